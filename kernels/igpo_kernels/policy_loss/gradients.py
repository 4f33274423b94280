"""Hands gradients that a forward computed to its backward."""

from __future__ import annotations

import torch


def hand_out(ctx, op: str) -> tuple[torch.Tensor | None, ...]:
    """Return ``ctx.gradients``, which the caller then owns and may scale in place.

    Raises:
        RuntimeError: a second backward.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise RuntimeError(
            f"{op}: a second backward; the forward computes the gradients and hands them out once: call {op} again"
        )
    return gradients
