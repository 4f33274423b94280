"""Building plans on the host: packs of 512 rollouts of 8k tokens, 64 groups, 16 answers each, block lists included."""

import numpy as np

from igpo_kernels import Branch, RolloutTokens, Tree, pack_within
from igpo_kernels.tree_attention.blocks import block_lists

TOKENS, PROMPT, TURNS, GROUP, GROUPS = 8192, 200, 16, 8, 64
TILES = {"forward": (32, 128, False), "backward_q": (32, 64, False), "backward_kv": (32, 128, True)}
"""Queries and keys of the tiles for heads of 128 with four query heads to a key head on sm_90, and the orientation."""


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


def test_plan(compare):
    trees = groups()

    def plans():
        return pack_within(trees, 1 << 17)

    def with_lists():
        made = plans()
        for queries, keys, by_key in TILES.values():
            for plan in made:
                block_lists(plan, None, queries, keys, by_key=by_key)

    shape = dict(rollouts=GROUP * GROUPS, tokens=TOKENS, turns=TURNS, group=GROUP)
    compare("plan", shape, {"ours": with_lists, "without_lists": lambda: (plans(), None)[1]}, rounds=5)
