"""Ctrl-C that loses nothing: the step ends, a checkpoint is written, the run stops."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from igpo_fast.heartbeat import STOP


class Interrupted(Exception):
    """The user asked to stop, and a checkpoint holds all progress."""


@contextmanager
def stop_requested() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets, so that the step ends and is saved; the second ends the process.

    A line on stderr acknowledges the first at once. The launcher of several ranks asks by ``STOP``, however often.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def told(number, frame):
        if not event.is_set():
            event.set()
            _say("finishing this step, which is then saved")

    def ask(number, frame):
        event.set()
        for either, handler in before.items():  # the second may be the other one
            signal.signal(either, handler)
        again = "press Ctrl-C again" if number == signal.SIGINT else "send SIGTERM again"
        _say(f"finishing this step, which is then saved; {again} to stop now")

    for number in before:
        signal.signal(number, ask)
    unasked = signal.signal(STOP, told)
    try:
        yield event
    finally:
        for number, handler in (before | {STOP: unasked}).items():
            signal.signal(number, handler)


def _say(line: str) -> None:
    """Write to stderr from a signal handler: not through Python's buffers, which the signal may have interrupted."""
    clear = "\r\x1b[2K" if sys.stderr.isatty() else ""
    with suppress(OSError):
        os.write(2, f"{clear}{line}\n".encode())
