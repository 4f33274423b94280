"""The search server on one core: 32 clients with one query per request over MuSiQue's passages, and the answers'
recall."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from bench.timing import ROOT

DATA = ROOT.parent / "shared" / "data" / "musique"
CLIENTS, TOPK, QUERIES = 32, 3, 640
FLOOR = 200
"""Queries per second that one core must answer."""

pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs the real data")


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("uvicorn")
    pytest.importorskip("bm25s")
    from tests.search_server import serving

    with serving(DATA / "corpus.jsonl", tmp_path, cpu=max(os.sched_getaffinity(0))) as server:
        yield server


@pytest.fixture
def questions():
    return [json.loads(line) for line in (DATA / "questions.jsonl").read_text().splitlines()]


def test_queries_a_second(compare, server, questions, capsys):
    from igpo_fast.data.passages import load_corpus
    from igpo_fast.rollouts.tools.search import Bm25Search, HttpSearch

    own = [(question["question"], step["passage_id"]) for question in questions for step in question["steps"]]
    hops = [hop for question in questions for hop in decomposed(question)]
    passages = load_corpus(DATA / "corpus.jsonl")
    local = Bm25Search({"": passages}, TOPK, cache_size=0)
    texts = [query for query, _ in (*own, *hops)]
    queries = [texts[i * 7 % len(texts)] for i in range(QUERIES)]
    shape = {
        "corpus": "musique", "passages": len(passages), "queries": QUERIES, "clients": CLIENTS, "topk": TOPK,
        "recall": round(recall(server.port, own), 3), "recall_of_hops": round(recall(server.port, hops), 3),
    }  # fmt: skip
    sides = {
        "ours": lambda: asyncio.run(ask(server.port, queries)) and None,
        "our_client": lambda: asyncio.run(search(HttpSearch(server.url, TOPK, concurrency=CLIENTS), queries)),
        "in_process": lambda: asyncio.run(search(local, queries)),
    }
    found = compare("search/server", shape, sides, rounds=5)
    rate = 1e3 * QUERIES / found["ours"]["median"]
    with capsys.disabled():
        print(f"{rate:,.0f} queries/s on one core; recall@{TOPK} {shape['recall']:.3f} by the question itself,")
        print(f"{shape['recall_of_hops']:.3f} by its decomposition, earlier answers filled in")
    assert rate >= FLOOR


async def ask(port: int, queries: list[str]) -> list[bytes]:
    """The answers to one query per request over ``CLIENTS`` connections, by a client that costs next to nothing."""
    answers: list[bytes] = [b""] * len(queries)

    async def client(first: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in range(first, len(queries), CLIENTS):
            body = json.dumps({"queries": [queries[number]], "topk": TOPK, "return_scores": True}).encode()
            head = f"POST /retrieve HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200 "), head
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            answers[number] = await reader.readexactly(length)
        writer.close()
        await writer.wait_closed()

    await asyncio.gather(*(client(first) for first in range(CLIENTS)))
    return answers


async def search(tool, queries: list[str]) -> None:
    await asyncio.gather(*map(tool, queries))


def decomposed(question: dict) -> list[tuple[str, str]]:
    """Each hop's query, with the answers of the hops before it, and its passage."""
    answers, found = [], []
    for step in question["steps"]:
        query = step["question"].replace(" >> ", " ")
        for number, answer in enumerate(answers, start=1):
            query = query.replace(f"#{number}", answer)
        answers.append(step["answer"])
        found.append((query, step["passage_id"]))
    return found


def recall(port: int, wanted: list[tuple[str, str]]) -> float:
    """Share of passages among the ``TOPK`` of their query."""
    answers = asyncio.run(ask(port, [query for query, _ in wanted]))
    ids = [{hit["document"]["id"] for hit in json.loads(answer)["result"][0]} for answer in answers]
    return sum(passage in found for found, (_, passage) in zip(ids, wanted, strict=True)) / len(wanted)
