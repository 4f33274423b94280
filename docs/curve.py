"""Draws learning curves per seed: ``python docs/curve.py > docs/curve.svg`` the quickstart's, ``python docs/curve.py
smollm2 > docs/smollm2.svg`` those of SmolLM2.

The newest row of each algorithm and seed in bench/results/. The quickstart's are sampled F1 on held-out worlds,
SmolLM2's the F1 of the rollouts that were trained on, in windows of steps.
"""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

from igpo_fast.report.chart import Chart, Line, draw

RESULTS = Path(__file__).parents[1] / "bench/results"
WINDOW = 4
"""Steps in a point of SmolLM2's curves."""
ALGORITHMS = ("igpo", "grpo")

Point = tuple[float, float, float]
"""Step, F1 and its standard error."""


def newest(name: str) -> dict[tuple[str, int], dict]:
    """(algorithm, seed) -> its newest row without overrides."""
    rows = map(json.loads, (RESULTS / f"{name}.jsonl").read_text().splitlines())
    return {(row["algorithm"], row["seed"]): row for row in rows if not row["overrides"]}


def evaluated(row: dict) -> list[Point]:
    return list(zip(row["steps"], row["eval/f1"], row["eval/f1_se"], strict=True))


def trained_on(row: dict) -> list[Point]:
    """A point per window, at its last step; the error is that of the mean of its steps."""
    f1 = row["train/f1"]
    windows = [(end, f1[end - WINDOW : end]) for end in range(WINDOW, len(f1) + 1, WINDOW)]
    return [(end, fmean(window), stdev(window) / WINDOW**0.5) for end, window in windows]


def line(algorithm: str, seed: int, points: list[Point]) -> Line:
    steps, f1, error = zip(*points, strict=True)
    low, high = ([f + sign * e for f, e in zip(f1, error, strict=True)] for sign in (-1, 1))
    colour = ALGORITHMS.index(algorithm)
    return Line(f"{algorithm.upper()} {seed}", steps, f1, low, high, bars=True, dots=True, colour=colour)


if __name__ == "__main__":
    if sys.argv[1:] == ["smollm2"]:
        points, rows = trained_on, newest("smollm2_nq")
        title, per_step = f"F1 of rollouts, means of {WINDOW} steps", "3 questions x 4 rollouts"
    else:
        points, rows = evaluated, newest("demo_seeds")
        title, per_step = "sampled F1, held-out worlds", "16 questions x 8 rollouts"
    lines = [line(*key, points(row)) for key, row in sorted(rows.items())]
    last = max(lines[0].xs)
    print(draw([Chart(title, lines, f"step ({per_step})", y_range=(0, 1), x_range=(0, last))]))
