"""From rollouts and answer values to turn advantages, for every algorithm, and metrics about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch

from igpo_fast.rewards import (
    Answers,
    Basis,
    Normalisation,
    Outcome,
    exact_match,
    f1_score,
    information_gain,
    outcome,
)
from igpo_fast.types import Group, TurnScores
from igpo_kernels.turn_advantages import GAIN, OUTCOME, Normaliser, turn_advantages

ZERO_GAIN = 1e-4
"""Gains below this count as zero in ``reward/ig_zero``."""


@dataclass(frozen=True)
class Algorithm:
    """What an algorithm changes of IGPO: the rewards that count, their normaliser, the loss's level."""

    gain_weight: float = 1.0
    outcome_weight: float = 1.0
    scale_std: bool = True
    leave_one_out: bool = False
    scope: Literal["group", "batch"] = "group"
    sequence_ratio: bool = False
    """The policy ratio is the sequence's, not the token's (``LossSettings.sequence_ratio``)."""

    @property
    def needs_values(self) -> bool:
        """Whether advantages depend on answer values; if not, it is outcome-only and gamma is 1."""
        return self.gain_weight != 0


ALGORITHMS: dict[str, Algorithm] = {
    "igpo": Algorithm(),
    "ig_only": Algorithm(outcome_weight=0.0),
    "grpo": Algorithm(gain_weight=0.0),
    "dr_grpo": Algorithm(gain_weight=0.0, scale_std=False),
    "rloo": Algorithm(gain_weight=0.0, scale_std=False, leave_one_out=True),
    "reinforce_pp": Algorithm(gain_weight=0.0, scope="batch"),
    "gspo": Algorithm(gain_weight=0.0, sequence_ratio=True),
}


def make_normaliser(
    algorithm: str,
    pool: Literal["separate", "joint", "scaled_separate"],
    gate: float,
    center: bool,
    min_std: float,
) -> Normaliser:
    """The normaliser of ``ALGORITHMS[algorithm]``; the other arguments shape the gains.

    Where only gains or only outcomes count they are a pool of their own, whatever ``pool`` says: rewards that
    are not used must not move the statistics of those that are.
    """
    chosen = ALGORITHMS[algorithm]
    return Normaliser(
        pool=pool if chosen.gain_weight and chosen.outcome_weight else "separate",
        gate=gate,
        center=center,
        min_std=min_std,
        gain_weight=chosen.gain_weight,
        outcome_weight=chosen.outcome_weight,
        scale_std=chosen.scale_std,
        leave_one_out=chosen.leave_one_out,
        scope=chosen.scope,
    )


@dataclass(frozen=True)
class Recipe:
    """Everything that turns rollouts and values into advantages. The defaults are preset ``paper``."""

    algorithm: str = "igpo"
    """A key of ``ALGORITHMS``."""
    basis: Basis = "log_prob"
    """For ``rewards.values_of``, whose results ``score_rollouts`` takes."""
    answers: Answers = "first"
    """Likewise."""
    pool: Literal["separate", "joint", "scaled_separate"] = "separate"
    gate: float = 0.0
    center: bool = True
    min_std: float = 1e-6
    gamma: float = 1.0
    format_penalty: float = -2.0
    outcome: Outcome = "f1"
    f1_normalisation: Normalisation = "igpo"

    @property
    def normaliser(self) -> Normaliser:
        return make_normaliser(self.algorithm, self.pool, self.gate, self.center, self.min_std)

    @property
    def needs_values(self) -> bool:
        return ALGORITHMS[self.algorithm].needs_values

    @property
    def discount(self) -> float:
        """gamma, or 1 for an outcome-only algorithm: the outcome belongs to every turn alike."""
        return self.gamma if self.needs_values else 1.0


