"""How long a report takes to load in headless Chromium: ``python -m bench.report_load [RUN] [--results FILE]``.

Without RUN a run is made up: 400 training and 100 evaluation rollouts of four turns, three passages of 100 words for
each query, and a tokenizer of its own. The page is opened ten times from its file, with a rollout in its address; the
time is from the start of the navigation to the end of the load event, by when the list and this rollout are drawn.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from bench.browser import Browser
from bench.timing import circumstances
from igpo_fast import config
from igpo_fast.report.page import Report
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.records import record_of
from igpo_fast.types import Credit, Question, Rollout, Turn, answer_with, search_for

STEPS, GROUPS, GROUP, EVALUATED, TURNS = (1, 2), 25, 8, 100, 4
PASSAGES, WORDS, THOUGHT = 3, 100, 40
OPENED = 10


def made_up(folder: Path) -> Path:
    """A run's folder with ``len(STEPS) * GROUPS * GROUP + EVALUATED`` rollouts."""
    draw = random.Random(0)
    words = [
        "".join(draw.choices("bcdfglmnprstvz", k=1) + draw.choices("aeiou", k=1)) * draw.randint(1, 3)
        for _ in range(999)
    ]
    write = lambda count: " ".join(draw.choices(words, k=count))  # noqa: E731
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokens.train_from_iterator(
        [write(5000)], BpeTrainer(vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    ids = lambda text: np.array(tokens.encode(text).ids, np.int32)  # noqa: E731

    def turn(actions, text, response=""):
        said = ids(text)
        logp = np.array([-draw.expovariate(2) for _ in said], np.float32)
        return Turn(
            said, logp, text, actions, ids(response), response, ("p1", "p2", "p3") if response else (), bool(response)
        )

    def rollout(question, index):
        turns = []
        for _ in range(TURNS - 1):
            query = write(6)
            response = "\n\n".join(f"{write(3)}\n{write(WORDS)}" for _ in range(PASSAGES))
            turns.append(
                turn((search_for(query),), f"<think>{write(THOUGHT)}</think><search>{query}</search>", response)
            )
        answer = draw.choice([question.answers[0], write(2)])
        turns.append(turn((answer_with(answer),), f"<answer>{answer}</answer>"))
        return Rollout(question, index, ids(f"Question: {question.question}"), tuple(turns))

    def scored(one):
        values = np.array([draw.random() for _ in one.turns])
        f1 = float(one.answer == one.question.answers[0])
        return record_of(
            one, Credit(values, np.diff(values), f1, f1, f1, np.array([draw.gauss(0, 1) for _ in one.turns]))
        )

    run = RunFolder(folder)
    run.rollouts.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.load(None, [f"run.dir={folder}", "algorithm.basis=prob"]).dump())
    PreTrainedTokenizerFast(tokenizer_object=tokens).save_pretrained(run.checkpoint(STEPS[-1]))
    questions = [Question(f"q{i}", f"{write(12)}?", (write(2),)) for i in range(GROUPS)]
    for step in STEPS:
        run.write_rollouts(step, (scored(rollout(question, i)) for question in questions for i in range(GROUP)))
        run.append_metrics({"step": step, "reward/f1": draw.random(), "turns/mean": TURNS})
    evaluated = (Question(f"e{i}", f"{write(12)}?", (write(2),)) for i in range(EVALUATED))
    run.write_rollouts(STEPS[-1], (record_of(rollout(question, 0)) for question in evaluated), "eval")
    return folder


def measure(run: Path) -> dict:
    """A row: rollouts and bytes of the page, milliseconds of loading."""
    page = Report(run).html()
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        file = Path(folder, "report.html")
        file.write_bytes(page)
        browser.open(file.as_uri())
        key, count = browser.js("[index.rollouts[0].key, index.rollouts.length]")
        loads = []
        for _ in range(OPENED):
            browser.open("about:blank")
            browser.open(f"{file.as_uri()}#{key}")
            assert browser.js("!!document.querySelector('#rollout .turn') && !!document.querySelector('#rows a')")
            loads.append(browser.js("performance.getEntriesByType('navigation')[0].loadEventEnd"))
        version = browser.call("Browser.getVersion")["product"]
    load = {"median": round(median(loads)), "most": round(max(loads)), "unit": "ms", "opened": OPENED}
    return {"rollouts": count, "megabytes": round(len(page) / 1e6, 2), "load": load, "browser": version}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--results", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(asked.run or made_up(Path(folder, "run")))
    row = {"bench": "report/load", **circumstances(), "run": asked.run.name if asked.run else "made up", **row}
    print(json.dumps(row))
    if asked.results:
        with open(asked.results, "a") as results:
            results.write(json.dumps(row) + "\n")
