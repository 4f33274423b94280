"""From rollouts and answer values to turn advantages, for every algorithm, and metrics about them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import islice, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch

from igpo_fast.extend import named
from igpo_fast.types import (
    INVALID,
    REWARD,
    Accumulate,
    Answers,
    Baseline,
    Basis,
    Credit,
    CreditOf,
    Group,
    Normalisation,
    Pool,
    Rollout,
    ValueModel,
)
from igpo_fast.update.gains import Gain, earning_turns, gains_of_ones_own, information_gain, repeated_passages
from igpo_fast.update.rewards import exact_match, f1_score, outcome, rewards_of
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
    outcome: str = "f1"
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
    gain: Gain | None = None
    """What makes gains of values; None is their increase."""
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

    def values(self, rollout: Rollout) -> bool:
        """Whether a rollout's prefixes have values: nothing is scored without an accepted answer (a group of which
        none answered has no majority)."""
        return bool(rollout.question.answers) or self.scored_answers == 0

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
    def calls_only(self) -> bool:
        """Whether only turns that call a tool earn gains: no other has a response that another may replace."""
        return self.baseline in ("random", "masked")

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
    own = ("steps", "gain")
    given = {f.name: getattr(algorithm, keys.get(f.name, f.name)) for f in fields(Recipe) if f.name not in own}
    gain = None if algorithm.gain == "information" else named(algorithm.gain, "algorithm.gain")
    return Recipe(**given, steps=steps, gain=gain)


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
    # Trajectories that are only read may have turns without tokens of the policy; each still has an advantage.
    credits, earned = earn(groups, values_per_rollout, recipe, outcomes, least=1)
    if earned is None:
        return credits
    credits = credited(credits, earned, token_advantages(earned, recipe).numpy(), recipe)
    if earned.call_tokens is None:
        return credits
    made = (
        np.repeat([len(t.ids) > 0 for t in r.turns], n) for r, n in zip(_rollouts(groups), earned.tokens, strict=True)
    )
    return tuple(replace(c, token_advantages=c.token_advantages[kept]) for c, kept in zip(credits, made, strict=True))


def earn(
    groups: Sequence[Group],
    values_per_rollout: Sequence[Values | np.ndarray] | None,
    recipe: Recipe,
    outcomes: Sequence[float] | None = None,
    least: int = 0,
) -> tuple[tuple[Credit, ...], Earned | None]:
    """What ``credit_rollouts`` does before advantages.

    Args:
        least: tokens that a turn counts as having at least. With 0, a turn without tokens has no advantage of its own.
    Returns:
        Credits whose advantages are 0, and what gives them; or, where rewards are not compared within groups, credits
        that are complete, or as complete as without a critic's values, and None.
    """
    rollouts = _rollouts(groups)
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
    earning = [
        earning_turns(
            rollout, recipe.ig_tools, recipe.ig_every, penalised, recipe.calls_only, valued=recipe.values(rollout)
        )
        for rollout in rollouts
    ]
    nothing = np.empty(0), 0

    def gains_of(rollout: Rollout, *each: np.ndarray) -> tuple[np.ndarray, int]:
        if recipe.gain is None or not recipe.values(rollout):
            return information_gain(*each)
        return gains_of_ones_own(recipe.gain, rollout, *each)

    found = [
        nothing if values_per_rollout is None else gains_of(*each)
        for each in zip(rollouts, values, earning, baselines, strict=True)
    ]
    gains = [gain for gain, _ in found]
    if outcomes is None:
        outcomes = [outcome(r, recipe.outcome, recipe.f1_normalisation, recipe.format_penalty) for r in rollouts]
    advantages, earned = [np.zeros(n) for n in turns], None
    if recipe.over_tokens:
        tokens = [rollout.decision_tokens for rollout in rollouts]
        normalised = _normalised_over_tokens(outcomes, tokens, recipe.normaliser)
        advantages = [np.full(n, a) for n, a in zip(turns, normalised, strict=True)]
    elif not recipe.critic:
        rewards = [_rewards(*parts, recipe) for parts in zip(rollouts, earning, gains, outcomes, strict=True)]
        earned = _earned(groups, rewards, earning, recipe, least)
    credits = tuple(
        Credit(
            values=values[i],
            gains=gains[i],
            outcome=outcomes[i],
            f1=_against_truth(f1_score, rollout, recipe.f1_normalisation),
            em=_against_truth(exact_match, rollout, recipe.f1_normalisation),
            advantages=advantages[i],
            baselines=baselines[i],
            undefined=found[i][1],
        )
        for i, rollout in enumerate(rollouts)
    )
    return credits, earned


def _rollouts(groups: Sequence[Group]) -> list[Rollout]:
    return [rollout for group in groups for rollout in group.rollouts]


def _against_truth(score: Callable[..., float], rollout: Rollout, normalisation: Normalisation) -> float:
    """A score of the answer against the ground truth; NaN without one."""
    truth = rollout.question.ground_truth
    return score(rollout.answer, truth, normalisation) if truth else math.nan


def _rewards(rollout: Rollout, earning: np.ndarray, gains: np.ndarray, last: float, recipe: Recipe) -> np.ndarray:
    """The rewards of the turns that earn a gain, then the outcome: float64 [earning + 1]."""
    earned = gains[earning] if len(gains) else np.zeros(earning.sum())
    if recipe.turn_format_penalty:
        malformed = np.array([turn.action == INVALID for turn in rollout.turns[:-1]], dtype=bool)[earning]
        earned = np.where(malformed, -recipe.turn_format_penalty, earned)
    return np.append(earned, last)


@dataclass(frozen=True)
class Earned:
    """Rewards that are compared within their groups, rollout after rollout, and whose tokens share them.

    A turn that earns nothing belongs to the next one that does; S such segments have M decision tokens.
    """

    rewards: np.ndarray
    """float64 [S]: gains or penalties, and each rollout's outcome last."""
    kinds: np.ndarray
    """``GAIN`` or ``OUTCOME``: int8 [S]."""
    rollout_offsets: np.ndarray
    """int64 [R + 1], into segments."""
    group_offsets: np.ndarray
    """int64 [groups + 1], into rollouts."""
    token_offsets: np.ndarray
    """int64 [S + 1], into decision tokens."""
    tokens: Sequence[np.ndarray]
    """Decision tokens of each rollout's turns, at least ``earn``'s ``least``: int64 [T]."""
    ends: Sequence[np.ndarray]
    """Each rollout's turns that earn a reward: int64 [S of the rollout]."""
    costs: np.ndarray | None = None
    """Taken from the segments' advantages: float64 [S]."""
    gates: np.ndarray | None = None
    """``ig_spread``: factor of what gains add to advantages: float64 [S]."""
    call_tokens: np.ndarray | None = None
    """``credit=query``: tokens of the call that a token is of, which share what gains add; inf where it is of none, or
    of a turn that earns no gain: float64 [M]."""


