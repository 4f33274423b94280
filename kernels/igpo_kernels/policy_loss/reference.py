"""The definition of policy_loss, from log-probabilities."""

from __future__ import annotations

import math

import torch

LOG_RATIO = 20.0
LOG_WEIGHT = (math.log(1e-8), 20.0)
"""Bounds of what vespo adds up, and of their sum: TRL's, which are the authors'."""
METRICS = ("policy", "tokens", "clipped", "ratio", "ratio_max", "kl", "mismatch", "entropy")
"""Names and order of the sums that every implementation returns beside the loss."""


def segment_count(name: str, lowest: int, highest: int, pairs: int) -> int:
    """Number of segments (``name``: of what) whose numbers lie between these."""
    if lowest < 0:
        raise ValueError(f"policy_loss: {name} holds {lowest}; number {name}s from 0, leave out pairs without one")
    if highest >= pairs:
        raise ValueError(
            f"policy_loss: {name} holds {highest}; number {name}s from 0 to below M, here {pairs}: "
            f"torch.unique({name}, return_inverse=True)[1]"
        )
    return highest + 1


def _per_segment(x, active, name, segment, reduce):
    """Sum or mean of x over each pair's segment; x is 0 where not active."""
    n = segment_count(name, *torch.stack(segment.aminmax()).tolist(), len(segment)) if len(segment) else 0
    total = x.new_zeros(n).index_add(0, segment, x)
    if reduce == "mean":
        total = total / x.new_zeros(n).index_add(0, segment, active.to(x.dtype)).clamp(min=1)
    return total[segment]


def _either(first, pos, neg, like):
    """Two numbers in ``like``'s dtype, chosen pair by pair."""
    return torch.full_like(like, neg).masked_fill(first, pos)


def _range_of(ratio, clip_scale, settings):
    """The ratio, clipped."""
    scale = 1 if clip_scale is None else clip_scale.to(ratio.dtype)
    return ratio.clamp(1 - settings.clip_low * scale, 1 + settings.clip_high * scale)


def _clip(logp, log_ratio, ratio, advantages, clip_scale, settings):
    surrogate = torch.maximum(-ratio * advantages, -_range_of(ratio, clip_scale, settings) * advantages)
    if settings.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.minimum(surrogate, -settings.dual_clip * advantages), surrogate)
    return surrogate, surrogate > -ratio * advantages


def _cispo(logp, log_ratio, ratio, advantages, clip_scale, settings):
    weight = _range_of(ratio.detach(), clip_scale, settings)
    return -weight * advantages * logp, -weight * advantages > -ratio * advantages


def _sapo(logp, log_ratio, ratio, advantages, clip_scale, settings):
    temperature = _either(advantages > 0, settings.sapo_temperature_pos, settings.sapo_temperature_neg, ratio)
    gate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature
    return -gate * advantages, torch.zeros_like(gate)


def _vespo(logp, log_ratio, ratio, advantages, clip_scale, settings):
    k = _either(advantages >= 0, settings.vespo_k_pos, settings.vespo_k_neg, ratio)
    rate = _either(advantages >= 0, settings.vespo_lambda_pos, settings.vespo_lambda_neg, ratio)
    phi = (rate + k * log_ratio - rate * ratio).exp()
    return -phi * advantages * logp, torch.zeros_like(phi)


SURROGATES = {"clip": _clip, "cispo": _cispo, "sapo": _sapo, "vespo": _vespo}
"""Each pair's surrogate loss, and whether a clip took its gradient or bounds its weight."""


def policy_loss(
    logp, *, old_logp, advantages, weights, settings, clip_scale, engine_logp, ref_logp, entropy, segment, sequence
):
    # A pair of weight 0 adds nothing, not even 0 * inf.
    kept = weights != 0
    logp, old_logp, advantages, clip_scale, engine_logp, ref_logp, entropy = (
        None if x is None else torch.where(kept, x, 0.0)
        for x in (logp, old_logp, advantages, clip_scale, engine_logp, ref_logp, entropy)
    )
    active = kept.to(logp.dtype)
    anchor = logp.detach() if old_logp is None else old_logp
    correction, mismatch = torch.ones_like(logp), torch.zeros_like(logp)
    dropped = torch.zeros_like(kept)
    if engine_logp is not None:
        gap = anchor - engine_logp
        mismatch = gap.abs()
        if settings.importance != "none":
            if settings.needs_sequence:
                reduce = "mean" if settings.importance == "geometric" else "sum"
                gap = _per_segment(gap, active, "sequence", sequence, reduce)
            correction, (floor, cap) = gap.exp(), (settings.importance_floor, settings.importance_cap)
            dropped = ((correction < floor) | (correction > cap)) & (settings.importance_mode == "mask")
            correction = torch.where(dropped, 0.0, correction.clamp(floor, cap))
    log_ratio = kl_log_ratio = logp - anchor
    if settings.surrogate == "vespo":
        # Importance weights are factors of the segment's weight: each token's, or the rollout's once.
        shares = log_ratio.detach().clamp(-LOG_RATIO, LOG_RATIO)
        of_pair, log_correction = settings.importance == "token", correction.log().clamp(*LOG_WEIGHT)
        shares = (shares + of_pair * log_correction).where(kept & ~dropped, 0.0)
        log_ratio = _per_segment(shares, active, "segment", segment, "sum") + (not of_pair) * log_correction
        log_ratio, correction = log_ratio.clamp(*LOG_WEIGHT), (~dropped).to(logp.dtype)
    elif settings.needs_segment:
        # Value and gradient of the segment's mean.
        log_ratio = _per_segment(log_ratio.where(~dropped, 0.0), active * ~dropped, "segment", segment, "mean")
        kl_log_ratio = log_ratio
    # Larger ratios are held where a bound applies anyway: overflowing, they would make the gradient 0 * inf.
    largest, bounded = math.log(torch.finfo(logp.dtype).max) / 2, settings.surrogate == "sapo" or settings.dual_clip
    held = (log_ratio > largest) & ((advantages >= 0) | bool(bounded) | dropped)
    ratio = torch.where(held, largest, log_ratio).exp()
    surrogate, clipped = SURROGATES[settings.surrogate](logp, log_ratio, ratio, advantages, clip_scale, settings)
    per_pair = correction * surrogate
    k3 = torch.zeros_like(logp)
    if ref_logp is not None:
        k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        k3 = k3 * kl_log_ratio.exp() if settings.unbiased_kl else k3
        per_pair = per_pair + settings.kl * k3
    if entropy is not None:
        per_pair = per_pair - settings.entropy * entropy
    with torch.no_grad():
        ratio = torch.where(kept, log_ratio.exp(), 0.0)
        metrics = {
            "policy": (weights * correction * surrogate).sum(),
            "tokens": active.sum(),
            "clipped": clipped.to(logp.dtype).sum(),
            "ratio": ratio.sum(),
            "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
            "kl": k3.sum(),
            "mismatch": mismatch.sum(),
            "entropy": entropy.sum() if entropy is not None else logp.new_zeros(()),
        }
    return (weights * per_pair).sum(), metrics
