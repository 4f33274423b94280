"""The tool ``visit``: a whole passage, which searches show cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from igpo_fast.rollouts.tools.base import Tool
from igpo_fast.types import Action, Passage, Question, ToolResult

VISIT = "visit"
VISIT_TOOL = {
    "type": "function",
    "function": {
        "name": VISIT,
        "description": "Read a passage from its beginning to its end.",
        "parameters": {
            "type": "object",
            "properties": {"id": {"type": "string", "description": "What a search shows in brackets."}},
            "required": ["id"],
        },
    },
}


class Visit(Tool):
    """Reads passages in memory. Where it is among a run's tools, results of searches show the passages' ids.

    Args:
        collections: name -> passages; a rollout reads those of its question's (``Question.corpus``).
    """

    schemas = (VISIT_TOOL,)
    counted = ("calls", "empty")

    def __init__(self, collections: Mapping[str, Sequence[Passage]]):
        super().__init__()
        self._collections = collections
        self._by_id: dict[str, dict[str, Passage]] = {}

    async def call(self, opened: Question, action: Action) -> ToolResult:
        """The passage's title and text; a failure if there is none of that id."""
        self.counts["calls"] += 1
        corpus = opened.corpus
        if corpus not in self._by_id:
            self._by_id[corpus] = {passage.id: passage for passage in self._collections.get(corpus, ())}
        passage = self._by_id[corpus].get(action.arguments["id"].strip("[] "))
        if passage is None:
            self.counts["empty"] += 1
            return ToolResult(text="There is no such passage.")
        return ToolResult(text="\n".join(part for part in (passage.title, passage.text) if part))
