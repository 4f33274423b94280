"""Scored (row, label) pairs, grouped for the LM head.

Rows repeat, so the LM head runs on distinct rows and its labels' logits on cells: distinct (row, label) pairs. A packer
knows rows and labels on the host; grouped there, once (``Pairs``), they cost an op neither a sort nor a wait for the
device. Plain tensors are grouped where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from igpo_kernels.cache import Cached, on_device
from igpo_kernels.checks import whole_numbers

ALIGNMENT = 16
"""Bytes at multiples of which kernels' arguments begin."""


@dataclass(frozen=True, eq=False)
class Pairs(Cached):
    """M scored pairs on the host, in place of ``labels`` and ``rows`` of ``linear_logprob`` and ``linear_policy_loss``.

    They are checked on the host, grouped once and copied once per device: a call sorts nothing and waits for nothing,
    so that a CUDA graph can capture it after a first call. ``TreePlan.pairs`` makes those of a plan. The arrays are
    copies and read-only: a grouping that is kept stays true.

    >>> pairs = Pairs(label=np.array([7, 9, 7]), row=np.array([1, 0, 1]))
    >>> cells = pairs.on("cpu")
    >>> cells.distinct.tolist(), cells.order.tolist(), cells.offsets.tolist()
    ([0, 1], [1, 0, 2], [0, 1, 3])
    >>> cells.row.tolist(), cells.label.tolist(), cells.of_pair.tolist()
    ([0, 1], [9, 7], [1, 0, 1])

    Raises:
        ValueError: labels or rows that are no whole numbers of at least 0, or not equally many.
    """

    label: np.ndarray
    """int64 [M]."""
    row: np.ndarray | None = None
    """int64 [M], repeats allowed; None is row m for pair m."""
    cache: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        label = whole_numbers("Pairs", "labels", self.label, 0)
        row = np.arange(len(label)) if self.row is None else whole_numbers("Pairs", "rows", self.row, 0)
        if len(label) != len(row):
            raise ValueError(f"Pairs: {len(label)} labels for {len(row)} rows; give one of each per pair")
        for name, array in (("label", label), ("row", row)):
            array.flags.writeable = False
            object.__setattr__(self, name, array)

    def __len__(self) -> int:
        return len(self.label)

    def check(self, op: str, n_vocab: int, n_rows: int) -> None:
        """Raise ValueError unless all labels are below ``n_vocab`` and all rows below ``n_rows``."""
        for name, x, stop in (("label", self.label, n_vocab), ("row", self.row, n_rows)):
            if self.cached(("highest", name), lambda x=x: int(x.max(initial=-1))) >= stop:
                pair = int((x >= stop).argmax())
                raise ValueError(f"{op}: {name} {x[pair]} of pair {pair} is not in 0 .. {stop - 1}")

    @property
    def _grouped(self) -> dict[str, np.ndarray]:
        """The arrays of ``Cells``, by name."""
        return self.cached("grouped", self._group)

    def _group(self) -> dict[str, np.ndarray]:
        order = np.lexsort((self.label, self.row))
        row, label = self.row[order], self.label[order]
        new_row = np.diff(row, prepend=-1) != 0
        new_cell = new_row | (np.diff(label, prepend=-1) != 0)
        row_starts, cell_starts = np.flatnonzero(new_row), np.flatnonzero(new_cell)
        number_of_row, of_pair, row_of_pair = np.cumsum(new_row) - 1, np.empty_like(order), np.empty_like(order)
        of_pair[order], row_of_pair[order] = np.cumsum(new_cell) - 1, number_of_row
        return dict(
            labels=self.label, rows=self.row, distinct=row[row_starts], order=order,
            offsets=np.append(row_starts, len(row)), row=number_of_row[cell_starts], label=label[cell_starts],
            of_pair=of_pair, row_of_pair=row_of_pair, cell_offsets=np.append(cell_starts, len(row)),
        )  # fmt: skip

    def on(self, device: torch.device | str) -> Cells:
        """The grouped pairs on ``device``: one copy, made once."""
        return self.cached(str(device), lambda: self._copy(device))

    def _copy(self, device: torch.device | str) -> Cells:
        arrays = self._grouped
        step = ALIGNMENT // np.dtype(np.int64).itemsize
        padded = [np.pad(array, (0, -len(array) % step)) for array in arrays.values()]
        parts = on_device(np.concatenate(padded), device).split([len(array) for array in padded])
        tensors = {name: part[: len(arrays[name])] for name, part in zip(arrays, parts, strict=True)}
        one_to_one = len(arrays["distinct"]) == len(self) and bool((arrays["order"] == np.arange(len(self))).all())
        return Cells(**tensors, one_to_one=one_to_one)

    def chunk(self, rows: slice, columns: Sequence[slice], device: torch.device, first_label: int = 0) -> Chunk:
        """The distinct ``rows`` and their pairs, by panels of the vocabulary.

        Args:
            rows: numbers of distinct rows. columns: adjoining panels of vocabulary entries.
            first_label: the label of entry 0; pairs of other entries than ``columns`` are in no panel.
        """
        of = self._grouped
        pairs = of["order"][of["offsets"][rows.start] : of["offsets"][rows.stop]]
        pairs = pairs[np.argsort(self.label[pairs], kind="stable")]
        row, label = of["row_of_pair"][pairs] - rows.start, self.label[pairs] - first_label
        starts = np.array([c.start for c in columns])
        edges = np.searchsorted(label, [*starts, columns[-1].stop])
        column = label.copy()
        column[edges[0] : edges[-1]] -= np.repeat(starts, np.diff(edges))
        pairs, row, column = (on_device(x, device) for x in (pairs, row, column))
        parts = [slice(*part) for part in pairwise(edges.tolist())]
        panels = [(c, part, (row[part], column[part])) for c, part in zip(columns, parts, strict=True)]
        return Chunk(self.on(device).distinct[rows], pairs, row, panels)


