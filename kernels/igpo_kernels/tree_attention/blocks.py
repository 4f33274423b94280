"""Which key blocks each query tile visits, from the plan alone: built once per (plan, window, block sizes)."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch

from igpo_kernels.plan import TreePlan


@dataclass(frozen=True)
class BlockLists:
    """For each row, the columns to visit: rows are query tiles and columns key blocks, or the other way round.

    A pair is *full* if every query of the tile sees every key of the block, *masked* if only some pairs are visible;
    pairs without any are in neither list. All int32.
    """

    order: np.ndarray | torch.Tensor
    """Rows by falling number of visits: long rows start first [rows]."""
    full_offset: np.ndarray | torch.Tensor
    """Row r visits ``full[full_offset[r] : full_offset[r + 1]]`` without a mask [rows + 1]."""
    full: np.ndarray | torch.Tensor
    masked_offset: np.ndarray | torch.Tensor
    masked: np.ndarray | torch.Tensor

    @property
    def visits(self) -> int:
        return len(self.full) + len(self.masked)

    def tensors(self) -> tuple:
        return astuple(self)


def block_lists(
    plan: TreePlan, window: int | None, queries: int, keys: int, *, by_key: bool = False, device="cpu"
) -> BlockLists:
    """The lists for tiles of ``queries`` and blocks of ``keys`` tokens, both counted from the pack's start, as tensors
    on ``device``: one row a tile, or with ``by_key`` one row a block."""
    made_for = ("blocks", window, queries, keys, by_key, str(device))
    if made_for not in plan.cache:
        rows = -(-plan.n_tokens // (keys if by_key else queries))
        lists = []
        for tile, block in _pairs(plan, window, queries, keys):
            if by_key:
                row, column = block, tile
            else:  # numpy sorts 16-bit integers by radix
                order = np.argsort(tile.astype(np.uint16) if rows < 1 << 16 else tile, kind="stable")
                row, column = tile[order], block[order]
            lists += [np.concatenate([[0], np.cumsum(np.bincount(row, minlength=rows))]), column]
        order = np.argsort(-(np.diff(lists[0]) + np.diff(lists[2])), kind="stable")
        tensors = (torch.from_numpy(array.astype(np.int32, copy=False)).to(device) for array in (order, *lists))
        plan.cache[made_for] = BlockLists(*tensors)
    return plan.cache[made_for]


def visible_area(plan: TreePlan, window: int | None = None) -> int:
    """(query, key) pairs that see each other: what no tiling can avoid."""
    path = plan.position_ids - plan.position_ids[plan.tree_start] + 1
    return int((path if window is None else np.minimum(path, window)).sum())


def _pairs(plan: TreePlan, window: int | None, queries: int, keys: int) -> tuple:
    """((tile, block) of the full pairs, the same of the masked ones), int32, each by rising block, then tile.

    Without a window the tiles that see a block are a range, from the tile of its first key to that of its keys' last
    descendant; and so are the tiles that see all of it: behind its last key, before any key's subtree ends.
    """
    end = _blocks(plan.subtree_end, keys, 0)
    start = np.arange(0, len(end) * keys, keys)
    first, stop = start // queries, -(-end.max(1) // queries)
    full_first = -(-(start + keys - 1) // queries)
    earliest = end.min(1)
    full_stop = np.where(earliest == plan.n_tokens, stop, earliest // queries)

    count = stop - first
    repeat = lambda values: np.repeat(values.astype(np.int32), count)  # noqa: E731
    block = repeat(np.arange(len(end)))
    tile = np.arange(len(block), dtype=np.int32) + repeat(first - np.cumsum(count) + count)
    full = (tile >= repeat(full_first)) & (tile < repeat(full_stop))
    if window is not None:
        lowest, highest = np.iinfo(np.int64).max, -1
        position_of_query = _blocks(plan.position_ids, queries, highest).max(1)
        position_of_key = _blocks(plan.position_ids, keys, lowest).min(1)
        full &= position_of_query[tile] - position_of_key[block] < window
        visible = full | _within(plan, window, tile, block, queries, keys)
        tile, block, full = tile[visible], block[visible], full[visible]
    return (tile[full], block[full]), (tile[~full], block[~full])


def _blocks(values: np.ndarray, size: int, fill: int) -> np.ndarray:
    """[blocks, size], the last one filled up."""
    return np.concatenate([values, np.full(-len(values) % size, fill)]).reshape(-1, size)


def _within(plan: TreePlan, window: int, tile, block, queries: int, keys: int) -> np.ndarray:
    """Whether any visible pair of each (tile, block) lies within ``window`` positions, decided key by key.

    A key before the tile is seen by the tile's queries up to its subtree's end; the lowest position among those is a
    running minimum.
    """
    lowest = np.minimum.accumulate(_blocks(plan.position_ids, queries, np.iinfo(np.int64).max), axis=1)
    end, position = _blocks(plan.subtree_end, keys, 0), _blocks(plan.position_ids, keys, -window)
    result = (block + 1) * keys > tile * queries  # keys inside the tile see themselves
    near = lowest[tile, -1] - position.max(1)[block] < window
    open_pairs = np.flatnonzero(near & ~result)
    for part in np.array_split(open_pairs, max(1, len(open_pairs) * keys >> 22)):
        reach = np.minimum(end[block[part]] - (tile[part] * queries)[:, None], queries)
        seen_from = lowest[tile[part][:, None], np.maximum(reach, 1) - 1]
        result[part] = ((reach > 0) & (seen_from - position[block[part]] < window)).any(1)
    return result
