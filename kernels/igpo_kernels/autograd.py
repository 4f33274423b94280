"""Rules of every op towards autograd: first derivatives only, in the tensors' own precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` computes in on ``device``, None where it is off."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def no_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products are taken in their operands' dtype."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def first_order(op: str) -> Callable[[Callable], Callable]:
    """Decorate the ``backward`` of an ``autograd.Function``: autocast does not reach it, and differentiating its
    gradients raises. torch's ``once_differentiable`` lets them pass as constants where the upstream gradient has none.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def call(ctx, *upstream):
            given = [x for x in upstream if x is not None]
            with torch.no_grad(), no_autocast(given[0].device) if given else nullcontext():
                gradients = backward(ctx, *upstream)
            if not torch.is_grad_enabled():  # no create_graph
                return gradients
            return tuple(None if x is None else _Constant.apply(op, x.requires_grad_()) for x in gradients)

        return call

    return decorate


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx, op, gradient):
        ctx.op = op
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.op}: its gradients were differentiated, but it has first derivatives only; "
            "pass backend='reference' for higher ones"
        )
