"""Gradients that a forward made, for its backward."""

from __future__ import annotations

import torch


def hand_out(ctx, op: str) -> tuple[torch.Tensor | None, ...]:
    """``ctx.gradients``, which are then the caller's: scaled in place, kept by nobody else.

    Raises:
        RuntimeError: a second backward.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError(
            f"{op}: a second backward; the forward makes the gradients and they are given away once: call {op} again"
        )
    return gradients
