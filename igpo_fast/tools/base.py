"""What a tool is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """A retrievable piece of text."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class ToolResult:
    """What a tool call brought."""

    passages: tuple[Passage, ...]
    """Best first; empty when nothing was found."""


class Tool(Protocol):
    """A search tool: a query in, passages out."""

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """Search ``corpus`` (``Question.corpus``) for ``query``."""
        ...
