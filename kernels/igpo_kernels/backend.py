"""Choice of an op's implementation, made once, by name or by device."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from igpo_kernels.triton_variants import ARCHITECTURES, DTYPES, arch_name

Implementation = TypeVar("Implementation")


def choose(
    op: str,
    backend: str,
    device: torch.device,
    implementations: Mapping[str, Implementation],
    dtypes: Sequence[torch.dtype] = (),
) -> Implementation:
    """The implementation of ``op`` that ``backend`` names.

    Args:
        backend: ``auto`` (Triton on CUDA/ROCm devices if the op has a kernel, the chip has tables and all tensors have
            one dtype that the kernel takes; else the memory-lean torch path), or one of ``implementations``.
        dtypes: dtypes of the tensors that a kernel would read without conversion.
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


def chosen(
    backend: str, device: torch.device, model: torch.dtype = torch.float32, head: torch.dtype | None = None
) -> dict[str, str]:
    """Implementations that a model of dtype ``model`` gets on ``device``: op -> name, without turn_advantages, which
    reads no tensor of a model. ``choose`` refuses names that do not exist.

    Args:
        head: dtype of the LM head's weight; the model's by default.
    """
    head = model if head is None else head
    dtypes = {
        "tree_attention": (model,),
        "linear_logprob": (model, head),
        "policy_loss": (torch.promote_types(model, torch.float32),),
        "linear_policy_loss": (model, head),
    }
    implementations = {op: importlib.import_module(f"igpo_kernels.{op}").IMPLEMENTATIONS for op in dtypes}
    return {op: resolve(backend, device, implementations[op], dtypes[op]) for op in dtypes}


def lazy(module: str, name: str) -> Callable[..., Any]:
    """``module.name``, imported when it is first called: Triton is imported only by an op that runs on it.

    It runs under the device of its first argument, for Triton launches on the current one. Autograd does the same for
    its backward.
    """

    def call(first: torch.Tensor, *args, **kwargs):
        with torch.cuda.device_of(first):
            return getattr(importlib.import_module(module), name)(first, *args, **kwargs)

    return call
