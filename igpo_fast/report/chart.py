"""Line charts as SVG text, by the standard library alone.

    >>> text = draw([Chart("sampled F1", [Line("IGPO", [0, 30, 60], [0.04, None, 0.73])], x_label="step")])

A missing number leaves a gap. Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), which
the colour-blind tell apart; past the last the lines are dashed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
DASHES = ("", "6 3", "2 3")
INK, GRID, PAPER = "#24292f", "#e0e0dc", "#ffffff"
FONT = 12
LETTER = 0.56 * FONT
"""Width of a letter, about: the font is the viewer's."""
LABEL = FONT + 1
"""Least distance between the labels of two lines."""
HUGE = 1e100
"""Numbers from here on count as missing, for spans of them overflow."""

Number = float | None


@dataclass(frozen=True)
class Line:
    """A line of a chart; ``name`` is written at its end."""

    name: str
    xs: Sequence[float]
    ys: Sequence[Number]
    """As many as ``xs``; None, NaN and infinities are missing."""
    low: Sequence[Number] | None = None
    """With ``high``: a band around the line, or with ``bars`` a bar at each point."""
    high: Sequence[Number] | None = None
    bars: bool = False
    dots: bool = False
    """A dot at each point; a point without neighbours always has one."""
    colour: int | str | None = None
    """A place in ``COLOURS``, or a colour of SVG; None: the line's place in its chart."""
    width: float = 2.0


@dataclass(frozen=True)
class Chart:
    """Lines over the same axes."""

    title: str
    lines: Sequence[Line]
    x_label: str = ""
    y_label: str = ""
    y_range: tuple[float, float] | None = None
    """Ends of the y axis, at which what exceeds them is cut; None: round numbers around all points."""
    x_range: tuple[float, float] | None = None
    """Likewise; None: from the first point to the last."""


