"""Run folders written by hand, without a model, and what a page says of them."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from igpo_fast import config
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.records import record_of
from igpo_fast.types import Action, Credit, Question, Rollout, Turn, answer_with, search_for


def turn(text, actions=(), response="", **about):
    """A turn of one token per word."""
    words = len(text.split()) or 1
    ids, logp = np.arange(words, dtype=np.int32), np.full(words, -0.5, np.float32)
    response_ids = np.zeros(len(response.split()), np.int32)
    return Turn(ids, logp, text, tuple(actions), response_ids, response=response, **about)


def searches(query, response="", **about):
    about = {"found": bool(response), "passages": ("p1",) if response else ()} | about
    return turn(f"search {query}", (search_for(query),), response, **about)


def answers(text):
    return turn(f"answer {text}", (answer_with(text),))


def calls(tool, **arguments):
    return turn(tool, (Action(tool, arguments),), "result", found=True)


def rollout(*turns, index=0, truth=("Weimar",), id="q1", question="Where did he die?", **about):
    return Rollout(Question(id, question, tuple(truth)), index, np.arange(3, dtype=np.int32), turns, **about)


def credit(rollout, values=None, f1=0.0, advantages=None, outcome=None, **about):
    """What a rollout earned: F1, unless another outcome is given; NaN for values if none are given."""
    turns = len(rollout.turns)
    values = np.full(turns, np.nan) if values is None else np.array(values, float)
    gains = np.empty(0) if np.isnan(values).all() else np.diff(values)
    advantages = np.full(turns, 0.5) if advantages is None else np.array(advantages, float)
    em = f1 if np.isnan(f1) else float(f1 == 1)
    return Credit(values, gains, f1 if outcome is None else outcome, f1, em, advantages, **about)


def run_folder(path: Path, *overrides: str, rows=(), evaluations=None, **steps) -> RunFolder:
    """A run's files: ``step_1=[(rollout, credit), ...]``; ``evaluations`` is step -> rollouts."""
    run = RunFolder(path)
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / "config.yaml").write_text(config.load(None, [f"run.dir={path}", *overrides]).dump())
    run.rollouts.mkdir(exist_ok=True)
    for name, pairs in steps.items():
        run.write_rollouts(int(name.removeprefix("step_")), [record_of(*pair) for pair in pairs])
    for step, found in (evaluations or {}).items():
        run.write_rollouts(step, map(record_of, found), "eval")
    for row in rows:
        run.append_metrics(row)
    return run


class Page(HTMLParser):
    """A page as a browser reads it: its elements, texts and embedded JSON."""

    def __init__(self, html: bytes):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.scripts: dict[str, str] = {}
        self.text = ""
        self._script = None
        self.feed(html.decode())
        self.index = json.loads(self.scripts["index"])
        self.rollouts = {entry["key"]: entry for entry in self.index["rollouts"]}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self._script = dict(attrs).get("id", "own")
            self.scripts[self._script] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self._script = None

    def handle_data(self, data):
        if self._script is None:
            self.text += data
        else:
            self.scripts[self._script] += data

    def detail(self, key: str) -> list[dict]:
        """The turns of a rollout in full."""
        return json.loads(self.scripts[f"group-{self.rollouts[key]['group']}"])["rollouts"][key]