class Chunk(NamedTuple):
    """Some distinct rows and their m pairs, in the order of their labels."""

    rows: torch.Tensor
    """Rows of hidden [U]."""
    pairs: torch.Tensor
    """Places of the pairs in the inputs [m]."""
    row: torch.Tensor
    """Each pair's row in the chunk [m]."""
    panels: list[tuple[slice, slice, tuple[torch.Tensor, torch.Tensor]]]
    """Each panel's columns, its pairs, and their (row, column in the panel)."""


@dataclass(frozen=True)
class Rows:
    """Pairs on a device, grouped by row; rows and, within a row, labels are in ascending order."""

    labels: torch.Tensor
    """[M]"""
    rows: torch.Tensor
    """[M]"""
    distinct: torch.Tensor
    """Row of hidden [U]."""
    order: torch.Tensor
    """Pairs sorted by (row, label) [M]."""
    offsets: torch.Tensor
    """Pairs of distinct row u are ``order[offsets[u] : offsets[u + 1]]``: [U + 1]."""
    one_to_one: bool
    """Whether pair m is known to be all of distinct row m: then nothing is gathered, nor summed."""

    @classmethod
    def sort(cls, labels: torch.Tensor, rows: torch.Tensor, vocab: int) -> Rows:
        key, order = torch.sort(rows * vocab + labels, stable=True)
        distinct, count = torch.unique_consecutive(key // vocab, return_counts=True)
        return Rows(labels, rows, distinct, order, offsets_of(count), False)

    @classmethod
    def in_order(cls, labels: torch.Tensor) -> Rows:
        """Of pairs whose rows are 0 .. M - 1."""
        labels = labels.clone(memory_format=torch.contiguous_format)  # kernels read them from an aligned address
        ramp = torch.arange(len(labels) + 1, device=labels.device)
        return Rows(labels, ramp[:-1], ramp[:-1], ramp[:-1], ramp, True)


@dataclass(frozen=True)
class Cells(Rows):
    """Pairs on a device, grouped by row and by cell: a cell is a distinct (row, label); both in ascending order."""

    row: torch.Tensor
    """Index into ``distinct`` of each cell [C]."""
    label: torch.Tensor
    """[C]"""
    of_pair: torch.Tensor
    """Cell of each pair [M]."""
    row_of_pair: torch.Tensor
    """Index into ``distinct`` of each pair [M]."""
    cell_offsets: torch.Tensor
    """Pairs of cell c are ``order[cell_offsets[c] : cell_offsets[c + 1]]``: [C + 1]."""

    @classmethod
    def sort(cls, labels: torch.Tensor, rows: torch.Tensor, vocab: int) -> Cells:
        key, order = torch.sort(rows * vocab + labels, stable=True)
        cell, of_sorted, in_cell = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
        distinct, in_row = torch.unique_consecutive(key // vocab, return_counts=True)
        of_pair = torch.empty_like(order)
        of_pair[order] = of_sorted
        row = torch.searchsorted(distinct, cell // vocab)
        return cls(
            labels, rows, distinct, order, offsets_of(in_row), False, row, cell % vocab, of_pair, row[of_pair],
            offsets_of(in_cell),
        )  # fmt: skip

    @classmethod
    def in_order(cls, labels: torch.Tensor) -> Cells:
        rows = Rows.in_order(labels)
        return cls(**vars(rows), row=rows.rows, label=rows.labels, of_pair=rows.rows, row_of_pair=rows.rows,
                   cell_offsets=rows.offsets)  # fmt: skip

    def spread(self, values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """``values[index]``, for one of ``row``, ``of_pair`` and ``row_of_pair``."""
        return values if self.one_to_one else values[index]

    def ordered(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` [M] in the order of the sorted pairs: float32, at an address of their own, as kernels need it."""
        return values.to(torch.float32, copy=True) if self.one_to_one else values[self.order].float()

    def sums_by_row(self, ordered: torch.Tensor) -> torch.Tensor:
        """Sums [U] over the pairs of each row, of values that are ``ordered``."""
        return self._sums(ordered, self.offsets)

    def sums_by_cell(self, ordered: torch.Tensor) -> torch.Tensor:
        """Sums [C] over the pairs of each cell, of values that are ``ordered``."""
        return self._sums(ordered, self.cell_offsets)

    def _sums(self, ordered: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        if self.one_to_one or not len(ordered):
            return ordered
        # index_add_ would add by atomics.
        return torch.segment_reduce(ordered, "sum", offsets=offsets, unsafe=True)


def offsets_of(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


@dataclass(frozen=True)
class GivenPairs:
    """An op's labels and rows, checked: tensors, or ``Pairs``."""

    labels: torch.Tensor
    """int64 [M]."""
    given_rows: torch.Tensor | None
    """int64 [M]; None is row m for pair m."""
    host: Pairs | None = None
    """The pairs where the host knows them."""

    @classmethod
    def of(cls, pairs: Pairs, device: torch.device) -> GivenPairs:
        cells = pairs.on(device)
        return cls(cells.labels, cells.rows, pairs)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def rows(self) -> torch.Tensor:
        """int64 [M]."""
        return torch.arange(len(self), device=self.labels.device) if self.given_rows is None else self.given_rows

    def grouped(self, kind: type[Rows], vocab: int) -> Rows:
        """The pairs grouped on their device, as ``Rows`` or ``Cells``. Without ``host`` and with rows that is a sort,
        and a wait for the numbers of groups."""
        if self.host is not None:
            return self.host.on(self.labels.device)
        return kind.in_order(self.labels) if self.given_rows is None else kind.sort(self.labels, self.rows, vocab)

    @torch.compiler.disable
    def on_host(self) -> Pairs:
        """The pairs on the host; tensors are copied there."""
        if self.host is not None:
            return self.host
        return Pairs(*(None if x is None else x.cpu().numpy() for x in (self.labels, self.given_rows)))
