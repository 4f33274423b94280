"""Many rollouts at once. Each rollout runs on its own: a slow tool call or a long turn delays no other."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from igpo_fast.engines.base import let_others_run
from igpo_fast.errors import InputError
from igpo_fast.rollouts.rollout import Agent, run_rollout
from igpo_fast.rollouts.tools.base import close
from igpo_fast.types import Group, Question, Rollout


class RolloutLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stops while the loop does not run.

    So the trainer's work on a finished group does not count against deadlines of tools, servers or stragglers: whether
    an answer came in time does not depend on the trainer's speed. Data that arrived meanwhile is read when the loop
    resumes.
    """

    def __init__(self):
        super().__init__()
        self._stood, self._stopped = 0.0, self.clock()

    clock = staticmethod(time.monotonic)
    """Seconds of real time."""

    def time(self) -> float:
        """Seconds in which deadlines are measured."""
        return self.clock() - self._stood

    def run_forever(self) -> None:
        self._stood += self.clock() - self._stopped
        try:
            super().run_forever()
        finally:
            self._stopped = self.clock()


@dataclass(frozen=True)
class Stragglers:
    """Limit on slow rollouts: once ``share`` of a batch's rollouts are done, each other may take ``factor`` times their
    median duration.

    One that takes longer is left out of its group, as if the group had been smaller; a group that keeps fewer than two
    has nothing to compare and is dropped. Ended as a rollout without an answer, it would earn the format penalty for
    its tools' latency, which is likelier with more turns: that teaches short rollouts and shifts its group's mean.
    Leaving it out adds no bias if latency is random; if rollouts are slow because they are long, long ones are not
    trained on. The choice depends on the clock, so a run with stragglers is not reproducible.
    """

    share: float
    factor: float


class _Flight:
    """The rollouts of a batch, each a task of its own, and the groups that they make."""

    def __init__(
        self,
        agent: Agent,
        questions: Sequence[Question],
        group_size: int,
        step: int,
        enough: int,
        stragglers: Stragglers | None,
        progress: Callable[[int, int], None] | None,
    ):
        self._agent, self._questions, self._group_size, self._step = agent, questions, group_size, step
        places, free = asyncio.Semaphore(agent.concurrency), nullcontext()
        self._rollout, self._turn = (places, free) if agent.engine.keeps_rollouts else (free, places)
        self._changed = asyncio.Event()
        self._enough, self._stragglers, self._progress = enough, stragglers, progress
        self._tasks: list[asyncio.Task] = []
        self._begun: dict[asyncio.Timeout, float] = {}  # per rollout that has begun: its deadline, when it began
        self._sampling = 0  # rollouts whose turn is in the engine or next
        self._seconds: list[float] = []  # seconds that finished rollouts took
        self._allowed: float | None = None  # seconds, once enough rollouts have finished
        self._ended: dict[int, dict[int, Rollout | None]] = defaultdict(dict)
        self._finished: deque[tuple[int, Group]] = deque()
        self._groups = 0  # finished groups, handed out or not
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
            await let_others_run()  # data that arrived meanwhile goes first
            if self._all.done():
                self._all.result()  # raises the first fault
                break
            if self._finished and (self._agent.engine.remote or not self._sampling):
                break
            self._changed.clear()
            await self._changed.wait()
        return self._finished.popleft() if self._finished else None

    async def end(self) -> None:
        """Cancel unfinished rollouts and await their end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _over(self, everything: asyncio.Future) -> None:
        everything.cancelled() or everything.exception()  # else asyncio complains about unretrieved exceptions
        self._changed.set()

    async def _one(self, place: int, index: int) -> None:
        question, rollout = self._questions[place], None
        loop = asyncio.get_running_loop()
        async with self._rollout:
            try:
                async with asyncio.timeout(None) as deadline:
                    turn = partial(self._sample, deadline)
                    rollout = await run_rollout(self._agent, question, self._step, index, turn)
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
        """Context of a rollout's turn in the engine; ``deadline`` starts when its first turn may begin."""
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
    agent: Agent,
    questions: Sequence[Question],
    group_size: int,
    step: int,
    *,
    enough: int | None = None,
    stragglers: Stragglers | None = None,
    counts: Counter | None = None,
    progress: Callable[[int, int], None] | None = None,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> Iterator[tuple[int, Group]]:
    """Sample ``group_size`` rollouts per question, all concurrently; yields groups as they finish.

    A group is handed out when the engine is idle: every rollout in flight waits for its tool, or all have ended. While
    the caller works on it nothing runs here and the clock stands, so that deadlines do not count the caller's work. A
    ``remote`` engine goes on sampling meanwhile, so its groups are handed out at once.

    Args:
        step: seeds the sampling noise, with the agent's seed, question and rollout, so that draws depend neither on the
            other questions nor on their order.
        enough: number of groups, the first to finish, after which the rest are cancelled; None waits for all.
        stragglers: None waits for every rollout.
        counts: gets ``rollout/stragglers``, the number of rollouts left out.
        progress: called with (done, total) after each rollout.
        loop_factory: makes the event loop; None makes a ``RolloutLoop``.
    Yields:
        A group and its question's place in ``questions``.
    Raises:
        InputError: two questions share an id, and so would share their noise.
        Also the first error of a rollout; the others are then cancelled, as when the iterator is closed.
    """
    twice = [id for id, count in Counter(question.id for question in questions).items() if count > 1]
    if twice:
        raise InputError(
            f"question {twice[0]}: occurs twice in a batch; give every question its own id, and a step no "
            "more questions than the data set has"
        )

    enough = len(questions) if enough is None else enough
    flight = _Flight(agent, questions, group_size, step, enough, stragglers, progress)

    async def end() -> None:
        await flight.end()
        await close(agent.tools, agent.engine)

    # A Runner keeps its loop between runs; closing it cancels unfinished tasks and awaits their end.
    with asyncio.Runner(loop_factory=loop_factory or RolloutLoop) as runner:
        try:
            while (found := runner.run(flight.next())) is not None:
                yield found
        finally:
            runner.run(end())
    if counts is not None:
        counts["rollout/stragglers"] += flight.stragglers


def rollout_groups(
    agent: Agent, questions: Sequence[Question], group_size: int, step: int, **options
) -> tuple[Group, ...]:
    """All groups of ``finished_groups``, which takes the options, in the order of ``questions``."""
    groups = dict(finished_groups(agent, questions, group_size, step, **options))
    return tuple(groups[place] for place in sorted(groups))


def in_ranges(finished: Iterable[tuple[int, Group]], size: int, total: int) -> Iterator[dict[int, Group]]:
    """Groups by their places, in ranges of ``size`` of the ``total`` places.

    Yields each range once all its groups are there; incomplete ranges come last. So a range's contents do not depend on
    finishing order.
    """
    ranges: dict[int, dict[int, Group]] = defaultdict(dict)
    for place, group in finished:
        number = place // size
        ranges[number][place] = group
        if len(ranges[number]) == min(size, total - number * size):
            yield dict(sorted(ranges.pop(number).items()))
    for number in sorted(ranges):
        yield dict(sorted(ranges[number].items()))
