"""Starts the ranks of a test: processes of one host that reach each other over gloo."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(command: Sequence[str], ranks: int, **options) -> list[subprocess.Popen]:
    """``python command`` as each of ``ranks`` processes; ``options`` are Popen's."""
    shared = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(ranks)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def run(command: Sequence[str], ranks: int, **options) -> list[str]:
    """Run them to their end; what each printed. Fails if one fails."""
    started = start(command, ranks, **options)
    printed = [process.communicate()[0] for process in started]
    for process, text in zip(started, printed, strict=True):
        assert process.returncode == 0, text[-3000:]
    return printed
