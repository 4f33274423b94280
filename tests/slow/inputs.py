"""Targets of the sweep that read rows: questions, passages, trajectories, answers of a retrieval server."""

from __future__ import annotations

import asyncio
import gzip
import json
from contextlib import suppress
from datetime import date
from pathlib import Path
from random import Random

import httpx
import pyarrow
import pyarrow.parquet
import pytest

from igpo_fast import endpoint, model
from igpo_fast.data.passages import load_corpus
from igpo_fast.data.questions import load_questions
from igpo_fast.rollouts.tools.search import HttpSearch
from igpo_fast.score import Scorer, score_file
from igpo_fast.types import Passage
from tests.families import FAMILIES, tokenizer_of
from tests.slow.odd import TEXTS, changed, damaged, written
from tests.slow.sweep import Case

# --- questions and passages ---

QUESTIONS = [
    {"id": "q1", "question": "Who wrote Faust?", "answers": ["Goethe", "J. W. Goethe"], "hops": 2},
    {
        "id": "m1", "question": "Where?", "answer": "Rome", "answer_aliases": ["Roma"],
        "question_decomposition": [{"question": "a", "answer": "b"}],
        "paragraphs": [{"idx": 0, "title": "T", "paragraph_text": "P"}],
    },
    {
        "_id": "h1", "question": "When?", "answer": "1808", "supporting_facts": [["T", 0], ["U", 1]],
        "context": [["T", ["a", "b"]], ["U", ["c"]]],
    },
    {"question_id": "t1", "Question": "Which?", "answer": {"value": "A", "aliases": ["B"]}, "context": "A text."},
    {"id": "s1", "question": "Why?", "answers": {"text": ["x"], "answer_start": [1]}, "title": "S", "context": "Some."},
    {
        "data_source": "nq", "prompt": [{"role": "user", "content": "Who?"}],
        "reward_model": {"ground_truth": {"target": ["A"]}, "style": "rule"},
        "extra_info": {"index": 3, "split": "train", "question": "Who?"},
    },
    {"id": "k1", "input": "What?", "output": [{"answer": "A"}, {"provenance": []}]},
    {"id": "p1", "question": "Job?", "possible_answers": '["poet", "writer"]'},
    {
        "id": "f1", "question": "F?", "golden_answers": ["1"],
        "metadata": {
            "supporting_facts": {"title": ["a"], "sent_id": [0]}, "context": {"title": ["a"], "content": [["b"]]},
        },
    },
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
            {
                "text": text, "ids": ids(text), "logp": [0.0] * len(ids(text)), "action": "search", "argument": "x",
                "response": reply, "response_ids": ids(reply), "passages": [],
            }
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
HEADERS = [
    {}, {}, {"Retry-After": "0"}, {"Retry-After": "Wed, 21 Oct 99999 07:28:00 GMT"}, {"Retry-After": "1e5"},
    {"Retry-After": "٣"}, {"Retry-After": "Wed, 21 Oct 0000 07:28:00 +9999"}, {"Location": "http://[::"},
    {"Location": "/x"}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "nope"}, {"Content-Length": "3"},
    {"Content-Type": "text/html; charset=nope"}, {"Set-Cookie": "a=\x7f"},
]  # fmt: skip
STATUSES = [200] * 12 + [204, 206, 301, 302, 400, 401, 404, 405, 407, 408, 418, 422, 429, 500, 502, 503, 999]
ERRORS = [
    httpx.ReadTimeout("slow"), httpx.ConnectError("no"), httpx.RemoteProtocolError("half"), httpx.DecodingError("gzip"),
    httpx.TooManyRedirects("loop"), httpx.LocalProtocolError("bad"), OSError(104, "reset"), httpx.ReadError(""),
]  # fmt: skip


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
            patch.setattr(endpoint, "LONGEST_WAIT", 0.0)
            found = asyncio.run(search(random.choice(["Faust", *TEXTS])))
        assert len(found.passages) <= 3
        for passage in found.passages:
            assert isinstance(passage, Passage) and passage.text.strip()
            assert (passage.id + passage.title + passage.text).encode()

    return case


def _bytes(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]
