"""Keys that each tile of queries reads, from the plan alone: built once per (plan, window)."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from igpo_kernels.plan import TreePlan

TILE = 256
"""Most queries of a tile."""
WASTE = 1.15
"""Runs share a tile while its area is at most this many times their areas in tiles of their own ..."""
SMALL = 4096
"""... plus this many (query, key) cells: the overhead of a tile of its own."""
TILE_CELLS = 1 << 21
"""Most cells of a tile: far from the root it holds fewer queries, so that its mask takes at most 8 MiB in float32."""
CACHED_CELLS = 1 << 22
"""Masks of tiles that fork are kept for all layers and passes while they have at most this many cells (16 MiB in
float32)."""


class Tile(NamedTuple):
    """Queries ``start:stop`` and the keys that any of them sees: earlier ones, then the queries themselves."""

    start: int
    stop: int
    runs: tuple[slice, ...]
    """Packed indices of the keys, in order; few ranges, so that gathering them copies long pieces."""
    n_keys: int
    fresh: tuple[slice, ...]
    """The last of ``runs``: the keys without the leading ones that the tile before has in the same places."""
    is_path: bool
    """Whether every query sees all keys up to itself."""

    def keys_of(self, x: torch.Tensor) -> torch.Tensor:
        """The keys' rows of ``x`` [N, ...]: a view where they are one range."""
        return x[self.runs[0]] if len(self.runs) == 1 else torch.cat([x[run] for run in self.runs])


def tiles(plan: TreePlan, window: int | None) -> list[Tile]:
    """Tiles that cover every query once, each with a superset of the keys that its queries see.

    For a query q >= start, any visible key k < start has ``k < start <= q < subtree_end[k]``: it lies on the path
    to ``start``. So a tile's keys are that path and the tile itself.
    """
    return plan.cached(("tiles", window), lambda: _tiles(plan, window))


def _tiles(plan: TreePlan, window: int | None) -> list[Tile]:
    tile_list, keys = [], np.empty(0, np.int64)
    for start, stop in _cuts(plan, window):
        before, keys = keys, _keys(plan, window, start, stop)
        shared = min(len(before), len(keys))
        differs = np.flatnonzero(before[:shared] != keys[:shared])
        shared = int(differs[0]) if len(differs) else shared
        length = plan.position_ids[stop - 1] - plan.position_ids[keys[0]] + 1
        is_path = (plan.subtree_end[keys] >= stop).all() and (window is None or length <= window)
        tile_list.append(Tile(start, stop, _runs(keys), len(keys), _runs(keys[shared:]), bool(is_path)))
    return tile_list


def mask(plan: TreePlan, number: int, window: int | None, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """0 where tile ``number``'s queries see its keys, -inf elsewhere: [tile, keys], a view of a mask that paths
    share."""
    tile = tiles(plan, window)[number]
    if _shares(tile):
        return _path_mask(plan, tile, window, dtype, device)
    if not _keeps_masks(plan, window):
        return _fork_mask(plan, tile, window, dtype, device)
    key = ("mask", number, window, dtype, str(device))
    return plan.cached(key, lambda: _fork_mask(plan, tile, window, dtype, device))


def _keeps_masks(plan: TreePlan, window: int | None) -> bool:
    """Whether the masks of all tiles that fork have at most ``CACHED_CELLS`` cells."""
    forks = lambda: (t for t in tiles(plan, window) if not _shares(t))  # noqa: E731
    cells = lambda: sum((t.stop - t.start) * t.n_keys for t in forks())  # noqa: E731
    return plan.cached(("mask cells", window), cells) <= CACHED_CELLS


def _fork_mask(plan: TreePlan, tile: Tile, window: int | None, dtype: torch.dtype, device: torch.device):
    result = torch.zeros(tile.stop - tile.start, tile.n_keys, dtype=dtype, device=device)
    query = torch.arange(tile.start, tile.stop, device=device)[:, None]
    index = tile.keys_of(torch.arange(plan.n_tokens, device=device))
    end = tile.keys_of(plan.tensor("subtree_end", device))
    # Keys before the tile are seen by its first query, and by all queries unless a subtree ends inside the tile.
    before = tile.n_keys - len(query)
    first = 0 if window is not None or bool((end[:before] < tile.stop).any()) else before
    hidden = (index[first:] > query) | (query >= end[first:])
    if window is not None:
        position = plan.tensor("position_ids", device)
        hidden |= position[tile.start : tile.stop, None] - tile.keys_of(position) >= window
    result[:, first:].masked_fill_(hidden, float("-inf"))
    return result


def _shares(tile: Tile) -> bool:
    return tile.is_path and tile.n_keys <= TILE_CELLS // TILE


def _path_mask(plan: TreePlan, tile: Tile, window: int | None, dtype: torch.dtype, device: torch.device):
    """The mask of a path: a view of one mask for the most keys before a tile, which all paths share."""

    def make() -> torch.Tensor:
        sharing = [t for t in tiles(plan, window) if _shares(t)]
        most = max(t.n_keys - (t.stop - t.start) for t in sharing)
        rows = max(t.stop - t.start for t in sharing)
        return torch.full((rows, most + rows), float("-inf"), dtype=dtype, device=device).triu_(most + 1)

    shared = plan.cached(("path mask", window, dtype, str(device)), make)
    rows = tile.stop - tile.start
    most = shared.shape[1] - shared.shape[0]
    return shared[:rows, most + rows - tile.n_keys : most + rows]


def _cuts(plan: TreePlan, window: int | None) -> list[tuple[int, int]]:
    """Cut the row into tiles: a run (a path without a fork) alone, or with its neighbours if that wastes little."""
    depth = plan.position_ids - plan.position_ids[plan.tree_start]
    index = np.arange(1, plan.n_tokens)
    continues = (depth[1:] == depth[:-1] + 1) & (plan.subtree_end[:-1] > index)
    starts = np.concatenate([[0], index[~continues], [plan.n_tokens]]).tolist()
    cuts: list[tuple[int, int]] = []
    alone = 0  # cells that the last tile's runs would have in tiles of their own
    for run_start, run_stop in pairwise(starts):
        b = run_start
        while b < run_stop:
            a, above = b, int(depth[b])
            reach = above if window is None else min(above, window)
            b = min(a + max(1, min(TILE, TILE_CELLS // (reach + TILE))), run_stop)
            cells = (b - a) * (above + b - a)
            if cuts:
                first = cuts[-1][0]
                together = (b - first) * (int(depth[first]) + b - first)
                if b - first <= TILE and together <= min(WASTE * (alone + cells) + SMALL, TILE_CELLS):
                    cuts[-1] = (first, b)
                    alone += cells
                    continue
            cuts.append((a, b))
            alone = cells
    return cuts


def _keys(plan: TreePlan, window: int | None, start: int, stop: int) -> np.ndarray:
    root = int(plan.tree_start[start])
    seen = plan.subtree_end[root:start] > start
    if window is not None:
        lowest = int(plan.position_ids[start:stop].min())
        seen &= plan.position_ids[root:start] > lowest - window
    return np.concatenate([np.flatnonzero(seen) + root, np.arange(start, stop)])


def _runs(keys: np.ndarray) -> tuple[slice, ...]:
    pieces = np.split(keys, np.flatnonzero(np.diff(keys) > 1) + 1)
    return tuple(slice(int(piece[0]), int(piece[-1]) + 1) for piece in pieces)
