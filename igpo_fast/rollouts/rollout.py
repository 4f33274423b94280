"""One rollout: turn after turn, until the policy answers or reaches a limit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from igpo_fast.engines.base import Engine, Generation, Request, Sampling
from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import Dialect
from igpo_fast.rollouts.outcome import Outcome
from igpo_fast.rollouts.tools.base import OpenTools, Tools
from igpo_fast.types import ANSWER, Question, Rollout, Truncation, Turn, truncation

NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Limits:
    """Limits of a rollout. A turn begins only if all its ``max_turn_tokens`` fit in ``max_tokens``."""

    max_turns: int
    max_turn_tokens: int
    """Tokens that the policy may sample per turn."""
    max_tokens: int
    """Tokens per rollout, prompt and responses included."""

    def fits(self, tokens: int) -> bool:
        """Whether a turn may begin after ``tokens`` tokens."""
        return tokens + self.max_turn_tokens <= self.max_tokens


def question_key(question: Question) -> int:
    """A number for sampling keys that depends on the question's id alone: 0 .. 2**63 - 1."""
    return int.from_bytes(hashlib.blake2b(question.id.encode(), digest_size=8).digest()) >> 1


def opening(question: Question, dialect: Dialect, limits: Limits) -> np.ndarray:
    """The prompt: int32 [p].

    Raises:
        InputError: it leaves no room for a turn.
    """
    prompt = dialect.prompt(question)
    if not limits.fits(len(prompt)):
        raise InputError(
            f"question {question.id}: its prompt of {len(prompt)} tokens and a turn of "
            f"{limits.max_turn_tokens} exceed rollout.max_tokens={limits.max_tokens}; raise it, or leave the "
            "question out"
        )
    return prompt


@dataclass(frozen=True)
class Agent:
    """Parts and settings of sampling, tools and parsing, made once per run."""

    engine: Engine
    tools: Tools
    dialect: Dialect
    limits: Limits
    sampling: Sampling
    seed: int
    """Seed of the sampling noise, together with step, question and rollout."""
    concurrency: int
    """Rollouts that the engine samples at a time; with an engine that ``keeps_rollouts`` between turns, rollouts that
    wait for their tools count, too."""
    outcome: Outcome | None = None
    """Asked what each rollout earned; None where answers decide."""


class OpenRollout:
    """A rollout in the making: it takes one turn after the other, and tools answer, until a turn ends it.

    Args:
        tools: the rollout's own.
        index: its place in its group.
    Raises:
        InputError: the prompt leaves no room for a turn.
    """

    def __init__(self, agent: Agent, question: Question, tools: OpenTools, index: int = 0):
        self._agent, self._question, self._tools, self._index = agent, question, tools, index
        self.prompt_ids = opening(question, agent.dialect, agent.limits)
        self.ids = self.prompt_ids
        """All tokens so far: int32 [L]."""
        self.turns: tuple[Turn, ...] = ()
        """The turns so far, each with its response but the one that ended it."""
        self.ended = False
        self._truncated: Truncation = ""

    async def resume(self, turns: Sequence[Turn]) -> None:
        """Go on behind turns of an earlier rollout, token for token. Their calls are made again, for tools that keep a
        state; what they bring now is not read."""
        for turn in turns:
            if turn.calls:
                await self._tools.call(turn.actions)
            self._append(turn)

    def request(self, key: tuple[int, ...]) -> Request:
        """What samples the next turn."""
        agent = self._agent
        return Request(
            key=key,
            ids=self.ids,
            max_tokens=agent.limits.max_turn_tokens,
            stop_ids=agent.dialect.stop_ids,
            stop_strings=agent.dialect.stop_strings,
            sampling=agent.sampling,
        )

    async def add(self, generation: Generation) -> None:
        """Add the next turn, with the response to it unless it ends the rollout."""
        dialect, limits = self._agent.dialect, self._agent.limits
        text = dialect.decode(generation.ids)
        actions = dialect.parse(text)
        call = dialect.call(generation.ids, actions)
        last = Turn(generation.ids, generation.logp, text, actions, response_ids=NOTHING, call=call)
        out_of_turns = len(self.turns) + 1 == limits.max_turns
        if last.action != ANSWER and not out_of_turns:
            results = await self._tools.call(actions)
            response_ids, response = dialect.response(actions, results, ended=generation.finished)
            if limits.fits(len(self.ids) + len(last.ids) + len(response_ids)):
                passages = tuple(passage.id for result in results for passage in result.passages)
                answered = replace(
                    last, response_ids=response_ids, response=response, passages=passages,
                    found=any(result.found for result in results), failed=any(result.failure for result in results),
                )  # fmt: skip
                self._append(answered)
                return
        self._append(last)
        self.ended, self._truncated = True, truncation(last.action, generation.finished, out_of_turns)

    def _append(self, turn: Turn) -> None:
        self.turns = (*self.turns, turn)
        self.ids = np.concatenate([self.ids, turn.ids, turn.response_ids]).astype(np.int32)

    async def finish(self) -> Rollout:
        """The rollout, with what it earned if the agent asks for outcomes."""
        rollout = Rollout(self._question, self._index, self.prompt_ids, self.turns, self._truncated)
        if self._agent.outcome is not None:
            rollout = replace(rollout, rewards=await self._agent.outcome(rollout, self._tools))
        return rollout


async def run_rollout(
    agent: Agent,
    question: Question,
    step: int,
    index: int,
    turn: Callable[[], AbstractAsyncContextManager] = nullcontext,
    begun: Sequence[Turn] = (),
) -> Rollout:
    """Sample turns until the policy answers, ``max_turns`` are made, or the next turn would not fit.

    Args:
        step: seeds the sampling noise, with the agent's seed, the question's id and ``index``.
        index: the rollout's place in its group.
        turn: makes the context of each turn in the engine.
        begun: turns with responses that it begins with (``OpenRollout.resume``).
    Returns:
        The rollout; its last turn has no response. A turn cut by length counts only if it parses anyway.
    Raises:
        InputError: the prompt leaves no room for a turn. Errors of engine, tools and outcome pass through.
    """
    key = (agent.seed, step, question_key(question), index)
    async with agent.tools.open(question) as tools:
        rollout = OpenRollout(agent, question, tools, index)
        try:
            await rollout.resume(begun)
            while not rollout.ended:
                async with turn():
                    generation = await agent.engine.generate(rollout.request(key))
                await rollout.add(generation)
        finally:
            agent.engine.release(key)
        return await rollout.finish()
