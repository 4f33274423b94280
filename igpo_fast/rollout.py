"""The multi-turn loop. Every rollout runs on its own: a slow tool call or a long turn holds up no other."""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from igpo_fast.dialect import Dialect
from igpo_fast.engines.base import Engine, Request, Sampling
from igpo_fast.errors import InputError
from igpo_fast.tools.base import Tool
from igpo_fast.types import ANSWER, SEARCH, Group, Question, Rollout, Turn, TurnScores

NOTHING = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Limits:
    """How long a rollout may get. A turn begins only if all its ``max_turn_tokens`` fit in ``max_tokens``."""

    max_turns: int
    max_turn_tokens: int
    """Tokens the policy may sample in a turn."""
    max_tokens: int
    """Tokens of the whole rollout, prompt and responses included."""

    def fits(self, tokens: int) -> bool:
        """Whether a turn may begin after so many tokens."""
        return tokens + self.max_turn_tokens <= self.max_tokens


def question_key(question: Question) -> int:
    """A number for sampling keys that follows from the question's id alone: 0 .. 2**63 - 1."""
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


async def run_rollout(
    question: Question,
    key: tuple[int, ...],
    index: int,
    *,
    engine: Engine,
    tool: Tool,
    dialect: Dialect,
    limits: Limits,
    sampling: Sampling,
) -> Rollout:
    """Turn after turn until the policy answers, ``max_turns`` are made, or the next turn would not fit.

    Args:
        key: (seed, step, question, rollout), keys the sampling noise.
        index: the rollout's place in its group.
    Returns:
        The rollout; its last turn has no response. A turn cut by length counts only if it parses anyway.
    Raises:
        InputError: the prompt leaves no room for a turn. What engine and tool raise passes through.
    """
    prompt = opening(question, dialect, limits)
    ids, turns = prompt, []
    try:
        while True:
            generation = await engine.generate(
                Request(
                    key=key,
                    ids=ids,
                    max_tokens=limits.max_turn_tokens,
                    stop_ids=dialect.stop_ids,
                    stop_strings=dialect.stop_strings,
                    sampling=sampling,
                )
            )
            text = dialect.decode(generation.ids)
            action, argument = dialect.parse(text)
            turn = Turn(generation.ids, generation.logp, text, action, argument, response_ids=NOTHING)
            if action == ANSWER or len(turns) + 1 == limits.max_turns:
                break
            result = await tool(argument, question.corpus) if action == SEARCH else None
            response_ids, response = dialect.response(action, result, ended=generation.finished)
            extended = np.concatenate([ids, generation.ids, response_ids]).astype(np.int32)
            if not limits.fits(len(extended)):
                break
            passages = tuple(passage.id for passage in result.passages) if result else ()
            turns.append(replace(turn, response_ids=response_ids, response=response, passages=passages))
            ids = extended
    finally:
        engine.release(key)
    return Rollout(question, index, prompt, (*turns, turn))


def rollout_groups(
    questions: Sequence[Question],
    group_size: int,
    *,
    seed: int,
    step: int,
    engine: Engine,
    tool: Tool,
    dialect: Dialect,
    limits: Limits,
    sampling: Sampling,
    concurrency: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Group, ...]:
    """``group_size`` rollouts of each question, all together.

    Args:
        seed, step: they key the sampling noise, with question and rollout: what is sampled depends neither on
            the other questions nor on their order.
        concurrency: rollouts in flight at a time.
        progress: called with (done, total) after each rollout.
    Returns:
        A group a question, in the order of ``questions``.
    Raises:
        InputError: two questions share an id, and so would share their noise.
        Else whatever a rollout raises first; the others are cancelled.
    """
    twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise InputError(
            f"question {twice[0]}: occurs twice in a batch; give every question its own id, and a step no "
            "more questions than the data set has"
        )
    gate = asyncio.Semaphore(concurrency)
    total, done = len(questions) * group_size, 0
    run = partial(run_rollout, engine=engine, tool=tool, dialect=dialect, limits=limits, sampling=sampling)

    async def one(question: Question, index: int) -> Rollout:
        nonlocal done
        key = (seed, step, question_key(question), index)
        async with gate:
            rollout = await run(question, key, index)
        done += 1
        if progress:
            progress(done, total)
        return rollout

    async def everything() -> list[Rollout]:
        return await asyncio.gather(*(one(question, i) for question in questions for i in range(group_size)))

    # gather raises the first exception at once; asyncio.run then cancels the others and awaits their end.
    rollouts = asyncio.run(everything())
    return tuple(
        Group(question, tuple(rollouts[q * group_size : (q + 1) * group_size])) for q, question in enumerate(questions)
    )


def _numbers(values: Any) -> list[float | None]:
    """JSON knows no NaN: null stands for it."""
    return [float(value) if math.isfinite(value) else None for value in values]


def rollout_record(rollout: Rollout, scores: TurnScores | None = None) -> dict[str, Any]:
    """The JSON object of rollouts/step_*.jsonl: everything that was sampled and, if scored, what it earned.

    ``values`` are v_0 .. v_{T-1}; a turn's ``value`` is the one after it, ``info_gain`` what it added, both
    null for the last turn. Undefined numbers are null: all of these where the algorithm needs no values.
    """
    count = len(rollout.turns)
    unscored = [None] * count
    values = _numbers(scores.values) if scores else unscored
    gains = _numbers(scores.gains) if scores and len(scores.gains) else unscored[1:]
    advantages = _numbers(scores.advantages) if scores else unscored
    turns = [
        {
            "text": turn.text,
            "action": turn.action,
            "argument": turn.argument,
            "response": turn.response,
            "passages": list(turn.passages),
            "tokens": len(turn.ids),
            "value": value,
            "info_gain": gain,
            "advantage": advantage,
            "ids": turn.ids.tolist(),
            "logp": _numbers(turn.logp),
            "response_ids": turn.response_ids.tolist(),
        }
        for turn, value, gain, advantage in zip(
            rollout.turns, [*values[1:], None], [*gains, None], advantages, strict=True
        )
    ]
    outcome, f1, em = _numbers([scores.outcome, scores.f1, scores.em]) if scores else [None] * 3
    return {
        "id": rollout.question.id,
        "question": rollout.question.question,
        "answers": list(rollout.question.answers),
        "index": rollout.index,
        "answer": rollout.answer,
        "outcome": outcome,
        "f1": f1,
        "em": em,
        "values": values,
        "turns": turns,
        "prompt_ids": rollout.prompt_ids.tolist(),
    }
