"""LM head to clipped loss and gradients, without [M, V] logits and without a second look at them."""

from __future__ import annotations

import torch

from igpo_kernels.backend import choose, lazy
from igpo_kernels.linear_logprob import check_pairs
from igpo_kernels.linear_policy_loss import reference, torch_path
from igpo_kernels.policy_loss import check_inputs
from igpo_kernels.policy_loss.settings import LossSettings

IMPLEMENTATIONS = {
    "reference": reference.linear_policy_loss,
    "torch": torch_path.linear_policy_loss,
    "triton": lazy("igpo_kernels.linear_policy_loss.triton_path", "linear_policy_loss"),
}


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    rows: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    settings: LossSettings | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float = 0.0,
    engine_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``policy_loss(*linear_logprob(hidden, weight, ...), ...)`` in 6 * M * H * V FLOPs, loss and gradients together.

    The gradients are made in the forward; backward only scales them. Arguments as in ``linear_logprob`` and
    ``policy_loss``; ``old_logp=None`` is ratio 1. ``engine_logp`` only reports the mismatch here.

    Returns:
        The loss (a scalar), and ``policy_loss``'s sums with ``logp`` [M] (no gradient) beside them.
    Raises:
        ValueError: shapes that do not fit, and settings that need the whole sequence before the first gradient
            (sequence-level ratio, importance weights): use linear_logprob and policy_loss for those.
    """
    settings = settings or LossSettings()
    if settings.sequence_ratio or settings.importance != "none":
        what = "sequence_ratio" if settings.sequence_ratio else f"importance={settings.importance!r}"
        raise ValueError(
            f"linear_policy_loss: {what} needs the whole sequence first; use linear_logprob and policy_loss"
        )
    rows = check_pairs("linear_policy_loss", hidden, weight, labels, rows, temperature)
    pair_inputs = dict(
        old_logp=old_logp, advantages=advantages, weights=weights, engine_logp=engine_logp, ref_logp=ref_logp
    )
    check_inputs("linear_policy_loss", labels.shape, settings, pair_inputs, exempt=("entropy",))
    run = choose("linear_policy_loss", backend, hidden.device, IMPLEMENTATIONS, (hidden.dtype, weight.dtype))
    return run(hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap)
