"""The multi-turn loop. Every rollout runs on its own: a slow tool call or a long turn holds up no other."""

from __future__ import annotations

import asyncio
import hashlib
import math
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from igpo_fast.dialect import Dialect
from igpo_fast.engines.base import Engine, Request, Sampling, others
from igpo_fast.errors import InputError
from igpo_fast.tools.base import Tool, close
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
    turn: Callable[[], AbstractAsyncContextManager] = nullcontext,
) -> Rollout:
    """Turn after turn until the policy answers, ``max_turns`` are made, or the next turn would not fit.

    Args:
        key: (seed, step, question, rollout), keys the sampling noise.
        index: the rollout's place in its group.
        turn: makes what is entered while the engine samples a turn.
    Returns:
        The rollout; its last turn has no response. A turn cut by length counts only if it parses anyway.
    Raises:
        InputError: the prompt leaves no room for a turn. What engine and tool raise passes through.
    """
    prompt = opening(question, dialect, limits)
    ids, turns = prompt, []
    try:
        while True:
            request = Request(
                key=key,
                ids=ids,
                max_tokens=limits.max_turn_tokens,
                stop_ids=dialect.stop_ids,
                stop_strings=dialect.stop_strings,
                sampling=sampling,
            )
            async with turn():
                generation = await engine.generate(request)
            text = dialect.decode(generation.ids)
            action, argument = dialect.parse(text)
            last = Turn(generation.ids, generation.logp, text, action, argument, response_ids=NOTHING)
            if action == ANSWER or len(turns) + 1 == limits.max_turns:
                break
            result = await tool(argument, question.corpus) if action == SEARCH else None
            response_ids, response = dialect.response(action, result, ended=generation.finished)
            extended = np.concatenate([ids, generation.ids, response_ids]).astype(np.int32)
            if not limits.fits(len(extended)):
                break
            passages = tuple(passage.id for passage in result.passages) if result else ()
            turns.append(replace(last, response_ids=response_ids, response=response, passages=passages))
            ids = extended
    finally:
        engine.release(key)
    return Rollout(question, index, prompt, (*turns, last))


class RolloutLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands still while the loop does.

    So the trainer's work on a finished group counts against no deadline of a tool, a server or a straggler: whether an
    answer came in time does not depend on how quick the trainer is. What arrived meanwhile is read when the loop goes
    on.
    """

    def __init__(self):
        super().__init__()
        self._stood, self._stopped = 0.0, self.clock()

    clock = staticmethod(time.monotonic)
    """The world's seconds."""

    def time(self) -> float:
        """Seconds that deadlines are measured in."""
        return self.clock() - self._stood

    def run_forever(self) -> None:
        self._stood += self.clock() - self._stopped
        try:
            super().run_forever()
        finally:
            self._stopped = self.clock()


@dataclass(frozen=True)
class Stragglers:
    """When ``share`` of a batch's rollouts are done, each of the rest may take ``factor`` times their median duration.

    One that takes longer is left out of its group, as if the group had been smaller; a group that keeps fewer than two
    has nothing to compare and is dropped. Ended as a rollout without an answer, it would earn the format penalty for
    its tools' latency, likelier the more turns it makes: that teaches short rollouts and shifts the mean of its group.
    Left out, it biases nothing where latency is chance; where rollouts are slow because they are long, the long ones
    are not learnt from. What is left out depends on the clock, so a run with stragglers does not repeat.
    """

    share: float
    factor: float


