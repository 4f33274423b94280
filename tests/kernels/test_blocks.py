"""Block lists: exactly the blocks with a visible pair, full where nothing is hidden, and little area beside it."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels.tree_attention.blocks import block_lists, visible_area
from igpo_kernels.tree_attention.reference import visible
from igpo_kernels.triton_variants import configs
from tests.kernels.test_plan import plan_of
from tests.kernels.test_tree_attention import comb

BY_QUERY, BY_KEY = ("forward", "backward_q"), ("backward_kv",)
GROUPS = (1, 4, 7)
"""Query heads a key head: a tile of the first two kernels holds BLOCK_M // group queries."""


def visits(lists):
    """(tile, block) pairs in all runs."""
    return int((lists.runs[:, 1] - lists.runs[:, 0]).sum())


def shipped_tiles():
    """(queries, keys) of every configuration, both orientations."""
    found = set()
    for part in BY_QUERY + BY_KEY:
        for _, _, _, config in configs(f"tree_attention_{part}"):
            for group in GROUPS if part in BY_QUERY else (1,):
                found.add((config["BLOCK_M"] // group, config["BLOCK_N"]))
    return sorted(found)


def by_hand(plan, window, queries, keys):
    """From the dense mask: bool [tiles, blocks] whether any pair is visible, and whether all are."""
    n = plan.n_tokens
    tiles, blocks = -(-n // queries), -(-n // keys)
    mask, real = (np.zeros((tiles * queries, blocks * keys), bool) for _ in range(2))
    mask[:n, :n], real[:n] = visible(plan, window, "cpu").numpy(), True
    mask, real = (x.reshape(tiles, queries, blocks, keys) for x in (mask, real))
    return mask.any((1, 3)), (mask | ~real).all((1, 3))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32), st.sampled_from([None, 1, 3, 9, 20]),
    st.sampled_from([(4, 4), (8, 4), (3, 8), (16, 16), (64, 32)]), st.booleans(),
)  # fmt: skip
def test_visited_are_exactly_the_blocks_with_a_visible_pair(seed, window, sizes, by_key):
    plan = plan_of(seed)[-1]
    some, all_of = by_hand(plan, window, *sizes)
    if by_key:
        some, all_of = some.T, all_of.T
    lists = block_lists(plan, window, *sizes, by_key=by_key)
    for row in range(len(some)):
        assert lists.columns(row, masked=False) == np.flatnonzero(all_of[row]).tolist()
        assert lists.columns(row, masked=True) == np.flatnonzero(some[row] & ~all_of[row]).tolist()
    assert visits(lists) == some.sum()
    starts = (np.diff(kind.astype(int), axis=1, prepend=0) == 1 for kind in (all_of, some & ~all_of))
    assert len(lists.runs) == sum(map(np.count_nonzero, starts))
    assert visible_area(plan, window) == int(visible(plan, window, "cpu").sum())


def test_long_rows_start_first():
    lists = block_lists(comb(900, 6, trees=2), None, 16, 16)
    rows = range(len(lists.order))
    lengths = np.array([len(lists.columns(row, masked=False) + lists.columns(row, masked=True)) for row in rows])
    assert (np.diff(lengths[lists.order]) <= 0).all() and sorted(lists.order.tolist()) == list(rows)


@pytest.mark.parametrize("by_key", [False, True])
def test_lists_and_their_making_grow_with_the_tokens_not_with_their_square(by_key):
    plan = comb(1 << 18, 16, wrapper_and_answer=24)
    tracemalloc.start()
    lists = block_lists(plan, None, 16, 64, by_key=by_key)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert visits(lists) > 3e7 and len(lists.runs) <= 3 * len(lists.order) and peak < 16 << 20


def test_lists_are_made_once_a_plan():
    plan = comb(100, 3)
    assert block_lists(plan, None, 16, 16) is block_lists(plan, None, 16, 16)
    assert block_lists(plan, 8, 16, 16) is not block_lists(plan, None, 16, 16)


@pytest.mark.parametrize(("queries", "keys"), shipped_tiles())
@pytest.mark.parametrize("by_key", [False, True])
def test_area_of_a_comb(queries, keys, by_key):
    plan = comb(8192, 16, wrapper_and_answer=24)
    pairs = visits(block_lists(plan, None, queries, keys, by_key=by_key))
    assert 1 <= pairs * queries * keys / visible_area(plan) <= 1.15
