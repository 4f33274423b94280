"""Draws learning curves per seed: ``python docs/curve.py > docs/curve.svg`` the quickstart's, ``python docs/curve.py
smollm2 > docs/smollm2.svg`` those of SmolLM2.

The newest row of each algorithm and seed in bench/results/. The quickstart's are sampled F1 on held-out worlds,
SmolLM2's the F1 of the rollouts that were trained on, in windows of steps.
"""

import json
import sys
from pathlib import Path
from statistics import fmean, stdev

RESULTS = Path(__file__).parents[1] / "bench/results"
WINDOW = 4
"""Steps in a point of SmolLM2's curves."""
COLOURS = {"igpo": "#2878b5", "grpo": "#c8553d"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 52, 24, 96, 44


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


def draw(curves: dict[tuple[str, int], list[Point]], title: str, per_step: str) -> str:
    steps = {step for points in curves.values() for step, _, _ in points}
    last = max(steps)
    x = lambda step: LEFT + step / last * (WIDTH - LEFT - RIGHT)  # noqa: E731
    y = lambda f1: TOP + (1 - f1) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    shapes = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(f'<path d="M{LEFT} {y(tick):.1f}H{x(last):.1f}" stroke="#e4e4e0"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in sorted(steps):
        shapes.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    shapes.append(f'<text x="{x(last / 2):.1f}" y="{HEIGHT - 6}" text-anchor="middle">step ({per_step})</text>')
    shapes.append(f'<text x="{LEFT}" y="{TOP - 10}">{title}</text>')
    for (algorithm, _), points in sorted(curves.items()):
        colour = COLOURS[algorithm]
        line = " ".join(f"{x(step):.1f},{y(f1):.1f}" for step, f1, _ in points)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for step, f1, error in points:
            shapes.append(
                f'<path d="M{x(step):.1f} {y(f1 + error):.1f}V{y(f1 - error):.1f}" stroke="{colour}"/>'
                f'<circle cx="{x(step):.1f}" cy="{y(f1):.1f}" r="2.5" fill="{colour}"/>'
            )
    ends = sorted(((points[-1][1], *key) for key, points in curves.items()), reverse=True)
    at = 0.0
    for f1, algorithm, seed in ends:  # overlapping labels are moved apart
        at = max(y(f1) + 4, at + 13)
        label = f"{algorithm.upper()} {seed}"
        shapes.append(f'<text x="{x(last) + 8:.1f}" y="{at:.1f}" fill="{COLOURS[algorithm]}">{label}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, *shapes, "</svg>"])


if __name__ == "__main__":
    if sys.argv[1:] == ["smollm2"]:
        rows = newest("smollm2_nq")
        title, per_step = f"F1 of rollouts, means of {WINDOW} steps", "3 questions x 4 rollouts"
        print(draw({key: trained_on(row) for key, row in rows.items()}, title, per_step))
    else:
        rows = newest("demo_seeds")
        title, per_step = "sampled F1, held-out worlds", "16 questions x 8 rollouts"
        print(draw({key: evaluated(row) for key, row in rows.items()}, title, per_step))
