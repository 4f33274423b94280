"""The sweep: cases of each kind of input, every one of which must be accepted, or refused in a line.

A target is a function of a folder of its own that gives ``case(random)``. A case makes an input, hands it to the code
that reads it, and raises what that raises. It asserts what must hold where the input is accepted, or refused.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import shutil
import signal
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from random import Random

import httpx
import pyarrow
import pyarrow.parquet
import pytest
import yaml

from igpo_fast import config as configuration
from igpo_fast import model
from igpo_fast.data.load import Data
from igpo_fast.data.passages import load_corpus
from igpo_fast.data.questions import load_questions
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.errors import RunError
from igpo_fast.files import write_manifest
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools import search as search_module
from igpo_fast.rollouts.tools.search import HttpSearch
from igpo_fast.run.checkpoint import load_checkpoint, open_run, rewind
from igpo_fast.run.crash import line_of
from igpo_fast.score import Scorer, score_file
from igpo_fast.train import train
from igpo_fast.types import Passage
from tests.families import FAMILIES, tokenizer_of
from tests.slow.odd import DEEP, LONG, TEXTS, VALUES, changed, damaged, harm, written
from tests.test_checkpoint import build, save, settings_for, update
from tests.tiny import SETTINGS, WORLD, Recorder

SECONDS = 20
"""Most that a case may take."""
Case = Callable[[Random], None]


class TimedOut(BaseException):
    """A case exceeded ``SECONDS``."""


@dataclass
class Counts:
    """What became of a target's cases."""

    refused: int = 0
    lines: Counter = field(default_factory=Counter)
    """How the refusals begin, and how often."""
    accepted: int = 0
    timed_out: int = 0
    faults: dict[str, str] = field(default_factory=dict)
    """The last lines of a traceback -> which case, and all of it."""
    failed: int = 0
    """Cases that ended in a traceback."""
    seconds: float = 0.0

    @property
    def cases(self) -> int:
        return self.refused + self.accepted + self.timed_out + self.failed


def sweep(target: Callable[[Path], Case], cases: Iterable[int], seconds: float = SECONDS) -> Counts:
    """Run cases of a target, each from a seed of its own number."""
    counts, began = Counts(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="sweep-") as folder, _here(Path(folder)):
        case = target(Path(folder))
        for number in cases:
            try:
                with _limited(seconds):
                    case(Random(f"{target.__name__}/{number}"))
                counts.accepted += 1
            except TimedOut:
                counts.timed_out += 1
            except Exception as error:
                if _in_a_line(error):
                    counts.refused += 1
                    counts.lines[re.sub(r"\d+|\S*/\S*", "", str(error))[:90]] += 1
                else:
                    counts.failed += 1
                    frames = traceback.extract_tb(error.__traceback__)
                    own = [f for f in frames if "/igpo_fast/" in f.filename] or frames
                    where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {type(error).__name__}"
                    counts.faults.setdefault(
                        where, f"{target.__name__}/{number}\n" + "".join(traceback.format_exception(error))
                    )
    counts.seconds = time.monotonic() - began
    return counts


def _in_a_line(error: Exception) -> bool:
    """Whether the command line would print a line for it: a RunError, or no memory for what was asked."""
    line = line_of(error)
    return line is not None and not isinstance(error, OSError) and len(line) < 2000 and "\n" not in line.strip()


@contextmanager
def _limited(seconds: float):
    def stop(number, frame):
        raise TimedOut

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _here(folder: Path):
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


# --- configuration ---

SECTIONS = {section: f.annotation.model_fields for section, f in configuration.Config.model_fields.items()}
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]

NUMBERS = (
    "0", "1", "2", "3", "5", "-1", "0.001", "0.3", "0.999", "1e-9", "1000", "1e9", "1e36", "1e-320", "65536",
)  # fmt: skip
ODD_TEXTS = [repr(text) for text in ("", " ", "x", "./x", "{}", "[]", "a,b", "é", "http://127.0.0.1:9/x", "null")]


