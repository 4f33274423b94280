"""``turn_advantages`` over whole batches by segmented reductions, without a loop over groups or rollouts."""

from __future__ import annotations

import torch

from igpo_kernels.turn_advantages.reference import GAIN, MAX_FACTOR, MIN_OUTCOME_SCALE, Normaliser


def turn_advantages_torch(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    gamma: float,
    normaliser: Normaliser,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int | None = None,
) -> torch.Tensor:
    """Arguments and result as ``igpo_kernels.turn_advantages``; checks nothing.

    Every pool is a contiguous run of the turns, of the gains or of the outcomes, so its statistics are
    segmented reductions in float64 in a fixed order. Workspace: a dozen float64 [S] and one [R, max T].
    """
    n, gain = normaliser, kinds == GAIN
    if n.scope == "batch":
        group_offsets = group_offsets[[0, -1]]
    rollouts_P, turns_P = group_offsets.diff(), rollout_offsets[group_offsets].diff()
    lengths = {"gain": turns_P - rollouts_P, "outcome": rollouts_P}

    r = rewards.double()
    r = r.masked_fill(gain & (r.abs() < n.gate), 0.0)
    if n.pool == "joint":
        statistics = _statistics(r, turns_P)
    else:
        statistics = r.new_empty(4, len(r))
        statistics[:, gain] = _statistics(r[gain], lengths["gain"])
        statistics[:, ~gain] = _statistics(r[~gain], lengths["outcome"])
    mean, variance, count, spread = statistics

    z = torch.where(gain, r - mean * n.center, r - mean)
    if n.leave_one_out:
        z = torch.where(gain, z, z * count / (count - 1))
    if n.scale_std:
        std = (variance + n.min_var).sqrt()
        z = z / torch.where(gain, std + n.min_std, std + n.outcome_floor)
    # Equal rewards are recognised by their spread: their rounded mean, and so their variance, can be off zero.
    z = z.masked_fill((spread == 0) | (variance == 0), 0.0)

    if n.pool == "scaled_separate":
        size = {
            "gain": torch.segment_reduce(z[gain].abs(), "mean", lengths=lengths["gain"]),
            "outcome": torch.segment_reduce(z[~gain].abs(), "mean", lengths=lengths["outcome"]),
        }
        factor_P = (size["outcome"].clamp(min=MIN_OUTCOME_SCALE) / size["gain"]).clamp(max=MAX_FACTOR)
        z[gain] *= factor_P.repeat_interleave(lengths["gain"])
    z = torch.where(gain, z * n.gain_weight, z * n.outcome_weight)
    advantages = _discount(z, rollout_offsets, gamma).to(rewards.dtype)
    if token_offsets is None:
        return advantages
    return advantages.repeat_interleave(token_offsets.diff(), output_size=n_tokens)


def _statistics(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean, population variance, count and max - min of each segment, repeated for its elements: [4, len(x)]."""

    def each(per_segment: torch.Tensor) -> torch.Tensor:
        return per_segment.repeat_interleave(lengths, output_size=len(x))

    mean = each(torch.segment_reduce(x, "mean", lengths=lengths))
    variance = torch.segment_reduce((x - mean).square(), "mean", lengths=lengths)
    spread = torch.segment_reduce(x, "max", lengths=lengths) - torch.segment_reduce(x, "min", lengths=lengths)
    return torch.stack([mean, each(variance), each(lengths.double()), each(spread)])


def _discount(r: torch.Tensor, rollout_offsets: torch.Tensor, gamma: float) -> torch.Tensor:
    """A_t = r_t + gamma A_{t+1} within each rollout. r: [S]."""
    lengths = rollout_offsets.diff()
    rollout = torch.arange(len(lengths), device=r.device).repeat_interleave(lengths, output_size=len(r))
    turn = torch.arange(len(r), device=r.device) - rollout_offsets[rollout]
    padded = r.new_zeros(len(lengths), int(lengths.max()))
    padded[rollout, turn] = r
    for t in reversed(range(padded.shape[1] - 1)):
        padded[:, t] += gamma * padded[:, t + 1]
    return padded[rollout, turn]