def score_rollouts(
    groups: Sequence[Group], values_per_rollout: Sequence[np.ndarray] | None, recipe: Recipe
) -> tuple[TurnScores, ...]:
    """Rewards and advantages of every turn, one ``TurnScores`` a rollout in the groups' order.

    Args:
        groups: at least one, each with at least one rollout.
        values_per_rollout: v_t of each rollout, float [T] in ``recipe.basis``, in the groups' order. An
            outcome-only algorithm only reports them and takes None: values are then NaN [T], gains empty.
        recipe: the knobs.
    Raises:
        ValueError: values missing where the algorithm needs them, or not matching the rollouts' turns.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    turns = [len(rollout.turns) for rollout in rollouts]
    if values_per_rollout is None:
        if recipe.needs_values:
            raise ValueError(f"score_rollouts: algorithm {recipe.algorithm} needs answer values; got None")
        values = [np.full(n, np.nan) for n in turns]
        gains = [np.empty(0) for _ in turns]
    else:
        values = [np.asarray(v, dtype=np.float64) for v in values_per_rollout]
        if [v.shape for v in values] != [(n,) for n in turns]:
            raise ValueError("score_rollouts: values_per_rollout must hold one [T] array a rollout, in order")
        gains = [information_gain(v)[0] for v in values]

    outcomes = [outcome(r, recipe.outcome, recipe.f1_normalisation, recipe.format_penalty) for r in rollouts]
    rollout_offsets = np.cumsum([0, *turns])
    last_turns = rollout_offsets[1:] - 1
    rewards, kinds = np.zeros(sum(turns)), np.full(sum(turns), GAIN)
    kinds[last_turns] = OUTCOME
    rewards[last_turns] = outcomes
    if values_per_rollout is not None:
        rewards[kinds == GAIN] = np.concatenate(gains)
    advantages = turn_advantages(
        torch.from_numpy(rewards),
        torch.from_numpy(kinds),
        torch.from_numpy(rollout_offsets),
        torch.from_numpy(np.cumsum([0, *(len(group.rollouts) for group in groups)])),
        recipe.discount,
        recipe.normaliser,
    ).numpy()
    return tuple(
        TurnScores(
            values=values[i],
            gains=gains[i],
            outcome=outcomes[i],
            f1=f1_score(rollout.answer, rollout.question.answers, recipe.f1_normalisation),
            em=exact_match(rollout.answer, rollout.question.answers, recipe.f1_normalisation),
            advantages=advantages[rollout_offsets[i] : rollout_offsets[i + 1]],
        )
        for i, rollout in enumerate(rollouts)
    )


def _scores_of_groups(groups: Sequence[Group], scores: Sequence[TurnScores]) -> Iterator[list[TurnScores]]:
    remaining = iter(scores)
    for group in groups:
        yield list(islice(remaining, len(group.rollouts)))


def collapsed_outcome(groups: Sequence[Group], scores: Sequence[TurnScores]) -> float:
    """Share of groups whose outcomes are all equal."""
    return _mean([len({s.outcome for s in group}) == 1 for group in _scores_of_groups(groups, scores)])


def collapsed(groups: Sequence[Group], scores: Sequence[TurnScores]) -> float:
    """Share of groups whose advantages are all exactly 0: nothing is learnt from them."""
    return _mean([not any(s.advantages.any() for s in group) for group in _scores_of_groups(groups, scores)])


def reward_metrics(groups: Sequence[Group], scores: Sequence[TurnScores]) -> dict[str, float]:
    """One step's metrics.jsonl keys about rewards, groups and turns.

    ``reward/ig_*`` and ``value/*`` are absent when no values were scored. Means over no gains at all (every
    rollout has one turn) are 0; values that are not finite are left out of ``value/*``.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {
        "reward/outcome": _mean([s.outcome for s in scores]),
        "reward/f1": _mean([s.f1 for s in scores]),
        "reward/em": _mean([s.em for s in scores]),
        "group/collapsed_outcome": collapsed_outcome(groups, scores),
        "group/collapsed": collapsed(groups, scores),
        "turns/mean": _mean([len(rollout.turns) for rollout in rollouts]),
        "turns/format_error": _mean([rollout.answer is None for rollout in rollouts]),
    }
    if all(np.isnan(s.values).all() and s.gains.size == 0 for s in scores):
        return metrics
    gains = np.concatenate([s.gains for s in scores])
    return metrics | {
        "reward/ig_mean": _mean(gains),
        "reward/ig_abs": _mean(np.abs(gains)),
        "reward/ig_zero": _mean(np.abs(gains) < ZERO_GAIN),
        "reward/ig_cum_negative": _mean([s.gains.sum() < 0 for s in scores]),
        "reward/ig_nan": float(sum(information_gain(s.values)[1] for s in scores)),
        "value/first": _mean([s.values[0] for s in scores if np.isfinite(s.values[0])]),
        "value/last": _mean([s.values[-1] for s in scores if np.isfinite(s.values[-1])]),
    }


def _mean(numbers: Sequence[float] | np.ndarray) -> float:
    return float(np.mean(numbers)) if len(numbers) else 0.0
