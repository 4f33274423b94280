"""Starts the ranks of a test: processes of one host that reach each other over gloo."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from igpo_fast.run.launch import environments


def start(command: Sequence[str], ranks: int, **options) -> list[subprocess.Popen]:
    """``python command`` as each of ``ranks`` processes; ``options`` are Popen's."""
    more = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command], env=environment | more, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, **options,
        )
        for environment in environments(ranks)
    ]  # fmt: skip


def run(command: Sequence[str], ranks: int, **options) -> list[str]:
    """Run them to their end; what each printed. Fails if one fails."""
    started = start(command, ranks, **options)
    printed = [process.communicate()[0] for process in started]
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return printed