def config(folder: Path) -> Case:
    """A YAML file with odd values, or damaged; or odd overrides. What is accepted is written and read again."""
    path, good = folder / "config.yaml", configuration.load().dump()

    def case(random):
        overrides = []
        how = random.randrange(4)
        if how == 0:
            path.write_bytes(damaged(random, good.encode()))
        elif how == 1:
            values = changed(random, yaml.safe_load(good), random.choice([1, 1, 2]))
            path.write_bytes(written(values))  # JSON is YAML
        else:
            path.write_text(good if random.randrange(2) else "")
            for _ in range(random.choice([1, 1, 2])):
                odd = random.choice(random.choice([VALUES, NUMBERS, ODD_TEXTS]))
                text = odd if isinstance(odd, str) else random.choice([repr, str, json.dumps])(odd)
                text = text.replace(DEEP, "[" * 3000).replace(LONG, "7" * 5000)
                overrides.append(f"{random.choice(KEYS)}{random.choice(['='] * 9 + ['.x='])}{text}")
        loaded = configuration.load(path, overrides)
        path.write_text(loaded.dump(), encoding="utf-8")
        assert configuration.load(path) == loaded

    return case


SMALL = [key for key in (*SETTINGS, *WORLD) if not key.startswith(("sft", "train.steps", "train.questions", "eval."))]
SMALL += ["train.steps=1", "train.questions=2", "eval.every=0", "eval.questions=2", "sft.clean_steps=0"]
SMALL += ["sft.noisy_steps=0", "sft.hard_steps=0", "search.retries=0"]
HUGE = {
    "layers",
    "hidden_size",
    "ffn_size",
    "steps",
    "persons",
    "companies",
    "cities",
    "countries",
    "vocab_size",
    "threads",
}
HUGE |= {
    "train_worlds",
    "eval_worlds",
    "sft_worlds",
    "clean_steps",
    "noisy_steps",
    "hard_steps",
    "group_size",
    "questions",
}
HUGE |= {"max_turns", "max_turn_tokens", "max_tokens", "oversample", "batch_size", "heads", "retries"}
"""Keys whose large values are not odd: they ask for hours, or for memory."""


def whole_run(folder: Path) -> Case:
    """A whole run of a step with one key of every section's type set to what its type allows, or nearly."""

    def options(name):
        section, key = name.split(".")
        if key == "dir":
            return []
        known = configuration.Config.model_fields[section].annotation.model_fields[key].annotation
        literals = [str(v) for v in getattr(known, "__args__", ()) if isinstance(v, str)]
        numbers = [n for n in NUMBERS if key not in HUGE or float(n) <= 5]
        return literals or (["true", "false"] if known is bool else [*numbers, *ODD_TEXTS])

    settable = [name for name in KEYS if options(name)]

    def case(random):
        name = random.choice(settable)
        value, run = random.choice(options(name)), folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        settings = configuration.load(None, [*SMALL, f"run.dir={run}", "run.cache=cache", f"{name}={value}"])
        try:
            train(settings, Recorder())
        finally:
            assert not list(run.rglob(".*.tmp"))
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    return case


# --- questions and passages ---

