import asyncio
import json
import math
from base64 import b64encode
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast import config
from igpo_fast.data.load import Data
from igpo_fast.data.passages import load_corpus
from igpo_fast.data.questions import load_questions
from igpo_fast.errors import InputError, RunError, ToolError, masked
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.search import COUNTS, SEARCH_TOOL, Bm25Search, HttpSearch, NoSearch, make_search
from igpo_fast.types import Passage, Question, ToolResult, search_for
from tests.clock import JumpingLoop
from tests.contracts.tool import told
from tests.scripted import words_tokenizer
from tests.search_server import Server, Slow
from tests.test_dialect import chat

DATA = Path(__file__).parents[2] / "shared" / "data"

PASSAGES = (
    Passage("p0", "", "the cat sat on a mat"),
    Passage("p1", "", "a dog sat on the cat"),
    Passage("p2", "Mat", "is a word"),
    Passage("p3", "", "nothing to see, x marks"),
)


URL = "http://127.0.0.1:9/retrieve"


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
        clients = search.endpoint._clients
        assert asyncio.run(search("two")) == first
        assert search.endpoint._clients is not clients, "connections of a closed loop cannot be used"
        assert [passage.id for passage in first.passages] == ["7"]


def test_http_replaces_what_utf8_cannot_write():
    answer = b'{"result": [[{"document": {"id": "1", "contents": "t\\ud800\\nx\\udfff"}, "score": 1}]]}'
    with Server((200, answer)) as server:
        found = asyncio.run(HttpSearch(server.url, 2)("a\udc00b"))
        assert server.requests[0]["queries"] == ["a?b"]
    assert found.passages == (Passage("1", "t?", "x?"),)


@pytest.mark.parametrize(
    "hits",
    [
        [{"document": {"contents": '"Mars"\nis red'}}, {"document": {"contents": "only a text"}}],
        [{"id": None, "contents": '"Mars"\nis red'}, {"id": "", "contents": "only a text"}],
        [{"contents": ""}, {"title": "Mars", "text": "is red"}, {"contents": "\n "}, {"contents": "only a text"}, {}],
    ],
    ids=["web search of Search-R1", "documents themselves", "blank passages"],
)
def test_http_understands_servers_that_give_less(hits):
    with Server((200, {"result": [hits]})) as server:
        search = HttpSearch(server.url, 2)
        first, second = asyncio.run(search("x")).passages
        assert [(p.title, p.text) for p in (first, second)] == [("Mars", "is red"), ("", "only a text")]
        assert first.id != second.id and len(first.id) == len(second.id) == 16
        assert asyncio.run(search("x")).passages == (first, second), "the same text has the same name"


def test_http_closes_its_connections():
    with Server((200, GOOD)) as server:
        search = HttpSearch(server.url, 2)

        async def twice():
            for _ in range(2):
                await gathered(search, 3)
                clients = [client for client in search.endpoint._clients._queue if client]
                await search.aclose()
            return clients

        assert all(client.is_closed for client in asyncio.run(twice()))
        search.check()
    assert search.endpoint._clients is None


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
        what = f"no answer \\(status {status}\\)" if status == 500 else "a POST gave status 404; is its path right"
        with pytest.raises(ToolError, match=rf"search.url={server.url}: {what}") as caught:
            ids(HttpSearch(server.url, 2, retries=2, backoff=0), "x")
        assert len(server.requests) == attempts
    assert "\n" not in str(caught.value) and isinstance(caught.value, RunError)


@pytest.mark.parametrize(
    "body",
    [
        b"<html>",
        {},
        {"result": []},
        {"result": [[{"score": 1}]]},
        {"result": [[{"document": {"id": "1"}}]]},
        {"result": [[], []]},
        [1],
        b"[" * 100_000,
    ],
    ids=lambda body: str(body)[:30],
)
def test_http_never_takes_a_malformed_answer_for_an_empty_one(body):
    with Server((200, body)) as server, pytest.raises(ToolError, match="not Search-R1's"):
        ids(HttpSearch(server.url, 2, backoff=0), "x")


def slow(network, **options):
    return HttpSearch(URL, 2, transport=network, **options)


def jump(work):
    """What ``work`` brings, and the seconds it takes, none of them the world's."""
    with asyncio.Runner(loop_factory=JumpingLoop) as runner:
        return runner.run(work), runner.get_loop().now


def test_http_times_out():
    search = slow(Slow(3), timeout=0.5, retries=1, backoff=0)
    with pytest.raises(ToolError, match=r"no answer within 0\.5 s after 2 attempts"):
        jump(search("x"))
    assert counted(search) == {"calls": 1, "failures": 1, "retries": 1, "timeouts": 2}


