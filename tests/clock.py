"""An event loop without waiting: when nothing is ready, its clock jumps to what comes next."""

from __future__ import annotations

import asyncio
import heapq
import itertools

from igpo_fast.rollouts.batch import RolloutLoop


class JumpingLoop(RolloutLoop):
    """Starts at 0 s; ``now`` are the world's seconds, ``time`` the loop's. No file descriptors, no threads.

    Raises:
        RuntimeError: everything waits and nothing comes: a deadlock.
    """

    def __init__(self):
        self.now = 0.0
        self._arrivals, self._order = [], itertools.count()
        super().__init__()
        poll = self._selector.select

        def select(timeout):
            after = [] if timeout is None else [self.now + timeout]
            first = min([*after, *(at for at, *_ in self._arrivals[:1])], default=None)
            if first is None:
                raise RuntimeError("everything waits, for ever")
            self.now = max(self.now, first)
            while self._arrivals and self._arrivals[0][0] <= self.now:
                future = heapq.heappop(self._arrivals)[-1]
                future.done() or future.set_result(None)
            return poll(0)

        self._selector.select = select

    def clock(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """Work that blocks the loop."""
        self.now += seconds

    async def arrival(self, seconds: float) -> None:
        """Wait as for an answer over a network: it is under way for so long, whether the loop runs or not."""
        future = self.create_future()
        heapq.heappush(self._arrivals, (self.now + seconds, next(self._order), future))
        await future


async def arrival(seconds: float) -> None:
    """``JumpingLoop.arrival`` of the running loop."""
    await asyncio.get_running_loop().arrival(seconds)
