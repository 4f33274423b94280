"""From rollouts and answer values to turn advantages, for every algorithm, and metrics about them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from igpo_fast.types import (
    INVALID,
    SEARCH,
    Accumulate,
    Answers,
    Baseline,
    Basis,
    Credit,
    CreditOf,
    Group,
    Normalisation,
    Outcome,
    Pool,
    Rollout,
    ValueModel,
)
from igpo_fast.update.gains import earning_turns, information_gain, repeated_passages
from igpo_fast.update.rewards import exact_match, f1_score, outcome
from igpo_fast.update.scoring import Values
from igpo_kernels.turn_advantages import GAIN, OUTCOME, Normaliser, normalised_rewards, turn_advantages

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
    critic: bool = False
    """Whether advantages are estimated from a critic's values (critic.py); ``credit_rollouts`` leaves them 0."""

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
    "ppo": Algorithm(gain_weight=0.0, critic=True),
    "ppo_ig": Algorithm(critic=True),
}


@dataclass(frozen=True)
class Recipe:
    """Settings that turn rollouts and values into advantages. The defaults are preset ``paper``."""

    algorithm: str = "igpo"
    """A key of ``ALGORITHMS``."""
    basis: Basis = "log_prob"
    """Basis for ``gains.values_of``, whose results ``credit_rollouts`` takes."""
    answers: Answers = "first"
    """Answers for ``gains.values_of``."""
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
    accumulate: Accumulate = "sum"
    ig_weight: float = 1.0
    ig_weight_end: float | None = None
    """Weight of gains in the last step, to which ``ig_weight`` leads in equal parts; None keeps it."""
    ig_tools: tuple[str, ...] = ()
    ig_every: int = 1
    turn_format_penalty: float = 0.0
    redundancy_penalty: float = 0.0
    adaptive_clip: float = 0.0
    baseline: Baseline = "previous"
    value_model: ValueModel = "policy"
    potential: bool = False
    ig_spread: float = 0.0
    credit: CreditOf = "turn"
    steps: int = 1
    """Steps of the run."""

    def at(self, step: int) -> Recipe:
        """The recipe of one step of the run, with its weight of gains."""
        if self.ig_weight_end is None or self.steps < 2:
            return self
        share = (step - 1) / (self.steps - 1)
        weight = self.ig_weight + share * (self.ig_weight_end - self.ig_weight)
        return replace(self, ig_weight=weight, ig_weight_end=None)

    @property
    def normaliser(self) -> Normaliser:
        """The normaliser. If only gains or only outcomes count, they have a pool of their own, whatever ``pool`` says:
        unused rewards must not affect the statistics of used ones."""
        chosen = ALGORITHMS[self.algorithm]
        alone = not (chosen.gain_weight and chosen.outcome_weight)
        return Normaliser(
            pool="separate" if alone and self.pool in ("joint", "scaled_separate") else self.pool,
            accumulate=self.accumulate if chosen.gain_weight else "sum",
            gate=self.gate,
            center=self.center,
            min_std=self.min_std,
            outcome_min_std=self.outcome_min_std,
            min_var=self.min_var,
            gain_weight=chosen.gain_weight * self.ig_weight,
            outcome_weight=chosen.outcome_weight,
            scale_std=chosen.scale_std,
            leave_one_out=chosen.leave_one_out,
        )

    @property
    def needs_values(self) -> bool:
        return ALGORITHMS[self.algorithm].needs_values

    @property
    def critic(self) -> bool:
        """Whether a critic's values give the advantages."""
        return ALGORITHMS[self.algorithm].critic

    @property
    def over_tokens(self) -> bool:
        """Whether advantages depend on the whole batch, not on the rollout's group alone."""
        return ALGORITHMS[self.algorithm].over_tokens

    @property
    def scored_answers(self) -> int | None:
        """Number of accepted answers that are scored, as the end of a slice: None for all."""
        if not self.needs_values or self.baseline == "masked":
            return 0
        return 1 if self.answers == "first" else None

    @property
    def value_source(self) -> ValueModel:
        """The model that gives the values, or, where none are needed, the policy."""
        return self.value_model if self.needs_values else "policy"

    @property
    def values_apart(self) -> bool:
        """Whether another model than the policy gives the values, in a pass before the policy's."""
        return self.value_source != "policy"

    def needs_whole_groups(self, passes: str) -> bool:
        """Whether a group must be in one pack, because advantages come from the values of the pass that trains."""
        return passes == "one" and self.needs_values and not self.values_apart

    @property
    def earning_tools(self) -> tuple[str, ...]:
        """Tools whose turns earn gains, all if empty. Only a search has a response that others may replace."""
        return self.ig_tools or ((SEARCH,) if self.baseline in ("random", "masked") else ())

    @property
    def discount(self) -> float:
        """gamma, or 1 for an outcome-only algorithm without a critic: the outcome counts equally for every turn."""
        return self.gamma if self.needs_values or self.critic else 1.0