def test_a_timeout_is_of_the_whole_attempt_and_not_of_waiting_for_a_turn():
    found, seconds = jump(gathered(slow(Slow(0.5), timeout=0.75, retries=0, concurrency=1), 10))
    assert (len(found), seconds) == (10, 5)
    with pytest.raises(ToolError, match=r"within 2\.5 s"):  # the answer would be whole after 3
        jump(slow(Slow(0.5, pieces=5), timeout=2.5, retries=0)("x"))
    assert jump(slow(Slow(0.5, pieces=5), timeout=3.5, retries=0)("x"))[1] == 3


@pytest.mark.parametrize(("limit", "seconds"), [(1, 12), (3, 4), (5, 3), (64, 1)])
def test_http_limits_how_many_requests_run_at_a_time(limit, seconds):
    network = Slow(1)
    assert jump(gathered(slow(network, concurrency=limit), 12))[1] == seconds
    assert network.most_at_a_time == min(limit, 12)


def test_who_backs_off_makes_room():
    """With one place: the second search takes its turn while the first waits 4 s or more to try again."""

    async def broken():
        if network.requests == 1:
            raise httpx.ReadError("torn")

    network = Slow(1, first=broken)
    search = slow(network, concurrency=1, backoff=4)
    order = []

    async def ask(query):
        await search(query)
        order.append((query, asyncio.get_running_loop().now))

    async def both():
        await asyncio.gather(ask("first"), ask("second"))

    jump(both())
    assert order[0] == ("second", 2) and order[1][0] == "first" and 6 <= order[1][1] <= 8


@pytest.mark.parametrize("backoff", [0, 0.5])
def test_many_retries_do_not_overflow(backoff):
    """0.5 * 2**1024 is more than a float holds."""

    async def down():
        raise httpx.ConnectError("refused")

    network = Slow(0, x=down)
    with pytest.raises(ToolError, match="after 1041 attempts"):
        jump(slow(network, retries=1040, backoff=backoff)("x"))
    assert network.requests == 1041


X = 1 + 0x4ADF4367 / 2**33
"""What the waits of query x are multiplied with: half the fraction that `b2sum -l 64` says is added."""


def test_http_waits_longer_each_time(monkeypatch):
    assert waits(monkeypatch, [(503, {})] * 3 + [(200, GOOD)], backoff=0.5) == pytest.approx([0.5 * X, X, 2 * X])
    assert waits(monkeypatch, [(503, {})] * 8 + [(200, GOOD)], backoff=1, retries=8)[-3:] == [30, 30, 30]


def test_http_waits_differ_by_query(monkeypatch):
    found = [waits(monkeypatch, [(503, {}), (200, GOOD)], query=f"query {i}", backoff=1)[0] for i in range(8)]
    assert all(1 <= wait < 1.5 for wait in found) and len(set(found)) == 8
    assert waits(monkeypatch, [(503, {}), (200, GOOD)], query="query 3", backoff=1) == [found[3]]


@pytest.mark.parametrize(
    ("after", "expected"),
    [("2", 2 * X), ("0", 0.5 * X), ("3600", 30), ("soon", 0.5 * X), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.5 * X)],
)
def test_http_waits_as_long_as_the_server_asks(monkeypatch, after, expected):
    found = waits(monkeypatch, [(429, {}, {"Retry-After": after}), (200, GOOD)], backoff=0.5)
    assert found == pytest.approx([expected])


def test_http_waits_until_the_date_the_server_names(monkeypatch):
    class Noon(datetime):
        @classmethod
        def now(cls, zone):
            return datetime(2026, 1, 1, 12, tzinfo=zone)

    monkeypatch.setattr("igpo_fast.endpoint.datetime", Noon)
    later = "Thu, 01 Jan 2026 12:00:20 GMT"
    assert waits(monkeypatch, [(503, {}, {"Retry-After": later}), (200, GOOD)], backoff=0.5) == [pytest.approx(20 * X)]


def waits(monkeypatch, answers, query="x", **options):
    """Seconds between attempts."""
    slept, real = [], asyncio.sleep

    async def sleep(seconds):
        slept.append(seconds)
        await real(0)

    with Server(*answers) as server, monkeypatch.context() as patch:
        patch.setattr("igpo_fast.rollouts.tools.search.asyncio.sleep", sleep)
        assert ids(HttpSearch(server.url, 2, **options), query) == ["7", "8"]
    return slept


