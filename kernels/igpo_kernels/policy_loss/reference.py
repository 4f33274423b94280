"""The definition of policy_loss, from log-probabilities."""

from __future__ import annotations

import torch


def _per_sequence(x, sequence, reduce):
    """Each pair's sum or mean of x over its sequence."""
    n = int(sequence.max()) + 1 if len(sequence) else 0
    total = x.new_zeros(n).index_add(0, sequence, x)
    if reduce == "mean":
        total = total / x.new_zeros(n).index_add(0, sequence, torch.ones_like(x)).clamp(min=1)
    return total[sequence]


def policy_loss(logp, *, old_logp, advantages, weights, settings, engine_logp, ref_logp, entropy, sequence):
    log_ratio = logp - (logp.detach() if old_logp is None else old_logp)
    if settings.sequence_ratio:
        # Value and gradient of the sequence's mean: GSPO.
        log_ratio = _per_sequence(log_ratio, sequence, "mean")
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = torch.maximum(-ratio * advantages, -clipped * advantages)
    if settings.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.minimum(surrogate, -settings.dual_clip * advantages), surrogate)
    correction = torch.ones_like(logp)
    mismatch = torch.zeros_like(logp)
    if engine_logp is not None:
        anchor = logp.detach() if old_logp is None else old_logp
        gap = anchor - engine_logp
        mismatch = gap.abs()
        if settings.importance != "none":
            gap = _per_sequence(gap, sequence, "sum") if settings.importance == "sequence" else gap
            correction = gap.exp()
            if settings.importance_mode == "mask":
                correction = torch.where(correction <= settings.importance_cap, correction, 0.0)  # inf * 0 is NaN
            else:
                correction = correction.clamp(max=settings.importance_cap)
    per_pair = correction * surrogate
    k3 = torch.zeros_like(logp)
    if ref_logp is not None:
        k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        per_pair = per_pair + settings.kl * k3
    if entropy is not None:
        per_pair = per_pair - settings.entropy * entropy
    with torch.no_grad():
        active = (weights != 0).to(logp.dtype)
        metrics = {
            "policy": (weights * correction * surrogate).sum(),
            "tokens": active.sum(),
            "clipped": (active * (surrogate > -ratio * advantages)).sum(),
            "ratio": (active * ratio).sum(),
            "ratio_max": (active * ratio).max() if len(ratio) else ratio.sum(),
            "kl": (active * k3).sum(),
            "mismatch": (active * mismatch).sum(),
            "entropy": (active * entropy).sum() if entropy is not None else torch.zeros_like(ratio.sum()),
        }
    return (weights * per_pair).sum(), metrics
