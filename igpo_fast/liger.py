"""Liger's RMSNorm, RoPE and SwiGLU in a model, where there is a GPU. Never its loss: igpo_kernels has that."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_fast.errors import InputError, reason_of
from igpo_fast.model import hidden_states
from igpo_kernels import RolloutTokens, Tree, pack, triton_variants
from igpo_kernels.huggingface import TreeAttend

PARTS = dict(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False)
"""Liger's arguments."""


def use_liger(lm: PreTrainedModel, choice: str) -> PreTrainedModel:
    """Put Liger's modules into ``lm``, in place, and verify that its hidden states stay what they were.

    Norms and feed-forward layers change in ``lm`` alone, RoPE in all models of its type in this process.

    Args:
        lm: set to run under ``hidden_states``.
        choice: ``auto`` is ``on`` where there is a GPU, Liger is installed and knows the model.
    Raises:
        InputError: ``on`` where it cannot run; or it changes what the model computes.
    """
    if choice == "off" or (choice == "auto" and lm.device.type == "cpu"):
        return lm
    if reason := _missing(lm):
        if choice == "on":
            raise InputError(f"model.liger=on: {reason}; use model.liger=auto or off")
        return lm
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    before = _sample(lm)
    try:
        with _classes_kept(lm):
            _apply_liger_kernel_to_instance(lm, **PARTS)
        after = _sample(lm)
    except Exception as error:  # Liger's code and Triton's may raise anything
        raise InputError(
            f"model.liger={choice}: {type(lm).__name__} does not run with it ({reason_of(error)}); use model.liger=off"
        ) from error
    tolerance = 1e-4 if before.dtype == torch.float32 else 5e-2
    error = float((after - before).abs().max() / before.abs().max())
    if not error <= tolerance:
        raise InputError(
            f"model.liger={choice}: the hidden states of {type(lm).__name__} change by {error:.1e} (relative); "
            "use model.liger=off"
        )
    return lm


@contextmanager
def _classes_kept(lm: PreTrainedModel) -> Iterator[None]:
    """Undo what Liger changes for later models of this type: the classes in transformers' module."""
    module = sys.modules[type(lm).__module__]
    before = {name: value for name, value in vars(module).items() if isinstance(value, type)}
    try:
        yield
    finally:
        vars(module).update(before)


def has_liger(lm: PreTrainedModel) -> bool:
    """Whether ``lm`` has Liger's modules."""
    return any(getattr(module.forward, "__module__", "").startswith("liger_kernel") for module in lm.modules())


def _missing(lm: PreTrainedModel) -> str:
    """Why ``lm`` cannot have Liger's modules; empty if it can."""
    if lm.device.type == "cpu" and not triton_variants.runs_on_cpu():
        return "needs a GPU, and the model is on the CPU"
    if find_spec("liger_kernel") is None:
        return "liger-kernel is not installed; install igpo-fast[liger]"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = lm.config.model_type
    return "" if kind in MODEL_TYPE_TO_APPLY_LIGER_FN else f"it has no kernels for models of type {kind}"


@torch.no_grad()
def _sample(lm: PreTrainedModel) -> torch.Tensor:
    """Hidden states [S, H] of a short rollout."""
    ids = np.arange(16) % lm.config.get_text_config().vocab_size
    plan = pack([Tree([RolloutTokens(0, ids, np.where(ids == 0, -1, 0))])])
    return hidden_states(lm, *plan.tokens(lm.device), TreeAttend(plan))
