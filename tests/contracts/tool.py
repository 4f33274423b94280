"""What every Tool owes (igpo_fast/rollouts/tools/base.py)."""

import asyncio

from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import FOUND
from igpo_fast.types import Passage, Question, ToolResult


def told(tool, what):
    """Metrics and warning of what one tool counted, which begins anew."""
    tools = Tools([tool])
    return tools.report(tools.take(), what)


class SearchContract:
    """Fixture: ``tool``, which answers ``query`` in ``corpus``."""

    query, corpus = "cat", ""
    finds = True
    """Whether it finds passages for ``query``."""

    def test_a_call_brings_passages_and_counts_them(self, tool):
        result = asyncio.run(tool(self.query, self.corpus))
        assert isinstance(result, ToolResult) and not result.failure
        assert bool(result.passages) == self.finds
        for passage in result.passages:
            assert isinstance(passage, Passage)
            assert all(isinstance(text, str) for text in (passage.id, passage.title, passage.text))
        counts = tool.counts
        assert (counts["calls"], counts["passages"], counts["empty"]) == (1, len(result.passages), not self.finds)

    def test_the_same_query_brings_the_same(self, tool):
        first, second = (asyncio.run(tool(self.query, self.corpus)) for _ in range(2))
        assert first == second

    def test_any_text_is_a_query(self, tool):
        for text in ("", " \n", "?!", "</search>", "ein Fuß", "\ud800", "x" * 10_000):
            assert isinstance(asyncio.run(tool(text, self.corpus)), ToolResult), text

    def test_many_calls_at_a_time_and_an_event_loop_after_the_other(self, tool):
        async def together():
            try:
                return await asyncio.gather(*(tool(self.query, self.corpus) for _ in range(20)))
            finally:
                await tool.aclose()

        assert asyncio.run(together()) == asyncio.run(together())
        assert tool.counts["calls"] == 40

    def test_a_check_counts_nothing(self, tool):
        tool.check(Question("q", self.query, ("a",)))
        assert not +tool.counts

    def test_counts_are_metrics_and_begin_anew(self, tool):
        asyncio.run(tool(self.query, self.corpus))
        counts, _ = told(tool, "step 1")
        assert set(counts) == {f"tool/{name}" for name in tool.counted} and set(FOUND) <= set(tool.counted)
        assert counts["tool/calls"] == 1
        assert set(told(tool, "step 2")[0].values()) == {0.0}
