"""What a test of tools may not leave behind: processes, descriptors, threads, temporary files."""

import asyncio
import os
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

from igpo_fast.rollouts.batch import RolloutLoop
from igpo_fast.rollouts.tools.processes import CAUSES, CallError

AMPLE = 60.0
"""Seconds of a call that is to succeed, however busy the machine is."""
MARK = uuid.uuid4().hex


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    """Every process of a tool carries ``MARK`` in its environment, wherever it has moved to."""
    monkeypatch.setenv("MARK", MARK)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before = _ours()
    yield
    eventually(lambda: not marked(), marked)
    assert _ours() == before
    assert not list(temporary.iterdir())


def _ours():
    """Open descriptors and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), threading.active_count()


def marked():
    """Process ids of living tools and forkservers."""
    found = set()
    for entry in os.listdir("/proc"):
        if entry.isdecimal() and int(entry) != os.getpid():
            try:
                environment = Path("/proc", entry, "environ").read_bytes()
            except OSError:
                continue
            if f"MARK={MARK}".encode() in environment.split(b"\0"):
                found.add(int(entry))
    return found


def eventually(condition, what):
    """Wait until the condition holds. Only a defect makes this long."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(what())


def run(main):
    """Run a coroutine on an event loop as a step has it."""
    with asyncio.Runner(loop_factory=RolloutLoop) as runner:
        return runner.run(main)


async def outcome(awaitable):
    """What it returns, or the cause of its failure."""
    try:
        return await awaitable
    except CallError as error:
        assert error.cause in CAUSES and str(error) and "\n" not in str(error) and len(str(error)) < 500
        return error.cause
