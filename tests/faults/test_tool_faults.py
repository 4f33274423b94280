"""A tool that hangs, raises or comes too late: the policy reads so or the run ends in a line, and nothing leaks."""

from __future__ import annotations

import asyncio
import gc
from collections import Counter

import pytest

from igpo_fast.batch import finished_groups
from igpo_fast.dialect import make_dialect
from igpo_fast.engines.base import Sampling
from igpo_fast.errors import ToolError
from igpo_fast.rollout import Agent, Limits
from igpo_fast.setup import set_up
from igpo_fast.tools.base import Passage, ToolResult
from igpo_fast.tools.limited import LimitedTool
from igpo_fast.tools.search import Bm25Search
from igpo_fast.types import Question
from tests.clock import JumpingLoop
from tests.scripted import ScriptedEngine, words_tokenizer
from tests.tiny import settings

DIALECT = make_dialect("tags", words_tokenizer(), max_passage_tokens=8, max_answer_tokens=4, max_answers=2)
LIMITS = Limits(max_turns=4, max_turn_tokens=6, max_tokens=64)
FAILED = "D D D"
FOUND = ToolResult((Passage("p1", "", "A B born C D"),))


class Tool:
    """Takes 1 s; ``faults`` by query."""

    def __init__(self, **faults):
        self.faults, self.at_once, self.most, self.late = faults, 0, 0, []

    async def __call__(self, query, corpus=""):
        self.at_once += 1
        self.most = max(self.most, self.at_once)
        try:
            await asyncio.sleep(1)
            await self.faults.get(query, self.fine)()
            return FOUND
        finally:
            self.at_once -= 1

    async def fine(self):
        pass

    async def hang(self):
        await asyncio.Event().wait()

    async def goes_on_regardless(self):
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(2)
            self.late.append(asyncio.get_running_loop().now)


def limited(tool, calls=8, timeout=10.0, failure_text=FAILED):
    return LimitedTool(tool, calls=calls, timeout=timeout, failure_text=failure_text)


class Batch:
    """Four rollouts of a question; rollout 1 asks for B, the others for A; then all answer."""

    def __init__(self, tool):
        self.engine = ScriptedEngine(
            lambda key, turn: "<answer> C </answer>" if turn else f"<search> {'AB'[key[3] == 1]} </search>"
        )
        self.tool, self.loop = tool, JumpingLoop()

    def run(self):
        agent = Agent(self.engine, self.tool, DIALECT, LIMITS, Sampling(), seed=0, concurrency=8)
        asked = [Question("q", "A B born ?", ("C D",))]
        ((_, group),) = finished_groups(agent, asked, 4, 1, loop_factory=lambda: self.loop)
        return group.rollouts


@pytest.fixture(autouse=True)
def no_complaints(caplog):
    yield
    gc.collect()
    assert not caplog.records  # asyncio complains of tasks destroyed and of exceptions not retrieved


def test_a_tool_that_hangs_is_given_up_and_the_policy_reads_so():
    tool = Tool()
    tool.faults["B"] = tool.hang
    batch = Batch(wrapped := limited(tool))
    rollouts = batch.run()
    assert [" ".join(r.turns[0].response.split()) for r in rollouts] == [
        f"<information> {text} </information>" for text in ("A B born C D", FAILED, "A B born C D", "A B born C D")
    ]
    assert [r.turns[0].passages for r in rollouts] == [("p1",), (), ("p1",), ("p1",)]
    assert all(r.answer == "C" for r in rollouts)
    assert batch.loop.now == 10
    assert wrapped.counts == {"calls": 4, "timeouts": 1, "failures": 1}
    assert tool.at_once == 0


def test_what_comes_after_the_timeout_is_not_used():
    tool = Tool()
    tool.faults["B"] = tool.goes_on_regardless
    rollouts = Batch(wrapped := limited(tool)).run()
    assert tool.late == [12.0]
    assert rollouts[1].turns[0].passages == ()
    assert wrapped.counts["timeouts"] == 1


def test_without_a_text_the_run_stops_at_the_first_timeout():
    tool = Tool()
    tool.faults["B"] = tool.hang
    batch = Batch(limited(tool, failure_text=None))
    with pytest.raises(ToolError, match=r"^search: no result within 10 s; raise rollout.tool_timeout, or .*$"):
        batch.run()
    assert sorted(key[3] for key in batch.engine.released) == [0, 1, 2, 3]


@pytest.mark.parametrize("error", [ConnectionError("cable\ncut"), TimeoutError("of its own")])
def test_a_tool_that_raises_ends_the_batch_in_a_line(error):
    tool = Tool()

    async def broken():
        raise error

    tool.faults["B"] = broken
    batch = Batch(wrapped := limited(tool, calls=2))
    line = f"search: the tool raised {type(error).__name__}: {' '.join(str(error).split())}; correct it, then"
    with pytest.raises(ToolError) as raised:
        batch.run()
    assert str(raised.value) == f"{line} resume the run"
    assert raised.value.__cause__ is error
    assert batch.loop.now == 1
    assert (tool.at_once, wrapped.counts["timeouts"]) == (0, 0)
    assert sorted(key[3] for key in batch.engine.released) == [0, 1, 2, 3]
    assert not asyncio.all_tasks(batch.loop)


def test_a_tools_own_message_passes():
    tool = Tool()

    async def broken():
        raise ToolError("search: no passages in collection ''; give data.corpus=FILE")

    tool.faults["B"] = broken
    with pytest.raises(ToolError, match=r"^search: no passages"):
        Batch(limited(tool)).run()


@pytest.mark.parametrize("calls, seconds", [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_no_more_calls_at_a_time_than_allowed(calls, seconds):
    tool = Tool()
    batch = Batch(limited(tool, calls))
    batch.run()
    assert (tool.most, batch.loop.now) == (min(calls, 4), seconds)


def test_waiting_for_ones_turn_does_not_count():
    wrapped = limited(Tool(), calls=1, timeout=1.5)
    batch = Batch(wrapped)
    batch.run()
    assert batch.loop.now == 4
    assert wrapped.counts == {"calls": 4}


def test_a_step_after_another_has_its_own_loop():
    wrapped = limited(Tool(), calls=1)
    for _ in range(2):
        Batch(wrapped).run()
    assert wrapped.counts["calls"] == 8


def test_a_tool_that_counts_is_counted_once():
    class Counting(Tool):
        def __init__(self):
            super().__init__()
            self.counts = Counter()

        async def __call__(self, query, corpus=""):
            self.counts["calls"] += 1
            return await super().__call__(query, corpus)

    tool = Counting()
    tool.faults["B"] = tool.hang
    wrapped = limited(tool)
    Batch(wrapped).run()
    assert wrapped.counts is tool.counts
    assert tool.counts == {"calls": 4, "timeouts": 1, "failures": 1}


def test_a_runs_tool_has_limits_where_it_can_fail(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "warm-start"
    tools = [
        set_up(settings(tmp_path, cache, *more)).agent.tool
        for more in ((), ("search.url=http://127.0.0.1:9/retrieve", "rollout.tool_timeout=7"))
    ]
    assert isinstance(tools[0], Bm25Search)
    assert isinstance(tools[1], LimitedTool) and tools[1]._timeout == 7
