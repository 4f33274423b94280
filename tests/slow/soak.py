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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random

import torch
from transformers import Qwen2ForCausalLM  # noqa: F401 (imported once, for all sessions)

import igpo_fast.train
from igpo_fast import cli
from igpo_fast.heartbeat import LAUNCHER
from igpo_fast.run.launch import environments
from tests.tiny import SETTINGS, WORLD, files, rows

DEEPSPEED = find_spec("deepspeed") is not None
if DEEPSPEED:
    import igpo_fast.update.zero  # noqa: F401
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


def command(folder: Path, cache: Path, log: Path, most: int, more: Mapping[str, str] | None = None) -> None:
    """``igpo-fast train`` in this process, its output in ``log``; files of at most ``most`` bytes, if not 0.

    Args:
        more: environment variables of a rank.
    """
    os.environ.update(more or {})
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
    """``kill -9`` of either of two ranks, or of both, up to four times a run."""
    if not DEEPSPEED:
        return
    name = "`kill -9` of either of two ranks, or of both"
    folder, pair = runs.home / "run", Pair(runs)
    pair.reference()
    tried = runs.results.setdefault(name, Tried())
    while tried.tries < RANKS:
        for _ in range(4):
            if _rows(folder) > STEPS or tried.tries == RANKS:
                break
            runs.disturb(name, lambda: pair.killed(folder))
        pair.finish(tried, folder)


class Pair:
    """Sessions of two ranks, without a launcher that would end one after the other."""

    VICTIMS = ((0,), (1,), (0, 1))

    def __init__(self, runs: Runs):
        self.runs, self.undisturbed = runs, runs.home / "pair"

    def reference(self) -> None:
        """A run that nothing disturbs."""
        how = self.end(self.start(self.undisturbed))
        assert how == "exit code 0, exit code 0", self.runs.log.read_text()

    def start(self, folder: Path) -> list[multiprocessing.Process]:
        own = [{name: of[name] for name in of.keys() - os.environ.keys() - {LAUNCHER}} for of in environments(2)]
        started = [
            CONTEXT.Process(target=command, args=(folder, self.runs.cache, self.runs.log, 0, more)) for more in own
        ]
        for process in started:
            process.start()
        return started

    def end(self, started: list[multiprocessing.Process]) -> str:
        return ", ".join(map(self.runs.end, started))

    def killed(self, folder: Path) -> str:
        """Kill at a random moment between the session's start and its end; how each rank ended."""
        random, before = self.runs.random, _rows(folder)
        victims, wanted, later = random.choice(self.VICTIMS), random.randrange(before, STEPS + 1), random.random()
        started = self.start(folder)
        while all(process.is_alive() for process in started) and _rows(folder) < wanted:
            time.sleep(0.005)
        started[0].join(later * (3.0 if wanted == before else 0.4))
        if any(not process.is_alive() for process in started):
            victims = ()  # too late
        for victim in victims:
            started[victim].kill()
        how = self.end(started)
        return "exit code 0" if how == "exit code 0, exit code 0" else how

    def finish(self, tried: Tried, folder: Path) -> None:
        tried.runs += 1
        how = self.end(self.start(folder))
        done = how == "exit code 0, exit code 0"
        wrong = differences(folder, self.undisturbed) if done else [how, self.runs.log.read_text()[-2000:]]
        tried.same += not wrong
        tried.problems += wrong
        shutil.rmtree(folder, ignore_errors=True)


FAULTS = (kills, stops, limits, disks, ranks)
