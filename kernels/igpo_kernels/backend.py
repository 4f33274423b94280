"""Which implementation of an op runs: chosen once, by name or by device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

Implementation = TypeVar("Implementation")


def choose(
    op: str, backend: str, device: torch.device, implementations: Mapping[str, Implementation]
) -> Implementation:
    """The implementation of ``op`` that ``backend`` names.

    Args:
        backend: ``auto`` (Triton on CUDA/ROCm devices where the op has a Triton kernel, else the memory-lean torch
            path), or one of ``implementations``.
    Raises:
        ValueError: a backend that the op does not have.
    """
    name = resolve(backend, device, implementations)
    if name not in implementations:
        raise ValueError(
            f"{op}: backend {backend!r} is not available; choose one of auto, {', '.join(implementations)}"
        )
    return implementations[name]


def resolve(backend: str, device: torch.device, implementations: Mapping[str, object]) -> str:
    """The name that ``auto`` stands for on ``device``; any other name is itself."""
    if backend != "auto":
        return backend
    return "triton" if device.type == "cuda" and "triton" in implementations else "torch"