def test_http_stops_reading_an_answer_that_is_too_large():
    sent = []

    def endless(file):
        for _ in range(2000):
            file.write(b" " * 100_000)
            sent.append(100_000)

    with Server((200, endless)) as server:
        search = HttpSearch(server.url, 2, max_bytes=1_000_000)
        with pytest.raises(ToolError, match=r"its answer exceeds 1,000,000 bytes; lower search\.top_k, or raise"):
            ids(search, "x")
        assert counted(search) == {"calls": 1, "failures": 1, "too_large": 1}
        assert sum(sent) < 50e6, "the connection was not closed"


def test_http_failed_for_good_the_policy_reads_the_text():
    with Server((404, {}), (200, GOOD)) as server:
        search = HttpSearch(server.url, 2, failure_text="Search is down.")
        assert asyncio.run(search("x")) == ToolResult(failure="Search is down.")
        assert ids(search, "x") == ["7", "8"]
        assert counted(search) == {"calls": 2, "passages": 2, "failures": 1, "refused": 1}
        found, warning = told(search, "step 3")
    expected = {"calls": 2, "passages": 2, "failures": 1, "refused": 1}
    assert found == {f"tool/{name}": expected.get(name, 0) for name in COUNTS}
    shown = "the policy was shown search.failure_text instead of passages"
    assert warning == f"step 3: 1 of 2 searches failed for good (refused 1); {shown}"
    assert told(search, "step 4") == ({f"tool/{name}": 0 for name in COUNTS}, "")


def test_a_step_in_which_every_search_failed_stops():
    with Server((404, {}), (200, b"{}")) as server:
        search = HttpSearch(server.url, 2, failure_text="no")
        ids(search, "x"), ids(search, "x")
    with pytest.raises(ToolError, match=r"step 3: every search failed \(2 calls; refused 1, malformed 1\); see that"):
        told(search, "step 3")
    assert told(NoSearch(), "step 3") == ({"tool/calls": 0, "tool/passages": 0, "tool/empty": 0}, "")


def test_both_dialects_show_the_failure_in_place_of_passages():
    tags = make_dialect(
        "tags", words_tokenizer(), (SEARCH_TOOL,), max_passage_tokens=4, max_answer_tokens=4, max_answers=1
    )
    _, text = tags.response((search_for("q"),), (ToolResult(failure="A B"),))
    assert text == "\n<information>\nA B\n</information>\n"
    _, text = chat().response((search_for("q"),), (ToolResult(failure="A B"),))
    assert "A B" in text and "Nothing was found." not in text


def counted(search):
    return {name: count for name, count in search.counts.items() if count}


async def gathered(search, calls):
    return await asyncio.gather(*(search(str(i)) for i in range(calls)))


def test_http_without_a_server():
    with pytest.raises(ToolError, match=r"no answer .* is the search server running there"):
        ids(HttpSearch("http://127.0.0.1:9/retrieve", 2, retries=0), "x")


NO_URLS = [
    "not a url", "localhost:8000/retrieve", "http://[::1/retrieve", "ftp://localhost/x", "http://h:99999/retrieve",
    "http://h:x/", "http://a..b/", "http:///retrieve", "http://h:0/", "http://***@h/retrieve", "http://h/\x00",
]  # fmt: skip


@pytest.mark.parametrize("url", NO_URLS)
def test_http_without_a_url(url):
    search = HttpSearch(url, 2)
    with pytest.raises(ToolError, match=r"^search\.url=.*; give a URL like http://127\.0\.0\.1:8000/retrieve$"):
        ids(search, "x")
    assert not search.counts["retries"]


@pytest.mark.parametrize("url", [url for url in NO_URLS if "***" not in url])
def test_a_configuration_without_a_url(url):
    with pytest.raises(InputError, match=r"search\.url: .*; give a URL like http://127\.0\.0\.1:8000/retrieve"):
        config.load(None, [f"search.url={json.dumps(url)}"])


