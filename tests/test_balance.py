"""update/balance.py: what a tree costs, and how evenly ranks share trees out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.types import ANSWER, Group, Question, Rollout, Turn
from igpo_fast.update.balance import shares, tree_cost
from igpo_fast.update.policy import make_trees
from igpo_kernels import Branch, pack
from tests.doing import doing
from tests.trees import random_branches, random_group

RANKS = 8
HEAVY = 1e-4
"""Attention's part of a 1.5B model: 2 H L / P with H 1536, L 28."""


def rollout_of(question, index, prompt, turns, start=10):
    """A rollout of ``prompt`` tokens and turns of the given (sampled, response) lengths, no two of them alike."""
    ids = iter(range(start, 10**9))
    made = [
        Turn(
            np.array([next(ids) for _ in range(said)], np.int32), np.zeros(said, np.float32), "", doing(ANSWER),
            np.array([next(ids) for _ in range(heard)], np.int32),
        )
        for said, heard in turns
    ]  # fmt: skip
    return Rollout(question, index, np.arange(prompt, dtype=np.int32), tuple(made))


@given(st.integers(0, 2**31), st.booleans())
def test_the_cost_is_that_of_the_packed_tree(seed, scored):
    """Rollouts that share turns, or are another's prefix, or the same; answers that share their wrapper."""
    rng = np.random.default_rng(seed)
    group = random_group(rng)
    (tree,) = make_trees([group], [random_branches(rng, int(rng.integers(1, 4))) if scored else ()], [range(4)])
    plan = pack([tree])
    assert tree_cost(tree, 0.0) == plan.n_tokens
    assert tree_cost(tree, 1.0) == plan.n_tokens + (plan.position_ids + 1).sum()  # a query sees its path


@given(st.lists(st.floats(0, 1e6), max_size=40), st.integers(1, 9))
def test_every_item_goes_to_one_rank_and_no_rank_has_much_more(costs, ranks):
    taken = shares(costs, ranks)
    assert sorted(number for numbers in taken for number in numbers) == list(range(len(costs)))
    assert all(numbers == sorted(numbers) for numbers in taken)
    totals = [sum(costs[number] for number in numbers) for numbers in taken]
    assert max(totals) <= sum(costs) / ranks + max(costs, default=0) * (1 + 1e-9)


def evenness(costs):
    totals = [sum(costs[number] for number in numbers) for numbers in shares(costs, RANKS)]
    return max(totals) / np.mean(totals)


def test_one_rank_takes_everything_in_order():
    assert shares([1.0, 5.0, 3.0], 1) == [[0, 1, 2]]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_even_on_log_normal_lengths(seed):
    """64 questions x 8 rollouts of 3 to 10 turns; a turn and what it found are log-normal around 200 tokens."""
    rng = np.random.default_rng(seed)
    question = Question("q", "q", ("a",))
    groups = []
    for _ in range(64):
        size = rng.lognormal(5.3, 0.6)
        rollouts = []
        for i in range(8):
            lengths = rng.lognormal(np.log(size), 0.6, (rng.integers(3, 11), 2)).astype(int) + 1
            rollouts.append(rollout_of(question, i, 300, lengths, 1000))
        groups.append(Group(question, tuple(rollouts)))
    trees = make_trees(groups, [[Branch(np.arange(24), 8, 24)]] * 64, [range(8)] * 64)
    assert evenness([tree_cost(tree, HEAVY) for tree in trees]) <= 1.10
