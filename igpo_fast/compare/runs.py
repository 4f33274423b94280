"""The trainings of a comparison: processes ``igpo-fast train``, several at a time; the same command goes on with them.

Processes begin in the order of their seeds, so that the runs of a seed train side by side and a busy machine slows all
alike. A seed's warm start is made once, before its runs, which find it in the cache.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from igpo_fast.compare.board import Board
from igpo_fast.compare.plan import Plan
from igpo_fast.compare.results import Run, is_finished
from igpo_fast.errors import RunError, masked
from igpo_fast.files import storage
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.interrupt import Interrupted, stop_requested
from igpo_fast.sft import steps_of

PROGRAM = (sys.executable, "-m", "igpo_fast")
POLL = 0.2
"""Seconds between two looks at the processes."""
GRACE = 10.0
"""Seconds that processes have to end after the second Ctrl-C, before they are killed."""
BEGIN = b"\n--- a new process ---\n"
"""Line of a log before those of a process; an earlier one may still write after it, if its command was killed."""
QUOTED = 300
"""Characters of a failed run's last line that are told."""


@dataclass(frozen=True, eq=False)
class Task:
    """A process to run.

    Args:
        run: the run that it trains; None makes a warm start.
        after: the task that must have ended well before it.
    """

    name: str
    command: Sequence[str]
    log: Path
    steps: int = 0
    run: Run | None = None
    after: Task | None = None


@dataclass
class Outcome:
    """What became of the trainings: names of those that ended well, and of the others with a reason."""

    trained: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


def tasks_of(plan: Plan, jobs: int, program: Sequence[str] = PROGRAM) -> list[Task]:
    """The trainings that are not finished, in the order of their seeds, and before those of every ``jobs`` seeds their
    warm starts."""
    tasks: list[Task] = []
    for first in range(0, len(plan.seeds), jobs):
        some = [task for seed in plan.seeds[first : first + jobs] for task in _tasks_of(plan, seed, program)]
        tasks += sorted(some, key=lambda task: task.run is not None)
    return tasks


def _tasks_of(plan: Plan, seed: int, program: Sequence[str]) -> list[Task]:
    config, logs = plan.config_of(next(iter(plan.variants)), seed), plan.folder / "logs"
    runs = [Run(variant, seed, RunFolder(plan.path(variant, seed))) for variant in plan.variants]
    left = [run for run in runs if not is_finished(run, config.train.steps)]
    fresh = [run for run in left if not run.folder.saved()]
    start = None
    if len(fresh) > 1 and steps_of(config):
        command = [*program, "sft", *plan.arguments(fresh[0].variant, seed)]
        start = Task(f"warm start of seed {seed}", command, logs / f"{seed}-warm-start.log")
    trainings = [
        Task(
            run.name,
            [*program, "train", *plan.arguments(run.variant, seed)],
            logs / f"{run.name}.log",
            config.train.steps,
            run,
            start if run in fresh else None,
        )
        for run in left
    ]
    return [start, *trainings] if start else trainings


def run_tasks(tasks: Sequence[Task], jobs: int, board: Board, outcome: Outcome) -> None:
    """Run the tasks in order, ``jobs`` at a time. One that fails stops none but those that come after it.

    Args:
        outcome: gets what becomes of them.
    Raises:
        Interrupted: Ctrl-C or SIGTERM; every process has finished its step and saved it, or after a second signal has
            ended at once.
        StorageError: a log cannot be written.
    """
    waiting, running, asked = list(tasks), {}, False
    with stop_requested() as stop, _ended(running):
        while running or (waiting and not asked):
            if stop.is_set() and not asked:  # once: the second SIGTERM would end them before they have saved
                asked = True
                _ask(running)
            while not asked and len(running) < jobs and _may_begin(waiting, outcome):
                task = waiting.pop(0)
                if task.after and task.after.name in outcome.failed:
                    outcome.failed[task.name] = f"the {task.after.name} failed"
                    board.ended(task, f"failed: {outcome.failed[task.name]}")
                else:
                    running[task] = _start(task)
                    board.began(task)
            for task, process in list(running.items()):
                if process.poll() is not None:
                    del running[task]
                    why = _failure(task, process.returncode)
                    if not why:
                        outcome.trained.append(task.name)
                    elif not asked:
                        outcome.failed[task.name] = why
                    board.ended(task, "stopped" if why and asked else why and f"failed: {why}")
            board.show(list(running))
            time.sleep(POLL)
    if asked:
        runs = [task for task in tasks if task.run]
        over = sum(task.name in outcome.trained for task in runs)
        raise Interrupted(f"{over} of {len(runs)} runs ended, the others go on from their last step")


def _may_begin(waiting: Sequence[Task], outcome: Outcome) -> bool:
    """Whether the first waits for nothing. Later ones wait with it: begun before, they would train beside others."""
    over = {*outcome.trained, *outcome.failed}
    return bool(waiting) and (waiting[0].after is None or waiting[0].after.name in over)


def _start(task: Task) -> subprocess.Popen:
    """Start a task in a process group of its own: Ctrl-C in a terminal reaches this process alone, which passes it
    on."""
    with storage(task.log):
        task.log.parent.mkdir(parents=True, exist_ok=True)
        log = open(task.log, "ab")  # noqa: SIM115 (closed below, the process has its own)
    with log:
        with storage(task.log):
            log.write(BEGIN)
            log.flush()
        return subprocess.Popen(
            task.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0,
            env={"OMP_NUM_THREADS": "1", **os.environ},
        )  # fmt: skip


def _failure(task: Task, status: int) -> str:
    """Why a process failed, empty if it did not."""
    if status == 0:
        ended = task.run is None or is_finished(task.run, task.steps)
        return "" if ended else f"ended before its last step, see {task.log}"
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    own = task.log.read_text(errors="replace").rpartition(BEGIN.decode())[2]
    lines = [line.strip() for line in own.split("\n") if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    last = (errors or lines or ["nothing said"])[-1]
    return masked(last.removeprefix("error: ")[:QUOTED])


def _ask(running: dict[Task, subprocess.Popen]) -> None:
    """Ask the processes to finish their step, or if they were asked before to end at once. Not by SIGINT, which a
    shell's background processes ignore until they train."""
    for process in running.values():
        process.terminate()


@contextmanager
def _ended(running: dict[Task, subprocess.Popen]) -> Iterator[None]:
    """A context that leaves no process behind."""
    try:
        yield
    except BaseException as error:
        _ask(running)
        for process in running.values():
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        if isinstance(error, KeyboardInterrupt):  # the second Ctrl-C
            raise Interrupted("stopped at once, as asked") from None
        raise


def refuse_failures(outcome: Outcome, folder: Path) -> None:
    """RunError that names the failed trainings, if there are any."""
    if not outcome.failed:
        return
    told = list(outcome.failed.items())
    first = "; ".join(f"{name}: {why}" for name, why in told[:3])
    more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
    raise RunError(
        f"{len(told)} of the trainings failed ({first}{more}). Their logs are in {folder / 'logs'}; once the cause is "
        f"gone, the same command goes on with them; a run is made anew, with other settings too, once its folder "
        f"{folder}/VARIANT-SEED is deleted"
    )
