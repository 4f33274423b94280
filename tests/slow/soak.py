"""Whole runs that are killed, stopped, or find no room, at random moments, and are started again with the same command.

Each must end as the run that nothing disturbed: the same metrics, rollouts, weights and optimiser state, no step twice
or missing, nothing half-written, and no traceback on the way.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from transformers import Qwen2ForCausalLM  # noqa: F401 (imported once, for all sessions)

import igpo_fast.train  # noqa: F401 (as above: the command line imports it late)
from igpo_fast import cli
from tests.tiny import SETTINGS, WORLD, files, rows

STEPS = 8
KILLS, STOPS, LIMITS, DISKS, RANKS = 16, 4, 5, 4, 20
"""How often each fault is tried."""
LAST = f"checkpoints/step_{STEPS:06d}"
KIB = 1024
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.slow.soak"])


@dataclass
class Tried:
    """What became of the tries of one fault."""

    tries: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    """How the disturbed sessions ended: an exit code, or a signal's name."""
    runs: int = 0
    same: int = 0
    """Of the runs, those that came to the same end as the undisturbed one."""
    problems: list[str] = field(default_factory=list)


def command(folder: Path, cache: Path, log: Path, most: int) -> None:
    """``igpo-fast train`` in this process, its output in ``log``; files of at most ``most`` bytes, if not 0."""
    with open(log, "ab") as file:  # through another process, for which the limit does not hold
        pipe = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file).stdin.fileno()
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115 (to this process's end)
    if most:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.argv = ["igpo-fast", "train", *SETTINGS, *WORLD, f"train.steps={STEPS}"]
    sys.argv += ["algorithm.kl=0.05", f"run.dir={folder}", f"run.cache={cache}"]
    cli.main()


class Runs:
    """Runs in folders of ``home``, each compared with ``undisturbed``; ``cache`` keeps their warm start."""

    def __init__(self, home: Path, cache: Path | None = None, seed: int = 0):
        self.home, self.random = home, Random(seed)
        self.log, self.cache, self.undisturbed = home / "log", cache or home / "cache", home / "undisturbed"
        self.end(self.start(self.undisturbed))
        self.results: dict[str, Tried] = {}

    def start(self, folder: Path, most: int = 0) -> multiprocessing.Process:
        process = CONTEXT.Process(target=command, args=(folder, self.cache, self.log, most))
        process.start()
        return process

    def end(self, process: multiprocessing.Process) -> str:
        """How a session ended: its exit code, or the name of the signal that ended it."""
        process.join(120)
        code = process.exitcode
        if code is None:
            process.kill()
            return "timed out"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def disturb(self, name: str, fault: Callable[[], str]) -> None:
        """Count how ``fault``, a session, ended, and what it printed."""
        tried = self.results.setdefault(name, Tried())
        how = fault()
        if how == "exit code 0":  # the fault came too late, or the limit was met by nothing
            return
        tried.tries += 1
        tried.ends[how] += 1
        said = self.log.read_text()
        if "Traceback" in said or "internal:" in said:
            tried.problems.append(said[-2000:])
        self.log.write_text("")

    def finish(self, name: str, folder: Path) -> None:
        """Start a run for the last time, and compare its end."""
        tried = self.results.setdefault(name, Tried())
        tried.runs += 1
        how = self.end(self.start(folder))
        wrong = differences(folder, self.undisturbed) if how == "exit code 0" else [how, self.log.read_text()[-2000:]]
        tried.same += not wrong
        tried.problems += wrong
        shutil.rmtree(folder, ignore_errors=True)

    def at_a_moment(self, folder: Path, number: int) -> str:
        """Send a signal at a random moment between the session's start and its end."""
        before = _rows(folder)
        wanted = self.random.randrange(before, STEPS + 1)
        process = self.start(folder)
        while process.is_alive() and _rows(folder) < wanted:
            time.sleep(0.005)
        process.join(self.random.random() * (1.0 if wanted == before else 0.2))
        if process.is_alive():
            os.kill(process.pid, number)
        return self.end(process)


def differences(folder: Path, reference: Path) -> list[str]:
    """What is not as in the undisturbed run, or half-written."""
    wrong = []
    if rows(folder) != rows(reference):
        wrong.append("metrics differ")
    if [row["step"] for row in rows(folder)] != list(range(STEPS + 1)):
        wrong.append("steps twice or missing")
    if files(folder / "rollouts") != files(reference / "rollouts"):
        wrong.append("rollouts differ")
    if (folder / LAST / "model.safetensors").read_bytes() != (reference / LAST / "model.safetensors").read_bytes():
        wrong.append("weights differ")
    for part in (reference / LAST).glob("learner-*"):
        ours, theirs = (torch.load(where / LAST / part.name, weights_only=True) for where in (folder, reference))
        if not _equal(ours, theirs):
            wrong.append("optimiser states differ")
    return wrong + [f"half-written: {path.name}" for path in folder.rglob(".*.tmp")]


def _equal(ours, theirs) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_equal(ours[key], theirs[key]) for key in ours)
    return ours == theirs


