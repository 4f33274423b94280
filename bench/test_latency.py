"""Wall time of a batch of rollouts whose tool takes 0-2 s per call: a rollout that waits for its search delays no
other."""

import asyncio
import random
import time
from collections import defaultdict
from dataclasses import replace

import pytest

pytest.importorskip("pydantic")

from igpo_fast.config import load
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import Search
from igpo_fast.setup import set_up
from igpo_fast.types import ToolResult, search_for

QUESTIONS, GROUP = 16, 8
SLOWEST = 2.0
"""Largest latency in seconds; latencies are uniform between 0 and this."""


class SlowSearch(Search):
    """A search tool with latency; ``chains[rollout]`` are the latencies of its calls in the latest batch."""

    def __init__(self, search, slowest):
        super().__init__()
        self._search, self._slowest = search, slowest
        self.begin()

    def begin(self):
        self.rng, self.chains = random.Random(0), defaultdict(list)

    async def search(self, query: str, corpus: str) -> ToolResult:
        latency = self.rng.uniform(0, self._slowest)
        self.chains[asyncio.current_task()].append(latency)
        await asyncio.sleep(latency)
        return await self._search.search(query, corpus)


def test_rollouts(compare, tmp_path):
    config = load(
        "configs/quickstart.yaml",
        [f"run.cache={tmp_path}", "sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0"],
    )
    setup = set_up(config)
    (search,) = setup.agent.tools
    # An untrained policy never searches; here every turn does, whatever it says.
    setup.agent.dialect.parse = lambda text: (search_for("who"),)
    slow, quick = SlowSearch(search, SLOWEST), SlowSearch(search, 0.0)

    def batch(tool):
        tool.begin()
        setup.agent.engine.load_weights()
        agent = replace(setup.agent, tools=Tools([tool]), concurrency=QUESTIONS * GROUP)
        return rollout_groups(agent, setup.data.train[:QUESTIONS], GROUP, 1) and None

    def longest_chain():
        time.sleep(max(map(sum, slow.chains.values())))
        batch(quick)

    def turn_by_turn():
        calls = max(map(len, slow.chains.values()))
        time.sleep(sum(max(chain[t] for chain in slow.chains.values() if len(chain) > t) for t in range(calls)))
        batch(quick)

    shape = dict(
        rollouts=QUESTIONS * GROUP, turns=setup.agent.limits.max_turns, turn_tokens=setup.agent.limits.max_turn_tokens
    )
    shape |= dict(latency=f"uniform 0-{SLOWEST:g} s")
    sides = {"ours": lambda: batch(slow), "longest_chain": longest_chain, "turn_by_turn": turn_by_turn}
    found = compare("latency/rollouts", shape, sides, rounds=1)
    assert found["ours"]["median"] <= 1.3 * found["longest_chain"]["median"]
