"""The sweep: cases of a kind of input, every one of which must be accepted, or refused in a line."""

from __future__ import annotations

import os
import re
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import huggingface_hub.constants
import pytest

from igpo_fast.run.crash import line_of

SECONDS = 20
"""Most that a case may take."""
Case = Callable[[Random], None]
"""Makes an input and hands it to what reads it; raises what that raises, or AssertionError for a wrong result."""


class TimedOut(BaseException):
    """A case exceeded ``SECONDS``."""


@dataclass
class Counts:
    """What became of a target's cases."""

    refused: int = 0
    lines: Counter = field(default_factory=Counter)
    """How the refusals begin, and how often."""
    accepted: int = 0
    timed_out: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    """The last lines of a traceback -> which case, and all of it."""
    failed: int = 0
    """Cases that ended in a traceback."""
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.refused + self.accepted + self.timed_out + self.failed


@contextmanager
def offline():
    """What names a model of the hub is answered at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


def sweep(target: Callable[[Path], Case], cases: Iterable[int], seconds: float = SECONDS) -> Counts:
    """Run cases of a target, each from a seed of its own number."""
    counts, began = Counts(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder, _here(Path(folder)), offline():
        case = target(Path(folder))
        for number in cases:
            try:
                with _limited(seconds):
                    case(Random(f"{target.__name__}/{number}"))
                counts.accepted += 1
            except TimedOut:
                counts.timed_out += 1
            except Exception as error:
                if _in_a_line(error):
                    counts.refused += 1
                    counts.lines[re.sub(r"\d+|\S*/\S*", "", str(error))[:90]] += 1
                else:
                    counts.failed += 1
                    frames = traceback.extract_tb(error.__traceback__)
                    own = [f for f in frames if "/igpo_fast/" in f.filename] or frames
                    where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {type(error).__name__}"
                    counts.faults.setdefault(
                        where, f"{target.__name__}/{number}\n" + "".join(traceback.format_exception(error))
                    )
    counts.seconds = time.monotonic() - began
    return counts


def _in_a_line(error: Exception) -> bool:
    """Whether the command line would print a line for it: a RunError, or no memory for what was asked."""
    line = line_of(error)
    return line is not None and not isinstance(error, OSError) and len(line) < 2000 and "\n" not in line.strip()


@contextmanager
def _limited(seconds: float):
    def stop(number, frame):
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _here(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
