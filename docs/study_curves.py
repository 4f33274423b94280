"""Draws a study's learning curves, a panel per variant: ``python docs/study_curves.py > docs/study.svg``, and
``python docs/study_curves.py tables > docs/tables.svg``.

Each line is a seed of bench/results/study.jsonl, or tables.jsonl; the grey line is the mean of `robust`. Sampled F1 on
held-out worlds.
"""

import json
import sys
from pathlib import Path
from statistics import fmean

from igpo_fast.report.chart import Chart, Line, draw

RESULTS = Path(__file__).parents[1] / "bench/results"
COLUMNS = 4


def panels(name: str) -> list[Chart]:
    """A chart per variant, that with the highest last F1 first."""
    lines = (RESULTS / f"{name}.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if not row["overrides"]]
    variants: dict[str, list[dict]] = {}
    for row in sorted(rows, key=lambda row: row["seed"]):
        variants.setdefault(row["variant"], []).append(row)
    order = sorted(variants, key=lambda name: -fmean(row["eval/f1"][-1] for row in variants[name]))
    usual = variants.get("robust", [])
    mean = [fmean(at) for at in zip(*(row["eval/f1"] for row in usual), strict=True)]
    grey = [Line("", usual[0]["steps"], mean, colour="#b9b9b4", width=3)] if usual else []
    return [
        Chart(
            variant,
            (grey if variant != "robust" else [])
            + [Line("", row["steps"], row["eval/f1"], colour=i, width=1.5) for i, row in enumerate(variants[variant])],
            x_label="step",
            y_range=(0, 1),
        )
        for variant in order
    ]


if __name__ == "__main__":
    charts = panels(*sys.argv[1:] or ["study"])
    print(draw(charts, columns=min(COLUMNS, len(charts)), width=210, height=160))
