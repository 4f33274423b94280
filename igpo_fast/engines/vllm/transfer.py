"""A backend of vLLM's weight transfer that takes tensors by reference (in process), from a file (over HTTP) or by
broadcast (``Broadcast``).

vLLM's own backends need CUDA; this one runs wherever vLLM does. Imported by workers only, through ``worker``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from torch.distributed import TCPStore
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from igpo_fast.engines.vllm.broadcast import Broadcast
from igpo_fast.engines.vllm.weights import BACKEND, FOLDER


@dataclass
class Link(WeightTransferInitInfo):
    """What a replica's workers need to meet the trainer in a ``Broadcast``."""

    name: str
    """A name that no other link has."""
    host: str
    port: int
    """The trainer's store."""
    backend: str
    timeout: float


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Some tensors of a checkpoint, whole, in one of three ways."""

    tensors: list[tuple[str, torch.Tensor]] | None = None
    file: str | None = None
    """A safetensors file in ``FOLDER``, which must stay until the update returns."""
    shapes: list[tuple[str, list[int]]] | None = None
    """Names and shapes of tensors, in the model's dtype, that the trainer broadcasts in this order."""


class BucketTransfer(WeightTransferEngine[Link, Bucket]):
    """Methods that vLLM's worker calls: at most one link per trainer, then updates of start, buckets, finish."""

    init_info_cls, update_info_cls = Link, Bucket
    link, _broadcast = "", None

    def init_transfer_engine(self, init_info: Link) -> None:
        """Meet the trainer and this replica's other workers; an earlier link is dropped.

        Raises:
            RuntimeError: the others do not come within the timeout.
        """
        self.shutdown()
        store = TCPStore(init_info.host, init_info.port, timeout=timedelta(seconds=init_info.timeout))
        workers = self.parallel_config.world_size
        self._broadcast = Broadcast(
            store, 1 + self.parallel_config.rank, 1 + workers, init_info.backend, init_info.timeout
        )
        self.link = init_info.name

    def start_weight_update(self) -> None:
        """Bring the layers to the layout of checkpoints."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        """Load a bucket; a layer is laid out for inference once all its tensors are there.

        Raises:
            ValueError: the file is not in ``FOLDER``.
            RuntimeError: the trainer is gone in the middle of a broadcast.
        """
        tensors = update_info.tensors
        if update_info.shapes is not None:
            empty = partial(torch.empty, dtype=self.model_config.dtype, device=self.device)
            tensors = [(name, self._broadcast(empty(shape))) for name, shape in update_info.shapes]
        elif tensors is None:
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
        """Drop the link."""
        self.link, self._broadcast = "", None


WeightTransferEngineFactory.register_engine(BACKEND, BucketTransfer)
