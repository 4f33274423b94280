"""The definition of ``turn_advantages``: plain loops over Python floats (float64)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import fsum, sqrt
from typing import Literal, get_args

import torch

from igpo_kernels.checks import described, is_finite

GAIN, OUTCOME = 0, 1
MIN_OUTCOME_SCALE, MAX_FACTOR = 0.3, 10.0

Pool = Literal["separate", "joint", "scaled_separate", "turn_index", "raw"]
Accumulate = Literal["sum", "sum_over_sqrt", "none"]
Scope = Literal["group", "batch"]


@dataclass(frozen=True)
class Normaliser:
    """Settings of the normalisation of turn rewards, which comes before the discount.

    >>> Normaliser(gate=0.02, center=False, min_std=0.05).pool
    'separate'
    """

    pool: Pool = "separate"
    """Gains and outcomes in separate pools, in a joint one, or separate with gains brought to the outcomes' size;
    gains of one turn number in a pool of their own (A2TGPO); or gains as they are, but for the gate."""
    accumulate: Accumulate = "sum"
    """What a turn gets of later ones: the discounted sum of all rewards; that of gains, divided by the square root of
    their number, and the outcome (A2TGPO); or its own gain and the outcome."""
    gate: float = 0.0
    """Gains smaller in magnitude count as 0."""
    center: bool = True
    """Subtract the pool's mean from gains; from outcomes it is always subtracted."""
    min_std: float = 1e-6
    """Added to the standard deviation that divides gains; in a joint pool, to that of all its rewards."""
    outcome_min_std: float = 0.0
    """Added to the standard deviation that divides outcomes; not used in a joint pool."""
    min_var: float = 0.0
    """Added to every pool's variance before its square root is taken."""
    gain_weight: float = 1.0
    """Multiplies normalised gains. A joint pool's statistics count them even at 0."""
    outcome_weight: float = 1.0
    """Multiplies normalised outcomes, likewise."""
    scale_std: bool = True
    """Whether to divide by standard deviations (Dr. GRPO does not)."""
    leave_one_out: bool = False
    """Subtract from an outcome the mean of the others in its pool, not of all (RLOO)."""
    scope: Scope = "group"
    """Span of a pool: one group, or the whole batch."""

    def __post_init__(self):
        for name, known in (("pool", get_args(Pool)), ("accumulate", get_args(Accumulate)), ("scope", get_args(Scope))):
            if getattr(self, name) not in known:
                raise ValueError(f"Normaliser.{name}: got {getattr(self, name)!r}; expected one of {known}")
        least = dict.fromkeys(("gate", "min_std", "outcome_min_std", "min_var"), 0.0)
        for name in (*least, "gain_weight", "outcome_weight"):
            value = getattr(self, name)
            if not is_finite(value) or value < least.get(name, value):
                bound = " >= 0" if name in least else ""
                raise ValueError(f"Normaliser.{name}: got {described(value)}; expected a finite number{bound}")

    @property
    def fused(self) -> bool:
        """Whether the Triton kernel has it."""
        return self.pool not in ("turn_index", "raw") and self.accumulate == "sum"

    @property
    def outcome_floor(self) -> float:
        """Floor added to the standard deviation that divides outcomes; a joint pool has only ``min_std``."""
        return self.min_std if self.pool == "joint" else self.outcome_min_std


def turn_advantages_reference(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    gamma: float,
    normaliser: Normaliser,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int | None = None,
) -> torch.Tensor:
    """Arguments and result as ``igpo_kernels.turn_advantages``; checks nothing."""
    n, kinds = normaliser, kinds.tolist()
    rollouts, groups = rollout_offsets.tolist(), group_offsets.tolist()
    z = _normalised(rewards.tolist(), kinds, rollouts, groups, n)
    weights = {GAIN: n.gain_weight, OUTCOME: n.outcome_weight}
    weighted = [x * weights[k] for x, k in zip(z, kinds, strict=True)]
    advantages = list(weighted)
    for start, end in pairwise(rollouts):
        last = end - 1
        if n.accumulate == "sum":
            for s in reversed(range(start, last)):
                advantages[s] += gamma * advantages[s + 1]
            continue
        later = 0.0
        for s in reversed(range(start, last)):
            later = weighted[s] + gamma * later
            own = later / sqrt(last - s) if n.accumulate == "sum_over_sqrt" else weighted[s]
            advantages[s] = own + weighted[last]
    if token_offsets is not None:
        tokens = (end - start for start, end in pairwise(token_offsets.tolist()))
        advantages = [a for a, count in zip(advantages, tokens, strict=True) for _ in range(count)]
    return torch.tensor(advantages, dtype=rewards.dtype, device=rewards.device)


def normalised_rewards_reference(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    normaliser: Normaliser,
) -> torch.Tensor:
    """Arguments and result as ``igpo_kernels.turn_advantages.normalised_rewards``; checks nothing."""
    arguments = (x.tolist() for x in (rewards, kinds, rollout_offsets, group_offsets))
    return torch.tensor(_normalised(*arguments, normaliser), dtype=torch.float64, device=rewards.device)


def _normalised(
    rewards: list[float], kinds: list[int], rollouts: list[int], groups: list[int], n: Normaliser
) -> list[float]:
    """z of every turn."""
    if n.scope == "batch":
        groups = [0, groups[-1]]
    number = [s - start for start, end in pairwise(rollouts) for s in range(start, end)]
    r = [0.0 if k == GAIN and abs(x) < n.gate else x for x, k in zip(rewards, kinds, strict=True)]
    z = list(r)
    for first, last in pairwise(groups):
        turns = range(rollouts[first], rollouts[last])
        gains, outcomes = ([s for s in turns if kinds[s] == kind] for kind in (GAIN, OUTCOME))
        pools = [gains, outcomes]
        if n.pool == "joint":
            pools = [turns]
        elif n.pool == "raw":
            pools = [outcomes]
        elif n.pool == "turn_index":
            pools = [*([s for s in gains if number[s] == t] for t in range(len(turns))), outcomes]
        for pool in pools:
            normalised = _normalise([r[s] for s in pool], [kinds[s] for s in pool], n)
            for s, x in zip(pool, normalised, strict=True):
                z[s] = x
        if n.pool == "scaled_separate" and any(z[s] for s in gains):
            outcome_size = fsum(abs(z[s]) for s in outcomes) / len(outcomes)
            gain_size = fsum(abs(z[s]) for s in gains) / len(gains)
            for s in gains:
                z[s] *= min(max(outcome_size, MIN_OUTCOME_SCALE) / gain_size, MAX_FACTOR)
    return z


def _normalise(pool: list[float], kinds: list[int], n: Normaliser) -> list[float]:
    # Tested before any mean is taken: the rounded mean of equal numbers can differ from them.
    if not pool or max(pool) == min(pool):
        return [0.0] * len(pool)
    mean = fsum(pool) / len(pool)
    variance = fsum((x - mean) ** 2 for x in pool) / len(pool)
    if variance == 0:  # the squares underflow
        return [0.0] * len(pool)
    std = sqrt(variance + n.min_var)
    others = len(pool) / (len(pool) - 1) if n.leave_one_out else 1.0
    normalised = []
    for x, kind in zip(pool, kinds, strict=True):
        deviation = (x - mean * n.center) if kind == GAIN else (x - mean) * others
        scale = std + (n.min_std if kind == GAIN else n.outcome_floor)
        normalised.append(deviation / scale if n.scale_std else deviation)
    return normalised
