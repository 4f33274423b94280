"""A backend of vLLM's weight transfer that takes tensors by reference (in process) or from a file (over HTTP).

vLLM's own backends need CUDA; this one runs wherever vLLM does. Imported by workers only, through ``worker``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from igpo_fast.engines.vllm.weights import BACKEND, FOLDER


@dataclass
class Nothing(WeightTransferInitInfo):
    """Empty: there is no connection to set up."""


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Some tensors of a checkpoint, whole, in one of the two fields."""

    tensors: list[tuple[str, torch.Tensor]] | None = None
    file: str | None = None
    """A safetensors file in ``FOLDER``, which must stay until the update returns."""


class BucketTransfer(WeightTransferEngine[Nothing, Bucket]):
    """Methods that vLLM's worker calls in an update: start, any number of buckets, finish."""

    init_info_cls, update_info_cls = Nothing, Bucket

    def init_transfer_engine(self, init_info: Nothing) -> None:
        """Do nothing: there is no connection."""

    def start_weight_update(self) -> None:
        """Bring the layers to the layout of checkpoints."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Load a bucket; a layer is laid out for inference once all its tensors are there.

        Raises:
            ValueError: the file is not in ``FOLDER``.
        """
        tensors = update_info.tensors
        if tensors is None:
            file, folder = Path(update_info.file).resolve(), os.environ.get(FOLDER)
            if not folder or file.parent != Path(folder).resolve():
                raise ValueError(f"update_weights: {update_info.file} is not in this replica's own folder")
            found = safetensors.torch.load_file(file)
            tensors = [(name, tensor.to(self.device)) for name, tensor in found.items()]
        self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        """Lay out the remaining layers for inference; a layer without new tensors keeps its own."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Do nothing: there is no connection."""


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