def draw(
    charts: Sequence[Chart], *, columns: int = 1, width: int = 640, height: int = 320, in_page: bool = False
) -> str:
    """An ``<svg>`` element with the charts side by side.

    Args:
        columns: charts per row.
        width, height: of one chart, in units of its view box.
        in_page: the element is part of an HTML page: it has no background, text takes the page's colour, and the page
            may set ``--line-1`` .. ``--line-6`` and ``--grid``. Else it is a file of its own, on white.
    """
    wide, high = width * min(columns, len(charts)), height * -(-len(charts) // columns)
    size = f'viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="{FONT}"'
    about = escape(_clean("; ".join(filter(None, (chart.title for chart in charts)))))
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{about}">']
    if not in_page:
        out.append(f'<rect width="{wide}" height="{high}" fill="{PAPER}"/>')
    for place, chart in enumerate(charts):
        left, top = place % columns * width, place // columns * height
        out += _Drawing(chart, left, top, width, height, in_page).shapes()
    return "\n".join([*out, "</svg>"])


def ticks(low: float, high: float, most: int = 6, around: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from ``low`` to ``high``: ``most`` of them at most; or, with
    ``around``, from the last one before ``low`` to the first behind ``high``.

    >>> ticks(0, 120), ticks(0.03, 0.94), ticks(0.03, 0.94, around=True)
    ([0.0, 50.0, 100.0], [0.2, 0.4, 0.6, 0.8], [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    """
    step, slack = _step(low, high, most), -1e-9 if around else 1e-9
    down, up = (math.floor, math.ceil) if around else (math.ceil, math.floor)
    first, last = down(low / step - slack), up(high / step + slack)
    return [_rounded(place * step) for place in range(first, last + 1)]


def _step(low: float, high: float, most: int) -> float:
    """The least step, 1, 2 or 5 times a power of ten, of which at most ``most`` multiples fit."""
    rough = (high - low) / max(1, most - 1)
    power = 10.0 ** math.floor(math.log10(rough))
    return next(step for nice in (1, 2, 5, 10) if (step := nice * power) >= rough * (1 - 1e-9))


def _rounded(number: float) -> float:
    """Without the noise of a product: 0.30000000000000004 is 0.3."""
    return float(f"{number:.12g}")


class _Drawing:
    """One chart, with its top left corner at (left, top)."""

    def __init__(self, chart: Chart, left: float, top: float, width: float, height: float, in_page: bool):
        self.chart, self.in_page = chart, in_page
        self.points = [list(_points(line)) for line in chart.lines]
        known = [point for points in self.points for point in points if point]
        self.x_range = chart.x_range or _span([x for x, *_ in known])
        ys = [y for _, *ys in known for y in ys if y is not None]
        self.y0 = top + (28 if chart.title else 12)
        self.y1 = top + height - 24 - (FONT + 4 if chart.x_label else 0)
        most = min(6, max(2, int((self.y1 - self.y0) / (2 * FONT))))
        self.y_ticks = ticks(*(chart.y_range or _span(ys)), most, around=chart.y_range is None)
        self.y_range = chart.y_range or (self.y_ticks[0], self.y_ticks[-1])
        self.labels = any(line.name for line in chart.lines)
        longest = max(len(line.name) for line in chart.lines) if self.labels else 0
        tick_letters = max(len(_said(tick)) for tick in self.y_ticks)
        self.x0 = left + 14 + LETTER * tick_letters + (FONT + 4 if chart.y_label else 0)
        self.x1 = left + width - (16 + LETTER * longest if self.labels else 14)
        self.left, self.top, self.bottom = left, top, top + height
        self.x_ticks = ticks(*self.x_range, most=max(2, int((self.x1 - self.x0) / (6 * LETTER))))

    def x(self, value: float) -> float:
        return _place(value, self.x_range, self.x0, self.x1)

    def y(self, value: float) -> float:
        return _place(value, self.y_range, self.y1, self.y0)

    def shapes(self) -> Iterator[str]:
        yield from self._axes()
        for number, (line, points) in enumerate(zip(self.chart.lines, self.points, strict=True)):
            yield from self._line(line, points, self._paint(line, number))
        yield from self._ends()

    def _axes(self) -> Iterator[str]:
        chart, grid = self.chart, f"var(--grid, {GRID})" if self.in_page else GRID
        for tick in self.y_ticks:
            yield f'<path d="M{self.x0:.1f} {self.y(tick):.1f}H{self.x1:.1f}" stroke="{grid}"/>'
            yield self._text(self.x0 - 8, self.y(tick) + 4, _said(tick), anchor="end")
        for tick in self.x_ticks:
            yield self._text(self.x(tick), self.y1 + 18, _said(tick), anchor="middle")
        middle = (self.x0 + self.x1) / 2
        if chart.title:
            yield self._text(self.left + 8, self.top + 16, chart.title, more='font-weight="bold"')
        if chart.x_label:
            yield self._text(middle, self.bottom - 8, chart.x_label, anchor="middle")
        if chart.y_label:
            at = f"{self.left + FONT + 2:.1f}", f"{(self.y0 + self.y1) / 2:.1f}"
            yield self._text(*map(float, at), chart.y_label, "middle", f'transform="rotate(-90 {at[0]} {at[1]})"')

    def _line(self, line: Line, points: list, paint: tuple[str, str]) -> Iterator[str]:
        colour, dash = paint
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        for known, run in groupby(points, key=bool):
            if not known:
                continue
            run = [(self.x(x), *(None if y is None else self.y(y) for y in ys)) for x, *ys in run]
            bounded = [(x, low, high) for x, _, low, high in run if low is not None and high is not None]
            if line.bars:
                for x, low, high in bounded:
                    yield f'<path d="M{x:.1f} {high:.1f}V{low:.1f}" stroke="{colour}"/>'
            elif len(bounded) > 1:
                around = [(x, low) for x, low, _ in bounded] + [(x, high) for x, _, high in reversed(bounded)]
                yield f'<polygon points="{_path(around)}" fill="{colour}" fill-opacity="0.18"/>'
            at = [(x, y) for x, y, *_ in run]
            if len(at) > 1:
                yield (
                    f'<polyline points="{_path(at)}" fill="none" stroke="{colour}" stroke-width="{line.width:g}"'
                    f' stroke-linejoin="round"{dashed}/>'
                )
            if line.dots or len(at) == 1:
                yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in at)

    def _ends(self) -> Iterator[str]:
        """Names beside the lines' last points, moved apart where they would overlap."""
        ends = []
        for number, (line, points) in enumerate(zip(self.chart.lines, self.points, strict=True)):
            if line.name and any(points):
                last = next(point for point in reversed(points) if point)
                ends.append((self.y(last[1]) + 4, number))
        ends.sort()
        for (_, number), at in zip(ends, apart([at for at, _ in ends], LABEL, self.y1 + 4), strict=True):
            line = self.chart.lines[number]
            yield self._text(self.x1 + 8, at, line.name, colour=self._paint(line, number)[0])

    def _paint(self, line: Line, number: int) -> tuple[str, str]:
        """Colour and dashes."""
        place = number if line.colour is None else line.colour
        if isinstance(place, str):
            return escape(place), ""
        turn, place = divmod(place, len(COLOURS))
        colour = COLOURS[place]
        return f"var(--line-{place + 1}, {colour})" if self.in_page else colour, DASHES[turn % len(DASHES)]

    def _text(self, x: float, y: float, text: str, anchor: str = "", more: str = "", colour: str = "") -> str:
        anchor = f' text-anchor="{anchor}"' if anchor else ""
        colour = colour or ("currentColor" if self.in_page else INK)
        more = f" {more}" if more else ""
        return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{anchor}{more}>{escape(_clean(text))}</text>'


def apart(wanted: Sequence[float], distance: float, end: float) -> list[float]:
    """Ascending places, moved so that neighbours are ``distance`` apart and the last is at ``end`` at most.

    >>> apart([10, 11, 50], 13, 60)
    [10, 23, 50]
    """
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + distance)
    for i in reversed(range(len(places))):
        places[i] = min(places[i], end if i == len(places) - 1 else places[i + 1] - distance)
    return places


def _points(line: Line) -> Iterator[tuple[float, float, Number, Number] | None]:
    """(x, y, low, high) of each point, None where it is missing."""
    absent = [None] * len(line.xs)
    for x, y, low, high in zip(line.xs, line.ys, line.low or absent, line.high or absent, strict=True):
        yield None if _known(x) is None or _known(y) is None else (x, y, _known(low), _known(high))


def _known(number: Number) -> Number:
    return number if number is not None and abs(number) < HUGE else None


def _span(values: list[float]) -> tuple[float, float]:
    """From the least to the greatest; of equal ones, with room around them."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    room = 0.0 if high - low > max(1e-9 * max(abs(low), abs(high)), 1 / HUGE) else abs(high) / 2 or 1.0
    return low - room, high + room


def _place(value: float, span: tuple[float, float], start: float, end: float) -> float:
    share = (value - span[0]) / (span[1] - span[0])
    return start + min(max(share, 0.0), 1.0) * (end - start)


def _said(number: float) -> str:
    return f"{number:,.0f}" if number == round(number) and abs(number) < 1e7 else f"{number:g}"


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _clean(text: str) -> str:
    """Without the characters that XML forbids."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
