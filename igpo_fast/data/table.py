"""Tables whose cells are looked up by the names of row and column."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from igpo_fast.data.fields import BadField, text
from igpo_fast.data.rows import Row, rows_of
from igpo_fast.errors import InputError

NO_ROW, NO_COLUMN = "no such row:", "no such column, only:"
"""What ``Table.cell`` says of what is missing, before the name of the row, or the names of the columns."""


class Table:
    """A table: a cell per row and column.

    Args:
        cells: texts by row and column.
    Raises:
        InputError: two cells that are asked for alike.

    >>> Table({("zavu kolo", "height"): "42"}).cell("Zavu Kolo, height")
    '42'
    """

    def __init__(self, cells: Mapping[tuple[str, str], str]):
        self._cells = {_key(f"{row} {column}"): cell for (row, column), cell in cells.items()}
        if len(self._cells) < len(cells):
            asked = sorted(_key(f"{row} {column}") for row, column in cells)
            twice = next(first for first, second in pairwise(asked) if first == second)
            raise InputError(f"table: two cells are asked for as {twice!r}; name rows and columns apart")
        self._columns = {_key(column): column for _, column in cells}

    def __len__(self) -> int:
        return len(self._cells)

    def __contains__(self, asked: str) -> bool:
        return _key(asked) in self._cells

    def cell(self, asked: str) -> str:
        """The cell of "row column", or a text that says which of the two does not exist.

        Capitals, spaces and commas do not count.
        """
        key = _key(asked)
        if key in self._cells:
            return self._cells[key]
        column = max((column for column in self._columns if f" {key}".endswith(f" {column}")), key=len, default="")
        if not column:
            return f"{NO_COLUMN} {', '.join(self._columns.values())}"
        return f"{NO_ROW} {key.removesuffix(column).strip()}"


def _key(name: str) -> str:
    return " ".join(name.casefold().replace(",", " ").split())


def load_table(source: str | Path) -> Table:
    """A table from a file, whose first column names the rows.

    Args:
        source: ``.csv`` with a line of column names, or what ``rows.rows_of`` takes. Empty cells do not exist.
    Raises:
        InputError: missing or malformed file, no cells, a row without a name, a row or column that occurs twice.
    """
    cells: dict[tuple[str, str], str] = {}
    for row in _csv_rows(source) if str(source).endswith(".csv") else rows_of(source):
        try:
            (_, name), *rest = row.values.items() or [("", "")]
            named = text(name, "name of the row")
            if not named:
                raise BadField("a row without a name; fill its first column")
            found = {(named, column): text(value, column) for column, value in rest}
        except BadField as error:
            raise InputError(f"{row.where}: {error}") from None
        if cells.keys() & found.keys():
            raise InputError(f"{row.where}: row {named!r} occurs twice; make names unique")
        cells |= {key: cell for key, cell in found.items() if cell}
    if not cells:
        raise InputError(f"{source}: no cells; give a line of column names, and rows")
    try:
        return Table(cells)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def _csv_rows(source: str | Path) -> Iterator[Row]:
    path = Path(source)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from _under_header(csv.reader(file, strict=True), path)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give an existing file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    except csv.Error as error:
        raise InputError(f"{path}: not CSV ({error}); correct it") from None


def _under_header(lines: Any, path: Path) -> Iterable[Row]:
    header = [name.strip() for name in next(lines, [])]
    if "" in header[1:] or len(set(header)) < len(header):
        raise InputError(f"{path} line 1: column names that are empty or occur twice; give each column its own")
    for cells in lines:
        where = f"{path} line {lines.line_num}"
        if not any(cells):
            continue
        if len(cells) != len(header):
            raise InputError(f"{where}: {len(cells)} cells under {len(header)} column names; correct it")
        yield Row(where, "", dict(zip(header, map(str.strip, cells), strict=True)))
