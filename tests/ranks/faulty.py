"""``python -m tests.ranks.faulty RANK FAULT STEP train ...``: the command line, with a fault on one rank at one step.

Faults happen while the rank samples, or, as ``FAULT_update``, when the others begin the update without it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys

from igpo_fast import heartbeat, train
from igpo_fast.cli import main
from igpo_fast.errors import EngineError
from igpo_fast.run import launch
from igpo_fast.update.update import Updater


def error():
    raise EngineError("planted")


def bug():
    raise RuntimeError("planted")


def signals(number: int, process=os.getpid):
    return lambda: os.kill(process(), number)


FAULTS = {
    "error": error,
    "bug": bug,
    "stop": signals(signal.SIGSTOP),
    "lock": lambda: ctypes.PyDLL(None).pause(),  # keeps the interpreter's lock
    "kill": signals(signal.SIGKILL),
    "term": signals(signal.SIGTERM),
    "int": signals(signal.SIGINT),
    "launcher_kill": signals(signal.SIGKILL, os.getppid),
    "launcher_term": signals(signal.SIGTERM, os.getppid),
    "launcher_int": signals(signal.SIGINT, os.getppid),
}


def full_disk(*arguments):
    """``disk``: this rank's part of every checkpoint."""
    if fault == "disk" and os.environ["RANK"] == rank:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    write_states(*arguments)


given = sys.argv[1:4]
rank, fault, step = given
del sys.argv[1:4]
heartbeat.BEAT = 0.25
sample, update = train.finished_groups, Updater.__call__


def act(name: str, number: int) -> None:
    if fault == name and os.environ["RANK"] == rank and number == int(step):
        FAULTS[fault.removesuffix("_update")]()


def finished_groups(agent, questions, group_size, number, **options):
    act(fault.removesuffix("_update"), number)
    yield from sample(agent, questions, group_size, number, **options)


def call(self, batch, readings, row):
    act(f"{fault.removesuffix('_update')}_update", batch.step)
    return update(self, batch, readings, row)


def launched(command, ranks, folder):
    return launcher([sys.executable, "-m", "tests.ranks.faulty", *given, *sys.argv[1:]], ranks, folder)


if "RANK" in os.environ:
    from igpo_fast.update import zero

    write_states, zero.write_states = zero.write_states, full_disk
launcher, launch.launch = launch.launch, launched
train.finished_groups, Updater.__call__ = finished_groups, call
main()