QUESTIONS = [
    {"id": "q1", "question": "Who wrote Faust?", "answers": ["Goethe", "J. W. Goethe"], "hops": 2},
    {"id": "m1", "question": "Where?", "answer": "Rome", "answer_aliases": ["Roma"], "question_decomposition": [{"question": "a", "answer": "b"}],
     "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "P"}]},
    {"_id": "h1", "question": "When?", "answer": "1808", "supporting_facts": [["T", 0], ["U", 1]], "context": [["T", ["a", "b"]], ["U", ["c"]]]},
    {"question_id": "t1", "Question": "Which?", "answer": {"value": "A", "aliases": ["B"]}, "context": "A text."},
    {"id": "s1", "question": "Why?", "answers": {"text": ["x"], "answer_start": [1]}, "title": "S", "context": "Some."},
    {"data_source": "nq", "prompt": [{"role": "user", "content": "Who?"}], "reward_model": {"ground_truth": {"target": ["A"]}, "style": "rule"},
     "extra_info": {"index": 3, "split": "train", "question": "Who?"}},
    {"id": "k1", "input": "What?", "output": [{"answer": "A"}, {"provenance": []}]},
    {"id": "p1", "question": "Job?", "possible_answers": "[\"poet\", \"writer\"]"},
    {"id": "f1", "question": "F?", "golden_answers": ["1"], "metadata": {"supporting_facts": {"title": ["a"], "sent_id": [0]},
     "context": {"title": ["a"], "content": [["b"]]}}},
]  # fmt: skip
PASSAGES = [
    {"id": "p1", "title": "Faust", "text": "A tragedy by Goethe."},
    {"_id": 2, "contents": '"Goethe"\nA poet.'},
    {"id": "k", "wikipedia_title": "Rome", "text": ["Rome\n", "A city."]},
    {"id": "h", "wikipedia_title": "Rome", "text": {"paragraph": ["Rome\n", "A city."]}},
]
OTHERS = [date(1970, 1, 1), b"bytes", b"\xff"]


def write_table(random: Random, path: Path, rows: list) -> None:
    """Rows as a file of the kind that its name says, perhaps damaged."""
    if path.suffix == ".parquet":
        _write_parquet(random, path, rows)
    else:
        lines = b"\n".join(map(written, rows)) + b"\n"
        content = written(rows) if path.name.startswith("array") else lines
        if random.randrange(6) == 0:
            content = damaged(random, content)
        path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    if random.randrange(12) == 0:
        path.write_bytes(damaged(random, path.read_bytes()))


def _write_parquet(random: Random, path: Path, rows: list) -> None:
    rows = [row if isinstance(row, dict) else {"question": row} for row in rows]
    if random.randrange(4) == 0:
        rows[0][random.choice(list(rows[0] or {"id": 0}))] = random.choice(OTHERS)
    columns = {}
    for name in {str(name) for row in rows for name in row}:
        if "\ud800" in name:
            continue
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
        except Exception:  # a column holds values of one kind
            with suppress(Exception):
                columns[name] = pyarrow.array([None if v is None else str(v) for v in values])
    try:
        pyarrow.parquet.write_table(pyarrow.table(dict(sorted(columns.items()))), path)
    except pyarrow.ArrowException:  # values that parquet has no form for
        path.write_bytes(b"PAR1")


NAMES = ("x.jsonl", "x.jsonl", "x.json", "array.json", "x.jsonl.gz", "array.json.gz", "x.parquet", "x.parquet")


def _table(random: Random, folder: Path, good: list) -> Path:
    rows = random.sample(good, random.randrange(1, 4))
    rows = changed(random, rows, random.choice([0, 1, 1, 1, 2, 4]))
    path = folder / random.choice(NAMES)
    write_table(random, path, rows if isinstance(rows, list) and rows else [rows])
    return path


def questions(folder: Path) -> Case:
    """Question files in the forms of nine data sets, with odd fields, or damaged."""

    def case(random):
        path = _table(random, folder, QUESTIONS)
        found = load_questions(path, passages={} if random.randrange(2) else None)
        assert len({q.id for q in found}) == len(found) > 0
        for question in found:
            for text in (question.id, question.question, *question.answers):
                assert isinstance(text, str) and text.strip() and text.encode()
            assert question.answers and (question.hops is None or question.hops >= 0)

    return case


def corpora(folder: Path) -> Case:
    """Corpora in four forms, with odd fields, or damaged."""

    def case(random):
        for passage in load_corpus(_table(random, folder, PASSAGES)):
            assert passage.id and passage.text and (passage.id + passage.title + passage.text).encode()

    return case


# --- trajectories ---

CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "Faust"}}}
PLAIN = {
    "question": "Who wrote Faust?",
    "answers": ["Goethe", "J. W. Goethe"],
    "messages": [
        {"role": "system", "content": "Search."},
        {"role": "user", "content": "Who wrote Faust?"},
        {"role": "assistant", "content": "<think>hm</think><search>Faust</search>"},
        {"role": "user", "content": "<information>A tragedy.</information>"},
        {"role": "assistant", "content": "<answer>Goethe</answer>"},
    ],
}
CALLS = PLAIN | {
    "tools": [{"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}],
    "messages": [
        {"role": "user", "content": "Who wrote Faust?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "I search."},
        {"role": "tool", "content": "A tragedy.", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "text", "text": "Goethe"}]},
    ],
}


def trajectories(folder: Path) -> Case:
    """Files for ``score``, in both dialects, under the templates of five families; messages, calls and rollouts."""
    path, target, scorers = folder / "in.jsonl", folder / "out.jsonl", {}

    def scorer(family, dialect):
        if (family, dialect) not in scorers:
            words = tokenizer_of(family)
            sizes = dict(hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=16, max_tokens=2048)
            lm = model.use_attend(model.build(len(words), tie_embeddings=True, seed=0, **sizes))
            scorers[family, dialect] = Scorer(lm, words, dialect=dialect, token_budget=4096, answers="max")
        return scorers[family, dialect]

    def rollout(words):
        ids = lambda text: words(text, add_special_tokens=False).input_ids  # noqa: E731
        turns = [
            {"text": text, "ids": ids(text), "response_ids": ids(reply), "action": "search", "argument": "x", "response": reply,
             "passages": [], "logp": [0.0] * len(ids(text))}
            for text, reply in (("<search>x</search>", "found"), ("<answer>y</answer>", ""))
        ]  # fmt: skip
        return PLAIN | {
            "messages": None,
            "prompt_ids": ids("Who wrote Faust?"),
            "turns": turns,
            "id": "q",
            "index": 0,
            "outcome": None,
        }

    def case(random):
        family, dialect = random.choice(list(FAMILIES)), random.choice(["tags", "chat"])
        good = [PLAIN, PLAIN, CALLS, CALLS, rollout(tokenizer_of(family))]
        rows = [changed(random, random.choice(good), random.choice([1, 1, 2])) for _ in range(random.choice([1, 1, 2]))]
        content = b"\n".join(map(written, rows)) + b"\n"
        path.write_bytes(damaged(random, content) if random.randrange(5) == 0 else content)
        target.unlink(missing_ok=True)
        try:
            count = score_file(path, target, lambda: scorer(family, dialect))
        finally:
            assert not list(folder.glob(".*.tmp"))
        scored = [json.loads(line) for line in target.read_bytes().splitlines()]
        assert len(scored) == count == sum(bool(line.strip()) for line in path.read_bytes().decode().split("\n"))
        for row in scored:
            assert len(row["info_gain"]) == len(row["values"]) - 1

    return case


# --- retrieval ---

ANSWER = {
    "result": [
        [
            {"document": {"id": "p1", "contents": '"Faust"\nA tragedy.'}, "score": 1.5},
            {"document": {"id": 2, "title": "Goethe", "text": "A poet."}, "score": 1},
            {"contents": "Weimar\nA town."},
        ]
    ]
}
HEADERS = [{}, {}, {"Retry-After": "0"}, {"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"}, {"Retry-After": "1e5"}, {"Location": "http://[::"},
           {"Location": "/x"}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "nope"}, {"Content-Length": "3"},
           {"Content-Type": "text/html; charset=nope"}, {"Retry-After": "٣"}, {"Set-Cookie": "a=\x7f"}]  # fmt: skip
