"""The page: numbers as the statistics have them, hostile text as text, nothing that runs or is fetched."""

import base64
import hashlib
import json
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from igpo_fast.compare.page import write_page
from tests.compare.rows import SCORE, row

HOSTILE = "<script>alert(1)</script>{{ 7 * 7 }}<img src=x onerror=alert(2)>\"'&\u2028"


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.cells, self.text, self.style = [], [], [], "", ""
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attributes]
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.tags[-1:] == ["style"]:
            self.style += data
            self.tags.append("")
        self.text += data
        if self.in_cell:
            self.cells[-1][-1] += data

    def row(self, *begin):
        return next(row for row in self.cells if row[: len(begin)] == list(begin))


def rows():
    igpo = [row("igpo", seed, [0.0, 0.4, 0.6 + seed / 100], commit="abc1234") for seed in range(1, 7)]
    grpo = [row("grpo", seed, [0.0, 0.2, 0.55], **{"group/collapsed": None}) for seed in range(1, 7)]
    return [*igpo, *grpo]


def written(folder, *made, baseline="grpo", **options):
    return write_page(folder, made or rows(), baseline, SCORE, **{"at": 0.5, "stalled": 0.15} | options)


def test_every_number_is_there(tmp_path):
    found = written(tmp_path)
    page = Page((tmp_path / "compare.html").read_text())
    assert all(sentence in page.text for sentence in found["sentences"])
    score = found["pairs"]["igpo"]["steps"]["score"]
    low, high = score["interval"]
    line = page.row("igpo", "steps")
    assert line[2:9] == ["6", f"{score['mean']:.3f}", f"{low:+.3f} to {high:+.3f}", "0.031", "6", "0", "0"]
    # Reached at step 20, after 40 s and 2,000 tokens by all; 25 % of groups collapsed.
    assert page.row("igpo", "6") == ["igpo", "6", "0.635", "0.008", "0", "25%", "6", "0", "20", "40", "2,000"]
    assert page.row("grpo", "6")[5] == "–"
    assert page.row("igpo-1")[1:] == ["20", "0.000", "0.610", "0.020", "40", "2,000", "25%", "4.5", "abc1234"]
    assert page.row("grpo-1")[-1] == "–"
    assert page.row("algorithm.name") == ["algorithm.name", "igpo", "grpo"]
    assert json.loads((tmp_path / "compare.json").read_text())["pairs"]["igpo"]["steps"]["score"] == score


def test_settings_that_change_the_speed_are_shown_where_runs_differ(tmp_path):
    """Of every run: two of a variant may differ."""
    made = rows()
    made[0]["settings"]["train.threads"] = 4
    written(tmp_path, *made)
    assert Page((tmp_path / "compare.html").read_text()).row("train.threads") == ["train.threads", "4, 0", "0"]


def test_nothing_runs_and_nothing_is_fetched(tmp_path):
    written(tmp_path)
    page = Page((tmp_path / "compare.html").read_text())
    assert not {"script", "link", "img", "iframe", "object", "base"} & {*page.tags}
    assert not [name for _, name, _ in page.attributes if name in ("src", "href", "style") or name.startswith("on")]
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in str(value))
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    nothing = "default-src 'none'; base-uri 'none'; form-action 'none'"
    assert policy == f"{nothing}; style-src 'sha256-{digest}'", "else the browser drops the style"


def test_hostile_text_is_text(tmp_path):
    key = "eval/<script>/f1"
    made = [
        {**r, key: r[SCORE], f"{key}_se": r[f"{SCORE}_se"], "variant": HOSTILE if r["variant"] == "igpo" else "grpo",
         "settings": {"rollout.system": HOSTILE, "algorithm.name": r["variant"], "data.train": f"{HOSTILE}{r['seed']}"},
         "commit": HOSTILE}
        for r in rows()
    ]  # fmt: skip
    write_page(tmp_path, made, "grpo", key, 0.5, 0.15)
    page = Page((tmp_path / "compare.html").read_text())
    assert not {"script", "img"} & {*page.tags} and "49" not in page.text
    assert page.row(f"{HOSTILE}-1")[-1] == HOSTILE
    assert page.row("rollout.system")[1] == HOSTILE
    for name in ("curves.svg", "differences.svg"):
        tags = {element.tag.rpartition("}")[2] for element in ElementTree.parse(tmp_path / name).iter()}
        assert not tags & {"script", "img"}, name


@pytest.mark.parametrize(
    "made",
    [
        [row("igpo", 1, [0.1])],
        [row("igpo", 1, [0.1, 0.2]), row("grpo", 2, [0.1, 0.2])],
        [row("igpo", 1, [0.1, 0.2], finished=False, steps=[0, 10]), row("grpo", 1, [0.0])],
        [row("igpo", 1, [0.1, 0.2]), row("grpo", 1, [], steps=[], finished=False), row("grpo", 2, [0.0, 0.2])],
        [row("igpo", 1, [0.1, 0.2], seconds=[None, None], tokens=[0, None]), row("grpo", 1, [0.1, 0.2])],
        [row("igpo", 1, [0.1, 0.2], trained_steps=20), row("grpo", 1, [0.1, 0.2], finished=False)],
        [],
        [row(name, seed, [0.5] * 3, turns=None) for name in ("igpo", "tips", "grpo") for seed in range(5)],
    ],
    ids=[
        "one evaluation",
        "no pair",
        "unfinished",
        "unevaluated",
        "unknown costs",
        "none counts",
        "no run",
        "all level",
    ],
)
def test_what_is_missing_breaks_nothing(tmp_path, made):
    found = write_page(tmp_path, made, "grpo", SCORE, 0.5, 0.15)
    page = Page((tmp_path / "compare.html").read_text())
    assert found["sentences"] and "nan" not in page.text.lower() and "None" not in page.text
    assert (tmp_path / "differences.svg").exists() == any(p["steps"]["seeds"] for p in found["pairs"].values())


def test_what_does_not_count_is_named(tmp_path):
    """A run whose last evaluation lacks the score ended nobody knows where."""
    made = [
        row("igpo", 1, [0.0, 0.2]),
        row("grpo", 1, [0.0, 0.1]),
        row("igpo", 2, [], steps=[]),
        row("grpo", 2, [0.0, 0.1]),
        row("igpo", 3, [0.0, 0.9], trained_steps=20),
        row("grpo", 3, [0.0, 0.1]),
    ]
    found = write_page(tmp_path, made, "grpo", SCORE, 0.5, 0.15, ["igpo-4"])
    assert found["variants"]["igpo"]["mean"] == 0.2 and found["pairs"]["igpo"]["steps"]["seeds"] == [1]
    text = Page((tmp_path / "compare.html").read_text()).text
    assert "Not counted: igpo-2 (no eval/f1), igpo-3 (no eval/f1 at its last step), igpo-4 (not begun)." in text
    assert "In no pair: grpo-2 (no igpo-2), grpo-3 (no igpo-3)." in text
    assert "igpo-3 (no eval/f1 at its last step, not counted)" in text


def test_dots_are_at_their_seeds(tmp_path):
    """Six seeds: with the mean and the line at 0 a chart has six dots, as high as their differences say."""
    written(tmp_path)
    dots = [
        (float(element.get("cx")), float(element.get("cy")))
        for element in ElementTree.parse(tmp_path / "differences.svg").iter()
        if element.tag.endswith("circle")
    ]
    assert len(dots) == 6 and dots == sorted(dots), "to the right by seed"
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True), "differences grow with the seed"
