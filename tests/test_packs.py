"""What packs.py gathers of a pack, against plain loops over its pairs, on random plans."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from igpo_fast.update.packs import advantages_of_pairs, decision_runs, means_of, of_pairs
from igpo_fast.update.policy import make_trees
from igpo_kernels import ANSWER, pack_within
from tests.trees import random_branches, random_group


def packed(seed, answers=(2, 1, 3, 2)):
    """Packs of groups with so many accepted answers each, and their rollouts; 0 answers: no branches."""
    rng = np.random.default_rng(seed)
    groups = [random_group(rng) for _ in answers]
    branches = [random_branches(rng, n) if n else () for n in answers]
    starts = np.cumsum([0, *(len(group.rollouts) for group in groups)])
    trees = make_trees(groups, branches, [range(*pair) for pair in pairwise(starts)])
    return pack_within(trees, 200, split=True), [rollout for group in groups for rollout in group.rollouts], rng


SEEDS = pytest.mark.parametrize("seed", range(8))


@SEEDS
def test_advantages_are_each_turns_or_each_tokens(seed):
    plans, rollouts, rng = packed(seed)
    draw = lambda n: rng.normal(size=n)  # noqa: E731
    of_turns = [SimpleNamespace(advantages=draw(len(r.turns)), token_advantages=None) for r in rollouts]
    of_tokens = [SimpleNamespace(token_advantages=draw(r.decision_tokens)) for r in rollouts]
    assert len(plans) > 1
    for plan in plans:
        n = plan.n_decisions
        loop = [of_turns[i].advantages[t] for i, t in zip(plan.rollout[:n], plan.turn[:n], strict=True)]
        found = advantages_of_pairs(plan, dict(enumerate(of_turns)))
        assert found.dtype == np.float32 and np.array_equal(found, np.array(loop, dtype=np.float32))
        place = {i: np.cumsum(rollouts[i].turn_of_token >= 0) - 1 for i in np.unique(plan.rollout[:n])}
        pairs = zip(plan.rollout[:n], plan.token[:n], strict=True)
        loop = [of_tokens[i].token_advantages[place[i][token]] for i, token in pairs]
        found = advantages_of_pairs(plan, dict(enumerate(of_tokens)))
        assert found.dtype == np.float32 and np.array_equal(found, np.array(loop, dtype=np.float32))


@SEEDS
def test_numbers_of_decision_tokens_come_in_the_plans_order(seed):
    plans, rollouts, _ = packed(seed)
    seen = []
    for plan in plans:
        owner = plan.rollout[: plan.n_decisions]
        loop = {int(i): np.flatnonzero(owner == i) for i in np.unique(owner)}
        numbers, starts = decision_runs(plan)
        parts = np.split(np.arange(len(owner)), starts[1:])
        assert sorted(numbers) == sorted(loop)
        assert all(np.array_equal(part, loop[i]) for i, part in zip(numbers, parts, strict=True))
        ids = of_pairs(plan, [np.concatenate([turn.ids for turn in rollout.turns]) for rollout in rollouts])
        assert np.array_equal(ids, plan.label[: plan.n_decisions])  # what a decision pair predicts is the token sampled
        seen += numbers
    assert sorted(seen) == list(range(len(rollouts)))


@SEEDS
def test_means_are_over_each_answers_tokens(seed):
    plans, _, rng = packed(seed)
    for plan in plans:
        logp = rng.normal(size=plan.n_pairs - plan.n_decisions)
        parts = {}
        pairs = (x[plan.kind == ANSWER].tolist() for x in (plan.rollout, plan.answer, plan.turn))
        for rollout, answer, turn, value in zip(*pairs, logp, strict=True):
            parts.setdefault(rollout, {}).setdefault((answer, turn), []).append(value)
        found = means_of(plan, logp, ANSWER)
        assert set(found) == set(parts)
        for rollout, cells in parts.items():
            assert found[rollout].size == len(cells)
            assert all(found[rollout][at] == pytest.approx(np.mean(values)) for at, values in cells.items())


def test_a_pack_without_answers_has_no_means():
    plans, *_ = packed(0, answers=(0, 0))
    assert all(means_of(plan, np.zeros(0), ANSWER) == {} for plan in plans)
