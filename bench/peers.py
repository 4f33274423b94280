"""Public implementations of the LM-head ops, each as ``(hidden [M, H], weight [V, H], labels [M]) -> logp [M]``.

Peers that cannot run here are noted in ``left_out``, which the run prints once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from bench.timing import DEVICE

left_out: dict[str, str] = {}
LOGIT_BYTES = 20
"""Bytes per logit of plain torch at its peak: bf16 logits and gradient, float32 copies of both, log-softmax."""


def imported(peer: str, module: str, gpu: bool = True) -> ModuleType | None:
    """``module``; None, with a note, if it does not import or needs a GPU (``gpu``) and there is none."""
    try:
        found = importlib.import_module(module)
    except Exception as error:  # a module that breaks with this torch counts as absent
        left_out[peer] = f"{type(error).__name__}: {error}".splitlines()[0]
        return None
    if gpu and DEVICE == "cpu":
        left_out[peer] = "needs a GPU"
        return None
    return found


def plain(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def logits_fit(pairs: int, vocab: int) -> bool:
    room = 0.8 * torch.cuda.get_device_properties(0).total_memory if DEVICE == "cuda" else 8e9
    if fits := LOGIT_BYTES * pairs * vocab < room:
        return fits
    left_out[f"torch, torch_compile at {pairs} x {vocab}"] = "the logits do not fit"
    return False


def logprobs(pairs: int, vocab: int) -> dict[str, Callable[..., torch.Tensor]]:
    """Implementations that import and fit.

    cut_cross_entropy's gradient skips blocks whose probabilities are small; ``_exact`` does not. verl's also
    computes the entropy. Ours and the rest compute the same function.
    """
    found = {}
    if logits_fit(pairs, vocab):
        found |= {"torch": plain, "torch_compile": torch.compile(plain, dynamic=False)}
    if liger := imported("liger", "liger_kernel.ops.fused_linear_cross_entropy"):
        apply = liger.LigerFusedLinearCrossEntropyFunction.apply
        found["liger"] = lambda h, w, ids: -apply(h, w, ids, None, None, -100, 0.0, 0.0, "none")[0]
    if cce := imported("cut_cross_entropy", "cut_cross_entropy"):
        found["cut_cross_entropy"] = lambda h, w, ids: -cce.linear_cross_entropy(h, w, ids, reduction="none")
        found["cut_cross_entropy_exact"] = lambda h, w, ids: (
            -cce.linear_cross_entropy(h, w, ids, reduction="none", filter_eps=None)
        )
    if verl := imported("verl", "verl.utils.kernel.linear_cross_entropy"):
        found["verl"] = lambda h, w, ids: verl.linear_cross_entropy(h, w, ids, 1.0, "none")[0]
    return found


def liger_grpo(length: int) -> Callable[..., torch.Tensor] | None:
    """Liger's fused linear GRPO, ``(hidden, weight, labels, old_logp [M], advantages [M / length]) -> loss``: pairs in
    sequences of ``length`` with one advantage each, all it takes; the mean over tokens."""
    module = imported("liger_grpo", "liger_kernel.chunked_loss", gpu=False)
    if module is None:
        return None
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")

    def run(hidden, weight, labels, old_logp, advantages):
        ids = labels.view(-1, length)
        x = hidden.view(*ids.shape, -1)
        return loss(
            x, weight, ids, torch.ones_like(ids), advantages, old_per_token_logps=old_logp.view(ids.shape)
        )[0]  # fmt: skip

    return run