STATUSES = [200] * 12 + [204, 206, 301, 302, 400, 401, 404, 405, 407, 408, 418, 422, 429, 500, 502, 503, 999]
ERRORS = [httpx.ReadTimeout("slow"), httpx.ConnectError("no"), httpx.RemoteProtocolError("half"), httpx.DecodingError("gzip"),
          httpx.TooManyRedirects("loop"), httpx.LocalProtocolError("bad"), OSError(104, "reset"), httpx.ReadError("")]  # fmt: skip


class Body(httpx.AsyncByteStream):
    """A body that comes in two pieces."""

    def __init__(self, content: bytes):
        self.content = content

    async def __aiter__(self):
        half = len(self.content) // 2
        yield self.content[:half]
        yield self.content[half:]


def retrieval(folder: Path) -> Case:
    """Answers of a retrieval server: odd values, damaged bytes, statuses, headers, lost connections."""
    answer: dict = {}

    def handle(request):
        if "error" in answer:
            raise answer["error"]
        return httpx.Response(answer["status"], stream=Body(answer["content"]), headers=answer["headers"])

    tool = HttpSearch("http://server/retrieve", 3, retries=1, backoff=0.0, transport=httpx.MockTransport(handle))

    async def search(query):
        try:
            return await tool(query)
        finally:
            await tool.aclose()

    def case(random):
        answer.clear()
        if random.randrange(15) == 0:
            answer["error"] = random.choice(ERRORS)
        content = written(changed(random, ANSWER, random.choice([0, 1, 1, 1, 2, 3])))
        content = damaged(random, content) if random.randrange(4) == 0 else content
        answer.update(status=random.choice(STATUSES), content=content, headers=_bytes(random.choice(HEADERS)))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(search_module, "LONGEST_WAIT", 0.0)
            found = asyncio.run(search(random.choice(["Faust", *TEXTS])))
        assert len(found.passages) <= 3
        for passage in found.passages:
            assert isinstance(passage, Passage) and passage.text.strip()
            assert (passage.id + passage.title + passage.text).encode()

    return case


