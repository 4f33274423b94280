"""Which keys each block of queries reads, from the plan alone: built once per (plan, window)."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from igpo_kernels.plan import TreePlan

TILE = 256
"""Most queries a tile holds."""
WASTE = 1.15
"""Runs share a tile while its area is at most this many times the areas that they would have alone ..."""
SMALL = 4096
"""... plus this many (query, key) cells: what a tile of its own costs in overhead."""
CACHED_CELLS = 1 << 24
"""Masks are kept for all layers and passes while a plan's tiles have at most this many cells (64 MiB in float32)."""


class Tile(NamedTuple):
    """Queries ``start:stop`` and the keys that any of them sees: earlier ones, then the queries themselves."""

    start: int
    stop: int
    keys: slice | torch.Tensor
    """One range of packed indices, or int64 [n_keys]."""
    n_keys: int


def tiles(plan: TreePlan, window: int | None, device: torch.device | str = "cpu") -> list[Tile]:
    """Tiles that cover every query once, each with a superset of the keys it sees.

    For a query q >= start, any visible key k < start has ``k < start <= q < subtree_end[k]``: it lies on the path
    to ``start``. So a tile's keys are that path and the tile itself.
    """
    key = ("tiles", window, str(device))
    if key not in plan.cache:
        plan.cache[key] = [_tile(plan, window, a, b, device) for a, b in _cuts(plan)]
    return plan.cache[key]


def mask(plan: TreePlan, number: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where tile ``number``'s queries see its keys, -inf elsewhere: [tile, keys]."""
    made = plan.cache.setdefault(("masks", window, dtype, str(device)), {})
    if number in made:
        return made[number]
    every = tiles(plan, window, device)
    tile = every[number]
    query = torch.arange(tile.start, tile.stop, device=device)[:, None]
    key = torch.arange(plan.n_tokens, device=device)[tile.keys]
    hidden = (key > query) | (query >= plan.tensor("subtree_end", device)[tile.keys])
    if window is not None:
        position = plan.tensor("position_ids", device)
        hidden |= position[tile.start : tile.stop, None] - position[tile.keys] >= window
    result = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    if sum((t.stop - t.start) * t.n_keys for t in every) <= CACHED_CELLS:
        made[number] = result
    return result


def _cuts(plan: TreePlan) -> list[tuple[int, int]]:
    """Cut the row into tiles: a run (a path without a fork) alone, or with its neighbours where that wastes little."""
    depth = plan.position_ids - plan.position_ids[plan.tree_start]
    index = np.arange(1, plan.n_tokens)
    continues = (depth[1:] == depth[:-1] + 1) & (plan.subtree_end[:-1] > index)
    starts = np.concatenate([[0], index[~continues], [plan.n_tokens]]).tolist()
    cuts: list[tuple[int, int]] = []
    alone = 0  # cells that the last tile's runs would have in tiles of their own
    for run_start, run_stop in pairwise(starts):
        for a in range(run_start, run_stop, TILE):
            b = min(a + TILE, run_stop)
            cells = (b - a) * (int(depth[a]) + b - a)
            if cuts:
                first = cuts[-1][0]
                together = (b - first) * (int(depth[first]) + b - first)
                if b - first <= TILE and together <= WASTE * (alone + cells) + SMALL:
                    cuts[-1] = (first, b)
                    alone += cells
                    continue
            cuts.append((a, b))
            alone = cells
    return cuts


def _tile(plan: TreePlan, window: int | None, start: int, stop: int, device: torch.device | str) -> Tile:
    root = int(plan.tree_start[start])
    seen = plan.subtree_end[root:start] > start
    if window is not None:
        lowest = int(plan.position_ids[start:stop].min())
        seen &= plan.position_ids[root:start] > lowest - window
    keys = np.concatenate([np.flatnonzero(seen) + root, np.arange(start, stop)])
    if keys[-1] - keys[0] + 1 == len(keys):
        return Tile(start, stop, slice(int(keys[0]), stop), len(keys))
    return Tile(start, stop, torch.from_numpy(keys).to(device), len(keys))
