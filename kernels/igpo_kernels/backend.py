"""Which implementation of an op runs: chosen once, by name or by device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from igpo_kernels.triton_variants import ARCHITECTURES, DTYPES, arch_name

Implementation = TypeVar("Implementation")
OPS = ("tree_attention", "linear_logprob", "policy_loss", "linear_policy_loss", "turn_advantages")


def choose(
    op: str,
    backend: str,
    device: torch.device,
    implementations: Mapping[str, Implementation],
    dtypes: Sequence[torch.dtype] = (),
) -> Implementation:
    """The implementation of ``op`` that ``backend`` names.

    Args:
        backend: ``auto`` (Triton on CUDA/ROCm devices where the op has a kernel, the chip its tables, and the tensors
            one dtype that it takes; else the memory-lean torch path), or one of ``implementations``.
        dtypes: of the tensors that a kernel would read as they are.
    Raises:
        ValueError: a backend that the op does not have.
    """
    name = resolve(backend, device, implementations, dtypes)
    if name not in implementations:
        raise ValueError(
            f"{op}: backend {backend!r} is not available; choose one of auto, {', '.join(implementations)}"
        )
    return implementations[name]


def resolve(
    backend: str, device: torch.device, implementations: Mapping[str, object], dtypes: Sequence[torch.dtype] = ()
) -> str:
    """The name that ``auto`` stands for on ``device``, for tensors of ``dtypes``; any other name is itself."""
    if backend != "auto":
        return backend
    fits = device.type == "cuda" and arch_name(device) in ARCHITECTURES and set(dtypes) <= set(DTYPES.values())
    return "triton" if fits and "triton" in implementations and len(set(dtypes)) <= 1 else "torch"


def chosen(backend: str, device: torch.device) -> dict[str, str]:
    """What runs on ``device``: op -> implementation. The names need not exist: ``choose`` says so when called."""
    return {op: resolve(backend, device, importlib.import_module(f"igpo_kernels.{op}").IMPLEMENTATIONS) for op in OPS}


def lazy(module: str, name: str) -> Callable[..., Any]:
    """``module.name``, imported when it is first called: Triton is imported only by an op that runs on it."""

    def call(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call
