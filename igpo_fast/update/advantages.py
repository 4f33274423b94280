"""From rollouts and answer values to turn advantages, for every algorithm, and metrics about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch

from igpo_fast.types import Answers, Basis, Credit, Group, Normalisation, Outcome, Pool
from igpo_fast.update.rewards import exact_match, f1_score, information_gain, outcome
from igpo_kernels.turn_advantages import GAIN, OUTCOME, Normaliser, turn_advantages

if TYPE_CHECKING:
    from igpo_fast import config

ZERO_GAIN = 1e-4
"""Gains below this count as zero in ``reward/ig_zero``."""


@dataclass(frozen=True)
class Algorithm:
    """Differences of an algorithm from IGPO: the rewards that count and their normaliser."""

    gain_weight: float = 1.0
    outcome_weight: float = 1.0
    scale_std: bool = True
    leave_one_out: bool = False
    over_tokens: bool = False
    """Whether outcomes are normalised over the batch's decision tokens, not over a group's rollouts. Outcome-only."""

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
    "reinforce_pp": Algorithm(gain_weight=0.0, over_tokens=True),
    "gspo": Algorithm(gain_weight=0.0),
}


@dataclass(frozen=True)
class Recipe:
    """Settings that turn rollouts and values into advantages. The defaults are preset ``paper``."""

    algorithm: str = "igpo"
    """A key of ``ALGORITHMS``."""
    basis: Basis = "log_prob"
    """Basis for ``rewards.values_of``, whose results ``credit_rollouts`` takes."""
    answers: Answers = "first"
    """Answers for ``rewards.values_of``."""
    pool: Pool = "separate"
    gate: float = 0.0
    center: bool = True
    min_std: float = 1e-6
    outcome_min_std: float = 1e-6
    min_var: float = 1e-8
    gamma: float = 1.0
    format_penalty: float = -2.0
    outcome: Outcome = "f1"
    f1_normalisation: Normalisation = "igpo"

    @property
    def normaliser(self) -> Normaliser:
        """The normaliser. If only gains or only outcomes count, they have a pool of their own, whatever ``pool`` says:
        unused rewards must not affect the statistics of used ones."""
        chosen = ALGORITHMS[self.algorithm]
        return Normaliser(
            pool=self.pool if chosen.gain_weight and chosen.outcome_weight else "separate",
            gate=self.gate,
            center=self.center,
            min_std=self.min_std,
            outcome_min_std=self.outcome_min_std,
            min_var=self.min_var,
            gain_weight=chosen.gain_weight,
            outcome_weight=chosen.outcome_weight,
            scale_std=chosen.scale_std,
            leave_one_out=chosen.leave_one_out,
        )

    @property
    def needs_values(self) -> bool:
        return ALGORITHMS[self.algorithm].needs_values

    @property
    def over_tokens(self) -> bool:
        """Whether advantages depend on the whole batch, not on the rollout's group alone."""
        return ALGORITHMS[self.algorithm].over_tokens

    @property
    def scored_answers(self) -> int | None:
        """Number of accepted answers that are scored, as the end of a slice: None for all."""
        if not self.needs_values:
            return 0
        return 1 if self.answers == "first" else None

    @property
    def discount(self) -> float:
        """gamma, or 1 for an outcome-only algorithm: the outcome counts equally for every turn."""
        return self.gamma if self.needs_values else 1.0


def recipe_of(algorithm: config.Algorithm) -> Recipe:
    """The recipe that the configuration's section ``algorithm`` describes."""
    keys = {"algorithm": "name", "gate": "ig_gate", "center": "ig_center", "min_std": "ig_min_std"}
    return Recipe(**{f.name: getattr(algorithm, keys.get(f.name, f.name)) for f in fields(Recipe)})


