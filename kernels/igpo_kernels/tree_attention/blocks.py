"""Key blocks that each query tile visits, from the plan alone: built once per (plan, window, block sizes)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from igpo_kernels.cache import on_device
from igpo_kernels.plan import TreePlan


@dataclass(frozen=True)
class BlockLists:
    """Runs of columns to visit per row: rows are query tiles and columns key blocks, or the other way round.

    A pair is *full* if every query of the tile sees every key of the block, *masked* if only some pairs are visible;
    pairs without any are in no run. A run is of one kind and as long as possible. Tensors are int32.
    """

    order: torch.Tensor
    """The rows to compute, by descending number of visits, so that long ones start first [rows or fewer]."""
    offset: torch.Tensor
    """Row r's full runs are ``runs[offset[2 * r] : offset[2 * r + 1]]``, its masked ones follow, up to
    ``offset[2 * r + 2]`` [2 * rows + 1]."""
    runs: torch.Tensor
    """First column and the one past the last, ascending within a row's kind [R, 2]."""

    def columns(self, row: int, masked: bool) -> list[int]:
        """Columns that a row visits with a mask, or without."""
        at = 2 * row + masked
        runs = self.runs[self.offset[at] : self.offset[at + 1]].tolist()
        return [column for start, stop in runs for column in range(start, stop)]


