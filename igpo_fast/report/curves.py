"""Which charts a run's rows make: every number of metrics.jsonl, in sections."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from igpo_fast.jsonl import number_of
from igpo_fast.report.chart import Chart, Line

ERROR = "_se"
"""``KEY_se`` is the standard error of ``KEY``."""
PANELS = (
    ("Evaluation", "F1", r"eval/(.+/)?f1"),
    ("Evaluation", "exact match", r"eval/(.+/)?em"),
    ("Evaluation", "turns", r"eval/(.+/)?turns"),
    ("Training rollouts", "F1", r"reward/f1"),
    ("Training rollouts", "exact match", r"reward/em"),
    ("Training rollouts", "outcome", r"reward/outcome"),
    ("Training rollouts", "gain of a turn", r"reward/ig_(mean|abs)"),
    ("Training rollouts", "value", r"value/(first|last)"),
    ("Training rollouts", "share of groups that teach nothing", r"group/collapsed(_outcome)?"),
    ("Training rollouts", "turns", r"turns/mean"),
    ("Training rollouts", "share malformed or cut", r"turns/(format_error|truncated_.+)"),
    ("Optimisation", "policy loss", r"loss/policy"),
    ("Optimisation", "entropy", r"loss/entropy"),
    ("Optimisation", "KL", r"loss/kl"),
    ("Optimisation", "gradient norm", r"loss/grad_norm"),
    ("Cost", "tokens", r"tokens/(packed|rollout|scored)"),
    ("Cost", "seconds", r"time/.+"),
)
"""Section, title and keys of each chart, in order. A key of no chart gets one of its own."""
OTHERS = "Other numbers"
FEW = 20
"""Points up to which each has a dot."""
MANY = 400
"""Points of a line at most: one has few more pixels."""


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Chart]]:
    """Section -> charts over steps, without empty ones.

    Args:
        rows: of metrics.jsonl. What is no number is a gap in its line; rows without a key are skipped, for many are
            measured at some steps only.
    """
    lines = {key: _line(key, rows) for key in dict.fromkeys(key for row in rows for key in row if key != "step")}
    lines = {key: line for key, line in lines.items() if any(y is not None for y in line.ys)}
    charts: dict[tuple[str, str], list[Line]] = {(section, title): [] for section, title, _ in PANELS}
    for key, line in lines.items():
        if not (key.endswith(ERROR) and key.removesuffix(ERROR) in lines):
            place = next((panel[:2] for panel in PANELS if re.fullmatch(panel[2], key)), (OTHERS, key))
            charts.setdefault(place, []).append(line)
    sections: dict[str, list[Chart]] = {}
    for (section, title), drawn in charts.items():
        if len(drawn) == 1:
            drawn = [replace(drawn[0], name="")]
        if drawn:
            sections.setdefault(section, []).append(Chart(title, drawn, x_label="step"))
    return sections


def _line(key: str, rows: Sequence[Mapping[str, Any]]) -> Line:
    name, rows = key.partition("/")[2] or key, [row for row in rows if key in row]
    ys, errors = ([number_of(row.get(name)) for row in rows] for name in (key, key + ERROR))
    if len(rows) > MANY:
        return _thinned(name, [row["step"] for row in rows], ys)
    low, high = (
        [None if y is None or error is None else y + sign * error for y, error in zip(ys, errors, strict=True)]
        for sign in (-1, 1)
    )
    return Line(name, [row["step"] for row in rows], ys, low, high, bars=True, dots=len(rows) <= FEW)


def _thinned(name: str, steps: Sequence[float], ys: Sequence[float | None]) -> Line:
    """Means over windows of steps, each at its last step, in a band from the least to the greatest."""
    size = -(-len(steps) // MANY)
    xs, means, low, high = [], [], [], []
    for start in range(0, len(steps), size):
        known = [y for y in ys[start : start + size] if y is not None]
        xs.append(steps[min(start + size, len(steps)) - 1])
        means.append(sum(known) / len(known) if known else None)
        low.append(min(known, default=None))
        high.append(max(known, default=None))
    return Line(name, xs, means, low, high)
