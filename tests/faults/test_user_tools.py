"""Rollouts whose tool hangs, floods, raises, returns bytes, dies or forks go on with a text, and leave nothing."""

import asyncio
from collections import Counter

import numpy as np

from igpo_fast.engines.base import Generation, Sampling
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.rollout import Agent, Limits, run_rollout
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.processes import Processes
from igpo_fast.rollouts.tools.user import UserTool
from igpo_fast.types import Action, Question, answer_with
from tests.families import tokenizer_of
from tests.leftovers import AMPLE, eventually, marked, nothing_is_left  # noqa: F401 (a fixture)
from tests.test_dialect_families import BUDGETS, Says
from tests.test_tool_processes import SHORT

ASKED = Question("q", "Who wrote Faust?", ("Goethe",))
SHOWN = {
    "sleep": ("misbehave failed: it took too long", "timeouts"),
    "flood_result": ("misbehave failed: its result is too long", "too_large"),
    "say": ("misbehave failed: ValueError: ", "raised"),
    "data": ("misbehave failed: its result is no text", "malformed"),
    "exit_hard": ("misbehave failed: its process ended", "died"),
    "segfault": ("misbehave failed: its process ended", "died"),
    "daemon": ("parent", ""),
    "fork_and_return": ("parent", ""),
}
"""What ``tests.hostile`` does -> what the policy reads, and the counter that goes up."""
tokenizer_of("qwen3")("A text")  # threads that it starts at its first use are no tool's


class Both:
    """Says the first turn after a prompt, the second after more."""

    remote = keeps_rollouts = False

    def __init__(self, dialect, first, second):
        self._prompt = len(dialect.prompt(ASKED))
        self._turns = [dialect.encode(turn) for turn in (first, second)]

    async def generate(self, request):
        ids = self._turns[len(request.ids) > self._prompt]
        return Generation(ids, np.zeros(len(ids), np.float32), finished=True)

    def release(self, key):
        pass


def rollout(tools, dialect, *hows):
    """One that calls ``misbehave`` turn after turn, then a tool that works, then answers."""
    calls = [(Action("misbehave", {"how": how}),) for how in (*hows, "quick")]
    turns = [dialect.write(actions) for actions in (*calls, (answer_with("Goethe"),))]
    agent = Agent(Says(dialect, *turns), tools, dialect, Limits(len(turns), 400, 9000), Sampling(), 0, 1)
    return asyncio.run(closing(agent))


async def closing(agent):
    try:
        return await run_rollout(agent, ASKED, 0, 0)
    finally:
        await agent.tools.aclose()


def test_a_rollout_goes_on_whatever_its_tool_does():
    processes = Processes("tests.hostile:misbehave", seconds=AMPLE, max_characters=1000)
    try:
        tool = UserTool("misbehave", processes)
        tools = Tools([tool])
        for name in ("chat", "tags"):
            dialect = make_dialect(name, tokenizer_of("qwen3"), tools.schemas, **BUDGETS)
            for how, (shown, cause) in SHOWN.items():
                processes.seconds = SHORT if how == "sleep" else AMPLE
                made = rollout(tools, dialect, how)
                first, second, last = made.turns
                assert shown in first.response and made.answer == "Goethe" and last.action == "answer", how
                assert first.found == (not cause)
                if how != "sleep":
                    assert "quick" in second.response, how
                counts = Counter({key: n for key, n in tools.take().items() if n})
                assert counts["misbehave/calls"] == 2 and counts[f"misbehave/{cause or 'calls'}"] >= 1, how
                eventually(lambda: len(marked()) == 1, marked)  # the forkserver
    finally:
        processes.end()


def test_a_whole_batch_with_a_tool_that_dies():
    processes = Processes("tests.hostile:misbehave", seconds=AMPLE, max_characters=1000)
    try:
        tools = Tools([UserTool("misbehave", processes)])
        dialect = make_dialect("chat", tokenizer_of("qwen3"), tools.schemas, **BUDGETS)
        turns = [dialect.write((Action("misbehave", {"how": "exit_hard"}),)), dialect.write((answer_with("Goethe"),))]

        agent = Agent(Both(dialect, *turns), tools, dialect, Limits(2, 400, 9000), Sampling(), 0, 8)
        (group,) = rollout_groups(agent, [ASKED], 8, 0)
        assert [made.answer for made in group.rollouts] == ["Goethe"] * 8
        assert tools.take() == {"misbehave/calls": 8, "misbehave/failures": 8, "misbehave/died": 8}
    finally:
        processes.end()
