"""The same ops under the signatures of other trainers, to be dropped in there."""

from __future__ import annotations

import torch

from igpo_kernels.linear_logprob import linear_logprob
from igpo_kernels.linear_policy_loss import linear_policy_loss
from igpo_kernels.policy_loss.settings import LossSettings

IGNORED = -100
"""The label of tokens that verl leaves out."""
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's ``linear_cross_entropy``: log-probabilities (not losses) and entropies of labels.

    Args:
        hidden: [..., H]. weight: [V, H]. labels: int64 [...], -100 where a token has none.
        reduction: ``none``, ``mean`` or ``sum`` (case is ignored) of the log-probabilities; entropies come per token.
        dist_process_group: the processes that the vocabulary is split over, as ``group`` of ``linear_logprob``: weight
            is this rank's shard, and the gradient of ``hidden`` this rank's part, as verl's.
    Returns:
        log-probabilities [tokens], flat as verl's (a scalar unless ``none``), and entropy [tokens]; both
        differentiable. The log-probability of label -100 is 0, without gradient, and not counted in the mean.
    Raises:
        ValueError: an unknown reduction, and what ``linear_logprob`` raises.
    """
    reduction = reduction.lower()
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r}; choose none, mean or sum")
    labels = labels.flatten()
    kept = labels != IGNORED
    logp, entropy = linear_logprob(
        hidden.flatten(0, -2), weight, labels.where(kept, 0), temperature=temperature, entropy=True,
        group=dist_process_group,
    )  # fmt: skip
    return (logp.where(kept, 0.0) if reduction == "none" else getattr(logp[kept], reduction)()), entropy


def fused_linear_grpo(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    loss_type: str = "grpo",
    max_completion_length: int | None = None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The fused LM head and GRPO loss of TRL and Liger; unlike theirs, advantages may differ by token.

    Args:
        hidden: [B, T, H], the states that predict ``ids`` [B, T]. weight: [V, H]. mask: [B, T], 1 where trained; a
            fraction weighs its token's loss, as in TRL.
        advantages: [B], one per sequence, or [B, T], one per token.
        old_logp, ref_logp: [B, T]; without old_logp the ratio is 1, without ref_logp ``beta`` must be 0.
        beta: coefficient of the k3 KL.
        delta: TRL's and Liger's upper bound of the unclipped ratio, ``-min(min(r, delta) A, clip(r) A)``; at least
            ``1 - epsilon_low``. (verl's dual clip is ``LossSettings.dual_clip``: it bounds negative advantages alone.)
        loss_type: ``grpo`` means over each sequence's tokens, then over sequences; ``bnpo`` and ``dapo`` over all
            tokens; ``dr_grpo`` sums, divided by B * max_completion_length (default T).
    Returns:
        The loss, and means over the tokens whose mask is not 0: ``kl``, ``clip_ratio``, ``entropy``, ``ratio``.
    Raises:
        ValueError: shapes or options that do not fit; nothing is broadcast.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"fused_linear_grpo: loss_type={loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    if ids.ndim != 2:
        raise ValueError(f"fused_linear_grpo: ids {tuple(ids.shape)}; give [B, T]")
    batch, length = ids.shape
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(
            f"fused_linear_grpo: hidden {tuple(hidden.shape)} for ids {tuple(ids.shape)}; "
            f"give the states that predict ids, [{batch}, {length}, H] (hidden[:, :-1] for ids[:, 1:])"
        )
    for name, x in (("mask", mask), ("old_logp", old_logp), ("ref_logp", ref_logp)):
        if x is not None and x.shape != ids.shape:
            raise ValueError(f"fused_linear_grpo: {name} {tuple(x.shape)}; give [{batch}, {length}] as of ids")
    if advantages.shape not in ((batch,), (batch, length)):
        raise ValueError(
            f"fused_linear_grpo: advantages {tuple(advantages.shape)}; give [{batch}] or [{batch}, {length}]"
        )
    per_token = advantages if advantages.ndim == 2 else advantages[:, None].expand(batch, length)
    trained, share = mask != 0, mask.float()
    if loss_type == "grpo":
        weights = share / (batch * share.sum(1, keepdim=True).clamp(min=1))
    elif loss_type == "dr_grpo":
        weights = share / max(1, batch * (max_completion_length or length))
    else:
        weights = share / share.sum().clamp(min=1)
    pick = lambda x: None if x is None else x[trained].to(torch.promote_types(x.dtype, torch.float32))  # noqa: E731
    loss, sums = linear_policy_loss(
        hidden.flatten(0, 1), weight, ids[trained], trained.flatten().nonzero()[:, 0], pick(old_logp),
        pick(per_token), pick(weights),
        _settings(epsilon_low, epsilon_high, delta, beta),
        bias=bias, temperature=temperature, ref_logp=pick(ref_logp),
    )  # fmt: skip
    tokens = sums["tokens"].clamp(min=1)
    names = {"kl": "kl", "clip_ratio": "clipped", "entropy": "entropy", "ratio": "ratio"}
    return loss, {name: sums[key] / tokens for name, key in names.items()}


def _settings(low: float, high: float, delta: float | None, beta: float) -> LossSettings:
    """Express the ratio's bound ``delta`` as clips: where A > 0 it lowers the upper clip; where A < 0 it is a dual
    clip, which acts above the upper clip only."""
    if delta is None:
        return LossSettings(clip_low=low, clip_high=high, kl=beta)
    if not delta >= 1 - low:
        raise ValueError(f"fused_linear_grpo: delta is {delta}; give at least 1 - epsilon_low, {1 - low:g}")
    return LossSettings(clip_low=low, clip_high=min(high, delta - 1), dual_clip=max(delta, 1 + high), kl=beta)
