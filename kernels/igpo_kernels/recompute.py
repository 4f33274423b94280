"""Gradient checkpointing that computes attention once.

A layer that runs again in the backward pass has its attention's output and statistics already: they are one row of
hidden states per token, while computing them takes time that grows with the length of the path.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

Tensors = tuple[torch.Tensor, ...]
Kept = list[list[tuple[torch.Tensor, int]]]
"""The results of each call, and how often each had been written to."""


def keep_attention() -> tuple[_Run, _Run]:
    """``context_fn`` for torch's non-reentrant checkpointing: attention (``tree_attention`` of the torch and triton
    backends) in a recomputed forward gives what it gave in the first one.

        checkpoint(layer, x, use_reentrant=False, context_fn=keep_attention)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep_attention})

    Returns:
        Context managers of the forward and of each recomputation; under torch.compile those of plain checkpointing.
        A recomputation raises RuntimeError if the output of an attention was written to in place, or if there are more
        attentions than in the forward.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    if get_proxy_mode() is not None:  # inside torch.compile, which takes no other contexts: it recomputes all
        return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)
    kept: Kept = []
    return _Run(kept, first=True), _Run(kept, first=False)


def once(compute: Callable[[], Tensors]) -> Tensors:
    """What ``compute`` gives, without gradient; in a recomputation what it gave in the forward, but not in a compiled
    one, for torch.compile traces no ContextVar."""
    run = None if torch.compiler.is_compiling() else _running.get()
    return compute() if run is None else run(compute)


class _Run:
    """A run of a checkpointed function; recomputations repeat the calls of the first run in its order."""

    def __init__(self, kept: Kept, first: bool):
        self._kept, self._first = kept, first

    def __enter__(self) -> None:
        self._calls = iter(self._kept)
        self._before = _running.set(self)

    def __exit__(self, *_) -> None:
        _running.reset(self._before)

    def __call__(self, compute: Callable[[], Tensors]) -> Tensors:
        # Autograd makes what a Function returns part of its graph; aliases stay outside.
        if self._first:
            result = compute()
            self._kept.append([(x.detach(), x._version) for x in result])
            return result
        kept = next(self._calls, None)
        if kept is None:
            raise RuntimeError(
                "keep_attention: a forward that was run again computed more attentions than at first; leave context_fn "
                "out, or have the function do the same each time"
            )
        if any(x._version != version for x, version in kept):
            raise RuntimeError(
                "keep_attention: the output of an attention was written to in place, so its gradients would be wrong; "
                "leave context_fn out, or have the layer write to a copy"
            )
        return tuple(x.detach() for x, _ in kept)


_running: ContextVar[_Run | None] = ContextVar("running", default=None)
