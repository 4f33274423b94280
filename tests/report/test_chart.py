"""Charts: coordinates by hand, gaps, labels, hostile names."""

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.report.chart import COLOURS, INK, Chart, Line, apart, draw, ticks

SVG = "{http://www.w3.org/2000/svg}"
numbers = st.none() | st.floats() | st.integers(-(10**6), 10**6)


def drawn(*lines, **chart):
    """A chart of 200 x 120 without title, labels and names: the plot's corners are (34.2, 12) and (186, 96) where the
    ticks of y have three letters."""
    return ET.fromstring(draw([Chart("", lines, **chart)], width=200, height=120))


def points(shape):
    return [tuple(map(float, pair.split(","))) for pair in shape.get("points").split()]


def all_of(root, name):
    return root.findall(f".//{SVG}{name}")


def test_a_line_by_hand():
    root = drawn(Line("", [0, 5, 10], [0, 0.5, 1]), y_range=(0, 1))
    assert points(all_of(root, "polyline")[0]) == [(34.2, 96), (110.1, 54), (186, 12)]


def test_the_axis_of_y_ends_at_round_numbers_and_that_of_x_at_points():
    root = drawn(Line("", [3, 13], [0.13, 0.87]))
    texts = [text.text for text in all_of(root, "text")]
    assert texts == ["0", "0.5", "1", "5", "10"]
    assert points(all_of(root, "polyline")[0]) == [(34.2, 85.1), (186, 22.9)]  # 96 - 84 x 0.13, 96 - 84 x 0.87


@pytest.mark.parametrize("missing", [None, math.nan, math.inf, -math.inf, 1e300])
def test_a_missing_number_leaves_a_gap_and_a_point_alone_is_a_dot(missing):
    root = drawn(Line("", [0, 1, 2, 3, 4], [1, 1, missing, 1, missing]), y_range=(0, 1))
    assert [len(points(line)) for line in all_of(root, "polyline")] == [2]
    dots = [(dot.get("cx"), dot.get("cy")) for dot in all_of(root, "circle")]
    assert dots == [("186.0", "12.0")]  # x = 3 is the last that is known, so the axis ends there


def test_a_band_and_bars_by_hand():
    line = dict(name="", xs=[0, 1, 2], ys=[0.5, 0.5, 0.5], low=[0, None, 0.25], high=[1, 1, 0.75])
    band = drawn(Line(**line), y_range=(0, 1))
    assert points(all_of(band, "polygon")[0]) == [(34.2, 96), (186, 75), (186, 33), (34.2, 12)]
    bars = drawn(Line(**line, bars=True), y_range=(0, 1))
    assert [path.get("d") for path in all_of(bars, "path") if path.get("stroke") == COLOURS[0]] == [
        "M34.2 12.0V96.0",
        "M186.0 33.0V75.0",
    ]


def test_what_exceeds_the_axis_is_cut_at_it():
    root = drawn(Line("", [0, 1], [-1, 2]), y_range=(0, 1))
    assert [y for _, y in points(all_of(root, "polyline")[0])] == [96, 12]


@pytest.mark.parametrize("value", [0.0, 0.003, -7, 5e-324])
def test_equal_values_and_a_point_alone_lie_in_the_middle(value):
    for xs in ([1, 2], [4]):
        root = drawn(Line("", xs, [value] * len(xs)))
        drawn_at = [y for line in all_of(root, "polyline") for _, y in points(line)]
        drawn_at += [float(dot.get("cy")) for dot in all_of(root, "circle")]
        assert drawn_at and all(24 < y < 84 for y in drawn_at)
    axis = float(all_of(root, "path")[0].get("d")[1:5])
    assert float(all_of(root, "circle")[0].get("cx")) == pytest.approx((axis + 186) / 2, abs=0.1)


def test_labels_of_lines_that_end_together_are_moved_apart():
    assert apart([10, 11, 50], 13, 60) == [10, 23, 50]
    assert apart([50, 55, 59], 13, 60) == [34, 47, 60]  # no room below: up
    root = drawn(*(Line(name, [0, 1], [0, 1]) for name in "abc"), y_range=(0, 1))
    at = [float(text.get("y")) for text in all_of(root, "text") if text.text in ("a", "b", "c")]
    assert at == [16, 29, 42]


def test_panels_stand_in_rows():
    chart = Chart("", [Line("", [0, 1], [0, 1])], y_range=(0, 1))
    root = ET.fromstring(draw([chart] * 3, columns=2, width=200, height=120))
    assert root.get("viewBox") == "0 0 400 240"
    first, second, third = map(points, all_of(root, "polyline"))
    assert second == [(x + 200, y) for x, y in first] and third == [(x, y + 120) for x, y in first]


def test_a_file_is_on_white_and_a_page_gives_the_colours():
    chart = [Chart("t", [Line("", [0, 1], [0, 1])])]
    alone, within = draw(chart), draw(chart, in_page=True)
    assert '<rect width="640" height="320" fill="#ffffff"/>' in alone and "var(" not in alone
    assert "<rect" not in within and f"var(--line-1, {COLOURS[0]})" in within and INK not in within


def test_more_lines_than_colours_are_dashed():
    lines = [Line("", [0, 1], [0, i]) for i in range(len(COLOURS) + 1)]
    shapes = all_of(drawn(*lines), "polyline")
    assert shapes[0].get("stroke") == shapes[-1].get("stroke")
    assert shapes[0].get("stroke-dasharray") is None and shapes[-1].get("stroke-dasharray")


def test_names_are_text_whatever_they_hold():
    name = "</svg><script>alert(1)</script>&\"'\x00\ud800 \u202e{{ x }}"
    text = draw([Chart(name, [Line(name, [0, 1], [0, 1], colour='"/><b>')], x_label=name, y_label=name)])
    text.encode()
    root = ET.fromstring(text)
    assert {shape.tag for shape in root.iter()} <= {SVG + tag for tag in ("svg", "rect", "path", "text", "polyline")}
    assert [shape.text for shape in all_of(root, "text")].count(name.translate({0: "\ufffd", 0xD800: "\ufffd"})) == 4


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9), st.integers(2, 12))
def test_ticks_are_round_inside_and_not_too_many(low, width, most):
    high = low + max(width, 1e-6 * abs(low))
    found = ticks(low, high, most)
    slack = 1e-6 * (high - low)
    assert len(found) <= most and all(low - slack <= tick <= high + slack for tick in found)
    steps = {f"{later - earlier:.2e}" for earlier, later in pairwise(found)}
    assert all(step[0] in "125" for step in steps)


@given(st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=8), st.booleans())
def test_any_numbers_are_drawn_inside(rows, bars):
    xs, ys, low, high = ([row[i] for row in rows] for i in range(4))
    root = drawn(Line("n", xs, ys, low, high, bars=bars))
    at = [point for shape in all_of(root, "polyline") + all_of(root, "polygon") for point in points(shape)]
    at += [(float(dot.get("cx")), float(dot.get("cy"))) for dot in all_of(root, "circle")]
    assert all(0 <= x <= 200 and 0 <= y <= 120 for x, y in at)
    assert len(at) >= sum(all(n is not None and abs(n) < 1e100 for n in row[:2]) for row in rows)
