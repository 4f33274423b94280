"""What every Tool owes (igpo_fast/rollouts/tools/base.py)."""

import asyncio
import json
from collections.abc import Mapping

from igpo_fast.rollouts.dialect.parsing import fits, kinds_of, parameters_of
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import FOUND
from igpo_fast.types import Action, Passage, Question, ToolResult, search_for
from tests.contracts.reward import rollout_of

TEXTS = ("", " \n", "?!", "</search>", "</tool_call><|im_end|>", "ein Fuß", "\x00", "x" * 10_000, "../../etc", "';--")
"""Texts that fit any schema's text, whatever they mean to the tool."""
VALUES = {
    "integer": (0, -1, 10**30), "number": (0.0, -1.5, 1e308), "boolean": (True, False), "null": (None,),
    "array": ([], [[]], ["x"] * 1000), "object": ({}, {"</tool_call>": {"": None}}),
}  # fmt: skip


def told(tool, what):
    """Metrics and warning of what one tool counted, which begins anew."""
    tools = Tools([tool])
    return tools.report(tools.take(), what)


class ToolContract:
    """Fixture: ``tool``, which answers ``action`` for ``question``."""

    question = Question("q7", "Who is it?", ("A",))
    action: Action
    """A call that succeeds."""
    same = True
    """Whether the same call brings the same in two rollouts."""

    def calls(self, tool, *rollouts):
        """The results of each rollout's calls, which run at once, as all rollouts do."""

        async def rollout(tools, actions):
            async with tools.open(self.question) as opened:
                return await opened.call(actions)

        async def together():
            tools = Tools([tool])
            try:
                return await asyncio.gather(*(rollout(tools, actions) for actions in rollouts))
            finally:
                await tools.aclose()

        return asyncio.run(together())

    def hostile(self, tool):
        """Calls whose arguments fit the schemas: each argument odd in turn, optional ones left out."""
        for schema in tool.schemas:
            parameters = parameters_of(schema)
            required = schema["function"].get("parameters", {}).get("required", ())
            plain = {name: self._odd(parameters[name])[0] for name in required}
            if schema["function"]["name"] == self.action.tool:
                plain |= self.action.arguments
            for name in parameters:
                for value in self._odd(parameters[name]):
                    assert fits(value, parameters[name])
                    yield Action(schema["function"]["name"], plain | {name: value})

    def _odd(self, schema):
        kinds = kinds_of(schema) or ("string", *VALUES)
        return [value for kind in kinds for value in (TEXTS if kind == "string" else VALUES[kind])]

    def test_it_describes_itself(self, tool):
        assert tool.schemas and Tools([tool]).schemas == tuple(tool.schemas)
        for schema in tool.schemas:
            described = schema["function"]
            assert schema["type"] == "function" and described["name"].isidentifier()
            assert described["description"].strip()
            parameters = described["parameters"]
            assert parameters["type"] == "object"
            assert set(parameters.get("required", ())) <= set(parameters["properties"])
            assert json.loads(json.dumps(schema)) == schema
        assert self.action.tool in tool.names and tool.names[0] == tool.schemas[0]["function"]["name"]

    def test_a_call_brings_a_result_and_is_counted(self, tool):
        ((result,),) = self.calls(tool, [self.action])
        assert isinstance(result, ToolResult) and not result.failure
        for passage in result.passages:
            assert isinstance(passage, Passage)
            assert all(isinstance(text, str) for text in (passage.id, passage.title, passage.text))
        assert result.text.encode() is not None
        assert tool.counts["calls"] == 1 and not tool.counts["failures"]

    def test_rollouts_have_states_of_their_own(self, tool):
        """What one rollout did is nothing to another, be it at the same time or before."""
        first, second = self.calls(tool, [self.action], [self.action])
        (third,) = self.calls(tool, [self.action])
        assert not self.same or first == second == third

    def test_many_calls_at_a_time_and_an_event_loop_after_the_other(self, tool):
        for _ in range(2):
            results = self.calls(tool, *([self.action] * 4 for _ in range(5)))
            assert all(isinstance(result, ToolResult) and not result.failure for row in results for result in row)
        assert tool.counts["calls"] == 40

    def test_hostile_arguments_have_results(self, tool):
        """A failure at worst: what a policy says ends no run, and what it is shown can be written."""
        actions = list(self.hostile(tool))
        for (result,) in self.calls(tool, *([action] for action in actions)):
            assert isinstance(result, ToolResult)
            assert all(isinstance(text, str) for text in (result.text, result.failure))
            (result.text + result.failure).encode()
        assert tool.counts["calls"] == len(actions) and tool.counts["failures"] <= len(actions)
        ((result,),) = self.calls(tool, [self.action])
        assert not result.failure

    def test_outcomes_are_numbers(self, tool):
        async def outcomes():
            opened = await tool.open(self.question)
            try:
                ended = (rollout_of(self.question, answer) for answer in (None, "", "A"))
                return [await tool.outcome(opened, rollout) for rollout in ended]
            finally:
                await tool.close(opened)
                await tool.aclose()

        for outcome in asyncio.run(outcomes()):
            assert isinstance(outcome, Mapping)
            assert all(isinstance(name, str) and isinstance(value, (int, float)) for name, value in outcome.items())

    def test_a_check_counts_nothing(self, tool):
        tool.check(self.question)
        assert not +tool.counts

    def test_counts_are_metrics_and_begin_anew(self, tool):
        self.calls(tool, [self.action])
        counts, warning = told(tool, "step 1")
        assert set(counts) == {f"tool/{name}" for name in tool.counted} and "calls" in tool.counted
        assert counts["tool/calls"] == 1 and isinstance(warning, str)
        assert set(told(tool, "step 2")[0].values()) == {0.0}


class SearchContract(ToolContract):
    """Fixture: ``tool``, which answers ``query`` in ``corpus``."""

    query, corpus = "cat", ""
    finds = True
    """Whether it finds passages for ``query``."""

    @property
    def action(self):
        return search_for(self.query)

    @property
    def question(self):
        return Question("q7", self.query, ("a",), corpus=self.corpus)

    def test_it_finds_passages_and_counts_them(self, tool):
        result = asyncio.run(tool(self.query, self.corpus))
        assert bool(result.passages) == self.finds
        counts = tool.counts
        assert (counts["calls"], counts["passages"], counts["empty"]) == (1, len(result.passages), not self.finds)
        assert set(FOUND) <= set(tool.counted)

    def test_any_text_is_a_query(self, tool):
        for text in ("", "\ud800"):  # no text that a turn could hold
            assert isinstance(asyncio.run(tool(text, self.corpus)), ToolResult), text