def recipe_of(algorithm: config.Algorithm, steps: int = 1) -> Recipe:
    """The recipe that the configuration's section ``algorithm`` describes, for a run of ``steps``."""
    keys = {
        "algorithm": "name", "gate": "ig_gate", "center": "ig_center", "min_std": "ig_min_std",
        "potential": "ig_potential",
    }  # fmt: skip
    named = {f.name: getattr(algorithm, keys.get(f.name, f.name)) for f in fields(Recipe) if f.name != "steps"}
    return Recipe(**named, steps=steps)


def credit_rollouts(
    groups: Sequence[Group],
    values_per_rollout: Sequence[Values | np.ndarray] | None,
    recipe: Recipe,
    outcomes: Sequence[float] | None = None,
) -> tuple[Credit, ...]:
    """Rewards and advantages of every turn, one ``Credit`` per rollout in the groups' order.

    Args:
        groups: at least one, each with at least one rollout.
        values_per_rollout: v_t of each rollout, float [T] in ``recipe.basis``, in the groups' order, or ``Values``,
            which also hold what they are compared with. An outcome-only algorithm only reports them and accepts None:
            values are then NaN [T], gains empty.
        recipe: settings of rewards and advantages.
        outcomes: reward of each rollout's last turn, in the groups' order; None takes the recipe's own outcome.
    Raises:
        ValueError: values are missing although the algorithm needs them, or do not match the rollouts' turns.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    turns = [len(rollout.turns) for rollout in rollouts]
    if values_per_rollout is None:
        if recipe.needs_values:
            raise ValueError(f"credit_rollouts: algorithm {recipe.algorithm} needs answer values; got None")
        values, baselines = [np.full(n, np.nan) for n in turns], [None] * len(turns)
    else:
        both = [v if isinstance(v, Values) else Values(v) for v in values_per_rollout]
        values, baselines = [np.asarray(v.values, dtype=np.float64) for v in both], [v.baselines for v in both]
        if [v.shape for v in values] != [(n,) for n in turns]:
            raise ValueError("credit_rollouts: values_per_rollout must hold one [T] array per rollout, in order")
    penalised = recipe.turn_format_penalty != 0
    earning = [earning_turns(rollout, recipe.earning_tools, recipe.ig_every, penalised) for rollout in rollouts]
    nothing = np.empty(0), 0
    found = [
        nothing if values_per_rollout is None else information_gain(*each)
        for each in zip(values, earning, baselines, strict=True)
    ]
    gains = [gain for gain, _ in found]
    if outcomes is None:
        outcomes = [outcome(r, recipe.outcome, recipe.f1_normalisation, recipe.format_penalty) for r in rollouts]
    of_turns: list[dict] = [{} for _ in rollouts]
    if recipe.critic:
        advantages = [np.zeros(n) for n in turns]
    elif recipe.over_tokens:
        tokens = [rollout.decision_tokens for rollout in rollouts]
        normalised = _normalised_over_tokens(outcomes, tokens, recipe.normaliser)
        advantages = [np.full(n, a) for n, a in zip(turns, normalised, strict=True)]
    else:
        rewards = [_rewards(*parts, recipe) for parts in zip(rollouts, earning, gains, outcomes, strict=True)]
        advantages, of_turns = _normalised_in_groups(groups, rewards, earning, recipe)
    return tuple(
        Credit(
            values=values[i],
            gains=gains[i],
            outcome=outcomes[i],
            f1=f1_score(rollout.answer, rollout.question.answers, recipe.f1_normalisation),
            em=exact_match(rollout.answer, rollout.question.answers, recipe.f1_normalisation),
            advantages=advantages[i],
            **of_turns[i],
            baselines=baselines[i],
            undefined=found[i][1],
        )
        for i, rollout in enumerate(rollouts)
    )


def _rewards(rollout: Rollout, earning: np.ndarray, gains: np.ndarray, last: float, recipe: Recipe) -> np.ndarray:
    """The rewards of the turns that earn a gain, then the outcome: float64 [earning + 1]."""
    earned = gains[earning] if len(gains) else np.zeros(earning.sum())
    if recipe.turn_format_penalty:
        malformed = np.array([turn.action == INVALID for turn in rollout.turns[:-1]], dtype=bool)[earning]
        earned = np.where(malformed, -recipe.turn_format_penalty, earned)
    return np.append(earned, last)


def _normalised_in_groups(
    groups: Sequence[Group], rewards: Sequence[np.ndarray], earning: Sequence[np.ndarray], recipe: Recipe
) -> tuple[list[np.ndarray], list[dict[str, np.ndarray]]]:
    """Advantages from rewards that are compared within their groups: float64 [T] per rollout; and the other fields of
    each ``Credit`` that come with them."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    ends = [np.flatnonzero([*e, True]) for e in earning]  # the turns that earn a reward
    segments = [np.searchsorted(end, np.arange(len(r.turns))) for end, r in zip(ends, rollouts, strict=True)]
    offsets = np.cumsum([0, *map(len, ends)])
    kinds = np.full(offsets[-1], GAIN)
    kinds[offsets[1:] - 1] = OUTCOME
    sizes = np.cumsum([0, *(len(group.rollouts) for group in groups)])
    arrays = [torch.from_numpy(x) for x in (np.concatenate(rewards), kinds, offsets, sizes)]
    total = turn_advantages(*arrays, recipe.discount, recipe.normaliser).numpy()
    apart = recipe.needs_values and (recipe.ig_spread or recipe.credit == "query")
    of_outcomes = total
    if apart:  # advantages are linear in the weights of gains and outcomes
        of_outcomes = turn_advantages(*arrays, recipe.discount, replace(recipe.normaliser, gain_weight=0.0)).numpy()
    if apart and recipe.ig_spread:
        spread = [_spread(rewards[a:b]) for a, b in pairwise(sizes)]
        gate = (1 - np.tanh(np.array(spread) / recipe.ig_spread / 2)) / 2  # the sigmoid of -spread / ig_spread
        total = of_outcomes + np.repeat(gate, np.diff(offsets[sizes])) * (total - of_outcomes)
    costs = [_repetition(rollout, end, recipe) for rollout, end in zip(rollouts, ends, strict=True)]
    per_turn = lambda x, i: (x[offsets[i] : offsets[i + 1]] - costs[i])[segments[i]]  # noqa: E731
    advantages = [per_turn(total, i) for i in range(len(rollouts))]
    more: list[dict[str, np.ndarray]] = [{} for _ in rollouts]
    if recipe.credit == "query" and apart:
        for i, rollout in enumerate(rollouts):
            others = per_turn(of_outcomes, i)
            own = np.isin(np.arange(len(others)), ends[i])  # others show the next one's gain
            of_tokens = _of_calls(rollout, others, own * (advantages[i] - others))
            advantages[i] = np.array([tokens.mean() for tokens in of_tokens])
            more[i]["token_advantages"] = np.concatenate(of_tokens).astype(np.float32)
    if recipe.adaptive_clip:
        z = normalised_rewards(*arrays, recipe.normaliser).numpy()
        # A2TGPO (arXiv 2605.06200), Eq. 11: within 1 +- adaptive_clip. The last turn has no gain.
        scale = np.where(kinds == GAIN, 1 + recipe.adaptive_clip * np.tanh(z / 2), 1.0)
        for i, segment in enumerate(segments):
            more[i]["clip_scale"] = scale[offsets[i] : offsets[i + 1]][segment]
    return advantages, more


