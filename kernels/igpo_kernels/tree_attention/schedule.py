"""Which keys each block of queries reads, from the plan alone: built once per (plan, window)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from igpo_kernels.plan import TreePlan

TILE = 256
"""Most queries a tile holds."""
LONG = 64
"""A run of at least this many tokens gets tiles of its own; shorter ones (branches) share a tile."""


class Tile(NamedTuple):
    """Queries ``start:stop`` and the keys that any of them sees: ``before`` (ranges of earlier tokens), then the
    queries themselves."""

    start: int
    stop: int
    before: tuple[tuple[int, int], ...]

    @property
    def keys(self) -> int:
        return sum(b - a for a, b in self.before) + self.stop - self.start


def tiles(plan: TreePlan, window: int | None) -> list[Tile]:
    """Tiles that cover every query once, each with a superset of the keys it sees.

    For a query q >= start, any visible key k < start has ``k < start <= q < subtree_end[k]``: it lies on the path
    to ``start``. So a tile's keys are that path and the tile itself.
    """
    key = ("tiles", window)
    if key not in plan.cache:
        plan.cache[key] = [_tile(plan, window, a, b) for a, b in _cuts(plan)]
    return plan.cache[key]


def _cuts(plan: TreePlan) -> list[tuple[int, int]]:
    """Cut the row into tiles: long runs by themselves, short runs next to each other together."""
    position, end = plan.position_ids, plan.subtree_end
    index = np.arange(1, plan.n_tokens)
    continues = (position[1:] == position[:-1] + 1) & (end[:-1] > index)
    starts = np.concatenate([[0], index[~continues], [plan.n_tokens]]).tolist()
    cuts: list[tuple[int, int]] = []
    shared = False  # whether the last tile is of short runs and may take another
    for a, b in zip(starts, starts[1:], strict=False):
        if b - a >= LONG:
            cuts += [(s, min(s + TILE, b)) for s in range(a, b, TILE)]
            shared = False
        elif shared and b - cuts[-1][0] <= TILE:
            cuts[-1] = (cuts[-1][0], b)
        else:
            cuts.append((a, b))
            shared = True
    return cuts


def _tile(plan: TreePlan, window: int | None, start: int, stop: int) -> Tile:
    root = int(plan.tree_start[start])
    seen = plan.subtree_end[root:start] > start
    if window is not None:
        lowest = int(plan.position_ids[start:stop].min())
        seen &= plan.position_ids[root:start] > lowest - window
    edges = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(np.int8))) + root
    return Tile(start, stop, tuple(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)))
