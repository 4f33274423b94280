"""The definition of policy_loss, from log-probabilities."""

from __future__ import annotations

import math

import torch

METRICS = ("policy", "tokens", "clipped", "ratio", "ratio_max", "kl", "mismatch", "entropy")
"""Names and order of the sums that every implementation returns beside the loss."""


def segment_count(name: str, lowest: int, highest: int) -> int:
    """Number of segments (``name``: of what) whose numbers lie between these."""
    if lowest < 0:
        raise ValueError(f"policy_loss: {name} holds {lowest}; number {name}s from 0, leave out pairs without one")
    return highest + 1


def _per_segment(x, active, name, segment, reduce):
    """Sum or mean of x over each pair's segment; x is 0 where not active."""
    n = segment_count(name, *torch.stack(segment.aminmax()).tolist()) if len(segment) else 0
    total = x.new_zeros(n).index_add(0, segment, x)
    if reduce == "mean":
        total = total / x.new_zeros(n).index_add(0, segment, active.to(x.dtype)).clamp(min=1)
    return total[segment]


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
    log_ratio = logp - anchor
    if settings.needs_segment:
        # Value and gradient of the segment's mean.
        log_ratio = _per_segment(log_ratio.where(~dropped, 0.0), active * ~dropped, "segment", segment, "mean")
    # Larger ratios are held where a clip applies anyway: overflowing, they would make the gradient 0 * inf.
    largest = math.log(torch.finfo(logp.dtype).max) / 2
    held = (log_ratio > largest) & ((advantages >= 0) | (settings.dual_clip is not None) | dropped)
    ratio = torch.where(held, largest, log_ratio).exp()
    scale = 1 if clip_scale is None else clip_scale.to(ratio.dtype)
    clipped = ratio.clamp(1 - settings.clip_low * scale, 1 + settings.clip_high * scale)
    surrogate = torch.maximum(-ratio * advantages, -clipped * advantages)
    if settings.dual_clip is not None:
        surrogate = torch.where(advantages < 0, torch.minimum(surrogate, -settings.dual_clip * advantages), surrogate)
    per_pair = correction * surrogate
    k3 = torch.zeros_like(logp)
    if ref_logp is not None:
        k3 = (ref_logp - logp).exp() - (ref_logp - logp) - 1
        per_pair = per_pair + settings.kl * k3
    if entropy is not None:
        per_pair = per_pair - settings.entropy * entropy
    with torch.no_grad():
        ratio = torch.where(kept, log_ratio.exp(), 0.0)
        metrics = {
            "policy": (weights * correction * surrogate).sum(),
            "tokens": active.sum(),
            "clipped": (surrogate > -ratio * advantages).to(logp.dtype).sum(),
            "ratio": ratio.sum(),
            "ratio_max": ratio.max() if len(ratio) else ratio.sum(),
            "kl": k3.sum(),
            "mismatch": mismatch.sum(),
            "entropy": entropy.sum() if entropy is not None else logp.new_zeros(()),
        }
    return (weights * per_pair).sum(), metrics
