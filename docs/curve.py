"""Draws the quickstart's learning curves per seed: ``python docs/curve.py > docs/curve.svg``.

The newest row of each algorithm and seed in bench/results/demo_seeds.jsonl: sampled F1 on held-out worlds.
"""

import json
from pathlib import Path

ROWS = Path(__file__).parents[1] / "bench/results/demo_seeds.jsonl"
COLOURS = {"igpo": "#2878b5", "grpo": "#c8553d"}
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 640, 320, 52, 24, 96, 44


def newest() -> dict[tuple[str, int], dict]:
    """(algorithm, seed) -> its newest row without overrides."""
    rows = map(json.loads, ROWS.read_text().splitlines())
    return {(row["algorithm"], row["seed"]): row for row in rows if not row["overrides"]}


def draw() -> str:
    rows = newest()
    last = max(max(row["steps"]) for row in rows.values())
    x = lambda step: LEFT + step / last * (WIDTH - LEFT - RIGHT)  # noqa: E731
    y = lambda f1: TOP + (1 - f1) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    shapes = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>']
    for tick in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(f'<path d="M{LEFT} {y(tick):.1f}H{x(last):.1f}" stroke="#e4e4e0"/>')
        shapes.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in sorted({step for row in rows.values() for step in row["steps"]}):
        shapes.append(f'<text x="{x(step):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{step}</text>')
    shapes.append(
        f'<text x="{x(last / 2):.1f}" y="{HEIGHT - 6}" text-anchor="middle">step (16 questions x 8 rollouts)</text>'
    )
    shapes.append(f'<text x="{LEFT}" y="{TOP - 10}">sampled F1, held-out worlds</text>')
    for (algorithm, _), row in sorted(rows.items()):
        points = list(zip(row["steps"], row["eval/f1"], row["eval/f1_se"], strict=True))
        colour = COLOURS[algorithm]
        line = " ".join(f"{x(step):.1f},{y(f1):.1f}" for step, f1, _ in points)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for step, f1, error in points:
            shapes.append(
                f'<path d="M{x(step):.1f} {y(f1 + error):.1f}V{y(f1 - error):.1f}" stroke="{colour}"/>'
                f'<circle cx="{x(step):.1f}" cy="{y(f1):.1f}" r="2.5" fill="{colour}"/>'
            )
    ends = sorted(((row["eval/f1"][-1], *key) for key, row in rows.items()), reverse=True)
    at = 0.0
    for f1, algorithm, seed in ends:  # overlapping labels are moved apart
        at = max(y(f1) + 4, at + 13)
        label = f"{algorithm.upper()} {seed}"
        shapes.append(f'<text x="{x(last) + 8:.1f}" y="{at:.1f}" fill="{COLOURS[algorithm]}">{label}</text>')
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, *shapes, "</svg>"])


if __name__ == "__main__":
    print(draw())
