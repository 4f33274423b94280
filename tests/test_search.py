import asyncio
import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast import config
from igpo_fast.data import Data, load_corpus, load_questions
from igpo_fast.errors import InputError
from igpo_fast.tools.base import Passage
from igpo_fast.tools.search import Bm25Search, HttpSearch, NoSearch, ToolError, make_search

DATA = Path(__file__).parents[2] / "shared" / "data"

PASSAGES = (
    Passage("p0", "", "the cat sat on a mat"),
    Passage("p1", "", "a dog sat on the cat"),
    Passage("p2", "Mat", "is a word"),
    Passage("p3", "", "nothing to see, x marks"),
)


def ids(search, query, corpus=""):
    return [passage.id for passage in asyncio.run(search(query, corpus)).passages]


def test_best_first_and_nothing_without_a_shared_word():
    search = Bm25Search({"": PASSAGES}, top_k=3)
    assert ids(search, "dog cat") == ["p1", "p0"]
    assert ids(search, "unicorn") == []
    assert ids(search, "") == []
    assert ids(search, "?!") == []


def test_titles_come_before_mentions_and_case_does_not_matter():
    assert ids(Bm25Search({"": PASSAGES}, 2), "MAT") == ["p2", "p0"]


def test_stop_words_and_single_letters_count():
    search = Bm25Search({"": PASSAGES}, 4)
    assert ids(search, "x") == ["p3"]
    assert ids(search, "to") == ["p3"]
    assert set(ids(search, "the")) == {"p0", "p1"}


def test_equal_scores_keep_the_order_of_the_passages():
    twins = [Passage(str(i), "", "same words here") for i in range(50)]
    assert ids(Bm25Search({"": twins}, 3), "words") == ["0", "1", "2"]
    assert ids(Bm25Search({"": twins[::-1]}, 3), "words") == ["49", "48", "47"]
    # Two scores, mixed, and more passages than an unstable sort leaves in order.
    mixed = [Passage(str(i), "", "rare words" if i % 3 == 0 else "same words") for i in range(300)]
    expected = [str(i) for i in (*range(0, 300, 3), *(i for i in range(300) if i % 3))]
    assert ids(Bm25Search({"": mixed}, 300), "rare words") == expected


def test_collections_are_searched_apart_and_an_unknown_one_is_named():
    search = Bm25Search({"a": PASSAGES[:1], "b": PASSAGES[1:], "empty": ()}, 4)
    assert ids(search, "cat", "a") == ["p0"]
    assert ids(search, "cat", "b") == ["p1"]
    for unknown in ("c", "empty"):
        with pytest.raises(ToolError, match=f"collection '{unknown}'"):
            ids(search, "cat", unknown)


def lucene_bm25(query, texts, k1=1.5, b=0.75):
    """Written out from the formula, over whitespace words."""
    docs = [text.split() for text in texts]
    mean = sum(map(len, docs)) / len(docs)
    scores = []
    for doc in docs:
        score = 0.0
        for word in query.split():
            df = sum(word in other for other in docs)
            idf = math.log(1 + (len(docs) - df + 0.5) / (df + 0.5))
            tf = doc.count(word)
            score += idf * tf / (tf + k1 * (1 - b + b * len(doc) / mean)) if df else 0.0
        scores.append(score)
    return scores


@given(
    st.lists(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=8).map(" ".join), min_size=1, max_size=9),
    st.lists(st.sampled_from("abcdefz"), max_size=4).map(" ".join),
    st.integers(1, 10),
)
def test_ranking_is_that_of_the_formula(texts, query, top_k):
    search = Bm25Search({"": [Passage(str(i), "", text) for i, text in enumerate(texts)]}, top_k)
    scores = lucene_bm25(query, texts)
    found = [int(id) for id in ids(search, query)]
    assert len(found) == min(top_k, sum(score > 0 for score in scores))
    best = sorted(scores, reverse=True)[: len(found)]
    assert [scores[i] for i in found] == pytest.approx(best, rel=1e-5)


def test_the_cache_is_used_and_bounded():
    search = Bm25Search({"": PASSAGES}, 2, cache_size=2)
    for query in ("cat", "cat", "dog", "mat", "cat"):
        ids(search, query)
    info = search._search_cached.cache_info()
    assert (info.hits, info.misses, info.currsize) == (1, 4, 2)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real data")
