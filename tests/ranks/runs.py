"""Whole runs by the command line, of one process or of several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import SETTINGS, STEPS, WORLD, files, rows

LAST = f"checkpoints/step_{STEPS:06d}"


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    """``train`` and its overrides."""
    return ["train", *SETTINGS, *WORLD, f"run.dir={folder}", f"run.cache={cache}", *more]


def command(*words: str, module: str = "igpo_fast") -> subprocess.CompletedProcess:
    """Run the command line to its end."""
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, timeout=300)


def train(folder: Path, cache: Path, *more: str, ranks: int = 1) -> str:
    """Train to the end; what it printed."""
    options = ["--nproc", str(ranks)] if ranks > 1 else []
    done = command(*arguments(folder, cache, *more), *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def same(ours: Path, theirs: Path, first: int = 0) -> None:
    """The same rollouts token for token from step ``first`` on, and the same curves but for rounding."""
    for name, content in files(theirs / "rollouts").items():
        if int(name[-12:-6]) >= first:
            mine = [json.loads(line) for line in files(ours / "rollouts")[name].splitlines()]
            wanted = [json.loads(line) for line in content.splitlines()]
            for one, other in zip(mine, wanted, strict=True):
                assert [turn["ids"] for turn in one["turns"]] == [turn["ids"] for turn in other["turns"]]
    for row, wanted in zip(rows(ours), rows(theirs), strict=True):
        assert list(row) == list(wanted)
        for key, value in wanted.items():
            rounding = 1e-4 if key.startswith("mismatch/") else 1e-5  # a mismatch is nothing but rounding here
            assert row[key] == pytest.approx(value, rel=1e-3, abs=rounding), (row["step"], key)
