"""What the pages say: links and anchors that lead somewhere, files and settings that exist, examples that are right."""

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from docs import linked
from igpo_fast.config import Config
from igpo_fast.types import Group, Question, Rollout, Turn, answer_with, search_for
from igpo_fast.update.advantages import Recipe, credit_rollouts

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "kernels/**/*.md", "examples/**/*.md", "tests/**/*.md")
    for path in ROOT.glob(pattern)
)
SITE = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^( *)```.*?^\1```$", re.DOTALL | re.MULTILINE)


def prose(page: Path) -> str:
    """A page without code: neither links nor headings are read there."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return re.sub(r"^ {4,}(?![-*\d]).*$", "", text, flags=re.MULTILINE)


def anchors(text: str) -> set[str]:
    """The anchors of a text's headings, as GitHub makes them: lower case, no punctuation, hyphens for spaces."""
    found: list[str] = []
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        shown = LINK.sub("]", heading).lower()
        name = re.sub(r"[^\w\- ]", "", shown).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def broken(page: Path) -> list[str]:
    """The links of a page that lead nowhere in the repository."""
    lost = []
    for link in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        there = target.exists() and target.is_relative_to(ROOT)
        if not there or (anchor and (target.suffix != ".md" or anchor not in anchors(prose(target)))):
            lost.append(link)
    return lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    assert broken(page) == []


def test_a_broken_link_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("# One: `two`, three\n## A\n## A\n```\n# no heading\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Here\n[a](b.md) ![a](https://x.y) [a](#here) [a](b.md#one-two-three) [a](b.md#a-1) `[a](code)`\n"
        "```\n[a](fenced)\n```\n\n    [a](indented)\n\n"
        "[a](c.md) [a](b.md#no-heading) [a](#there) [a](b.md#a-2) [a](../outside.md)\n    - [a](nested)\n"
    )
    assert broken(page) == ["c.md", "b.md#no-heading", "#there", "b.md#a-2", "../outside.md", "nested"]


def test_results_that_are_named_exist():
    named = {
        (page.name, name) for page in PAGES for name in re.findall(r"bench/results/([\w.-]+\.jsonl)", page.read_text())
    }
    assert len(named) > 10 and not [
        (page, name) for page, name in named if not (ROOT / "bench/results" / name).exists()
    ]


def test_settings_that_the_first_pages_name_exist():
    keys = {
        f"{section}.{key}" for section, field in Config.model_fields.items() for key in field.annotation.model_fields
    }
    named = {
        (page.name, key)
        for page in SITE
        if page.stem in ("index", "quickstart", "concepts", "faq")
        for key in re.findall(rf"`((?:{'|'.join(Config.model_fields)})\.\w+)(?:=[^`]*)?`", page.read_text())
    }
    assert len(named) > 40 and not [(page, key) for page, key in named if key not in keys]


def test_the_symptoms_are_those_that_a_run_warns_of():
    from igpo_fast.run.signatures import SIGNATURES

    page = (ROOT / "docs/faq.md").read_text()
    assert [signature.what for signature in SIGNATURES if f"`{signature.what}`" not in page] == []


# --- the site ---


class Tags(yaml.SafeLoader):
    """Reads mkdocs.yml without running what it names."""


Tags.add_multi_constructor("!!python/", lambda loader, tag, node: tag)
Tags.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, tag, node: tag)


def test_the_site_has_every_page():
    nav, places = yaml.load((ROOT / "mkdocs.yml").read_text(), Tags)["nav"], []
    todo = list(nav)
    while todo:
        entry = todo.pop()
        if isinstance(entry, dict):
            todo += [part for value in entry.values() for part in (value if isinstance(value, list) else [value])]
        else:
            places.append(entry)
    own = {linked.place(page) for page in SITE}
    assert own <= set(places) and len(places) == len(set(places))
    outside = {linked.place(path) for page in SITE for path in linked.targets(page)} - own
    assert set(places) - own <= outside, "a page from elsewhere is in the site if another page links to it"


def test_links_of_the_site():
    study, kernels = ROOT / "docs/study.md", ROOT / "kernels/igpo_kernels/README.md"
    said = "[a](../bench/results/study.jsonl) [b](config.md#run) [c](#x) ![d](study.svg) [e](https://x.y) t[i](j)"
    here = said.replace("../bench", "source/bench")
    assert linked.relinked(study, said) == here
    assert linked.relinked(
        kernels, "[a](../../docs/mask.svg) [b](tree_attention/README.md#x) [c](../../README.md)"
    ) == ("[a](../../../mask.svg) [b](tree_attention/README.md#x) [c](../../README.md)")
    assert list(linked.targets(study))  # it names its rows


def test_lists_of_the_site():
    text = "It says:\n- a\n  more\n- b\n\n1. c\n2. d\n\nThen\n1. e\n```\nkept:\n- f\n  g\n```\n| a |\n- h\n"
    made = text.replace("says:\n", "says:\n\n").replace("Then\n", "Then\n\n").replace("  more\n", "    more\n\n")
    assert linked.with_lists(text) == made
    assert linked.with_lists("- a\n\n  ```\n  if b:\n    c\n  ```\n") == "- a\n\n    ```\n    if b:\n      c\n    ```\n"


# --- examples ---


def test_the_group_of_the_concepts_page():
    """The table is what ``credit_rollouts`` gives, number by number."""
    page = (ROOT / "docs/concepts.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if re.match(r"\| [12] \|", line)
    ]
    question, nothing = Question("q", "?", ("right",)), np.zeros(0, np.int32)
    one = np.ones(1, np.int32)

    def turn(action):
        return Turn(one, np.zeros(1, np.float32), "", (action,), nothing)

    search = turn(search_for("x"))
    rollouts = (
        Rollout(question, 0, one, (search, search, turn(answer_with("right")))),
        Rollout(question, 1, one, (search, turn(answer_with("wrong")))),
    )
    values = [np.array([0.1, *(float(row[2]) for row in rows if row[0] == number and row[2])]) for number in "12"]
    credits = credit_rollouts([Group(question, rollouts)], values, Recipe(basis="prob", gamma=1.0))
    earned = [x for credit in credits for x in (*credit.gains, credit.outcome)]
    assert [float(row[3]) for row in rows] == pytest.approx(earned)
    advantages = np.concatenate([credit.advantages for credit in credits])
    assert [float(row[5]) for row in rows] == pytest.approx(advantages.tolist(), abs=6e-4)
    later = np.array([*advantages[1:3], 0, advantages[4], 0])
    assert [float(row[4]) for row in rows] == pytest.approx((advantages - later).tolist(), abs=6e-4)
