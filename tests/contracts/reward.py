"""What every function of ``algorithm.outcome`` owes (docs/extending.md)."""

import asyncio
import math
from dataclasses import replace

import numpy as np
import pytest

from igpo_fast.rollouts.outcome import Outcome
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.types import Question, Rollout, Turn, answer_with, search_for

ANSWERS = ("Goethe", "goethe!", "Johann Wolfgang von Goethe", "Nobody", "", " ", "</answer>", "x" * 10_000, "\x00", "é")


def rollout_of(question, answer, searches=1):
    """One that searches, then answers; a malformed last turn for None."""
    ids, logp = np.ones(2, np.int32), np.zeros(2, np.float32)
    turns = [Turn(ids, logp, f"query {n}", (search_for(f"query {n}"),), ids, "A text", ("p",)) for n in range(searches)]
    last = () if answer is None else (answer_with(answer),)
    turns.append(Turn(ids, logp, str(answer), last, np.zeros(0, np.int32)))
    return Rollout(question, 0, ids, tuple(turns))


class RewardContract:
    """Fixture: ``reward``, a function of a rollout."""

    question = Question("q7", "Who wrote Faust?", ("Goethe", "Johann Wolfgang von Goethe"))
    judges_all = True
    """Whether it has a verdict on every rollout."""

    def verdicts(self, reward, *rollouts):
        """Numbers by name of each rollout, as a run asks for them: all at once."""
        outcome = Outcome("the reward", reward)

        async def together():
            async with Tools([]).open(self.question) as tools:
                return await asyncio.gather(*(outcome(rollout, tools) for rollout in rollouts))

        return asyncio.run(together())

    def test_every_rollout_has_a_verdict_in_finite_numbers(self, reward):
        """Answered or malformed, at the first turn or after many; ``Outcome`` refuses what no run takes."""
        rollouts = [rollout_of(self.question, answer, n) for answer in (*ANSWERS, None) for n in (0, 1, 5)]
        for numbers in self.verdicts(reward, *rollouts):
            assert numbers or not self.judges_all
            assert all(math.isfinite(number) for number in numbers.values())

    def test_the_same_rollout_earns_the_same_whatever_its_place_and_company(self, reward):
        rollout = rollout_of(self.question, "Goethe")
        first, *_, last = self.verdicts(reward, rollout, rollout_of(self.question, None), replace(rollout, index=3))
        assert first == last == self.verdicts(reward, rollout)[0]

    def test_all_rollouts_have_the_same_numbers(self, reward):
        """Else a metric's mean would be over other rollouts than its neighbour's."""
        rollouts = [rollout_of(self.question, answer) for answer in (*ANSWERS, None)]
        assert len({frozenset(numbers) for numbers in self.verdicts(reward, *rollouts) if numbers}) == 1

    @pytest.mark.parametrize("answers", [("a",), ("a", "b", "c")])
    def test_it_changes_no_rollout(self, reward, answers):
        rollout = rollout_of(replace(self.question, answers=answers), "a")
        before = repr(rollout)
        self.verdicts(reward, rollout)
        assert repr(rollout) == before
