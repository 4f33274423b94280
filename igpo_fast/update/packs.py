"""Packs of groups of rollouts, and the results of passes over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from igpo_fast.ranks import Ranks
from igpo_fast.types import Batch, Credit, Group, Rollout
from igpo_fast.update.advantages import Recipe, collapsed, credit_rollouts
from igpo_fast.update.balance import attention_share, shares, tree_cost
from igpo_fast.update.gains import values_of
from igpo_fast.update.learner import Learner
from igpo_fast.update.policy import PackResult, make_trees
from igpo_fast.update.scoring import Scoring, Values
from igpo_kernels import ANSWER, FORK, RolloutTokens, Tree, TreePlan, pack, pack_within


class Pack(NamedTuple):
    """One row of packed tokens, and the groups in it."""

    plan: TreePlan
    groups: np.ndarray
    """Numbers of the batch's groups with a rollout in it, ascending: int64. None in a filler."""

    @property
    def filler(self) -> bool:
        """Whether it is read only because other ranks read one more pack, and counts nothing."""
        return not len(self.groups)

    @property
    def tokens(self) -> dict[str, int]:
        """Token counts that reading the pack adds to a step's row."""
        return {"tokens/packed": self.plan.n_tokens, "tokens/scored": self.plan.n_pairs - self.plan.n_decisions}


FILLER = Pack(pack([Tree([RolloutTokens(0, np.zeros(2, np.int32), np.array([-1, 0]))])]), np.zeros(0, np.int64))
"""Two tokens, one of them a decision."""


class Reading(NamedTuple):
    """What the passes before the update say about one rollout; None for what no pass gave."""

    values: Values | None = None
    logp: np.ndarray | None = None
    """Log-probabilities of its decision tokens: float32 [decision tokens]."""
    critic: np.ndarray | None = None
    """The critic's values of its decision tokens: float32 [decision tokens]."""
    other_logp: np.ndarray | None = None
    """As ``logp``, under the value model, if that is not the policy."""


Readings = dict[tuple[str, int], Reading]
"""Results by the question's id and the rollout's index."""


