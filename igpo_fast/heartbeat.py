"""Signs of life between the ranks of a run: a rank that is stopped or stuck ends the run, as a dead one does.

A thread of each rank counts up a number in torch's store, which torchrun and ``--nproc`` both provide, and reads the
others' numbers. It needs no more than a moment of its process and of the interpreter's lock, so a rank beats while it
computes, compiles, swaps or waits for others. It falls silent when its process is stopped (SIGSTOP, a debugger, a hung
driver) or when a library keeps the interpreter's lock.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the launcher needs no torch
    import torch.distributed as dist

BEAT = 2.0
"""Seconds between two beats."""
LIMIT = 20
"""Beats of this rank without one of another's, after which that one counts as stuck. Own beats are the clock, so a rank
that was stopped itself, or a machine that slept, blames nobody."""
STALLED = 75
"""Exit status of a rank that gives up because another is stuck."""
STOP = signal.SIGUSR1
"""The launcher's signal to finish the step and save it. Unlike the user's, a second one ends nothing: what the user
sends may reach launcher and ranks alike."""
LAUNCHER = "IGPO_FAST_LAUNCHER"
"""Environment variable with the process id of the ranks' launcher; torchrun sets none, and ends its ranks itself."""
_ENDED = b"ended"


class Heartbeat:
    """Beats for one rank and watches the others, from ``start`` to the end of this process.

    Args:
        store: the ranks' own; every rank makes its Heartbeat before one starts.
        number, size: this rank and how many there are.
        silent: called in a thread, with the numbers of the ranks that are stuck.
    """

    def __init__(self, store: dist.Store, number: int, size: int, silent: Callable[[Sequence[int]], None]):
        self._store, self._number, self._silent = store, number, silent
        self._keys = [f"beat/{rank}" for rank in range(size)]
        self._heard: list[bytes] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._beat, self._watch)]
        store.set(self._keys[number], "0")

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        atexit.register(self._end)

    def _end(self) -> None:
        """A rank that is done is not stuck. Threads end before the interpreter does, which cannot stop them in C++."""
        over = self._over.is_set()
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT * LIMIT)
        if not over and not self._threads[0].is_alive():
            self._tell(_ENDED.decode())

    def _tell(self, value: str) -> bool:
        try:
            self._store.set(self._keys[self._number], value)
            self._heard = self._store.multi_get(self._keys)
            return True
        except RuntimeError:  # its host, the first rank, is done or dead: the next exchange says so
            return False

    def _beat(self) -> None:
        beats = 0
        while not self._over.wait(BEAT):
            beats += 1
            if not self._tell(str(beats)):
                self._over.set()

    def _watch(self) -> None:
        """Apart from ``_beat``, which waits for the store as long as the store's host is stopped."""
        silent, before = [0] * len(self._keys), self._heard
        launcher = int(os.environ.get(LAUNCHER, 0))
        while not self._over.wait(BEAT):
            if launcher and os.getppid() != launcher:  # it was killed: end as if it had asked
                launcher = 0
                os.kill(os.getpid(), STOP)
            now = self._heard
            if now is before:
                silent[0] += 1  # the first rank's process has the store
            else:
                for rank, value in enumerate(now):
                    beats = not before or value == _ENDED or value != before[rank]
                    silent[rank] = 0 if beats or rank == self._number else silent[rank] + 1
            before = now
            if stuck := [rank for rank, beats in enumerate(silent) if beats >= LIMIT]:
                self._silent(stuck)
