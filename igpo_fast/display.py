"""What a run shows while it runs: a live display in a terminal, plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

LONG_PHASE = 10.0
"""Seconds from which a phase is worth a line of a log."""
BARS = "▁▂▃▄▅▆▇█"


class Display:
    """Progress of a run.

    In a terminal two bars are redrawn in place, the run's and the current phase's, above the last step's numbers, and
    a line stays for each step that was evaluated. Elsewhere each step is a line, and so is a phase of ``LONG_PHASE``
    or more.

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
        self._last_step = self._phase_start = clock()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            console=self.console,
        )
        self._run = self._progress.add_task("step", total=steps, completed=done)
        self._phase = self._progress.add_task("", total=None, visible=False)
        # Not a column of the bars: a narrow terminal would squeeze those to nothing.
        self._info = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._progress, self._info), console=self.console, transient=True)
        self._phase_name = ""

    def __enter__(self) -> Display:
        self._last_step = self._clock()
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *exception) -> None:
        self._end_phase()
        self._live.stop()

    def phase(self, name: str, total: int | None = None) -> None:
        """Begin a phase of ``total`` units; the one before ends."""
        self._end_phase()
        self._phase_name = name
        self._phase_start = self._clock()
        # reset() keeps an old total where the new one is None.
        self._progress.remove_task(self._phase)
        self._phase = self._progress.add_task(name, total=total)

    def advance(self, done: int = 1) -> None:
        """``done`` more units of the phase are finished."""
        self._progress.advance(self._phase, done)

    def step(self, row: Mapping) -> None:
        """A step is finished; ``row`` is its line of metrics.jsonl (step 0: evaluation before training)."""
        self._end_phase()
        now = self._clock()
        if row["step"] > 0:
            self._seconds.append(now - self._last_step)
        self._last_step = now
        self._done = int(row["step"])
        line = f"{summary(row)}  eta {_duration(self._eta())}"
        self._progress.update(self._run, completed=self._done)
        self._info.plain = line
        if not self.console.is_terminal or _number(row, "eval/f1") is not None:
            self._print(Text(f"step {self._done}/{self.steps}  {line}"))

    def warm_start(self, done: int, total: int, loss: float) -> None:
        """Progress of the warm start: a step of it is done."""
        if done == 1:
            self.phase("warm start", total=total)
        self.advance()
        if done % max(1, total // 5) == 0:
            self.note(f"warm start {done}/{total}  loss {loss:.3f}")

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(Text(text))

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""
        self._print(Text(f"warning: {text}", style="yellow"))

    def _print(self, text: Text) -> None:
        # soft_wrap: a log's line is a line, however narrow the console is taken to be.
        self.console.print(text, soft_wrap=True)

    def _end_phase(self) -> None:
        seconds = self._clock() - self._phase_start
        step = min(self._done + 1, self.steps)
        if self._phase_name and seconds >= LONG_PHASE and not self.console.is_terminal:
            self._print(Text(f"step {step}/{self.steps}  {self._phase_name} {_duration(seconds)}"))
        self._phase_name = ""
        self._progress.update(self._phase, visible=False)

    def _eta(self) -> float:
        """Seconds left at the pace of the last 20 steps; NaN before the first."""
        recent = self._seconds[-20:]
        return sum(recent) / len(recent) * (self.steps - self._done) if recent else math.nan


def summary(row: Mapping) -> str:
    """The row's main numbers in one line; those that it lacks are left out."""
    parts = [
        text.format(value)
        for key, text in (
            ("reward/f1", "f1 {:.3f}"),
            ("reward/ig_mean", "gain {:+.4f}"),
            ("group/collapsed", "collapsed {:.2f}"),
            ("turns/mean", "turns {:.1f}"),
        )
        if (value := _number(row, key)) is not None
    ]
    tokens, seconds = _number(row, "tokens/rollout"), _number(row, "time/step")
    if tokens is not None and seconds:
        parts.append(f"{tokens / seconds:,.0f} tokens/s")
    if seconds is not None:
        parts.append(f"{seconds:.1f} s")
    if (f1 := _number(row, "eval/f1")) is not None:
        error = _number(row, "eval/f1_se")
        parts.append(f"eval f1 {f1:.3f}" + (f" ± {error:.3f}" if error is not None else ""))
    return "  ".join(parts)


def sparkline(values: Sequence[float | None], low: float | None = None, high: float | None = None) -> str:
    """A bar a value, from ``low`` (default: the least) to ``high`` (the greatest); a gap for None and NaN.

    >>> sparkline([0.0, 0.5, None, 1.0])
    '▁▅ █'
    """
    numbers = [value for value in values if value is not None and math.isfinite(value)]
    if not numbers:
        return " " * len(values)
    low = min(numbers) if low is None else low
    high = max(numbers) if high is None else high

    def bar(value: float) -> str:
        share = (value - low) / (high - low) if high > low else 0.0
        return BARS[min(int(max(share, 0.0) * len(BARS)), len(BARS) - 1)]

    return "".join(bar(value) if value is not None and math.isfinite(value) else " " for value in values)


def _number(row: Mapping, key: str) -> float | None:
    value = row.get(key)
    return value if value is not None and math.isfinite(value) else None


def _duration(seconds: float) -> str:
    """``45 s``, ``6:10`` or ``2:03:00``; ``-`` for NaN."""
    if math.isnan(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
