"""What docs/reliability.md counts: a sweep of odd and damaged inputs, and whole runs that are killed and stopped.

``python -m tests.slow.test_reliability`` does both and writes the table; the seeds are fixed, so the sweep's counts
repeat. ``pytest -m slow tests/slow`` does the same without writing.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.slow import folders, inputs, soak
from tests.slow.sweep import Case, Counts, sweep

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs/reliability.md"
COMMAND = "python -m tests.slow.test_reliability"
TARGETS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "configuration: load, write, load again": (folders.config, 1500),
    "configuration: a whole run of a step": (folders.whole_run, 250),
    "question files": (inputs.questions, 1000),
    "corpora": (inputs.corpora, 500),
    "trajectories for `score`, both dialects": (inputs.trajectories, 800),
    "retrieval answers": (inputs.retrieval, 700),
    "run folders: checkpoints, metrics, configuration": (folders.run_folder, 400),
    "tokenizer folders": (folders.tokenizers, 250),
    "model folders": (folders.models, 200),
}
BEGIN, END = f"<!-- written by {COMMAND} -->", "<!-- end -->"


@pytest.mark.parametrize("name", TARGETS)
def test_every_case_is_accepted_or_refused_in_a_line(name):
    counts = sweep(*_of(name))
    assert not counts.faults and not counts.timed_out, "\n".join(counts.faults.values())
    assert counts.refused and counts.accepted, "the cases are all alike"


@pytest.mark.parametrize("fault", soak.FAULTS, ids=lambda fault: fault.__name__)
def test_a_disturbed_run_ends_as_an_undisturbed_one(fault, tmp_path_factory):
    runs = soak.Runs(tmp_path_factory.mktemp("soak"), cache=tmp_path_factory.getbasetemp() / "cache")
    fault(runs)
    if not runs.results:
        pytest.skip("no file system can be mounted here")
    for tried in runs.results.values():
        assert not tried.problems and tried.same == tried.runs, "\n".join(tried.problems)


def _of(name: str):
    target, cases = TARGETS[name]
    return target, range(cases)


def write(found: dict[str, Counts], disturbed: dict[str, soak.Tried]) -> None:
    """Put the counts into the page."""
    page = PAGE.read_text(encoding="utf-8")
    lines = [BEGIN, "", f"{date.today()}, {_commit()}, Python {platform.python_version()}, {os.uname().machine}.", ""]
    lines += [
        "| input | cases | refused in a line | accepted | tracebacks | over 20 s |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    rows = {name: [c.cases, c.refused, c.accepted, c.failed, c.timed_out] for name, c in found.items()}
    rows["all"] = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines += [f"| {name} | {' | '.join(f'{number:,}' for number in row)} |" for name, row in rows.items()]
    lines += [
        "",
        "| fault | times | how the disturbed sessions ended | runs | the same end | tracebacks, half-written files |",
    ]
    lines += ["| --- | --: | --- | --: | --: | --: |"]
    for name, tried in disturbed.items():
        ends = ", ".join(f"{how}: {times}" for how, times in sorted(tried.ends.items()))
        lines.append(f"| {name} | {tried.tries} | {ends} | {tried.runs} | {tried.same} | {len(tried.problems)} |")
    lines += ["", END]
    text = re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: "\n".join(lines), page, flags=re.DOTALL)
    PAGE.write_text(text, encoding="utf-8")


def _commit() -> str:
    """The commit that was tried, and whether the working tree has changes beside it."""
    git = ["git", "-C", str(PAGE.parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    return f"commit {commit}{' with changes' if changed.stdout.strip() else ''}" if commit else "no commit known"


def main() -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found, faults = {}, Counter()
    for name in TARGETS:
        found[name] = counts = sweep(*_of(name))
        print(f"{name}: {counts.cases:,} cases in {counts.seconds:.0f} s", flush=True)
        print(*counts.faults.values(), sep="\n", end="")
        faults["cases"] += counts.failed + counts.timed_out
    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        runs = soak.Runs(Path(home))
        for fault in soak.FAULTS:
            fault(runs)
            print(f"{fault.__doc__.splitlines()[0]} done", flush=True)
    for tried in runs.results.values():
        print(*tried.problems, sep="\n", end="")
        faults["runs"] += len(tried.problems) + tried.runs - tried.same
    write(found, runs.results)
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