class Packer:
    """Makes a rank's packs, and runs the passes without gradient.

    Groups go to ranks by the cost of their trees. All ranks have equally many packs, for a learner's forwards and
    backwards may wait for each other.

    Args:
        scoring: what is scored beside the rollouts' own tokens.
        passes: ``one`` or ``two``.
        token_budget: most packed tokens per forward.
        least: tokens of what is never split over packs: a rollout with its answers, or in one-pass mode a group.
        ranks: the processes of the run, which share the packs out.
    """

    def __init__(
        self,
        learner: Learner,
        scoring: Scoring,
        recipe: Recipe,
        passes: str,
        token_budget: int,
        ranks: Ranks,
        least: int = 1,
    ):
        self.scoring = scoring
        self._learner, self._recipe = learner, recipe
        self._passes, self._budget, self._least, self.ranks = passes, token_budget, least, ranks
        self._tokens_per_pair = attention_share(learner.lm, learner.parameters)

    def halve(self) -> int | None:
        """Halve ``token_budget``; returns it, or None if a pack could then be too small for what it must hold."""
        if self._budget // 2 < self._least:
            return None
        self._budget //= 2
        return self._budget

    def packs(self, batch: Batch, share: Sequence[int], scored: bool) -> list[Pack]:
        """This rank's packs of the groups ``share``, with answers and forks if ``scored``. Groups stay whole if their
        advantages come from the pass itself."""
        sizes = [len(group.rollouts) for group in batch.groups]
        starts = np.cumsum([0, *sizes])
        branches = [self.scoring.branches_of(batch.groups[g].question) if scored else () for g in share]
        numbers = [range(starts[g], starts[g + 1]) for g in share]
        forks = self.scoring.forks(batch) if scored else None
        trees = self._mine(make_trees([batch.groups[g] for g in share], branches, numbers, forks))
        plans = pack_within(trees, self._budget, split=not self._recipe.needs_whole_groups(self._passes))
        group_of_rollout = np.repeat(np.arange(len(sizes)), sizes)
        for plan in plans:
            self._learner.policy.choose_attention(plan)
        packs = [Pack(plan, np.unique(group_of_rollout[plan.rollout])) for plan in plans]
        return packs + [FILLER] * (max(self.ranks.gather(len(packs))) - len(packs))

    def _mine(self, trees: Sequence[Tree]) -> list[Tree]:
        """The trees that this rank reads."""
        if self.ranks.size == 1:
            return list(trees)
        costs = [tree_cost(tree, self._tokens_per_pair) for tree in trees]
        return [trees[i] for i in shares(costs, self.ranks.size)[self.ranks.number]]

    def separate_tokens(self, batch: Batch) -> int:
        """Tokens that separate passes would read for the same results: each rollout once per pass, and what is scored
        beside it."""
        passes = 1 if self._passes == "one" else 2
        return passes * sum(len(rollout.ids) for rollout in batch.rollouts) + self.scoring.separate_tokens(batch)

    def values(self, batch: Batch, plan: TreePlan, scored_logp: np.ndarray) -> dict[int, Values]:
        """The values of a pack's rollouts, by their numbers in the batch, in the pack's order; none if the algorithm
        needs none.

        Args:
            scored_logp: of each pair of answers and forks, in the plan's order: float64 [M - D].
        """
        if not self._recipe.needs_values:
            return {}
        rollouts = batch.rollouts
        answers, forks = (means_of(plan, scored_logp, kind) for kind in (ANSWER, FORK))
        value_of = partial(values_of, basis=self._recipe.basis, answers=self._recipe.answers)
        return {
            i: self.scoring.values(len(rollouts[i].turns), answers.get(i), forks.get(i), value_of)
            for i in decision_runs(plan)[0]
        }

    def read(self, batch: Batch, readings: Readings) -> list[dict[str, int]]:
        """Run the passes before the update, over groups that are not in ``readings`` yet: the value model's, if it is
        not the policy, and the first of the policy's two.

        Returns:
            Token counts of the packs that the ranks have read.
        """
        new = Batch(
            batch.step, tuple(group for group in batch.groups if rollout_key(group.rollouts[0]) not in readings)
        )
        mine: dict[int, Reading] = {}
        counts: list[dict[str, int]] = []
        apart = self._recipe.values_apart
        if apart:
            self._read(new, self._learner.value, mine, counts, of_policy=False, scored=True)
        if self._passes == "two":
            self._read(new, self._learner, mine, counts, of_policy=True, scored=not apart)
        told = self.ranks.gather((mine, counts))
        for theirs, _ in told:
            for i, reading in theirs.items():
                key = rollout_key(new.rollouts[i])
                found = {name: value for name, value in reading._asdict().items() if value is not None}
                readings[key] = readings.get(key, Reading())._replace(**found)
        return [tokens for _, counts in told for tokens in counts]

    def _read(
        self,
        batch: Batch,
        model: Callable[[TreePlan], PackResult],
        readings: dict[int, Reading],
        counts: list[dict[str, int]],
        *,
        of_policy: bool,
        scored: bool,
    ) -> None:
        """Add what one model's pass gives to this rank's readings, by the rollouts' numbers, and to its counts."""
        for read in self.packs(batch, range(len(batch.groups)), scored):
            result = model(read.plan)
            if read.filler:
                continue
            counts.append(read.tokens)
            numbers, starts = decision_runs(read.plan)
            values = self.values(batch, read.plan, result.scored_logp) if scored else {}
            logp = np.split(result.decision_logp, starts[1:])
            critic = [None] * len(logp) if result.critic is None else np.split(result.critic, starts[1:])
            for i, of_tokens, of_critic in zip(numbers, logp, critic, strict=True):
                found = dict(logp=of_tokens, critic=of_critic) if of_policy else dict(other_logp=of_tokens)
                if i in values:
                    found["values"] = values[i]
                readings[i] = readings.get(i, Reading())._replace(**found)

    def credits(self, step: int, groups: Sequence[Group], readings: Readings) -> tuple[Credit, ...]:
        """Rewards and advantages of the groups' rollouts in a step; outcome-only algorithms need no ``readings``."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        values = [readings[rollout_key(rollout)].values for rollout in rollouts] if self._recipe.needs_values else None
        return credit_rollouts(groups, values, self._recipe.at(step))

    def collapsed(self, step: int, group: Group, readings: Readings) -> bool:
        """Whether a group's advantages are all 0; equal outcomes are not enough if gains differ."""
        return collapsed([group], self.credits(step, [group], readings)) == 1


def rollout_key(rollout: Rollout) -> tuple[str, int]:
    """A rollout's key in ``Readings``."""
    return rollout.question.id, rollout.index


def decision_runs(plan: TreePlan) -> tuple[list[int], np.ndarray]:
    """Numbers in the batch of a pack's rollouts, and the start of each one's decision pairs, which are contiguous and
    in order."""
    owner = plan.rollout[: plan.n_decisions]
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    return owner[starts].tolist(), starts


