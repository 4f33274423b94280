"""Timing of calls, and a record of the circumstances."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def timed(side: Callable[[], object], calls: int = 1, graph: bool = False) -> Callable[[], None]:
    """``calls`` calls of ``side``, then a wait for the device. With ``graph``, a CUDA device replays them from a CUDA
    graph, which excludes the host's launch time. Calls that wait for the device cannot be captured.
    """

    def several():
        for _ in range(calls):
            side()

    work = captured(several) if graph and DEVICE == "cuda" else several

    def run():
        work()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return run


def captured(work: Callable[[], None]) -> Callable[[], None]:
    stream = torch.cuda.Stream()  # capture needs a warm-up on a side stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def circumstances() -> dict:
    """Date, commit, hardware, how many processes wanted a core in the last minute, what glibc's allocator was told, and
    versions."""
    malloc = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    return ({"malloc": malloc} if malloc else {}) | {
        "date": date.today().isoformat(),
        "commit": commit(),
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{cpu()}, {torch.get_num_threads()} threads",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: found for name in ("torch", "triton", "transformers") if (found := installed(name))},
    }


def commit() -> str:
    """The environment's COMMIT where the tree was copied without its history; empty if unknown."""
    if known := os.environ.get("COMMIT"):
        return known
    if not shutil.which("git"):
        return ""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def cpu() -> str:
    for entry in Path("/proc/cpuinfo").read_text().splitlines():
        if entry.startswith("model name"):
            return entry.split(":", 1)[1].strip()
    return platform.machine()


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
