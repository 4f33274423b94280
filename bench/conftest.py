"""What every bench shares: both sides timed in turns in one run, a row for each comparison.

``pytest bench/ [-k NAME] [--full] [--results FILE]`` prints each comparison and, with --results, appends its row.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=None, help="append JSON lines here")
    parser.addoption("--full", action="store_true", help="model shapes, for a GPU")


def hardware() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {torch.get_num_threads()} threads"


def spread(seconds: list[float]) -> dict:
    """Median and the 20th and 80th percentiles, in ms."""
    ordered = sorted(seconds)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    ms = {"median": statistics.median(ordered), "p20": at(0.2), "p80": at(0.8)}
    return {**{name: round(value * 1e3, 3) for name, value in ms.items()}, "unit": "ms"}


@pytest.fixture
def compare(request, capsys):
    """``compare(bench, shape, {"ours": f, peer: g, ...}, rounds)`` times all sides in turns, one after the other in
    each round, after one unmeasured round."""

    def run(bench: str, shape: dict, sides: dict[str, Callable[[], object]], rounds: int = 3) -> dict[str, dict]:
        times: dict[str, list[float]] = {name: [] for name in sides}
        for measured in [False] + [True] * rounds:
            for name, side in sides.items():
                start = time.perf_counter()
                side()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if measured:
                    times[name].append(time.perf_counter() - start)
        found = {name: spread(seconds) for name, seconds in times.items()}
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        for peer in [name for name in sides if name != "ours"]:
            ratios = [p / o for p, o in zip(times[peer], times["ours"], strict=True)]
            row = {
                "bench": f"{bench}/{peer}", "date": date.today().isoformat(), "commit": commit.stdout.strip(),
                "hardware": hardware(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "shape": shape, "ours": found["ours"], "peer": peer, "peers": {peer: found[peer]},
                "ratio": round(statistics.median(ratios), 3),
                "ratio_spread": [round(min(ratios), 3), round(max(ratios), 3)],
            }  # fmt: skip
            with capsys.disabled():
                print(
                    f"\n{row['bench']}: ours {found['ours']['median']:.0f} ms, {peer} {found[peer]['median']:.0f} ms, "
                    f"ratio {row['ratio']:.2f} ({row['ratio_spread'][0]:.2f} - {row['ratio_spread'][1]:.2f})"
                )
            if results := request.config.getoption("--results"):
                with open(results, "a") as file:
                    file.write(json.dumps(row) + "\n")
        return found

    return run
