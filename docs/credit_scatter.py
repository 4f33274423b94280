"""Draws what turns gained against what they changed, a panel per row of bench/results/credit.jsonl:
``python docs/credit_scatter.py > docs/credit.svg``.

A dot is a turn: its information gain, and the difference of the mean F1 of continuations from after and from before it.
"""

import json
from pathlib import Path

ROWS = Path(__file__).parents[1] / "bench/results/credit.jsonl"
SIDE, COLUMNS, GAP = 170, 4, 40
COLOURS = ("#8d6bb1", "#2878b5", "#4f9a59", "#e3a72f", "#c8553d")
"""Of turns 1, 2, 3, 4 and later ones."""


def draw() -> str:
    rows = map(json.loads, ROWS.read_text().splitlines())
    newest = {(row["algorithm"], row["seed"], row["step"]): row for row in rows}
    shapes = []
    for place, ((algorithm, seed, step), row) in enumerate(sorted(newest.items())):
        left, top = GAP + place % COLUMNS * (SIDE + GAP), GAP + place // COLUMNS * (SIDE + GAP)
        x = lambda value, left=left: left + (value + 1) / 2 * SIDE  # noqa: E731
        y = lambda value, top=top: top + (1 - value) / 2 * SIDE  # noqa: E731
        shapes.append(f'<path d="M{x(-1)} {y(0):.1f}H{x(1)}M{x(0):.1f} {y(-1)}V{y(1)}" stroke="#d8d8d4" fill="none"/>')
        shapes.append(f'<rect x="{left}" y="{top}" width="{SIDE}" height="{SIDE}" fill="none" stroke="#b9b9b4"/>')
        rho = row["spearman"]["gain"][0]
        title = f"{algorithm} {seed}, step {step}: rho {rho:.2f}"
        shapes.append(f'<text x="{left}" y="{top - 8}" font-weight="bold">{title}</text>')
        for tick in (-1, 0, 1):
            shapes.append(f'<text x="{left - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
            shapes.append(f'<text x="{x(tick):.1f}" y="{top + SIDE + 13}" text-anchor="middle">{tick}</text>')
        points = row["points"]
        for number, colour in enumerate(COLOURS, start=1):
            dots = [
                f'<circle r="2" cx="{x(max(-1, min(gain, 1))):.0f}" cy="{y(change):.0f}"/>'
                for gain, change, turn in zip(points["gain"], points["change"], points["turn"], strict=True)
                if min(turn, len(COLOURS)) == number
            ]
            shapes.append(f'<g fill="{colour}" fill-opacity="0.55">{"".join(dots)}</g>')
    width = GAP + min(COLUMNS, len(newest)) * (SIDE + GAP)
    height = GAP + -(-len(newest) // COLUMNS) * (SIDE + GAP) + 22
    for turn, colour in enumerate(COLOURS, start=1):
        at = GAP + (turn - 1) * 70
        label = f"turn {turn}" + "+" * (turn == len(COLOURS))
        shapes.append(f'<circle cx="{at}" cy="{height - 12}" r="4" fill="{colour}"/>')
        shapes.append(f'<text x="{at + 8}" y="{height - 8}">{label}</text>')
    shapes.append(f'<text x="{GAP + 380}" y="{height - 8}">across: gain; up: change in F1</text>')
    size = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *shapes, "</svg>"])


if __name__ == "__main__":
    print(draw())
