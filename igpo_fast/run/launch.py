"""Several processes of one run on this host: started together, ended together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from igpo_fast.errors import RunError
from igpo_fast.heartbeat import LAUNCHER, STALLED, STOP

GRACE = 30.0
"""Seconds that the other ranks have to end by themselves after one has failed."""
LINES = 5
"""Last lines of a failed rank's log that its message repeats."""


def log_of(folder: Path, rank: int) -> Path:
    """The log of a rank other than 0, which writes to the terminal."""
    return folder / "logs" / f"rank_{rank}.log"


def log_end(folder: Path, rank: int) -> str:
    """What a message says of a rank's log: its name and its last lines; nothing if there is none."""
    log = log_of(folder, rank)
    return f"; the end of {log}: {_last_lines(log.read_bytes())}" if log.exists() else ""


def _last_lines(said: bytes) -> str:
    return " / ".join(said.decode(errors="replace").splitlines()[-LINES:])


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each of ``ranks`` processes on this host, with torchrun's variables."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared[LAUNCHER] = os.getpid()
    own = ({"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks))
    return [os.environ | {name: str(value) for name, value in (shared | of).items()} for of in own]


def launch(command: Sequence[str], ranks: int, folder: Path) -> int:
    """Run ``command`` in ``ranks`` processes that find each other through torchrun's variables.

    Rank 0 keeps the terminal. SIGINT and SIGTERM are passed on as a request to finish the step; the second ends all at
    once. Once a rank fails, the others get ``GRACE`` seconds to say why they end, then are killed.

    Args:
        folder: the run folder, for the logs.
    Returns:
        The exit status of rank 0, which says itself what went wrong for all.
    Raises:
        RunError: another rank failed, or one was killed; it has the rank's number and the end of its log.
    """
    # What they print before they have logs; closed, and so deleted, when this process ends.
    started, early = [], [tempfile.TemporaryFile() for _ in range(ranks)]  # noqa: SIM115
    for rank, environment in enumerate(environments(ranks)):
        out = early[rank] if rank else None
        started.append(subprocess.Popen(command, env=environment, stdout=out, stderr=out))
    asked: list[int] = []

    def ask(number, frame):
        for process in started:
            process.send_signal(signal.SIGKILL if asked else STOP)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        first = _wait(started)
    finally:
        for process in started:
            process.kill()
        for number, handler in before.items():
            signal.signal(number, handler)
    status = started[first].returncode
    if asked and status < 0:
        return 128 + asked[0]
    if first or status < 0:
        early[first].seek(0)
        said = log_end(folder, first) or (f"; it said: {_last_lines(early[first].read())}" if first else "")
        how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
        raise RunError(f"rank {first} ended with {how}; the same command goes on after its last checkpoint{said}")
    return 2 if status == STALLED else status


def _wait(started: Sequence[subprocess.Popen]) -> int:
    """Wait for all; returns the number of the rank that says why the run failed: one that was killed, else 0 if it
    failed, too, else the first that did. 0 if none failed."""
    failed: list[int] = []
    since = 0.0
    while any(process.poll() is None for process in started):
        failed += [n for n, process in enumerate(started) if process.poll() and n not in failed]
        since = since or (time.monotonic() if failed else 0.0)
        stuck = any(process.returncode == STALLED for process in started)  # the one that is stuck ends by force only
        if failed and time.monotonic() > since + (1.0 if stuck else GRACE):
            break
        time.sleep(0.1)
    failed += [n for n, process in enumerate(started) if process.returncode and n not in failed]
    killed = [n for n in failed if started[n].returncode < 0]
    return killed[0] if killed else 0 if 0 in failed or not failed else failed[0]


def redirect(log: Path) -> None:
    """Send what this process prints, its libraries included, to ``log`` from now on."""
    log.parent.mkdir(exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
