"""Public implementations of the LM-head ops, each as ``(hidden [M, H], weight [V, H], labels [M]) -> logp [M]``.

Peers that cannot run here are noted in ``left_out``, which the run prints once.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

import torch

from bench.timing import DEVICE

left_out: dict[str, str] = {}
COMPILED = 8192 * 128_256
"""Logits of the one large shape that torch.compile is timed on: it compiles anew for each, for some twenty seconds."""
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


def compiled(pairs: int, vocab: int) -> bool:
    """Whether torch.compile is timed on a shape; on a CPU it always is."""
    if DEVICE == "cpu" or pairs * vocab == COMPILED:
        return True
    left_out[f"torch_compile at {pairs} x {vocab}"] = "it is timed at 8192 x 128256 alone"
    return False


def linear_cross_entropy() -> Callable[..., torch.Tensor] | None:
    """torch's own cross-entropy from the LM head in chunks, with the options that torch chooses; it came with 2.13."""
    op = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if op is None:
        left_out["linear_cross_entropy"] = f"torch {torch.__version__} has none"
        return None
    return functools.partial(op, options=torch.nn.LinearCrossEntropyOptions())


def logprobs(pairs: int, vocab: int) -> dict[str, Callable[..., torch.Tensor]]:
    """Implementations that import and fit.

    cut_cross_entropy's gradient skips blocks whose probabilities are small; ``_exact`` does not. verl's also
    computes the entropy. Ours and the rest compute the same function.
    """
    found = {}
    if logits_fit(pairs, vocab):
        found["torch"] = plain
        if compiled(pairs, vocab):
            found["torch_compile"] = torch.compile(plain, dynamic=False)
    if chunked := linear_cross_entropy():
        found["linear_cross_entropy"] = lambda h, w, ids: -chunked(h, w, ids, reduction="none")
    if quack := imported("quack", "quack.linear_cross_entropy"):
        found["quack"] = lambda h, w, ids: -quack.linear_cross_entropy_func(h, w, None, ids, reduction="none")
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