def _spread(rewards: Sequence[np.ndarray]) -> float:
    """Standard deviation of a group's outcomes, a sample's as in InfoPO's code; 0 for one rollout."""
    outcomes = [row[-1] for row in rewards]
    return float(np.std(outcomes, ddof=1)) if len(outcomes) > 1 else 0.0


def _of_calls(rollout: Rollout, others: np.ndarray, gains: np.ndarray) -> list[np.ndarray]:
    """Advantages of each turn's tokens: ``others``, to which those of its tool call add its gain over their number
    (IG-Search, arXiv 2604.15148, Eq. 4)."""
    tokens = []
    for turn, other, gain in zip(rollout.turns, others, gains, strict=True):
        row = np.full(len(turn.ids), other)
        row[turn.call :] += gain / (len(turn.ids) - turn.call)
        tokens.append(row)
    return tokens


def _repetition(rollout: Rollout, ends: np.ndarray, recipe: Recipe) -> np.ndarray:
    """What repeated passages cost each rewarded turn and, as they are summed, those before it: float64 [ends]."""
    costs = np.zeros(len(ends))
    if not recipe.redundancy_penalty:
        return costs
    shares = repeated_passages(rollout)
    np.add.at(costs, np.searchsorted(ends, np.arange(len(shares))), recipe.redundancy_penalty * shares)
    if recipe.accumulate != "none":
        for t in reversed(range(len(costs) - 1)):
            costs[t] += recipe.discount * costs[t + 1]
    return costs


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
    earned = [s.gains[~np.isnan(s.gains)] for s in credits]
    gains = np.concatenate(earned)
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
        "reward/ig_cum_negative": [np.nansum(s.gains) < 0 for s in scored],
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
        metrics["reward/ig_nan"] = float(sum(s.undefined for s in credits))
    return metrics
