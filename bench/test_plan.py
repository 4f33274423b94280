"""Building plans on the host: packs of 512 rollouts of 8k tokens, 64 groups, 16 answers each, block lists included."""

import numpy as np
import pytest

from igpo_kernels import Branch, RolloutTokens, Tree, pack_within
from igpo_kernels.tree_attention.blocks import block_lists
from igpo_kernels.triton_variants import config_for

TOKENS, PROMPT, TURNS, GROUP, GROUPS = 8192, 200, 16, 8, 64


def tiles(heads_a_key_head):
    """Queries and keys of the tiles for heads of 128 on sm_90, and whether the lists are by key."""
    for part in ("forward", "backward_q", "backward_kv"):
        config, by_key = config_for(f"tree_attention_{part}", "sm_90", "d128", "bf16"), part == "backward_kv"
        yield config["BLOCK_M"] // (1 if by_key else heads_a_key_head), config["BLOCK_N"], by_key


def groups():
    rng = np.random.default_rng(0)
    boundaries = np.linspace(PROMPT, TOKENS - 2, TURNS).astype(np.int64)
    turn = np.full(TOKENS, -1)
    for t, start in enumerate(boundaries[:-1]):
        turn[start : start + 100] = t
    branch = Branch(rng.integers(0, 150_000, 24), 16, 24)
    trees = []
    for _ in range(GROUPS):
        prompt = rng.integers(0, 150_000, PROMPT)
        ids = [np.concatenate([prompt, rng.integers(0, 150_000, TOKENS - PROMPT)]) for _ in range(GROUP)]
        trees.append(Tree([RolloutTokens(i, row, turn, boundaries) for i, row in enumerate(ids)], [branch]))
    return trees


@pytest.mark.parametrize("heads_a_key_head", [4, 8])
def test_plan(compare, heads_a_key_head):
    trees = groups()

    def plans():
        return pack_within(trees, 1 << 17)

    def with_lists():
        made = plans()
        for queries, keys, by_key in tiles(heads_a_key_head):
            for plan in made:
                block_lists(plan, None, queries, keys, by_key=by_key)

    shape = dict(rollouts=GROUP * GROUPS, tokens=TOKENS, turns=TURNS, group=GROUP, heads_a_key_head=heads_a_key_head)
    compare("plan", shape, {"ours": with_lists, "without_lists": lambda: (plans(), None)[1]}, rounds=5)
