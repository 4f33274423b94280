"""One rollout: turn after turn, until the policy answers or reaches a limit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np

from igpo_fast.engines.base import Engine, Request, Sampling
from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import Dialect
from igpo_fast.rollouts.outcome import Outcome
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.types import ANSWER, Question, Rollout, Turn, truncation

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


async def run_rollout(
    agent: Agent,
    question: Question,
    step: int,
    index: int,
    turn: Callable[[], AbstractAsyncContextManager] = nullcontext,
) -> Rollout:
    """Sample turns until the policy answers, ``max_turns`` are made, or the next turn would not fit.

    Args:
        step: seeds the sampling noise, with the agent's seed, the question's id and ``index``.
        index: the rollout's place in its group.
        turn: makes the context of each turn in the engine.
    Returns:
        The rollout; its last turn has no response. A turn cut by length counts only if it parses anyway.
    Raises:
        InputError: the prompt leaves no room for a turn. Errors of engine, tools and outcome pass through.
    """
    engine, dialect, limits = agent.engine, agent.dialect, agent.limits
    key = (agent.seed, step, question_key(question), index)
    prompt = opening(question, dialect, limits)
    ids, turns = prompt, []
    async with agent.tools.open(question) as tools:
        try:
            while True:
                request = Request(
                    key=key,
                    ids=ids,
                    max_tokens=limits.max_turn_tokens,
                    stop_ids=dialect.stop_ids,
                    stop_strings=dialect.stop_strings,
                    sampling=agent.sampling,
                )
                async with turn():
                    generation = await engine.generate(request)
                text = dialect.decode(generation.ids)
                actions = dialect.parse(text)
                call = dialect.call(generation.ids, actions)
                last = Turn(generation.ids, generation.logp, text, actions, response_ids=NOTHING, call=call)
                if last.action == ANSWER or len(turns) + 1 == limits.max_turns:
                    break
                results = await tools.call(actions)
                response_ids, response = dialect.response(actions, results, ended=generation.finished)
                extended = np.concatenate([ids, generation.ids, response_ids]).astype(np.int32)
                if not limits.fits(len(extended)):
                    break
                passages = tuple(passage.id for result in results for passage in result.passages)
                last = replace(
                    last, response_ids=response_ids, response=response, passages=passages,
                    found=any(result.found for result in results), failed=any(result.failure for result in results),
                )  # fmt: skip
                turns.append(last)
                ids = extended
        finally:
            engine.release(key)
        truncated = truncation(last.action, generation.finished, len(turns) + 1 == limits.max_turns)
        rollout = Rollout(question, index, prompt, (*turns, last), truncated)
        if agent.outcome is not None:
            rollout = replace(rollout, rewards=await agent.outcome(rollout, tools))
    return rollout
