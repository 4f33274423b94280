"""An event loop without waiting: when nothing is ready, its clock jumps to the next timer."""

from __future__ import annotations

import asyncio


class JumpingLoop(asyncio.SelectorEventLoop):
    """Starts at 0 s; ``spend`` stands for work that blocks it. No file descriptors, no threads.

    Raises:
        RuntimeError: everything waits and no timer is set: a deadlock.
    """

    def __init__(self):
        super().__init__()
        self.now = 0.0
        poll = self._selector.select

        def select(timeout):
            if timeout is None:
                raise RuntimeError("everything waits, for ever")
            self.now += timeout
            return poll(0)

        self._selector.select = select

    def time(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds
