"""Progress of a run: a live display in a terminal, plain lines in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from igpo_fast.errors import masked
from igpo_fast.jsonl import finite

LONG_PHASE = 10.0
"""Seconds from which a phase gets a line in a log."""
QUIET_SECONDS = 60.0
"""Longest silence of a log, in seconds, while a phase advances."""
LOG_SECONDS = 10.0
"""Seconds between progress lines in a log."""
BARS = "▁▂▃▄▅▆▇█"


class Display:
    """Progress of a run.

    In a terminal two bars, the run's and the current phase's, are redrawn in place above the last step's numbers, and
    each evaluated step leaves a line. Elsewhere each step is a line; its phases of ``LONG_PHASE`` or more get a line,
    and so does a phase's progress after ``QUIET_SECONDS``.

    Args:
        steps: of the whole run.
        done: steps finished by earlier sessions.
    """

    def __init__(
        self,
        steps: int,
        done: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.steps = steps
        self.console = console or Console()
        self._done = done
        self._clock = clock
        self._seconds: list[float] = []
        self._last_step = self._phase_start = self._last_line = clock()
        self._phases: dict[str, float] = {}  # seconds of phases that ended since the last step
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            console=self.console,
        )
        self._run = self._progress.add_task("step", total=steps, completed=done)
        self._phase = self._progress.add_task("", total=None, visible=False)
        # Not a column of the bars: a narrow terminal would squeeze the bars to nothing.
        self._info = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._info), console=self.console, transient=True)
        self._phase_name, self._phase_total, self._phase_done = "", None, 0

    def __enter__(self) -> Display:
        self._last_step = self._clock()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        self._end_phase()
        self._live.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase of ``total`` units, which ends the one before."""
        self._end_phase()
        self._phase_name, self._phase_total, self._phase_done = name, total, 0
        self._phase_start = self._clock()
        # reset() keeps an old total where the new one is None.
        self._progress.remove_task(self._phase)
        self._phase = self._progress.add_task(name, total=total)

    def advance(self, done: int = 1) -> None:
        """Add ``done`` finished units of the phase."""
        self._progress.advance(self._phase, done)
        self._phase_done += done
        if not self.console.is_terminal and self._clock() - self._last_line >= QUIET_SECONDS:
            self._print(Text(f"{self._phase_name} {self._phase_done}/{self._phase_total or '?'}"))

    def step(self, row: Mapping) -> None:
        """Show a finished step; ``row`` is its line of metrics.jsonl (step 0: evaluation before training)."""
        self._end_phase()
        now = self._clock()
        if row["step"] > 0:
            self._seconds.append(now - self._last_step)
        self._last_step = now
        self._done = int(row["step"])
        self._print_phases(row)
        line = f"{summary(row)}  eta {duration(self._eta())}"
        self._progress.update(self._run, completed=self._done)
        self._info.plain = line
        if not self.console.is_terminal or evaluated(row) is not None:
            self._print(Text(f"step {self._done}/{self.steps}  {line}"))

    def warm_start(self, done: int, total: int, loss: float) -> None:
        """Show that a step of the warm start is finished."""
        if done == 1:
            self.phase("warm start", total=total)
        self.advance()
        if done % max(1, total // 5) == 0:
            self.note(f"warm start {done}/{total}  loss {loss:.3f}")

    def note(self, text: str) -> None:
        """Show a line that stays."""
        self._print(Text(masked(text)))

    def warn(self, text: str) -> None:
        """Show a highlighted line that stays."""
        self._print(Text(f"warning: {masked(text)}", style="yellow"))

    def _print(self, text: Text) -> None:
        # soft_wrap: a log's line stays one line, however narrow rich takes the console to be.
        self.console.print(text, soft_wrap=True)
        self._last_line = self._clock()

    def _print_phases(self, row: Mapping) -> None:
        """Print the step's long phases: the row's ``time/*``, and by our own clock phases without such a key (the warm
        start)."""
        timed = {key.removeprefix("time/"): finite(row.get(key)) for key in row if key.startswith("time/")}
        seconds = {name: s for name, s in (self._phases | timed).items() if name != "step" and s is not None}
        long = [f"{name} {duration(s)}" for name, s in seconds.items() if s >= LONG_PHASE]
        if long and not self.console.is_terminal:
            self._print(Text(f"step {self._done}/{self.steps}  {'  '.join(long)}"))
        self._phases = {}

    def _end_phase(self) -> None:
        if self._phase_name:
            before = self._phases.get(self._phase_name, 0.0)
            self._phases[self._phase_name] = before + self._clock() - self._phase_start
        self._phase_name = ""
        self._progress.update(self._phase, visible=False)

    def _eta(self) -> float:
        """Seconds left at the pace of the last 20 steps; NaN before the first."""
        recent = self._seconds[-20:]
        return sum(recent) / len(recent) * (self.steps - self._done) if recent else math.nan


def summary(row: Mapping) -> str:
    """The row's main numbers in one line; missing ones are left out."""
    parts = [
        text.format(value)
        for key, text in (
            ("reward/f1", "f1 {:.3f}") if "reward/f1" in row else ("reward/outcome", "outcome {:.3f}"),
            ("reward/ig_mean", "gain {:+.4f}"),
            ("group/collapsed", "collapsed {:.2f}"),
            ("turns/mean", "turns {:.1f}"),
        )
        if (value := finite(row.get(key))) is not None
    ]
    tokens, seconds = finite(row.get("tokens/rollout")), finite(row.get("time/step"))
    if tokens is not None and seconds:
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    if key := evaluated(row):
        error = finite(row.get(f"{key}_se"))
        name = key.replace("/", " ")
        parts.append(f"{name} {row[key]:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
    return "  ".join(parts)


def evaluated(row: Mapping) -> str | None:
    """The main number of a row's evaluation: F1, or where nothing is known the reward; None without one."""
    return next((key for key in ("eval/f1", "eval/reward") if finite(row.get(key)) is not None), None)


def sparkline(values: Sequence[float | None], low: float | None = None, high: float | None = None) -> str:
    """One bar per value, from ``low`` (default: the least) to ``high`` (the greatest); a gap for None and NaN.

    >>> sparkline([0.0, 0.5, None, 1.0])
    '▁▅ █'
    """
    numbers = [value for value in values if finite(value) is not None]
    if not numbers:
        return " " * len(values)
    low = min(numbers) if low is None else low
    high = max(numbers) if high is None else high

    def bar(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.0
        return BARS[min(int(max(share, 0.0) * len(BARS)), len(BARS) - 1)]

    return "".join(" " if finite(value) is None else bar(value) for value in values)


def duration(seconds: float) -> str:
    """``45 s``, ``6:10`` or ``2:03:00``; ``-`` for NaN."""
    if math.isnan(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def bar(name: str, log: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A context whose value takes (done, total) and shows progress on stderr: a bar, or if that is no terminal a line
    at times, or nothing without ``log``."""
    console = Console(stderr=True)
    if log and not console.is_terminal:
        yield _log_line(name)
        return
    name_column = TextColumn("{task.description}", markup=False)  # a file's name may look like markup
    columns = (name_column, BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _log_line(name: str) -> Callable[[int, int], None]:
    """Print progress at the start, at the end, and every ten seconds."""
    last = -math.inf

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            print(f"{name} {done / total:.0%}", file=sys.stderr, flush=True)

    return show