@pytest.mark.parametrize(
    ("name", "floor"), [("musique", 0.48), ("hotpotqa", 0.75), ("nq_open", 0.90)], ids=lambda v: str(v)
)
def test_real_questions_find_their_passages(name, floor):
    """Share of supporting passages among the best 5; measured .506, .785, .921."""
    search = Bm25Search({"": load_corpus(DATA / name / "corpus.jsonl")}, 5)
    questions = load_questions(DATA / name / "questions.jsonl")[:500]
    found = [
        step["passage_id"] in {p.id for p in search._search(q.question, "").passages}
        for q in questions
        for step in q.steps
    ]
    assert sum(found) / len(found) >= floor


class Server:
    """A retrieval server that gives (status, body) pairs in turn, the last one again and again."""

    def __init__(self, *answers, delay=0.0):
        self.answers, self.requests, self.delay = list(answers), [], delay
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                server.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status, body = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
                time.sleep(server.delay)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.handle_error = lambda *args: None  # a client that has timed out
        self.url = f"http://127.0.0.1:{self._server.server_port}/retrieve"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


GOOD = {
    "result": [
        [
            {"document": {"id": "7", "contents": '"Mars"\nMars is red.\nAnd far.'}, "score": 3.5},
            {"document": {"id": 8, "contents": "only a text"}, "score": 1.0},
        ]
    ]
}


def test_http_speaks_search_r1():
    with Server((200, GOOD)) as server:
        result = asyncio.run(HttpSearch(server.url, 2)("red planet"))
        assert result.passages == (
            Passage("7", "Mars", "Mars is red.\nAnd far."),
            Passage("8", "", "only a text"),
        )
        assert server.requests == [{"queries": ["red planet"], "topk": 2, "return_scores": True}]


def test_http_cuts_to_top_k_and_works_in_a_second_event_loop():
    with Server((200, GOOD)) as server:
        search = HttpSearch(server.url, 1)
        first = asyncio.run(search("one"))
        client = search._client
        assert asyncio.run(search("two")) == first
        assert search._client is not client, "connections of a closed loop cannot be used"
        assert [passage.id for passage in first.passages] == ["7"]


def test_http_finding_nothing_is_no_error():
    with Server((200, {"result": [[]]})) as server:
        assert ids(HttpSearch(server.url, 2), "x") == []


@pytest.mark.parametrize("status", [500, 503, 429])
def test_http_tries_again_and_recovers(status):
    with Server((status, {}), (status, {}), (200, GOOD)) as server:
        assert ids(HttpSearch(server.url, 2, retries=2, backoff=0), "x") == ["7", "8"]
        assert len(server.requests) == 3


@pytest.mark.parametrize(("status", "attempts"), [(500, 3), (404, 1)])
def test_http_gives_up_with_one_line(status, attempts):
    with Server((status, {})) as server:
        with pytest.raises(ToolError, match=rf"search.url={server.url}: no answer \(status {status}\)") as caught:
            ids(HttpSearch(server.url, 2, retries=2, backoff=0), "x")
        assert len(server.requests) == attempts
    assert "\n" not in str(caught.value) and isinstance(caught.value, InputError)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        {},
        {"result": []},
        {"result": [[{"score": 1}]]},
        {"result": [[{"document": {"id": "1"}}]]},
        [1],
    ],
    ids=str,
)
def test_http_never_takes_a_malformed_answer_for_an_empty_one(body):
    with Server((200, body)) as server, pytest.raises(ToolError, match="not Search-R1's"):
        ids(HttpSearch(server.url, 2, backoff=0), "x")


def test_http_times_out():
    with Server((200, GOOD), delay=0.3) as server, pytest.raises(ToolError, match="ReadTimeout"):
        ids(HttpSearch(server.url, 2, timeout=0.05, retries=1, backoff=0), "x")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/retrieve", "not a url"])
def test_http_without_a_server(url):
    with pytest.raises(ToolError, match="no answer"):
        ids(HttpSearch(url, 2, retries=0), "x")


def test_no_search_finds_nothing():
    assert ids(NoSearch(), "cat") == []


def test_make_search_follows_the_config():
    data = Data((), (), {"": PASSAGES})
    local = make_search(config.load(None, ["search.top_k=1"]), data)
    assert ids(local, "dog cat") == ["p1"]
    with Server((200, GOOD)) as server:
        assert ids(make_search(config.load(None, [f"search.url={server.url}"]), data), "cat") == ["7", "8"]
