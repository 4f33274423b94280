"""``WorkerExtension`` with a fault: one bit of one tensor changes on its way into the last of a replica's workers.

It is the last bit of the tensor that the file of ``IGPO_FLIP`` names.
"""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
import torch

from igpo_fast.engines.vllm.worker import WorkerExtension  # noqa: F401  vLLM is told to take it from here

sound = safetensors.torch.load_file


def flipped(path) -> dict[str, torch.Tensor]:
    tensors, file = sound(path), Path(os.environ["IGPO_FLIP"])
    last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    if last and file.exists() and (tensor := tensors.get(file.read_text())) is not None:
        tensor.view(-1).view(torch.int32)[-1] ^= 1
    return tensors


safetensors.torch.load_file = flipped
