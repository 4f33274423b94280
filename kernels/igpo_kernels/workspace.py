"""Memory that an op may take beyond inputs, outputs and gradients."""

from __future__ import annotations

import torch

CPU_BYTES = 64 << 20
GPU_BYTES = 1 << 30


def workspace_bytes(device: torch.device) -> int:
    return CPU_BYTES if device.type == "cpu" else GPU_BYTES
