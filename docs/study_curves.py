"""Draws a study's learning curves: ``python docs/study_curves.py NAME > docs/NAME.svg`` from bench/results/NAME.jsonl.

A panel per variant, where each line is a seed and the grey line the mean of `robust`; of the comparisons on 16 seeds
the mean of each variant with its 95 % band and seeds as thin lines, over steps and over seconds. Sampled F1 on held-out
worlds.
"""

import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench import study
from igpo_fast.compare.page import Charts
from igpo_fast.compare.statistics import summarise
from igpo_fast.report.chart import Chart, Line, draw

COLUMNS = 4


def panels(name: str) -> list[Chart]:
    """A chart per variant, that with the highest last F1 first."""
    variants: dict[str, list[dict]] = {}
    for row in sorted(study.rows_of(name), key=lambda row: row["seed"]):
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


def means(name: str) -> list[Chart]:
    """The curves of ``igpo-fast compare``'s page, over steps and over seconds."""
    rows = study.rows_of(name)
    found = summarise(rows, "grpo", "eval/f1", at=0.5, stalled=0.15)
    return [Charts(rows, found).curves(budget) for budget in ("steps", "seconds")]


if __name__ == "__main__":
    (name,) = sys.argv[1:]
    if name in study.PAIRED:
        print(draw(means(name), columns=2, width=420, height=260))
    else:
        charts = panels(name)
        print(draw(charts, columns=min(COLUMNS, len(charts)), width=210, height=160))
