"""One comparison, from its trainings to its page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from igpo_fast.compare.board import Board
from igpo_fast.compare.page import write_page
from igpo_fast.compare.plan import Plan
from igpo_fast.compare.results import check_alike, row_of, runs_in, write_rows
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
        InputError: runs of the folder were made with other settings; there is nothing to compare.
        Interrupted: Ctrl-C.
        RunError: a training failed; the page about the others was written.
    """
    if plan is None and not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give --dir, or leave --report-only out")
    asked = list(plan.variants) if plan else []
    expected = {name: plan.config_of(name, plan.seeds[0]) for name in asked}
    planned = {f"{name}-{seed}" for name in asked for seed in plan.seeds}
    if baseline is not None and asked and baseline not in {*asked, *(run.variant for run in runs_in(folder))}:
        raise InputError(f"--baseline {baseline}: not among {', '.join(asked)}; give one of them")
    with _alone(folder):
        check_alike(runs_in(folder), expected, planned)
        outcome = Outcome()
        try:
            if plan is not None:
                tasks = tasks_of(plan, jobs, program)
                with Board(tasks, score) as board:
                    run_tasks(tasks, jobs, board, outcome)
        finally:
            # Now: who is interrupted may go on with another version.
            runs = runs_in(folder)
            names = [*asked, *sorted({run.variant for run in runs}.difference(asked))]
            if baseline is None:
                baseline = asked[-1] if asked else "grpo" if "grpo" in names else names[-1] if names else ""
            names.sort(key=lambda name: name == baseline)
            runs.sort(key=lambda run: (names.index(run.variant), run.seed))
            steps = max((run.folder.config.train.steps for run in runs), default=0)
            rows = write_rows(folder, [row_of(run, score, steps) for run in runs], outcome.trained)
        try:
            return write_page(folder, rows, baseline, score, at, stalled)
        finally:
            refuse_failures(outcome, folder)


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
