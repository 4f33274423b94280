"""TreePlan: hand-worked layouts, and properties of random trees."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_fast.update.policy import make_trees
from igpo_kernels import ANSWER, DECISION, Branch, RolloutTokens, Tree, pack, pack_within
from tests.trees import random_branches, random_group


def rollout(index, ids, turn, boundaries=()):
    return RolloutTokens(index, np.array(ids), np.array(turn), np.array(boundaries, np.int64))


def test_a_comb_by_hand():
    # Prompt 1 2; turn 0 is 3 4, response 5; turn 1 is 6 7. The answer 9 8 in the wrapper 0.
    # Trunk fed: 1 2 3 4 5 6 (7 is a label only), then the branch of prefix_1 (5 tokens), then that of prefix_0.
    plan = pack(
        [
            Tree(
                [rollout(4, [1, 2, 3, 4, 5, 6, 7], [-1, -1, 0, 0, -1, 1, 1], [2, 5])],
                [Branch(np.array([0, 9, 8, 0]), 1, 3)],
            )
        ]
    )
    assert plan.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 0, 9, 0, 9]
    assert plan.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 2, 3]
    assert plan.subtree_end.tolist() == [10, 10, 8, 8, 8, 6, 8, 8, 10, 10]
    decision = plan.kind == DECISION
    assert plan.row[decision].tolist() == [1, 2, 4, 5]
    assert plan.label[decision].tolist() == [3, 4, 6, 7]
    assert plan.turn[decision].tolist() == [0, 0, 1, 1]
    assert plan.token[decision].tolist() == [2, 3, 5, 6]
    answer = plan.kind == ANSWER
    assert plan.row[answer].tolist() == [8, 9, 6, 7]  # prefix_0 first, then prefix_1
    assert plan.label[answer].tolist() == [9, 8, 9, 8]
    assert plan.turn[answer].tolist() == [0, 0, 1, 1]
    assert set(plan.rollout.tolist()) == {4}


def test_shared_tokens_have_an_owner_each():
    # Both share 1 2 3 and prefix_0 and prefix_1; the second goes on differently.
    a = rollout(0, [1, 2, 3, 4, 5], [-1, 0, -1, 1, 1], [1, 3])
    b = rollout(1, [1, 2, 3, 6, 7], [-1, 0, -1, 1, 1], [1, 3])
    plan = pack([Tree([a, b], [Branch(np.array([8, 9]), 0, 2)])])
    assert plan.input_ids.tolist() == [1, 2, 3, 4, 6, 8, 8]  # one branch a boundary, not one a rollout
    assert plan.position_ids.tolist() == [0, 1, 2, 3, 3, 3, 1]
    assert plan.subtree_end.tolist() == [7, 6, 6, 4, 5, 6, 7]
    pairs = set(zip(plan.rollout.tolist(), plan.kind.tolist(), plan.row.tolist(), plan.label.tolist(), strict=True))
    assert {(0, DECISION, 0, 2), (1, DECISION, 0, 2), (0, DECISION, 2, 4), (1, DECISION, 2, 6)} <= pairs
    assert {(0, ANSWER, 2, 8), (1, ANSWER, 2, 8), (0, ANSWER, 5, 9), (1, ANSWER, 5, 9)} <= pairs
    assert len(np.unique(plan.row)) < plan.n_pairs


def test_tokens_with_a_gradient_by_hand():
    # Two trees of a turn 3 4, whose response 5 is fed for the answer 8 9 in the wrapper 0; 4 is a label only, but for
    # that. Fed: 1 3 4 5, the wrapper and 8, and the same again.
    made = rollout(0, [1, 3, 4, 5], [-1, 0, 0, -1], [4])
    plan = pack([Tree([made], [Branch(np.array([0, 8, 9]), 1, 3)])] * 2)
    assert plan.input_ids.tolist() == [1, 3, 4, 5, 0, 8] * 2
    assert plan.rows_with_gradient.tolist() == [0, 1, 6, 7]
    assert plan.rows_without_gradient.tolist() == [2, 3, 4, 5, 8, 9, 10, 11]
    assert plan.rows_read.tolist() == [0, 1, 4, 5, 6, 7, 10, 11]
    assert plan.rows_read_without_gradient.tolist() == [4, 5, 10, 11]
    assert plan.place_in_parts.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    trained = plan.with_gradient
    assert trained.input_ids.tolist() == [1, 3, 1, 3] and trained.position_ids.tolist() == [0, 1, 0, 1]
    assert trained.subtree_end.tolist() == [2, 2, 4, 4] and trained.tree_start.tolist() == [0, 0, 2, 2]
    assert trained.row.tolist() == [0, 1, 2, 3] and trained.label.tolist() == [3, 4, 3, 4]


def test_a_rollout_that_is_a_prefix_of_another_adds_no_token():
    long = rollout(0, [1, 2, 3, 4, 5], [-1, 0, -1, 1, 1])
    short = rollout(1, [1, 2, 3, 4], [-1, 0, -1, 1])
    assert pack([Tree([long, short])]).input_ids.tolist() == [1, 2, 3, 4]


def test_answers_share_their_wrapper():
    plan = pack(
        [
            Tree(
                [rollout(0, [1, 2], [-1, 0], [1])],
                [Branch(np.array([7, 8, 3, 4]), 2, 4), Branch(np.array([7, 8, 3, 5, 6]), 2, 5)],
            )
        ]
    )
    assert plan.input_ids.tolist() == [1, 7, 8, 3, 5]  # the trie of 7 8 3 [4] and 7 8 3 5 [6]
    answers = plan.kind == ANSWER
    assert plan.answer[answers].tolist() == [0, 0, 1, 1, 1]
    assert plan.row[answers].tolist() == [2, 3, 2, 3, 4]


@pytest.mark.parametrize(
    "bad, message",
    [
        (rollout(0, [1, 2], [0, 0]), "trains its first token"),
        (rollout(0, [1, 2], [-1, 0], [3]), "boundaries"),
        (rollout(0, [1, 2], [-1, 0], [0]), "boundaries"),
        (rollout(0, [], []), "0 tokens"),
    ],
)
def test_what_cannot_be_packed_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        pack([Tree([bad], [Branch(np.array([1]), 0, 1)])])


def test_lists_are_packed_and_other_numbers_refused():
    as_lists = RolloutTokens(4, [1, 2, 3, 4], [-1, 0, -1, 1], [1, 3])
    plan = pack([Tree([as_lists], [Branch([9, 8], 1, 2)])])
    arrays = pack([Tree([rollout(4, [1, 2, 3, 4], [-1, 0, -1, 1], [1, 3])], [Branch(np.array([9, 8]), 1, 2)])])
    assert plan.input_ids.tolist() == arrays.input_ids.tolist() and plan.label.tolist() == arrays.label.tolist()
    for bad, message in (
        (RolloutTokens(4, [1.5, 2.0], [-1, 0]), r"^rollout 4: ids are float64 \[2\] from 1.5; give one row of whole"),
        (RolloutTokens(4, [[1, 2]], [-1, 0]), r"rollout 4: ids are int64 \[1, 2\]"),
        (RolloutTokens(4, [1, -100], [-1, 0]), r"rollout 4: ids are int64 \[2\] from -100; .* of at least 0"),
        (RolloutTokens(4, [1, 2], [-1.0, 0.0]), "rollout 4: turns are float64"),
        (RolloutTokens(4, [1, 2], [-1, 0], [1.0]), "rollout 4: boundaries are float64"),
    ):
        with pytest.raises(ValueError, match=message):
            pack([Tree([bad])])
    with pytest.raises(ValueError, match="branch 0: ids are float32"):
        pack([Tree([as_lists], [Branch(np.ones(2, np.float32), 0, 2)])])


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(ValueError, match="at least one token"):
        pack([Tree([rollout(0, [1, 2], [-1, 0], [1])], [Branch(np.array([1]), 1, 1)])])


def test_a_group_over_the_budget_is_named_or_split():
    group = Tree([rollout(i, [1, 10 + i, 3, 4, 5], [-1, 0, 0, 0, 0]) for i in range(4)])
    with pytest.raises(ValueError, match="4 rollouts packs to 13 tokens, over the budget of 8"):
        pack_within([group], 8)
    plans = pack_within([group], 8, split=True)
    assert [plan.n_tokens for plan in plans] == [7, 7]
    assert sorted(np.concatenate([np.unique(plan.rollout) for plan in plans]).tolist()) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="a rollout packs to 4 tokens"):
        pack_within([group], 3, split=True)


def plan_of(seed):
    rng = np.random.default_rng(seed)
    groups = [random_group(rng, int(rng.integers(1, 6))) for _ in range(int(rng.integers(1, 4)))]
    numbers = np.split(
        np.arange(sum(len(g.rollouts) for g in groups)), np.cumsum([len(g.rollouts) for g in groups])[:-1]
    )
    branches = [random_branches(rng, int(rng.integers(1, 4))) for _ in groups]
    trees = make_trees(groups, branches, numbers)
    return [r for g in groups for r in g.rollouts], branches, groups, pack(trees)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_the_visible_path_of_every_pair_is_its_rollouts_prefix(seed):
    rollouts, branches, groups, plan = plan_of(seed)
    index = np.arange(plan.n_tokens)
    group_of = np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])
    for m in range(plan.n_pairs):
        row = plan.row[m]
        seen = index[(index <= row) & (row < plan.subtree_end)]
        assert plan.position_ids[seen].tolist() == list(range(len(seen)))
        owner = rollouts[plan.rollout[m]]
        if plan.kind[m] == DECISION:
            expected = owner.ids[: plan.token[m]]
            assert plan.label[m] == owner.ids[plan.token[m]]
            assert owner.turn_of_token[plan.token[m]] == plan.turn[m] >= 0
        else:
            branch = branches[group_of[plan.rollout[m]]][plan.answer[m]]
            at = branch.start + plan.token[m]
            expected = [*owner.ids[: owner.boundaries[plan.turn[m]]], *branch.ids[:at]]
            assert plan.label[m] == branch.ids[at]
        assert plan.input_ids[seen].tolist() == list(expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_tokens_with_a_gradient_are_the_pack_without_answers(seed):
    rollouts, _, groups, plan = plan_of(seed)
    numbers = np.split(np.arange(len(rollouts)), np.cumsum([len(g.rollouts) for g in groups])[:-1])
    alone, trained = pack(make_trees(groups, None, numbers)), plan.with_gradient
    for name in ("input_ids", "position_ids", "subtree_end", "tree_start"):
        assert getattr(trained, name).tolist() == getattr(alone, name).tolist(), name
    for name in ("row", "label", "kind", "rollout", "turn", "answer", "token"):
        assert getattr(trained, name)[: trained.n_decisions].tolist() == getattr(alone, name).tolist(), name
    by_place = np.empty_like(plan.rows_read)
    by_place[plan.place_in_parts] = plan.rows_read
    first = plan.rows_with_gradient[trained.rows_read]
    assert by_place.tolist() == [*first.tolist(), *plan.rows_read_without_gradient.tolist()]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_every_owner_has_its_pairs_and_no_token_is_read_in_vain(seed):
    rollouts, branches, groups, plan = plan_of(seed)
    group_of = np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])
    decisions = sum(r.decision_tokens for r in rollouts)
    answers = sum(len(r.turns) * sum(b.stop - b.start for b in branches[group_of[i]]) for i, r in enumerate(rollouts))
    assert plan.n_decisions == decisions
    assert plan.n_pairs == decisions + answers  # M = decision tokens x owners + answer tokens
    assert len(np.unique(plan.row)) <= plan.n_pairs
    # As many tokens as the group's trie has nodes, counted here with sets of prefixes; then padding.
    nodes = 0
    for group, answers_of_group in zip(groups, branches, strict=True):
        trunk, boundaries, branch = set(), set(), set()
        for r in group.rollouts:
            last_label = np.flatnonzero(r.turn_of_token >= 0)[-1]
            fed = max(last_label, r.boundaries[-1])
            trunk |= {tuple(r.ids[:d]) for d in range(1, fed + 1)}
            boundaries |= {tuple(r.ids[:b]) for b in r.boundaries}
        for b in answers_of_group:
            branch |= {tuple(b.ids[:d]) for d in range(1, b.stop)}
        nodes += len(trunk) + len(boundaries) * len(branch)
    padding = plan.subtree_end - plan.tree_start == 1
    assert nodes <= plan.n_tokens < nodes + 4
    assert padding[nodes:].all()
