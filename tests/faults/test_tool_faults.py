"""A search that hangs, raises or comes too late: the policy reads so or the run ends in a line, and nothing leaks."""

from __future__ import annotations

import asyncio
import gc

import httpx
import pytest

from igpo_fast import setup
from igpo_fast.data.load import load_data
from igpo_fast.engines.base import Sampling
from igpo_fast.errors import ToolError
from igpo_fast.rollouts.batch import finished_groups
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.rollout import Agent, Limits
from igpo_fast.rollouts.tools.search import SEARCH_TOOL, Bm25Search, HttpSearch, NoSearch, make_search
from igpo_fast.setup import set_up
from igpo_fast.types import Question
from tests.clock import JumpingLoop
from tests.scripted import ScriptedEngine, tools_of, words_tokenizer
from tests.search_server import Slow
from tests.tiny import settings

DIALECT = make_dialect(
    "tags", words_tokenizer(), (SEARCH_TOOL,), max_passage_tokens=8, max_answer_tokens=4, max_answers=2
)
LIMITS = Limits(max_turns=4, max_turn_tokens=6, max_tokens=64)
FAILED = "D D D"


def hanging():
    return asyncio.Event().wait()


def limited(server, calls=8, timeout=10.0, retries=0, failure_text=FAILED):
    return HttpSearch(
        "http://127.0.0.1:9/retrieve", 1, timeout=timeout, retries=retries, backoff=0, concurrency=calls,
        failure_text=failure_text, transport=server,
    )  # fmt: skip


def counted(tool):
    return {name: count for name, count in tool.counts.items() if count}


class Batch:
    """Four rollouts of a question; rollout 1 asks for B, the others for A; then all answer."""

    def __init__(self, tool):
        self.engine = ScriptedEngine(
            lambda key, turn: "<answer> C </answer>" if turn else f"<search> {'AB'[key[3] == 1]} </search>"
        )
        self.tool, self.loop = tool, JumpingLoop()

    def run(self):
        agent = Agent(self.engine, tools_of(self.tool), DIALECT, LIMITS, Sampling(), seed=0, concurrency=8)
        asked = [Question("q", "A B born ?", ("C D",))]
        ((_, group),) = finished_groups(agent, asked, 4, 1, loop_factory=lambda: self.loop)
        return group.rollouts


@pytest.fixture(autouse=True)
def no_complaints(caplog):
    yield
    gc.collect()
    assert not caplog.records  # asyncio complains of tasks destroyed and of exceptions not retrieved


def test_a_server_that_hangs_is_given_up_and_the_policy_reads_so():
    server = Slow(B=hanging)
    batch = Batch(tool := limited(server))
    rollouts = batch.run()
    assert [" ".join(r.turns[0].response.split()) for r in rollouts] == [
        f"<information> {text} </information>" for text in ("A B born C D", FAILED, "A B born C D", "A B born C D")
    ]
    assert [r.turns[0].passages for r in rollouts] == [("p1",), (), ("p1",), ("p1",)]
    assert all(r.answer == "C" for r in rollouts)
    assert batch.loop.now == 10
    assert counted(tool) == {"calls": 4, "passages": 3, "timeouts": 1, "failures": 1}
    assert server.at_once == 0


def test_a_search_takes_as_long_as_its_attempts():
    batch = Batch(tool := limited(Slow(B=hanging), retries=2))
    batch.run()
    assert batch.loop.now == 30
    assert counted(tool) == {"calls": 4, "passages": 3, "timeouts": 3, "retries": 2, "failures": 1}


def test_what_comes_after_the_timeout_is_not_used():
    late = []

    async def goes_on_regardless():
        try:
            await asyncio.sleep(100)
        except asyncio.CancelledError:
            await asyncio.sleep(2)
            late.append(asyncio.get_running_loop().now)

    rollouts = Batch(tool := limited(Slow(B=goes_on_regardless))).run()
    assert late == [12.0]
    assert rollouts[1].turns[0].passages == ()
    assert tool.counts["timeouts"] == 1


def test_without_a_text_the_run_stops_at_the_first_timeout():
    batch = Batch(limited(Slow(B=hanging), failure_text=None))
    with pytest.raises(ToolError, match=r"^search.url=http://127.0.0.1:9/retrieve: no answer within 10 s after 1 "):
        batch.run()
    assert sorted(key[3] for key in batch.engine.released) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "error",
    [
        httpx.ReadError("cable\ncut"),
        ConnectionError("cable cut"),
        UnicodeError("label too long"),
        httpx.InvalidURL("?"),
    ],
)
def test_a_connection_that_raises_ends_the_batch_in_a_line(error):
    async def broken():
        raise error

    server = Slow(B=broken)
    batch = Batch(tool := limited(server, calls=2, failure_text=None))
    with pytest.raises(ToolError) as raised:
        batch.run()
    reason = " ".join(str(error).split())
    assert str(raised.value).startswith(f"search.url=http://127.0.0.1:9/retrieve: no answer ({reason}) after 1 attempt")
    assert "\n" not in str(raised.value)
    assert batch.loop.now == 1
    assert (server.at_once, tool.counts["unreachable"]) == (0, 1)
    assert sorted(key[3] for key in batch.engine.released) == [0, 1, 2, 3]
    assert not asyncio.all_tasks(batch.loop)


@pytest.mark.parametrize("calls, seconds", [(1, 4), (2, 2), (3, 2), (4, 1), (8, 1)])
def test_no_more_calls_at_a_time_than_allowed(calls, seconds):
    server = Slow()
    batch = Batch(limited(server, calls))
    batch.run()
    assert (server.most_at_a_time, batch.loop.now) == (min(calls, 4), seconds)


def test_waiting_for_ones_turn_does_not_count():
    batch = Batch(tool := limited(Slow(), calls=1, timeout=1.5))
    batch.run()
    assert batch.loop.now == 4
    assert counted(tool) == {"calls": 4, "passages": 4}


def test_a_step_after_another_has_its_own_loop():
    tool = limited(Slow(), calls=1)
    for _ in range(2):
        Batch(tool).run()
    assert tool.counts["calls"] == 8


NOBODY = ("search.url=http://127.0.0.1:9/retrieve", "search.timeout=7", "search.retries=0")


def test_a_runs_tool_is_the_one_it_asks_for(tmp_path):
    tools = [make_search(config := settings(tmp_path, tmp_path, *more), load_data(config)) for more in ((), NOBODY)]
    assert isinstance(tools[0], Bm25Search)
    assert isinstance(tools[1], HttpSearch) and tools[1].endpoint._timeout == 7


def test_a_tool_that_does_not_answer_is_known_before_the_model_is_loaded(tmp_path, monkeypatch):
    class Loaded(Exception):
        pass

    def load(*arguments):
        raise Loaded

    monkeypatch.setattr(setup, "_load_model", load)
    config = settings(tmp_path, tmp_path, *NOBODY)
    with pytest.raises(ToolError, match=r"^search\.url=http://127\.0\.0\.1:9/retrieve: no answer"):
        set_up(config)
    with pytest.raises(Loaded):  # who does not search needs no server
        set_up(config, search=NoSearch())