def block_lists(
    plan: TreePlan, window: int | None, queries: int, keys: int, *, by_key: bool = False, only: str | None = None,
    device="cpu",
) -> BlockLists:  # fmt: skip
    """The runs for tiles of ``queries`` and blocks of ``keys`` tokens, both counted from the pack's start, as tensors
    on ``device``: one row per tile, or with ``by_key`` one row per block.

    Args:
        only: rows of the plan (``rows_read``, ...); ``order`` then has the tiles that hold some of them.
    """
    key = ("blocks", window, queries, keys, by_key)

    def make() -> BlockLists:
        arrays = plan.cached(key, lambda: _block_lists(plan, window, queries, keys, by_key))
        if only is None:
            return BlockLists(*(on_device(array, device) for array in arrays))
        order = arrays[0][np.isin(arrays[0], getattr(plan, only) // queries)]
        every = block_lists(plan, window, queries, keys, by_key=by_key, device=device)
        return replace(every, order=on_device(order, device))

    return plan.cached((*key, only, str(device)), make)


def _block_lists(plan: TreePlan, window: int | None, queries: int, keys: int, by_key: bool) -> list[np.ndarray]:
    rows = -(-plan.n_tokens // (keys if by_key else queries))
    bounds = _bounds(plan, queries, keys)
    if window is not None:
        place, runs = _runs_within(plan, window, bounds, queries, keys, by_key)
    else:
        place, runs = (_runs_of_blocks if by_key else _runs_of_tiles)(bounds)
    offset = np.concatenate([[0], np.cumsum(np.bincount(place, minlength=2 * rows))])
    visits = np.bincount(place // 2, runs[:, 1] - runs[:, 0], rows)
    return [array.astype(np.int32) for array in (np.argsort(-visits, kind="stable"), offset, runs)]


def visible_area(plan: TreePlan, window: int | None = None) -> int:
    """Number of visible (query, key) pairs: the work that no tiling can avoid."""
    path = plan.position_ids - plan.position_ids[plan.tree_start] + 1
    return int((path if window is None else np.minimum(path, window)).sum())


def _bounds(plan: TreePlan, queries: int, keys: int) -> np.ndarray:
    """Bounds [blocks, 4] of each key block without a window: tiles ``[0]:[3]`` see some of it, ``[1]:[2]`` all of it.

    The tiles that see a block are a range, from the tile of its first key to that of its keys' last descendant; and so
    are the tiles that see all of it: behind its last key, before any key's subtree ends.
    """
    end = _blocks(plan.subtree_end, keys, 0)
    start = np.arange(0, len(end) * keys, keys)
    first, stop = start // queries, -(-end.max(1) // queries)
    full_first = -(-(start + keys - 1) // queries)
    earliest = end.min(1)
    full_stop = np.where(earliest == plan.n_tokens, stop, earliest // queries)
    none = full_stop <= full_first
    return np.stack([first, np.where(none, stop, full_first), np.where(none, stop, full_stop), stop], 1)


# Runs are made as (place, runs): place [R], ascending, is 2 * row for a full run and 2 * row + 1 for a masked one.


def _runs_of_blocks(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs by key: at most one full run per block, with a masked one before and behind it."""
    place = np.add.outer(2 * np.arange(len(bounds)), [0, 1, 1])
    runs = bounds[:, [[1, 2], [0, 1], [2, 3]]]
    visited = runs[..., 0] < runs[..., 1]
    return place[visited], runs[visited]


def _runs_of_tiles(bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs by query: a run starts at block b for the tiles that visit b and not b - 1, and stops for the tiles that
    visit b - 1 and not b. Neighbouring blocks differ by few tiles, so nothing as large as all pairs is made."""
    runs = []
    for masked, columns in enumerate(([1, 2], [0, 1, 2, 3])):
        ranges = np.pad(bounds[:, columns], ((1, 1), (0, 0)))
        tile, start = _by_place(*_differences(ranges[1:], ranges[:-1]))
        _, stop = _by_place(*_differences(ranges[:-1], ranges[1:]))
        runs.append((2 * tile + masked, np.stack([start, stop], 1)))
    return _by_place(*map(np.concatenate, zip(*runs, strict=True)))


def _runs_within(plan: TreePlan, window: int, bounds, queries: int, keys: int, by_key: bool) -> tuple:
    """Runs with a window, which counts positions: each (tile, block) whose nearest positions are within it is
    decided."""
    sizes, beyond = (queries, keys), np.iinfo(np.int64).max
    lowest_of_query, lowest_of_key = (_blocks(plan.position_ids, size, beyond).min(1) for size in sizes)
    highest_of_query, highest_of_key = (_blocks(plan.position_ids, size, -1).max(1) for size in sizes)
    pairs = []
    for part in np.array_split(np.arange(len(bounds)), 1 + ((bounds[:, 3] - bounds[:, 0]).sum() >> 22)):
        tile, at = _expand(bounds[part, 0], bounds[part, 3])
        near = lowest_of_query[tile] - highest_of_key[part[at]] < window
        pairs.append((tile[near], part[at[near]]))
    tile, block = map(np.concatenate, zip(*pairs, strict=True))
    full = (tile >= bounds[block, 1]) & (tile < bounds[block, 2])
    full &= highest_of_query[tile] - lowest_of_key[block] < window
    visible = full | _within(plan, window, tile, block, queries, keys)
    tile, block, full = tile[visible], block[visible], full[visible]
    row, column = (block, tile) if by_key else (tile, block)
    place, column = _by_place(2 * row + ~full, column)
    cut = np.flatnonzero((np.diff(place) != 0) | (np.diff(column) != 1)) + 1
    first, last = np.append(0, cut), np.append(cut, len(place)) - 1
    return place[first], np.stack([column[first], column[last] + 1], 1)


def _by_place(place: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(place, kind="stable")
    return place[order], values[order]


def _differences(inside: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(tile, block) of the tiles in a block's ranges ``inside`` and in none of ``outside``, by ascending block; both
    are [blocks, 2 * ranges], ascending."""
    between = np.pad(outside, ((0, 0), (1, 1)))
    between[:, -1] = np.iinfo(np.int64).max
    first = np.maximum(inside[:, 0::2, None], between[:, None, 0::2])
    stop = np.minimum(inside[:, 1::2, None], between[:, None, 1::2])
    tile, at = _expand(first.ravel(), stop.ravel())
    return tile, at // first[0].size


def _expand(first: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of each range first:stop, one range after the other, and the index of each one's range."""
    count = np.maximum(stop - first, 0)
    owner = np.repeat(np.arange(len(first)), count)
    return np.arange(len(owner)) + (first - np.cumsum(count) + count)[owner], owner


def _blocks(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """``values`` as [blocks, size], the last block filled up."""
    return np.concatenate([values, np.full(-len(values) % size, fill)]).reshape(-1, size)


def _within(plan: TreePlan, window: int, tile, block, queries: int, keys: int) -> np.ndarray:
    """Whether any visible pair of each (tile, block) lies within ``window`` positions, decided key by key.

    A key before the tile is seen by the tile's queries up to its subtree's end; the lowest position among those is a
    running minimum.
    """
    lowest = np.minimum.accumulate(_blocks(plan.position_ids, queries, np.iinfo(np.int64).max), axis=1)
    end, position = _blocks(plan.subtree_end, keys, 0), _blocks(plan.position_ids, keys, -window)
    result = (block + 1) * keys > tile * queries  # keys inside the tile see themselves
    open_pairs = np.flatnonzero(~result)
    for part in np.array_split(open_pairs, max(1, len(open_pairs) * keys >> 22)):
        reach = np.minimum(end[block[part]] - (tile[part] * queries)[:, None], queries)
        seen_from = lowest[tile[part][:, None], np.maximum(reach, 1) - 1]
        result[part] = ((reach > 0) & (seen_from - position[block[part]] < window)).any(1)
    return result