@pytest.mark.parametrize(
    ("path", "answer", "words"),
    [
        ("", (404, {}), "a POST gave status 404; add the path: search.url={place}/retrieve"),
        ("/", (405, {}), "a POST gave status 405; add the path: search.url={place}/retrieve"),
        ("/", (200, {"status": "ok"}), "its answer is not Search-R1's (KeyError: 'result'); add the path: search.url="),
        ("/retreive", (404, {}), "a POST gave status 404; is its path right? A search server's address is like http"),
        ("/retrieve", (401, {}), "a POST gave status 401; give the credentials that it needs"),
        ("/a", (308, {}, {"Location": "/b"}), "a POST gave status 308; give the address that it redirects to: /b"),
        ("/retrieve", (422, {}), "a POST gave status 422; expected "),
        ("/retrieve", (200, b"<html>"), "its answer is not Search-R1's (JSONDecodeError: "),
    ],
)  # fmt: skip
def test_a_wrong_address_says_what_to_do(path, answer, words):
    with Server(answer) as server:
        place = server.url.removesuffix("/retrieve")
        with pytest.raises(ToolError) as caught:
            HttpSearch(place + path, 2, retries=2).check(Question("q", "who wrote Faust?", ("Goethe",)))
        assert len(server.requests) == 1 and server.requests[0]["queries"] == ["who wrote Faust?"]
    assert str(caught.value).startswith(f"search.url={place}{path}: {words.format(place=place)}"), str(caught.value)


def test_a_proxy_does_not_stand_before_a_server_on_this_machine(monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with Server((200, GOOD)) as server:
        for url in (server.url, server.url.replace("127.0.0.1", "localhost")):
            assert ids(HttpSearch(url, 2, retries=0), "x") == ["7", "8"]
        with Server((200, GOOD)) as proxy:  # which every other address is asked through
            monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/retrieve"))
            monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/retrieve"))
            assert ids(HttpSearch("http://server.invalid/retrieve", 2, retries=0), "x") == ["7", "8"]
            assert len(proxy.requests) == 1 and len(server.requests) == 2


def test_credentials_are_sent_and_never_shown():
    with Server((200, GOOD), (404, {})) as server:
        url = server.url.replace("//", "//me:s%3Acret@")
        search = HttpSearch(url, 2)
        assert ids(search, "x") == ["7", "8"]
        assert server.headers[0]["Authorization"] == "Basic " + b64encode(b"me:s:cret").decode()
        with pytest.raises(ToolError) as caught:
            ids(search, "x")
    assert str(caught.value).startswith(f"search.url={server.url.replace('//', '//***@')}: ")
    loaded = config.load(None, [f"search.url={url}"])
    assert loaded.search.url == url and "cret" not in loaded.dump() and "***@" in loaded.dump()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://user:secret@h:8000/x", "http://***@h:8000/x"),
        ("at https://token@h/ and http://a:b@[::1]:9/, twice", "at https://***@h/ and http://***@[::1]:9/, twice"),
        ("http://u:p@ss@h/x", "http://***@h/x"),
        ("search.url=user:secret@h:8/x: bad", "search.url=***@h:8/x: bad"),
        ("http://h/x?api_key=abc&k=3&token=t", "http://h/x?api_key=***&k=3&token=***"),
        ("mail a@b.c, http://h/@x, key: v@w", "mail a@b.c, http://h/@x, key: v@w"),
    ],
)
def test_secrets_of_urls_are_masked(text, expected):
    assert masked(text) == str(ToolError(text)) == str(InputError(text)) == expected


def test_what_finds_nothing_is_counted_and_told():
    local = Bm25Search({"": PASSAGES}, top_k=3)
    ids(local, "unicorn"), ids(local, "dog cat"), ids(local, "unicorn")
    assert told(local, "step 1") == ({"tool/calls": 3, "tool/passages": 2, "tool/empty": 2}, "")
    ids(local, "unicorn"), ids(local, "unicorn")
    advice = "see that {} has the passages that these questions need"
    warning = f"step 2: none of 2 searches found a passage; {advice}"
    assert told(local, "step 2")[1] == warning.format("data.corpus")
    with Server((200, {"result": [[]]})) as server:
        search = HttpSearch(server.url, 2)
        ids(search, "x"), ids(search, "y")
        counts, warned = told(search, "step 2")
    assert warned == warning.format("search.url") and counts["tool/empty"] == counts["tool/calls"] == 2
    with Server((200, {"result": [[]]}), (404, {})) as server:
        search = HttpSearch(server.url, 2, failure_text="no")
        ids(search, "x"), ids(search, "y")
        warned = told(search, "step 2")[1]
    assert warned.startswith("step 2: 1 of 2 searches failed for good")
    assert "; none of 1 searches found" in warned


def test_no_search_finds_nothing():
    assert ids(NoSearch(), "cat") == []


def test_make_search_follows_the_config():
    data = Data((), (), {"": PASSAGES})
    local = make_search(config.load(None, ["search.top_k=1"]), data)
    assert ids(local, "dog cat") == ["p1"]
    with Server((200, GOOD)) as server:
        assert ids(make_search(config.load(None, [f"search.url={server.url}"]), data), "cat") == ["7", "8"]
