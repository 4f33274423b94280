"""Draws a study's learning curves, a panel per variant: ``python docs/study_curves.py > docs/study.svg``, and
``python docs/study_curves.py tables > docs/tables.svg``.

Each line is a seed of bench/results/study.jsonl, or tables.jsonl; the grey line is the mean of `robust`. Sampled F1 on
held-out worlds.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

RESULTS = Path(__file__).parents[1] / "bench/results"
WIDE, HIGH, COLUMNS, GAP = 168, 110, 4, 34
COLOURS = ("#2878b5", "#c8553d", "#4f9a59", "#8d6bb1")


def draw(name: str) -> str:
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if not row["overrides"]]
    variants: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        variants.setdefault(row["variant"], []).append(row)
    order = sorted(variants, key=lambda name: -fmean(row["eval/f1"][-1] for row in variants[name]))
    last = max(max(row["steps"]) for row in rows)
    usual = variants.get("robust", [])
    mean = [fmean(at) for at in zip(*(row["eval/f1"] for row in usual), strict=True)] if usual else []
    shapes = []
    for place, name in enumerate(order):
        left, top = GAP + place % COLUMNS * (WIDE + GAP), GAP + place // COLUMNS * (HIGH + GAP)

        def line(steps, f1s, colour, width, left=left, top=top):
            at = " ".join(
                f"{left + s / last * WIDE:.1f},{top + (1 - f) * HIGH:.1f}" for s, f in zip(steps, f1s, strict=True)
            )
            shapes.append(f'<polyline points="{at}" fill="none" stroke="{colour}" stroke-width="{width}"/>')

        for tick in (0, 0.5, 1):
            y = top + (1 - tick) * HIGH
            shapes.append(f'<path d="M{left} {y:.1f}h{WIDE}" stroke="#e4e4e0"/>')
            shapes.append(f'<text x="{left - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
        shapes.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{name}</text>')
        shapes.append(f'<text x="{left + WIDE}" y="{top + HIGH + 12}" text-anchor="end">step {last}</text>')
        if mean and name != "robust":
            line(usual[0]["steps"], mean, "#b9b9b4", 3)
        for row, colour in zip(variants[name], COLOURS * len(rows), strict=False):
            line(row["steps"], row["eval/f1"], colour, 1.5)
    width = GAP + min(COLUMNS, len(order)) * (WIDE + GAP)
    height = GAP + -(-len(order) // COLUMNS) * (HIGH + GAP)
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *shapes, "</svg>"])


if __name__ == "__main__":
    print(draw(*sys.argv[1:] or ["study"]))
