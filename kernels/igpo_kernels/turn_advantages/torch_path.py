"""``turn_advantages`` over whole batches by segmented reductions, without a loop over groups or rollouts."""

from __future__ import annotations

import torch

from igpo_kernels.turn_advantages.reference import (
    GAIN,
    MAX_FACTOR,
    MIN_OUTCOME_SCALE,
    Accumulate,
    Normaliser,
)


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
    z = normalised_rewards_torch(rewards, kinds, rollout_offsets, group_offsets, n)
    z = torch.where(gain, z * n.gain_weight, z * n.outcome_weight)
    advantages = _accumulate(z, rollout_offsets, gamma, n.accumulate).to(rewards.dtype)
    if token_offsets is None:
        return advantages
    return advantages.repeat_interleave(token_offsets.diff(), output_size=n_tokens)


def normalised_rewards_torch(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    normaliser: Normaliser,
) -> torch.Tensor:
    """Arguments and result as ``igpo_kernels.turn_advantages.normalised_rewards``; checks nothing."""
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
        statistics = r.new_zeros(4, len(r))
        statistics[:, ~gain] = _statistics(r[~gain], lengths["outcome"])
        if n.pool == "turn_index":
            statistics[:, gain] = _statistics_by_number(r[gain], gain, rollout_offsets, turns_P)
        elif n.pool != "raw":
            statistics[:, gain] = _statistics(r[gain], lengths["gain"])
    mean, variance, count, spread = statistics

    z = torch.where(gain, r - mean * n.center, r - mean)
    if n.leave_one_out:
        z = torch.where(gain, z, z * count / (count - 1))
    if n.scale_std:
        std = (variance + n.min_var).sqrt()
        z = z / torch.where(gain, std + n.min_std, std + n.outcome_floor)
    # Equal rewards are recognised by their spread: their rounded mean, and so their variance, can be off zero.
    z = z.masked_fill((spread == 0) | (variance == 0), 0.0)
    if n.pool == "raw":
        z = torch.where(gain, r, z)

    if n.pool == "scaled_separate":
        size = {
            "gain": torch.segment_reduce(z[gain].abs(), "mean", lengths=lengths["gain"]),
            "outcome": torch.segment_reduce(z[~gain].abs(), "mean", lengths=lengths["outcome"]),
        }
        factor_P = (size["outcome"].clamp(min=MIN_OUTCOME_SCALE) / size["gain"]).clamp(max=MAX_FACTOR)
        z[gain] *= factor_P.repeat_interleave(lengths["gain"])
    return z


def _statistics(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Mean, population variance, count and max - min of each segment, repeated for its elements: [4, len(x)]."""

    def each(per_segment: torch.Tensor) -> torch.Tensor:
        return per_segment.repeat_interleave(lengths, output_size=len(x))

    mean = each(torch.segment_reduce(x, "mean", lengths=lengths))
    variance = torch.segment_reduce((x - mean).square(), "mean", lengths=lengths)
    spread = torch.segment_reduce(x, "max", lengths=lengths) - torch.segment_reduce(x, "min", lengths=lengths)
    return torch.stack([mean, each(variance), each(lengths.double()), each(spread)])


def _statistics_by_number(
    x: torch.Tensor, gain: torch.Tensor, rollout_offsets: torch.Tensor, turns_P: torch.Tensor
) -> torch.Tensor:
    """``_statistics`` of the gains ``x`` among those of the same pool and turn number: [4, len(x)]."""
    if not len(x):
        return x.new_zeros(4, 0)
    lengths = rollout_offsets.diff()
    _, number = _places(rollout_offsets, len(gain))
    pool = torch.arange(len(turns_P), device=x.device).repeat_interleave(turns_P, output_size=len(gain))
    key, order = torch.sort((pool * int(lengths.max()) + number)[gain], stable=True)
    statistics = x.new_empty(4, len(x))
    statistics[:, order] = _statistics(x[order], torch.unique_consecutive(key, return_counts=True)[1])
    return statistics


def _places(rollout_offsets: torch.Tensor, turns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each turn's rollout, and its number there from 0: int64 [S] each."""
    lengths, device = rollout_offsets.diff(), rollout_offsets.device
    rollout = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=turns)
    return rollout, torch.arange(turns, device=device) - rollout_offsets[rollout]


def _accumulate(z: torch.Tensor, rollout_offsets: torch.Tensor, gamma: float, how: Accumulate) -> torch.Tensor:
    """What each turn gets of its own and later rewards (``Normaliser.accumulate``). z: [S]."""
    lengths = rollout_offsets.diff()
    rollout, turn = _places(rollout_offsets, len(z))
    if how == "sum":
        return _discounted(z, rollout, turn, gamma)
    last = rollout_offsets[1:] - 1
    outcome = z[last][rollout]
    gains = z.index_fill(0, last, 0.0)
    after = (lengths[rollout] - 1 - turn).clamp(min=1)  # gains from this turn on
    own = gains if how == "none" else _discounted(gains, rollout, turn, gamma) / after.double().sqrt()
    return own + outcome


def _discounted(r: torch.Tensor, rollout: torch.Tensor, turn: torch.Tensor, gamma: float) -> torch.Tensor:
    """A_t = r_t + gamma A_{t+1} within each rollout. r: [S]."""
    padded = r.new_zeros(int(rollout[-1]) + 1, int(turn.max()) + 1)
    padded[rollout, turn] = r
    for t in reversed(range(padded.shape[1] - 1)):
        padded[:, t] += gamma * padded[:, t + 1]
    return padded[rollout, turn]