def _earned(
    groups: Sequence[Group], rewards: Sequence[np.ndarray], earning: Sequence[np.ndarray], recipe: Recipe, least: int
) -> Earned:
    rollouts = _rollouts(groups)
    ends = [np.flatnonzero([*e, True]) for e in earning]
    tokens = [np.array([max(len(turn.ids), least) for turn in rollout.turns]) for rollout in rollouts]
    offsets = np.cumsum([0, *map(len, ends)])
    kinds = np.full(offsets[-1], GAIN, np.int8)
    kinds[offsets[1:] - 1] = OUTCOME
    sizes = np.cumsum([0, *(len(group.rollouts) for group in groups)])
    before = np.cumsum([0, *(n.sum() for n in tokens)])  # tokens of earlier rollouts
    behind = [start + np.cumsum(n)[end] for start, n, end in zip(before, tokens, ends, strict=False)]
    costs = gates = call_tokens = None
    if recipe.redundancy_penalty:
        costs = np.concatenate([_repetition(*each, recipe) for each in zip(rollouts, ends, strict=True)])
    if recipe.needs_values and recipe.ig_spread:
        spread = np.array([_spread(rewards[a:b]) for a, b in pairwise(sizes)])
        gate = (1 - np.tanh(spread / recipe.ig_spread / 2)) / 2  # the sigmoid of -spread / ig_spread
        gates = np.repeat(gate, np.diff(offsets[sizes]))
    if recipe.needs_values and recipe.credit == "query":
        call_tokens = np.concatenate([_call_tokens(*each) for each in zip(rollouts, ends, tokens, strict=True)])
    return Earned(
        np.concatenate(rewards), kinds, offsets, sizes, np.concatenate([[0], *behind]), tokens, ends, costs, gates,
        call_tokens,
    )  # fmt: skip