def of_pairs(plan: TreePlan, per_rollout: Mapping[int, np.ndarray] | Sequence[np.ndarray]) -> np.ndarray:
    """Gather per-token numbers of rollouts in the order of the plan's decision pairs: float32 [D]."""
    return np.concatenate([per_rollout[i] for i in decision_runs(plan)[0]]).astype(np.float32)


def of_turns(plan: TreePlan, per_rollout: Mapping[int, np.ndarray] | Sequence[np.ndarray]) -> np.ndarray:
    """Gather per-turn numbers of rollouts for the plan's decision pairs: float32 [D]."""
    numbers, starts = decision_runs(plan)
    turns = [per_rollout[i] for i in numbers]
    first = np.cumsum([0, *map(len, turns[:-1])])  # start of each rollout in the concatenation
    n = plan.n_decisions
    place = np.repeat(first, np.diff(starts, append=n)) + plan.turn[:n]
    return np.concatenate(turns)[place].astype(np.float32)


def advantages_of_pairs(plan: TreePlan, credits: Mapping[int, Credit] | Sequence[Credit]) -> np.ndarray:
    """The advantage of each decision pair, or A_t of its turn: float32 [D]."""
    numbers = decision_runs(plan)[0]
    if credits[numbers[0]].token_advantages is not None:
        return of_pairs(plan, {i: credits[i].token_advantages for i in numbers})
    return of_turns(plan, {i: credits[i].advantages for i in numbers})


def clip_scales_of_pairs(plan: TreePlan, credits: Mapping[int, Credit] | Sequence[Credit]) -> np.ndarray | None:
    """The clip range's factor of each decision pair's turn: float32 [D]; None if all are 1."""
    numbers = decision_runs(plan)[0]
    if credits[numbers[0]].clip_scale is None:
        return None
    return of_turns(plan, {i: credits[i].clip_scale for i in numbers})


def means_of(plan: TreePlan, scored_logp: np.ndarray, kind: int) -> dict[int, np.ndarray]:
    """Mean log-probability of each scored text: rollout number -> float64 [answers, turns], NaN where there is none.

    Args:
        scored_logp: of each pair of answers and forks, in the plan's order: float64 [M - D].
        kind: ``ANSWER`` (after each prefix: T turns) or ``FORK`` (``Fork.answer``, ``Fork.turn``).
    """
    members = np.flatnonzero(plan.kind == kind)
    if not len(members):
        return {}
    rollout, turn, answer = (x[members] for x in (plan.rollout, plan.turn, plan.answer))
    logp = scored_logp[members - plan.n_decisions]
    numbers, number = np.unique(rollout, return_inverse=True)
    answers, turns = np.zeros((2, len(numbers)), dtype=np.int64)
    np.maximum.at(answers, number, answer + 1)
    np.maximum.at(turns, number, turn + 1)
    shape = len(numbers), answers.max(), turns.max()
    cell = np.ravel_multi_index((number, answer, turn), shape)
    total = np.bincount(cell, logp, np.prod(shape)).reshape(shape)
    count = np.bincount(cell, minlength=np.prod(shape)).reshape(shape)
    means = np.where(count, total / np.maximum(count, 1), np.nan)
    return {int(i): means[r, : answers[r], : turns[r]] for r, i in enumerate(numbers)}


def answer_values(
    policy: Callable[[TreePlan], PackResult],
    groups: Sequence[Group],
    scoring: Scoring,
    value_of: Callable[[np.ndarray], np.ndarray],
    token_budget: int,
) -> list[Values]:
    """The values of each rollout of ``groups``, in their order, from passes without gradient that train nothing.

    Args:
        policy: what gives them.
        scoring: what is scored; without forks.
        value_of: log-probabilities [n, turns] to a value per turn, as ``gains.values_of`` does.
        token_budget: most packed tokens per forward.
    Raises:
        ValueError: a rollout with its answers exceeds ``token_budget``.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    numbers = iter(range(len(rollouts)))
    numbered = [[next(numbers) for _ in group.rollouts] for group in groups]
    trees = make_trees(groups, [scoring.branches_of(group.question) for group in groups], numbered)
    answers: dict[int, np.ndarray] = {}
    for plan in pack_within(trees, token_budget, split=True):
        answers |= means_of(plan, policy(plan).scored_logp, ANSWER)
    return [scoring.values(len(r.turns), answers.get(i), None, value_of) for i, r in enumerate(rollouts)]