def credit_rollouts(
    groups: Sequence[Group], values_per_rollout: Sequence[np.ndarray] | None, recipe: Recipe
) -> tuple[Credit, ...]:
    """Rewards and advantages of every turn, one ``Credit`` per rollout in the groups' order.

    Args:
        groups: at least one, each with at least one rollout.
        values_per_rollout: v_t of each rollout, float [T] in ``recipe.basis``, in the groups' order. An
            outcome-only algorithm only reports them and accepts None: values are then NaN [T], gains empty.
        recipe: settings of rewards and advantages.
    Raises:
        ValueError: values are missing although the algorithm needs them, or do not match the rollouts' turns.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    turns = [len(rollout.turns) for rollout in rollouts]
    if values_per_rollout is None:
        if recipe.needs_values:
            raise ValueError(f"credit_rollouts: algorithm {recipe.algorithm} needs answer values; got None")
        values = [np.full(n, np.nan) for n in turns]
        gains = [np.empty(0) for _ in turns]
    else:
        values = [np.asarray(v, dtype=np.float64) for v in values_per_rollout]
        if [v.shape for v in values] != [(n,) for n in turns]:
            raise ValueError("credit_rollouts: values_per_rollout must hold one [T] array per rollout, in order")
        gains = [information_gain(v)[0] for v in values]

    outcomes = [outcome(r, recipe.outcome, recipe.f1_normalisation, recipe.format_penalty) for r in rollouts]
    rollout_offsets = np.cumsum([0, *turns])
    if recipe.over_tokens:
        tokens = [rollout.decision_tokens for rollout in rollouts]
        advantages = np.repeat(_normalised_over_tokens(outcomes, tokens, recipe.normaliser), turns)
    else:
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
        Credit(
            values=values[i],
            gains=gains[i],
            outcome=outcomes[i],
            f1=f1_score(rollout.answer, rollout.question.answers, recipe.f1_normalisation),
            em=exact_match(rollout.answer, rollout.question.answers, recipe.f1_normalisation),
            advantages=advantages[rollout_offsets[i] : rollout_offsets[i + 1]],
        )
        for i, rollout in enumerate(rollouts)
    )


def _normalised_over_tokens(outcomes: Sequence[float], tokens: Sequence[int], normaliser: Normaliser) -> np.ndarray:
    """Outcomes normalised over the batch's decision tokens, where each occurs once per token of its rollout: float64
    [R]."""
    rewards = torch.from_numpy(np.repeat(np.asarray(outcomes, dtype=np.float64), tokens))
    n = len(rewards)
    each = torch.arange(n + 1)  # here a token is a rollout of one turn, and all are one group
    whole = torch.tensor([0, n])
    advantages = turn_advantages(rewards, torch.full((n,), OUTCOME), each, whole, 1.0, normaliser)
    return advantages.numpy()[np.cumsum(tokens) - 1]


def _credits_of_groups(groups: Sequence[Group], credits: Sequence[Credit]) -> Iterator[list[Credit]]:
    remaining = iter(credits)
    for group in groups:
        yield list(islice(remaining, len(group.rollouts)))


def collapsed_outcome(groups: Sequence[Group], credits: Sequence[Credit]) -> float:
    """Share of groups whose outcomes are all equal."""
    return float(np.mean([len({s.outcome for s in group}) == 1 for group in _credits_of_groups(groups, credits)]))


def collapsed(groups: Sequence[Group], credits: Sequence[Credit]) -> float:
    """Share of groups whose advantages are all exactly 0, which have no gradient."""
    return float(np.mean([not any(s.advantages.any() for s in group) for group in _credits_of_groups(groups, credits)]))


def reward_metrics(groups: Sequence[Group], credits: Sequence[Credit], gate: float = 0.0) -> dict[str, float]:
    """One step's metrics.jsonl keys about rewards, groups and turns; a mean over nothing is absent.

    Args:
        gate: the recipe's. With a gate, ``reward/ig_gated`` is the share of non-zero gains that it drops.
    Returns:
        ``turns/format_error``: share of rollouts without a well-formed answer. It includes ``turns/truncated_tokens``
        and ``turns/truncated_turns``, the shares of all rollouts that ran into a limit; the rest ended malformed.
        ``reward/ig_*`` and ``value/*``: only if values were scored, over finite ones.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    gains = np.concatenate([s.gains for s in credits])
    scored = [s for s in credits if s.gains.size or not np.isnan(s.values).all()]
    sizes = np.abs(gains)
    means = {
        "reward/outcome": [s.outcome for s in credits],
        "reward/f1": [s.f1 for s in credits],
        "reward/em": [s.em for s in credits],
        "reward/ig_mean": gains,
        "reward/ig_abs": sizes,
        "reward/ig_zero": sizes < ZERO_GAIN,
        "reward/ig_gated": sizes[sizes >= ZERO_GAIN] < gate if gate else (),
        "reward/ig_cum_negative": [s.gains.sum() < 0 for s in scored],
        "value/first": [s.values[0] for s in scored if np.isfinite(s.values[0])],
        "value/last": [s.values[-1] for s in scored if np.isfinite(s.values[-1])],
        "turns/mean": [len(rollout.turns) for rollout in rollouts],
        "turns/format_error": [rollout.answer is None for rollout in rollouts],
        "turns/truncated_tokens": [rollout.truncated == "tokens" for rollout in rollouts],
        "turns/truncated_turns": [rollout.truncated == "turns" for rollout in rollouts],
    }
    metrics = {key: float(np.mean(numbers)) for key, numbers in means.items() if len(numbers)}
    metrics["group/collapsed_outcome"] = collapsed_outcome(groups, credits)
    metrics["group/collapsed"] = collapsed(groups, credits)
    if scored:
        metrics["reward/ig_nan"] = float(sum(information_gain(s.values)[1] for s in scored))
    return metrics