def token_advantages(earned: Earned, recipe: Recipe, device: torch.device | str = "cpu") -> torch.Tensor:
    """The advantage of each decision token, on ``device`` without waiting for it: float64 [M].

    It is computed there by the kernel, or on the host where the kernel lacks the normaliser: torch's operations would
    wait for the device.
    """
    if device != "cpu" and not recipe.normaliser.fused:
        return token_advantages(earned, recipe).to(device)
    names = ("rewards", "kinds", "rollout_offsets", "group_offsets")
    arrays = [torch.from_numpy(getattr(earned, name)).to(device) for name in names]
    token_offsets, n_tokens = torch.from_numpy(earned.token_offsets).to(device), int(earned.token_offsets[-1])

    def normalised(normaliser: Normaliser) -> torch.Tensor:
        return turn_advantages(*arrays, recipe.discount, normaliser, token_offsets=token_offsets, n_tokens=n_tokens)

    def of_tokens(per_segment: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.repeat(per_segment, np.diff(earned.token_offsets))).to(device)

    total = normalised(recipe.normaliser)
    if earned.gates is None and earned.call_tokens is None:
        return total if earned.costs is None else total - of_tokens(earned.costs)
    # Advantages are linear in the weights of gains and outcomes.
    of_outcomes = normalised(replace(recipe.normaliser, gain_weight=0.0))
    if earned.gates is not None:
        total = of_outcomes + of_tokens(earned.gates) * (total - of_outcomes)
    if earned.costs is not None:
        total, of_outcomes = (x - of_tokens(earned.costs) for x in (total, of_outcomes))
    if earned.call_tokens is not None:  # IG-Search (arXiv 2604.15148), Eq. 4
        total = of_outcomes + (total - of_outcomes) / torch.from_numpy(earned.call_tokens).to(device)
    return total


def credited(credits: Sequence[Credit], earned: Earned, of_tokens: np.ndarray, recipe: Recipe) -> tuple[Credit, ...]:
    """``earn``'s credits with the advantages that ``token_advantages`` has given."""
    scale = None
    if recipe.adaptive_clip:
        arrays = (earned.rewards, earned.kinds, earned.rollout_offsets, earned.group_offsets)
        z = normalised_rewards(*map(torch.from_numpy, arrays), recipe.normaliser).numpy()
        # A2TGPO (arXiv 2605.06200), Eq. 11: within 1 +- adaptive_clip. The last turn has no gain.
        scale = np.where(earned.kinds == GAIN, 1 + recipe.adaptive_clip * np.tanh(z / 2), 1.0)
    made = []
    start = 0
    for i, (credit, tokens, end) in enumerate(zip(credits, earned.tokens, earned.ends, strict=True)):
        own = of_tokens[start : start + tokens.sum()]
        start += tokens.sum()
        first = np.cumsum(tokens) - tokens
        more: dict[str, np.ndarray] = {"advantages": np.append(own, 0.0)[first]}  # a last turn may have no token
        if earned.call_tokens is not None:
            means = np.array([own[a : a + n].mean() if n else 0.0 for a, n in zip(first, tokens, strict=True)])
            more = {"advantages": means, "token_advantages": own.astype(np.float32)}
        if scale is not None:
            segment = np.searchsorted(end, np.arange(len(tokens)))
            more["clip_scale"] = scale[earned.rollout_offsets[i] : earned.rollout_offsets[i + 1]][segment]
        made.append(replace(credit, **more))
    return tuple(made)


def _spread(rewards: Sequence[np.ndarray]) -> float:
    """Standard deviation of a group's outcomes, a sample's as in InfoPO's code; 0 for one rollout."""
    outcomes = [row[-1] for row in rewards]
    return float(np.std(outcomes, ddof=1)) if len(outcomes) > 1 else 0.0


def _call_tokens(rollout: Rollout, ends: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """``Earned.call_tokens`` of one rollout."""
    rows = []
    for t, (turn, count) in enumerate(zip(rollout.turns, tokens, strict=True)):
        row = np.full(count, np.inf)
        if t in ends:  # others show the next one's gain
            row[turn.call :] = count - turn.call
        rows.append(row)
    return np.concatenate(rows)


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
        ``reward/ig_*`` and ``value/*``: only if values were scored, over finite ones. ``reward/f1`` and ``reward/em``:
        over rollouts of questions with a ground truth. ``reward/NAME``: means of the other numbers in
        ``Rollout.rewards``.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    earned = [s.gains[~np.isnan(s.gains)] for s in credits]
    gains = np.concatenate(earned)
    scored = [s for s in credits if s.gains.size or not np.isnan(s.values).all()]
    sizes = np.abs(gains)
    means = {
        "reward/outcome": [s.outcome for s in credits],
        "reward/f1": [s.f1 for s in credits if not math.isnan(s.f1)],
        "reward/em": [s.em for s in credits if not math.isnan(s.em)],
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
    means |= {f"reward/{name}": numbers for name, numbers in rewards_of(rollouts).items() if name != REWARD}
    metrics = {key: float(np.mean(numbers)) for key, numbers in means.items() if len(numbers)}
    metrics["group/collapsed_outcome"] = collapsed_outcome(groups, credits)
    metrics["group/collapsed"] = collapsed(groups, credits)
    if scored:
        metrics["reward/ig_nan"] = float(sum(s.undefined for s in credits))
    return metrics
