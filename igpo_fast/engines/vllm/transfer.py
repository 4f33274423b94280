"""A backend of vLLM's weight transfer that takes tensors by reference (in process) or as safetensors (over HTTP).

vLLM's own backends need CUDA; this one runs wherever vLLM does. Imported by workers only, through ``worker``.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

import safetensors.torch
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from igpo_fast.engines.vllm.weights import BACKEND


@dataclass
class Nothing(WeightTransferInitInfo):
    """There is no connection to set up."""


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Some tensors of a checkpoint: one of the two."""

    tensors: list[tuple[str, torch.Tensor]] | None = None
    safetensors: str | None = None
    """Base64."""


class BucketTransfer(WeightTransferEngine[Nothing, Bucket]):
    init_info_cls, update_info_cls = Nothing, Bucket

    def init_transfer_engine(self, init_info: Nothing) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        tensors = update_info.tensors
        if tensors is None:
            found = safetensors.torch.load(base64.b64decode(update_info.safetensors))
            tensors = [(name, tensor.to(self.device)) for name, tensor in found.items()]
        self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
