"""Progress of several trainings: bars in a terminal, lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from igpo_fast.compare.results import Run
from igpo_fast.errors import InputError
from igpo_fast.jsonl import number_of
from igpo_fast.run.display import QUIET_SECONDS, duration

LOOK = 2.0
"""Seconds between two looks at the runs' metrics."""


class Task(Protocol):
    """What a board knows of a process (runs.Task)."""

    name: str
    steps: int
    run: Run | None


class Board:
    """Runs finished, and of the running ones step, last score and the time left of all.

    Args:
        tasks: all that will run.
        score: key of the score.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        score: str,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.console = console or Console()
        self._score, self._clock = score, clock
        self._runs = [task for task in tasks if task.run]
        self._steps = {task.name: self._state(task)[0] for task in self._runs}
        self._left_before = sum(task.steps - self._steps[task.name] for task in self._runs)
        self._over = 0
        self._begun = self._last_line = clock()
        self._last_look = -math.inf
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._all = self._progress.add_task("runs", total=len(self._runs), said="")
        self._bars: dict[str, TaskID] = {}

    def __enter__(self) -> Board:
        self._progress.start()
        return self

    def __exit__(self, *exception) -> None:
        self._progress.stop()

    def began(self, task: Task) -> None:
        """Show a process that was started."""
        total = task.steps or None
        self._bars[task.name] = self._progress.add_task(task.name, total=total, said="")
        if not self.console.is_terminal:
            self._print(f"{task.name} begins")

    def ended(self, task: Task, why: str) -> None:
        """Show a process that has ended; ``why``, empty if it did what it should."""
        if (bar := self._bars.pop(task.name, None)) is not None:
            self._progress.remove_task(bar)
        if task.run:
            step, score = self._state(task)
            self._steps[task.name] = step if not why else task.steps
            if why:  # what is left of it will not be done
                self._left_before -= task.steps - step
            self._over += 1
            self._progress.update(self._all, completed=self._over)
            end = why or f"{step} steps{self._said(score)}"
            self._print(f"{task.name}: {end}  ({self._over} of {len(self._runs)}{self._left()})")
        elif why:
            self._print(f"{task.name}: {why}")

    def show(self, running: Sequence[Task]) -> None:
        """Show how far the running processes are; looks at their files at times only."""
        now = self._clock()
        if now - self._last_look < LOOK:
            return
        self._last_look, said = now, []
        for task in running:
            step, score = self._state(task) if task.run else (0, None)
            if task.run:
                self._steps[task.name] = step
                said.append(f"{task.name} {step}/{task.steps}{self._said(score)}")
            self._progress.update(self._bars[task.name], completed=step, said=self._said(score))
        self._progress.update(self._all, said=self._left().removeprefix(", "))
        if said and not self.console.is_terminal and now - self._last_line >= QUIET_SECONDS:
            self._print(f"{'; '.join(said)}  ({self._over} of {len(self._runs)} ended{self._left()})")

    def _state(self, task: Task) -> tuple[int, float | None]:
        """The run's last step and last score."""
        try:
            rows = task.run.folder.read_metrics()
        except InputError:  # the run itself says what is wrong with the file
            return 0, None
        scores = [row[self._score] for row in rows if number_of(row.get(self._score)) is not None]
        return (rows[-1]["step"] if rows else 0), (scores[-1] if scores else None)

    def _said(self, score: float | None) -> str:
        return "" if score is None else f"  {self._score} {score:.3f}"

    def _left(self) -> str:
        """The time left at the pace so far, where there is one."""
        left = sum(task.steps - self._steps[task.name] for task in self._runs)
        done = self._left_before - left
        return f", {duration((self._clock() - self._begun) / done * left)} left" if done > 0 and left > 0 else ""

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)
        self._last_line = self._clock()