class _Flight:
    """The rollouts of a batch, each a task of its own, and the groups that they make."""

    def __init__(
        self,
        run: Callable[..., Coroutine[Any, Any, Rollout]],
        engine: Engine,
        questions: Sequence[Question],
        group_size: int,
        concurrency: int,
        enough: int,
        stragglers: Stragglers | None,
        progress: Callable[[int, int], None] | None,
    ):
        self._run, self._questions, self._group_size = run, questions, group_size
        places, free = asyncio.Semaphore(concurrency), nullcontext()
        self._rollout, self._turn = (places, free) if engine.keeps_rollouts else (free, places)
        self._remote = engine.remote
        self._changed = asyncio.Event()
        self._enough, self._stragglers, self._progress = enough, stragglers, progress
        self._tasks: list[asyncio.Task] = []
        self._begun: dict[asyncio.Timeout, float] = {}  # of each rollout that has: its deadline, when it began
        self._sampling = 0  # rollouts whose turn the engine has or gets next
        self._seconds: list[float] = []  # that the finished ones took
        self._allowed: float | None = None  # seconds, once enough of them are known
        self._ended: dict[int, dict[int, Rollout | None]] = defaultdict(dict)
        self._finished: deque[tuple[int, Group]] = deque()
        self._groups = 0  # finished, handed out or not
        self.stragglers = 0

    async def next(self) -> tuple[int, Group] | None:
        """A finished group, as soon as ``finished_groups`` may hand it out; None after the last."""
        if not self._tasks:
            places = range(len(self._questions))
            rollouts = [self._one(place, i) for place in places for i in range(self._group_size)]
            self._tasks = [asyncio.create_task(rollout) for rollout in rollouts]
            self._all = asyncio.gather(*self._tasks)
            self._all.add_done_callback(self._over)
        while self._groups < self._enough:
            await others()  # what has arrived meanwhile goes first
            if self._all.done():
                self._all.result()  # raises the first fault
                break
            if self._finished and (self._remote or not self._sampling):
                break
            self._changed.clear()
            await self._changed.wait()
        return self._finished.popleft() if self._finished else None

    async def end(self) -> None:
        """Cancel what is left, and see it end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _over(self, everything: asyncio.Future) -> None:
        everything.cancelled() or everything.exception()  # else asyncio complains, where nobody asks any more
        self._changed.set()

    async def _one(self, place: int, index: int) -> None:
        question, rollout = self._questions[place], None
        loop = asyncio.get_running_loop()
        async with self._rollout:
            try:
                async with asyncio.timeout(None) as deadline:
                    rollout = await self._run(question, index, turn=partial(self._sample, deadline))
            except TimeoutError:
                if not deadline.expired():
                    raise
                self.stragglers += 1
            finally:
                began = self._begun.pop(deadline, None)
        if rollout is not None:
            self._seconds.append(loop.time() - began)
        self._end(place, index, rollout)

    @asynccontextmanager
    async def _sample(self, deadline: asyncio.Timeout) -> AsyncIterator[None]:
        """A turn of the rollout with this deadline, which begins when its first turn may."""
        self._sampling += 1
        try:
            async with self._turn:
                if deadline not in self._begun:
                    self._begun[deadline] = asyncio.get_running_loop().time()
                    self._limit(deadline)
                yield
        finally:
            self._sampling -= 1
            self._changed.set()

    def _end(self, place: int, index: int, rollout: Rollout | None) -> None:
        group = self._ended[place]
        group[index] = rollout
        total, done = len(self._questions) * self._group_size, sum(map(len, self._ended.values()))
        if self._progress:
            self._progress(done, total)
        if len(group) == self._group_size:
            kept = tuple(rollout for _, rollout in sorted(group.items()) if rollout is not None)
            if len(kept) >= min(2, self._group_size):
                self._finished.append((place, Group(self._questions[place], kept)))
                self._groups += 1
        limits = self._stragglers
        if limits and self._allowed is None and len(self._seconds) >= limits.share * total:
            self._allowed = limits.factor * statistics.median(self._seconds)
            for deadline in self._begun:
                self._limit(deadline)
        self._changed.set()

    def _limit(self, deadline: asyncio.Timeout) -> None:
        if self._allowed is not None:
            deadline.reschedule(self._begun[deadline] + self._allowed)


def finished_groups(
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
    enough: int | None = None,
    stragglers: Stragglers | None = None,
    counts: Counter | None = None,
    progress: Callable[[int, int], None] | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] = RolloutLoop,
) -> Iterator[tuple[int, Group]]:
    """``group_size`` rollouts of each question, all together; groups as they finish.

    A group is handed out when the engine has nothing to do: every rollout in flight waits for its tool, or all have
    ended. While the caller works on it nothing else runs here, and no clock does: work on the engine's device costs
    tools' time only, and no deadline. An engine that is ``remote`` samples on meanwhile, so its groups are handed out
    at once.

    Args:
        seed, step: they key the sampling noise, with question and rollout: what is sampled depends neither on
            the other questions nor on their order.
        concurrency: rollouts that the engine samples at a time; one that ``keeps_rollouts`` between turns counts those
            that wait for their tool, too.
        enough: end with so many groups, whichever finish first, and cancel the rest; None waits for all.
        stragglers: None waits for every rollout.
        counts: gets ``rollout/stragglers``, the rollouts that were left out.
        progress: called with (done, total) after each rollout.
        loop_factory: makes the event loop.
    Yields:
        A group and its question's place in ``questions``.
    Raises:
        InputError: two questions share an id, and so would share their noise.
        Else whatever a rollout raises first; the others are cancelled, as they are when the iterator is closed.
    """
    twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise InputError(
            f"question {twice[0]}: occurs twice in a batch; give every question its own id, and a step no "
            "more questions than the data set has"
        )

    def run(question: Question, index: int, turn: Callable) -> Coroutine[Any, Any, Rollout]:
        key = (seed, step, question_key(question), index)
        return run_rollout(
            question, key, index, engine=engine, tool=tool, dialect=dialect, limits=limits, sampling=sampling, turn=turn
        )

    enough = len(questions) if enough is None else enough
    flight = _Flight(run, engine, questions, group_size, concurrency, enough, stragglers, progress)

    async def end() -> None:
        await flight.end()
        await close(tool, engine)

    # A Runner keeps its loop between runs; when it closes it cancels what is left and awaits its end.
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            while (found := runner.run(flight.next())) is not None:
                yield found
        finally:
            runner.run(end())
    if counts is not None:
        counts["rollout/stragglers"] += flight.stragglers


def rollout_groups(questions: Sequence[Question], group_size: int, **options) -> tuple[Group, ...]:
    """All of ``finished_groups``, which takes the options, in the order of ``questions``."""
    groups = dict(finished_groups(questions, group_size, **options))
    return tuple(groups[place] for place in sorted(groups))


def in_ranges(finished: Iterable[tuple[int, Group]], size: int, total: int) -> Iterator[dict[int, Group]]:
    """Groups by their places, in ranges of ``size`` of the ``total`` places: a range as soon as it is whole, and at the
    end what came of the others. So what is in a range depends on nothing that finished when."""
    ranges: dict[int, dict[int, Group]] = defaultdict(dict)
    for place, group in finished:
        number = place // size
        ranges[number][place] = group
        if len(ranges[number]) == min(size, total - number * size):
            yield dict(sorted(ranges.pop(number).items()))
    for number in sorted(ranges):
        yield dict(sorted(ranges[number].items()))


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
