"""The tool ``lookup``: the cell of a table."""

from __future__ import annotations

from collections.abc import Mapping

from igpo_fast.data.table import Table
from igpo_fast.errors import ToolError
from igpo_fast.rollouts.tools.base import Tool, text_function
from igpo_fast.types import LOOKUP, Action, Question, ToolResult

LOOKUP_TOOL = text_function(
    LOOKUP,
    "Look up one cell of a table by the name of its row, followed by the name of its column.",
    "cell",
    "Row and column, like: Norway population",
)


class Lookup(Tool):
    """Reads a cell from the question's table. It counts ``calls`` and, of those, ``empty`` ones, whose cell does not
    exist.

    Args:
        tables: tables by ``Question.corpus``.
    """

    schemas = (LOOKUP_TOOL,)
    counted = ("calls", "empty")

    def __init__(self, tables: Mapping[str, Table]):
        super().__init__()
        self._tables = tables

    def check(self, question: Question) -> None:
        if question.corpus not in self._tables:
            raise ToolError("lookup: there is no table; give tools.table=FILE, or world.kind=tables")

    async def open(self, question: Question) -> Table:
        return self._tables[question.corpus]

    async def call(self, opened: Table, action: Action) -> ToolResult:
        asked = action.arguments["cell"]
        self.counts["calls"] += 1
        self.counts["empty"] += asked not in opened
        return ToolResult(text=opened.cell(asked))