def _bytes(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


# --- run folders, models, tokenizers ---


def run_folder(folder: Path) -> Case:
    """A run of three steps with two checkpoints, one of its files damaged (a checkpoint's with or without a manifest
    that agrees), then resumed. A refusal leaves the folder as it was; a resume loses no row and doubles none."""
    good, bad = folder / "good", folder / "run"
    with open_run(good, settings_for()) as run:
        run.begin()
        parts = build()
        for step in (1, 2, 3):
            update(*parts)
            run.write_rollouts(step, [{"step": step}] * 2)
            run.append_metrics({"step": step, "norm": parts[0].lm_head.weight.norm().item()})
            if step < 3:
                save(run, step, parts)
    names = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file() and path.name != ".lock")

    def case(random):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        path = bad / random.choice(names)
        harm(random, path)
        if path.parent.parent.name == "checkpoints" and path.name != "manifest.json" and random.randrange(2):
            _agree(path.parent)
        before, lines = _files(bad), _lines(bad / "metrics.jsonl")
        try:
            with open_run(bad, settings_for()) as run:
                parts = build(seed=1)
                done = load_checkpoint(run, *parts)
                run.begin()
                step = done[0] if done else 0
                rewind(run, step)
                update(*parts)
                save(run, step + 1, parts)
        except RunError:
            if path.name != "metrics.jsonl":  # whose lines are checked last, after the configuration is written
                assert _files(bad) == before
            raise
        assert not list(bad.rglob(".*.tmp"))
        kept = [
            line for file in (bad / "metrics.jsonl", *bad.glob("discarded/*/metrics.jsonl")) for line in _lines(file)
        ]
        assert Counter(kept) == Counter(lines)

    return case


def _agree(checkpoint: Path) -> None:
    """A manifest of what is there now: damage that happened before it was written."""
    about = json.loads((checkpoint / "manifest.json").read_bytes())
    about.pop("files")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, **about)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def _lines(path: Path) -> list[bytes]:
    return [line for line in (path.read_bytes() if path.is_file() else b"").split(b"\n") if line.strip()]


def _model_folder(folder: Path) -> Path:
    good = folder / "good"
    words = tokenizer_of("qwen2.5")
    sizes = dict(hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=16, max_tokens=256)
    model.build(len(words), tie_embeddings=True, seed=0, **sizes).save_pretrained(good)
    words.save_pretrained(good)
    return good


def _damaged_copy(random: Random, good: Path, bad: Path, kinds: tuple[str, ...]) -> None:
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    names = sorted(path.name for path in good.iterdir() if path.name.startswith(kinds))
    for name in random.sample(names, random.choice([1, 1, min(2, len(names))])):
        harm(random, bad / name)


def tokenizers(folder: Path) -> Case:
    """A tokenizer's folder with damaged files, or odd values in them. What is accepted encodes, and is saved."""
    good, bad = _model_folder(folder), folder / "bad"
    (good / "config.json").unlink()
    settings = configuration.load(None, [f"model.tokenizer={bad}"])

    def case(random):
        _damaged_copy(random, good, bad, ("tokenizer", "chat_template", "special"))
        words = load_tokenizer(settings, Data((), (), {}))
        dialect = make_dialect(
            random.choice(["tags", "chat"]), words, max_passage_tokens=32, max_answer_tokens=8, max_answers=2
        )
        dialect.check()
        words.save_pretrained(folder / "saved")

    return case


def models(folder: Path) -> Case:
    """A model's folder with damaged files, or odd values in them. What is accepted passes the probe, and is saved."""
    good, bad = _model_folder(folder), folder / "bad"

    def case(random):
        _damaged_copy(random, good, bad, ("config", "generation", "model"))
        model.load(str(bad)).save_pretrained(folder / "saved")

    return case


TARGETS: dict[str, tuple[Callable[[Path], Case], int]] = {
    "configuration: load, write, load again": (config, 1500),
    "configuration: a whole run of a step": (whole_run, 250),
    "question files": (questions, 1000),
    "corpora": (corpora, 500),
    "trajectories for `score`, both dialects": (trajectories, 800),
    "retrieval answers": (retrieval, 700),
    "run folders: checkpoints, metrics, configuration": (run_folder, 400),
    "tokenizer folders": (tokenizers, 250),
    "model folders": (models, 200),
}


if __name__ == "__main__":
    import sys

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    for name, (target, cases) in TARGETS.items():
        if len(sys.argv) > 1 and target.__name__ not in sys.argv[1:]:
            continue
        few = int(os.environ.get("CASES", cases))
        found = sweep(target, range(few))
        print(
            f"{name}: {found.cases} cases, {found.refused} refused, {found.accepted} accepted, {found.failed} tracebacks,"
            f" {found.timed_out} timed out, {found.seconds:.0f} s",
            flush=True,
        )
        if os.environ.get("LINES"):
            print(*found.lines.most_common(25), sep="\n")
        for where, text in found.faults.items():
            print("==", where, "\n", "\n".join(text.splitlines()[:1] + text.splitlines()[-14:]), flush=True)
