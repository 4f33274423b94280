"""Forks of a TreePlan: hand-worked layouts, and that each scored token sees exactly its own path."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.update.policy import make_trees
from igpo_kernels import ANSWER, DECISION, FORK, Branch, Fork, RolloutTokens, Tree, pack, tree_size
from tests.trees import random_branches, random_group


def test_a_fork_by_hand():
    # Prompt 1 2; turn 0 is 3, response 4; turn 1 is 5. The fork has 7 8 in place of 4, then the answer 9 in wrapper 6.
    made = RolloutTokens(
        3, np.array([1, 2, 3, 4, 5]), np.array([-1, -1, 0, -1, 1]), np.array([2, 4]),
        [Fork(3, np.array([7, 8, 6, 9, 0]), 3, 4, turn=1, answer=0)],
    )  # fmt: skip
    plan = pack([Tree([made], [Branch(np.array([6, 9]), 1, 2)])])
    # Trunk 1 2 3 4 (5 is a label only) with the branch of prefix_1, then the fork, then the branch of prefix_0.
    assert plan.input_ids.tolist() == [1, 2, 3, 4, 6, 7, 8, 6, 6]
    assert plan.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 2]
    assert plan.subtree_end.tolist() == [9, 9, 8, 5, 5, 8, 8, 8, 9]
    assert plan.kind.tolist() == [DECISION, DECISION, ANSWER, ANSWER, FORK]
    assert plan.row.tolist() == [1, 3, 8, 4, 7] and plan.label.tolist() == [3, 5, 9, 9, 9]
    assert (plan.rollout[-1], plan.turn[-1], plan.answer[-1], plan.token[-1]) == (3, 1, 0, 0)
    assert tree_size(Tree([made], [Branch(np.array([6, 9]), 1, 2)])) == (9, (plan.position_ids + 1).sum())


def test_a_fork_that_is_the_rollout_adds_no_token():
    ids, turn = np.array([1, 2, 3, 4, 5]), np.array([-1, 0, -1, 1, 1])
    own = Fork(2, ids[2:], 1, 3, turn=1)
    plan = pack([Tree([RolloutTokens(0, ids, turn, forks=[own])])])
    assert plan.input_ids.tolist() == [1, 2, 3, 4]
    forks = plan.kind == FORK
    assert plan.row[forks].tolist() == [2, 3] and plan.label[forks].tolist() == [4, 5]
    assert plan.row[1:3].tolist() == [2, 3]  # the decisions' own rows


@pytest.mark.parametrize("bad", [
    Fork(0, np.array([1]), 0, 1, 0), Fork(4, np.array([1]), 0, 1, 0), Fork(1, np.array([1]), 1, 1, 0),
    Fork(1, np.array([1]), 0, 2, 0), Fork(1, np.array([1]), -1, 1, 0),
])  # fmt: skip
def test_a_fork_that_scores_nothing_or_begins_nowhere_is_refused(bad):
    made = RolloutTokens(0, np.array([1, 2, 3]), np.array([-1, 0, 0]), forks=[bad])
    for use in (pack, lambda trees: tree_size(trees[0])):
        with pytest.raises(ValueError, match="rollout 0: a fork after"):
            use([Tree([made])])
    with pytest.raises(ValueError, match="a fork of rollout 0: ids are float64"):
        pack([Tree([replace(made, forks=[Fork(1, np.array([1.5]), 0, 1, 0)])])])


def forked(rng, tree, vocab=61):
    """The tree with up to three forks per rollout, some of which follow it for a while."""
    rollouts = []
    for made in tree.rollouts:
        forks = []
        for number in range(int(rng.integers(0, 4))):
            at = int(rng.integers(1, len(made.ids) + 1))
            shared = made.ids[at : at + int(rng.integers(0, 4))]
            ids = np.concatenate([shared, rng.integers(0, vocab, int(rng.integers(1, 5)))])
            start = int(rng.integers(0, len(ids)))
            forks.append(Fork(at, ids, start, int(rng.integers(start + 1, len(ids) + 1)), number, number + 7))
        rollouts.append(replace(made, forks=forks))
    return Tree(rollouts, tree.branches)


@given(st.integers(0, 2**31), st.booleans())
def test_each_scored_token_sees_its_own_path(seed, scored):
    rng = np.random.default_rng(seed)
    group = random_group(rng)
    (tree,) = make_trees([group], [random_branches(rng) if scored else ()], [range(4)])
    tree = forked(rng, tree)
    plan = pack([tree])
    assert tree_size(tree) == (plan.n_tokens, (plan.position_ids + 1).sum())
    found = []
    for m in np.flatnonzero(plan.kind == FORK):
        row = plan.row[m]
        visible = np.flatnonzero((np.arange(plan.n_tokens) <= row) & (row < plan.subtree_end))
        numbers = (plan.rollout[m], plan.turn[m], plan.answer[m], plan.token[m], plan.label[m])
        found.append((plan.input_ids[visible].tolist(), *map(int, numbers)))
        assert plan.position_ids[row] == len(visible) - 1
    expected = [
        (
            [*made.ids[: fork.at], *fork.ids[:place]],
            made.index,
            fork.turn,
            fork.answer,
            place - fork.start,
            fork.ids[place],
        )
        for made in tree.rollouts
        for fork in made.forks
        for place in range(fork.start, fork.stop)
    ]
    assert found == expected
    plain = pack([Tree([replace(made, forks=()) for made in tree.rollouts], tree.branches)])
    for name in ("label", "kind", "rollout", "turn", "answer", "token"):
        assert np.array_equal(getattr(plan, name)[plan.kind != FORK], getattr(plain, name)), name
