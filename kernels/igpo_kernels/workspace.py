"""Memory that an op may take beyond inputs, outputs and gradients."""

from __future__ import annotations

import torch

from igpo_kernels.checks import described, is_finite

CPU_BYTES = 64 << 20
GPU_BYTES = 1 << 30
LEAST_BYTES = 1 << 20


def workspace_bytes(device: torch.device) -> int:
    return CPU_BYTES if device.type == "cpu" else GPU_BYTES


def set_workspace(*, cpu_bytes: int | None = None, gpu_bytes: int | None = None) -> None:
    """Set what each op of this process may take beyond inputs, outputs and gradients, from its next call on.

    A GPU with room gains by more: each chunk of rows of ``linear_policy_loss`` after the first, and each block of
    ``linear_logprob``'s backward, reads and writes the whole float32 gradient of the weight.

    Args:
        cpu_bytes, gpu_bytes: bytes per call, at least 1 MiB; 64 MiB and 1 GiB at first. None leaves it.
    Raises:
        ValueError: no finite number, or less than 1 MiB; nothing is set then.
    """
    global CPU_BYTES, GPU_BYTES
    for name, size in (("cpu_bytes", cpu_bytes), ("gpu_bytes", gpu_bytes)):
        if size is not None and not (is_finite(size) and size >= LEAST_BYTES):
            got = described(size)
            raise ValueError(f"set_workspace: {name} must be at least {LEAST_BYTES} (1 MiB), got {got}; give bytes")
    CPU_BYTES = CPU_BYTES if cpu_bytes is None else int(cpu_bytes)
    GPU_BYTES = GPU_BYTES if gpu_bytes is None else int(gpu_bytes)
