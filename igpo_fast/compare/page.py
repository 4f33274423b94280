"""What a comparison says: compare.html, compare.json and two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from igpo_fast.compare.statistics import BUDGETS, mean_curve, sentences, summarise
from igpo_fast.config import Config, values_of
from igpo_fast.files import atomic
from igpo_fast.jsonl import json_bytes
from igpo_fast.report.chart import Chart, Line, draw
from igpo_fast.report.frame import policy, template

HERE = Path(__file__).parent
GREY = "#8a8a85"
UNITS = {"steps": "step", "seconds": "seconds of training", "tokens": "tokens"}


def write_page(
    folder: Path,
    rows: Sequence[dict],
    baseline: str,
    score: str,
    at: float,
    stalled: float,
    absent: Sequence[str] = (),
) -> dict:
    """Write what the rows say, variants in the order in which they come.

    Args:
        absent: names of runs that were asked for and have no row.
    Returns:
        The statistics, with ``not_counted`` (name of a run -> why) and ``sentences``.
    Raises:
        StorageError: the operating system refuses.
    """
    reasons = [left_out(row, score) for row in rows]
    counted = [row for row, why in zip(rows, reasons, strict=True) if not why]
    found = summarise(counted, baseline, score, at, stalled)
    found["not_counted"] = {
        f"{row['variant']}-{row['seed']}": why for row, why in zip(rows, reasons, strict=True) if why
    } | dict.fromkeys(absent, "not begun")
    found["sentences"] = sentences(found)
    charts = Charts(counted, found)
    _write(folder / "compare.json", json_bytes(found, indent=True))
    _write(folder / "curves.svg", _picture([charts.curves("steps")]))
    (folder / "differences.svg").unlink(missing_ok=True)
    if differences := charts.differences("steps"):
        _write(folder / "differences.svg", _picture(differences))
    _write(folder / "compare.html", page(rows, found, charts).encode(errors="replace"))
    return found


def left_out(row: Mapping, score: str) -> str:
    """Why the run of a row does not count, empty if it does."""
    if not (row["finished"] and row["steps"]):
        return f"no {score}" if row["finished"] else "unfinished"
    return f"no {score} at its last step" if row["steps"][-1] < row["trained_steps"] else ""


def _write(path: Path, content: bytes) -> None:
    with atomic(path) as file:
        file.write(content)


def _picture(charts: Sequence[Chart]) -> bytes:
    return draw(charts, columns=2, width=560, height=320).encode()


class Charts:
    """The charts of rows that count; variants have the colours of their order."""

    def __init__(self, rows: Sequence[Mapping], found: Mapping):
        self._found, self._score = found, found["score"]
        self._runs = {name: [row for row in rows if row["variant"] == name] for name in found["variants"]}
        self._colours = {name: place for place, name in enumerate(self._runs)}

    def curves(self, budget: str) -> Chart:
        """The score over a budget: the mean of each variant with its band, and each seed as a thin line."""
        seeds = [
            Line("", row[budget], row[self._score], colour=self._colours[name], width=0.6)
            for name, rows in self._runs.items()
            for row in rows
            if None not in row[budget]
        ]
        lines = seeds + self._means(self._score, budget)
        known = [y for line in lines for y in line.ys if y is not None]
        share = (0.0, 1.0) if known and min(known) >= 0 and max(known) <= 1 else None
        return Chart(f"{self._score} over {budget}", lines, UNITS[budget], y_range=share)

    def collapse(self) -> Chart:
        """The share of collapsed groups over steps."""
        return Chart("share of collapsed groups", self._means("collapsed", "steps"), "step", y_range=(0, 1))

    def _means(self, key: str, budget: str) -> list[Line]:
        means = {name: mean_curve(rows, key, budget) for name, rows in self._runs.items()}
        return [
            Line(name, mean["x"], mean["mean"], mean["low"], mean["high"], colour=self._colours[name], width=2.5)
            for name, mean in means.items()
            if mean["x"]
        ]

    def ahead(self) -> Chart:
        """Each variant's mean difference from the baseline at each evaluation, with its band."""
        curves = {name: curve for name, curve in self._found["by_step"].items() if curve["x"]}
        lines = [
            Line(
                f"{name} - {self._found['baseline']}",
                c["x"],
                c["mean"],
                c["low"],
                c["high"],
                colour=self._colours[name],
            )
            for name, c in curves.items()
        ]
        ends = [edge(x for c in curves.values() for x in c["x"]) for edge in (min, max)] if curves else []
        zero = [Line("", ends, [0, 0], colour=GREY, width=1)] if curves else []
        return Chart(f"difference in {self._score}", zero + lines, "step")

    def differences(self, budget: str) -> list[Chart]:
        """Per variant a dot per seed, the mean, and its interval as a band."""
        return [
            self._dots(name, pairs[budget], budget)
            for name, pairs in self._found["pairs"].items()
            if pairs[budget]["seeds"]
        ]

    def _dots(self, name: str, pairs: Mapping, budget: str) -> Chart:
        seeds, score, colour = pairs["seeds"], pairs["score"], self._colours[name]
        ends = [seeds[0] - 0.5, seeds[-1] + 0.5]
        low, high = ([end] * 2 for end in score["interval"] or (None, None))
        # Gaps between the points, for they are no line.
        xs = [x for seed in seeds for x in (seed, seed)]
        ys = [y for value in score["differences"] for y in (value, None)]
        return Chart(
            f"{name} - {self._found['baseline']}: {self._score} at equal {budget}",
            [
                Line("", ends, [0, 0], colour=GREY, width=1),
                Line("mean", ends, [score["mean"]] * 2, low, high, colour=colour),
                Line("", xs, ys, colour=colour),
            ],
            "seed",
            x_range=(ends[0], ends[1]),
        )


def page(rows: Sequence[Mapping], found: Mapping, charts: Charts) -> str:
    """The page as one HTML text that reads nothing else and runs nothing."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    drawn = [
        charts.curves("steps"),
        charts.ahead(),
        *charts.differences("steps"),
        charts.curves("seconds"),
        charts.curves("tokens"),
    ]
    drawn += [charts.collapse()]
    defaults, seen = values_of(Config()), [row["settings"] for row in rows]
    alike = {key: value for key, value in dict(*seen[:1]).items() if all(key in s and s[key] == value for s in seen)}
    own_keys = sorted({key for s in seen for key in s} - alike.keys() - {"train.seed"})
    return template(HERE).render(
        found=found,
        rows=rows,
        names=list(dict.fromkeys(row["variant"] for row in rows)),
        budgets=BUDGETS,
        style=Markup(style),
        policy=policy(style=style),
        charts=[Markup(draw([chart], width=460, height=290, in_page=True)) for chart in drawn if chart.lines],
        alike=alike,
        own={key: _told(rows, key, defaults[key]) for key in own_keys},
    )


def _told(rows: Sequence[Mapping], key: str, default: object) -> dict[str, str]:
    """Variant -> the values that its runs have of a key, each once."""
    told: dict[str, dict[str, None]] = {}
    for row in rows:
        told.setdefault(row["variant"], {})[str(row["settings"].get(key, default))] = None
    return {name: ", ".join(values) for name, values in told.items()}
