"""One comparison, from its trainings to its page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from igpo_fast.compare.board import Board
from igpo_fast.compare.page import left_out, write_page
from igpo_fast.compare.plan import Plan
from igpo_fast.compare.results import check_alike, row_of, rows_in, runs_in, write_rows
from igpo_fast.compare.runs import PROGRAM, Outcome, refuse_failures, run_tasks, tasks_of
from igpo_fast.errors import InputError
from igpo_fast.files import check_writable, lock, storage


def compare(
    folder: Path,
    plan: Plan | None,
    *,
    jobs: int = 1,
    score: str = "eval/f1",
    at: float = 0.5,
    stalled: float = 0.15,
    baseline: str | None = None,
    program: Sequence[str] = PROGRAM,
) -> dict:
    """Train what is left of a plan, then write compare.html and the rest about all runs of the folder.

    Args:
        plan: None only writes.
        jobs: trainings at a time.
        score, at, stalled, baseline: what is compared (statistics.summarise); without a baseline it is the plan's last
            variant, else ``grpo`` if it is there.
        program: the command whose ``train`` and ``sft`` are run.
    Returns:
        The statistics, with ``sentences``.
    Raises:
        InputError: runs of the folder were made with other settings or cannot be read; there is nothing to compare.
        Interrupted: Ctrl-C.
        RunError: a training failed; the page about the others was written.
    """
    if not score.startswith("eval/"):
        raise InputError(f"--score {score}: not a number of the evaluations; give one of theirs, like eval/f1")
    for option, value in (("--at", at), ("--stalled", stalled)):
        if not math.isfinite(value):
            raise InputError(f"{option} {value}: not a score; give a finite number")
    if plan is None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give --dir, or leave --report-only out")
    begun = runs_in(folder)
    if plan is None and not begun:
        raise InputError(
            f"{folder}: no run is here, a folder VARIANT-SEED like igpo-1 with a config.yaml; give another --dir, or "
            "leave --report-only out"
        )
    asked = list(plan.variants) if plan else []
    expected = {name: plan.config_of(name, plan.seeds[0]) for name in asked}
    planned = {f"{name}-{seed}" for name in asked for seed in plan.seeds}
    names = [*asked, *sorted({run.variant for run in begun}.difference(asked))]
    if baseline not in (None, *names):
        raise InputError(f"--baseline {baseline}: not among {', '.join(names)}; give one of them")
    check_alike(begun, expected, planned)
    before = rows_in(folder)
    for run in begun:
        run.folder.read_metrics()  # a damaged line is told now, not after hours of training
    if baseline is None:
        baseline = asked[-1] if asked else "grpo" if "grpo" in names else names[-1]
    names.sort(key=lambda name: name == baseline)
    nothing = InputError(f"{folder}: no finished run has {score}; train on, or give another --score")
    with _alone(folder):
        outcome = Outcome()
        try:
            if plan is not None:
                tasks = tasks_of(plan, jobs, program)
                with Board(tasks, score) as board:
                    run_tasks(tasks, jobs, board, outcome)
        finally:
            # Now: who is interrupted may go on with another version.
            runs = runs_in(folder)
            runs.sort(key=lambda run: (names.index(run.variant), run.seed))
            steps = max((run.folder.config.train.steps for run in runs), default=0)
            rows = [row_of(run, score, steps) for run in runs]
            if plan is None and all(left_out(row, score) for row in rows):
                raise nothing
            rows = write_rows(folder, rows, before, outcome.trained)
        absent = sorted(planned.difference(run.name for run in runs))
        try:
            found = write_page(folder, rows, baseline, score, at, stalled, absent)
        finally:
            refuse_failures(outcome, folder)
        if not found["variants"]:
            raise nothing
        return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """The folder for this process alone."""
    check_writable(folder)
    with storage(folder, "lock"):
        held = open(folder / ".lock", "a+")  # noqa: SIM115 (closed below)
    with held:
        if not lock(held):
            raise InputError(f"{folder}: another comparison runs here; wait for it, or give another --dir")
        yield