def _rows(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kills(runs: Runs) -> None:
    """``kill -9``, up to four times a run."""
    _signals(runs, "`kill -9` at a random moment", KILLS, [signal.SIGKILL], 4)


def stops(runs: Runs) -> None:
    """Ctrl-C and SIGTERM, up to twice a run."""
    _signals(runs, "Ctrl-C or SIGTERM at a random moment", STOPS, [signal.SIGTERM, signal.SIGINT], 2)


def _signals(runs: Runs, name: str, wanted: int, numbers: list[int], most: int) -> None:
    folder = runs.home / "run"
    while runs.results.setdefault(name, Tried()).tries < wanted:
        for at in range(most):
            if _rows(folder) > STEPS:
                break
            runs.disturb(name, lambda at=at: runs.at_a_moment(folder, numbers[at % len(numbers)]))
        runs.finish(name, folder)


def limits(runs: Runs) -> None:
    """A limit on the size of files (``ulimit -f``), so that each kind of file is the first that does not fit."""
    name, folder = "a limit on file sizes", runs.home / "run"
    sizes = sorted({path.stat().st_size for path in runs.undisturbed.rglob("*") if path.is_file()} - {0})
    for number in range(LIMITS):
        most = sizes[int((len(sizes) - 1) * number / LIMITS)] + runs.random.randrange(64)
        runs.disturb(name, lambda most=most: runs.end(runs.start(folder, most)))
        runs.finish(name, folder)


def disks(runs: Runs) -> None:
    """A small file system that fills up; left out where none can be mounted."""
    disk = runs.home / "disk"
    disk.mkdir(exist_ok=True)
    size = sum(path.stat().st_size for path in runs.undisturbed.rglob("*") if path.is_file()) // KIB + 1500
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk], capture_output=True).returncode:
        return
    try:
        for _ in range(DISKS):
            _fill(runs, disk)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def _fill(runs: Runs, disk: Path) -> None:
    name, folder, ballast = "a full disk", disk / "run", disk / "other"
    left = runs.random.randrange(300) * KIB
    wanted = runs.random.randrange(STEPS)

    def fault() -> str:
        process = runs.start(folder)
        while process.is_alive() and _rows(folder) < wanted:
            time.sleep(0.005)
        ballast.write_bytes(b"x" * max(0, shutil.disk_usage(disk).free - left))
        return runs.end(process)

    runs.disturb(name, fault)
    ballast.unlink()
    runs.finish(name, folder)


def ranks(runs: Runs) -> None:
    """``kill -9`` of a rank of two, of both, or of their launcher, up to four times a run."""
    if find_spec("deepspeed") is None:
        return
    name = "`kill -9` of one of two ranks, of both, or of their launcher"
    folder, reference = runs.home / "run", runs.home / "two"
    pair = Pair(runs)
    assert pair.end(pair.start(reference)) == "exit code 0", runs.log.read_text()
    tried = runs.results.setdefault(name, Tried())
    while tried.tries < RANKS:
        for _ in range(4):
            if _rows(folder) > STEPS:
                break
            runs.disturb(name, lambda: pair.killed(folder))
        tried.runs += 1
        how = pair.end(pair.start(folder))
        wrong = differences(folder, reference) if how == "exit code 0" else [how, runs.log.read_text()[-2000:]]
        tried.same += not wrong
        tried.problems += wrong
        shutil.rmtree(folder, ignore_errors=True)


class Pair:
    """Sessions of two ranks under the launcher, beside ``runs``."""

    VICTIMS = ("rank 0", "rank 1", "both ranks", "the launcher")

    def __init__(self, runs: Runs):
        self.runs, self.random = runs, runs.random

    def start(self, folder: Path) -> subprocess.Popen:
        words = [*SETTINGS, *WORLD, f"train.steps={STEPS}", f"run.dir={folder}", f"run.cache={self.runs.cache}"]
        with open(self.runs.log, "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "igpo_fast", "train", "--nproc", "2", *words], stdout=log, stderr=log
            )

    def killed(self, folder: Path) -> str:
        """Kill at a random moment between the session's first sign of life and its end; how it ended."""
        before, victim = _rows(folder), self.random.choice(self.VICTIMS)
        wanted, later = self.random.randrange(before, STEPS + 1), self.random.random()
        launcher, ranks = self.start(folder), []
        while launcher.poll() is None and (len(ranks) < 2 or _rows(folder) < wanted):
            ranks = _children(launcher.pid)
            time.sleep(0.005)
        with suppress(subprocess.TimeoutExpired):
            launcher.wait(later * (8.0 if wanted == before else 0.4))
        if launcher.poll() is None:
            chosen = {"rank 0": ranks[:1], "rank 1": ranks[1:], "both ranks": ranks, "the launcher": [launcher.pid]}
            for process in chosen[victim]:
                os.kill(process, signal.SIGKILL)
        how = self.end(launcher)
        until = time.monotonic() + 60
        while any(map(_alive, ranks)) and time.monotonic() < until:
            time.sleep(0.01)
        return how if how == "exit code 0" else f"{victim}: {how}"

    def end(self, launcher: subprocess.Popen) -> str:
        """How a session ended: its exit code, or the name of the signal that ended it."""
        try:
            code = launcher.wait(180)
        except subprocess.TimeoutExpired:
            launcher.kill()
            return "timed out"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _children(process: int) -> list[int]:
    """The processes that ``process`` started, in this order."""
    started = [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]
    return sorted(child for child in started if _stat(child)[1:2] == [str(process)])


def _alive(process: int) -> bool:
    return _stat(process)[:1] not in ([], ["Z"])


def _stat(process: int) -> list[str]:
    """A process's state, its parent, and more; nothing if it is gone."""
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return []


FAULTS = (kills, stops, limits, disks, ranks)
