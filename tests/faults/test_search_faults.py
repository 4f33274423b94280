"""A search server that fails in every way: the step completes, or the run stops in one line and goes on later; no
rollout is lost or made twice, and the step's counts name what happened."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
import time

import pytest

from igpo_fast import config
from igpo_fast.data.world import make_worlds
from igpo_fast.errors import ToolError
from igpo_fast.rollouts.tools.search import COUNTS, Bm25Search
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import train
from igpo_fast.types import Passage
from tests.search_server import Server, Serving
from tests.tiny import Recorder, settings

STEPS, GROUP, QUESTIONS = 3, 4, 4
PASSAGE_OF_NOTHING = Passage("0", "", "zzz")
FAILURE = "nothing ."  # in the made-up world's words


@pytest.fixture(scope="session")
def passages(tmp_path_factory):
    """Those of the run's worlds, together."""
    worlds = [world for kind in ("train", "eval") for world in make_worlds(options(".", ".").world, kind)]
    return [passage for world in worlds for passage in world.passages]


def options(folder, cache, *overrides):
    return settings(
        folder, cache, f"train.steps={STEPS}", f"rollout.group_size={GROUP}", f"train.questions={QUESTIONS}",
        "train.checkpoint_every=100", "eval.every=0", "search.backoff=0.01", "search.retries=3", "search.timeout=60",
        f"search.failure_text={json.dumps(FAILURE)}", *overrides,
    )  # fmt: skip


class Service:
    """Answers well, except where ``fault(number, query)`` has something else; training's requests count from 0."""

    def __init__(self, passages, fault=lambda number, query: None):
        self._search, self._fault, self._lock = Bm25Search({"": passages}, 2), fault, threading.Lock()
        self.training, self.seen = False, 0

    def __call__(self, _, request):
        (query,) = request["queries"]
        with self._lock:
            number, self.seen = self.seen, self.seen + self.training
        answer = self._fault(number, query) if self.training else None
        return answer or (200, self.body(query))

    def body(self, query):
        found = asyncio.run(self._search(query)).passages
        documents = [{"id": p.id, "contents": f"{p.title}\n{p.text}"} for p in found]
        return {"result": [[{"document": document, "score": 1.0} for document in documents]]}


class Told(Recorder):
    """Tells the service when training begins and evaluation ends."""

    def __init__(self, service):
        super().__init__()
        self._service = service

    def phase(self, name, total=None):
        super().phase(name, total)
        self._service.training = name == "rollout"


@pytest.fixture(scope="module")
def clean(passages, cache, tmp_path_factory):
    """Turns of a run without faults, by step, question and index."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    _, rows = run(folder, cache, Service(passages))
    assert all(row["tool/calls"] > 10 and not row["tool/failures"] for row in rows)
    return turns(folder)


def run(folder, cache, service, *overrides, port=0):
    display = Told(service)
    with Server(service, port=port) as server:
        train(options(folder, cache, f"search.url={server.url}", *overrides), display)
    return display.text, RunFolder(folder).read_metrics()[1:]


def turns(folder):
    """What was said and found in training, by (step, question, index); each once."""
    found = {}
    for path in sorted(RunFolder(folder).rollouts.glob("step_*")):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = (path.name, record["id"], record["index"])
            assert key not in found
            found[key] = [(turn["text"], turn["response"]) for turn in record["turns"]]
            assert all(turn.get("failed", False) == (FAILURE in turn["response"]) for turn in record["turns"])
    assert len(found) == STEPS * GROUP * QUESTIONS
    return found


def total(rows):
    """Counts of calls and of what went wrong that are not 0, over all steps."""
    sums = {name: sum(row[f"tool/{name}"] for row in rows) for name in COUNTS if name not in ("passages", "empty")}
    return {name: count for name, count in sums.items() if count}


def every(n, answer):
    """A fault of each n-th training search that is no retry of the last."""
    return lambda number, query: answer if number % n == n - 1 else None


def late(number, query):
    if number % 15 == 14:
        time.sleep(6)


def hang_up(file):
    """Says less than it announced."""
    file.write(b'{"result": [')


# --- what passes by ---


@pytest.mark.parametrize(
    ("fault", "counted", "overrides"),
    [
        (every(5, (500, "oops")), "server_errors", ()),
        (every(5, (429, {}, {"Retry-After": "0"})), "rate_limited", ()),
        (late, "timeouts", ("search.timeout=3",)),
        (every(5, (200, hang_up, {"Content-Length": "1000"})), "unreachable", ()),
    ],
    ids=["500", "429", "slow", "torn"],
)
def test_what_passes_by_changes_nothing(passages, cache, clean, tmp_path, fault, counted, overrides):
    text, rows = run(tmp_path / "run", cache, Service(passages, fault), *overrides)
    assert turns(tmp_path / "run") == clean
    sums = total(rows)
    assert set(sums) == {"calls", "retries", counted} and sums["retries"] == sums[counted] >= 3
    assert "warning" not in text


def test_a_server_killed_in_a_step_and_started_again(passages, cache, clean, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"id": f"{i}", "title": p.title, "text": p.text} for i, p in enumerate(passages)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = Serving(corpus, tmp_path / "index", "--topk=2")
    after = []

    class Kills(Recorder):
        def advance(self, done=1):
            super().advance(done)
            if self._phase_name == "rollout" and self._done == 1 and not after:
                after.append(threading.Thread(target=self.restart))
                first.end(subprocess.Popen.kill)
                after[0].start()

        def restart(self):
            time.sleep(0.3)
            after.append(Serving(corpus, tmp_path / "index", port=first.port))

    try:
        train(options(tmp_path / "run", cache, f"search.url={first.url}", "search.retries=13"), Kills())
        second = after[1]
        assert any("serving" in line for line in second.log) and "words 100%" not in second.log
        second.end()
    finally:
        first.process.kill()
    assert turns(tmp_path / "run") == clean
    sums = total(RunFolder(tmp_path / "run").read_metrics()[1:])
    assert set(sums) == {"calls", "retries", "unreachable"}


# --- what fails for good ---


def broken(fault_answer):
    """Every search for some of the queries, retries included."""
    return lambda number, query: fault_answer if len(query) % 3 == 0 else None


HUGE = json.dumps({"result": [[{"document": {"id": "1", "contents": "x" * 10_000_000}, "score": 1}]]}).encode()


@pytest.mark.parametrize(
    ("answer", "counted", "retried"),
    [
        ((500, {}), "server_errors", True),
        ((200, b'{"result": [['), "malformed", False),
        ((200, {"results": []}), "malformed", False),
        ((200, HUGE), "too_large", False),
        ((404, {}), "refused", False),
    ],
    ids=["500", "malformed", "wrong shape", "10 MB", "404"],
)
def test_what_fails_for_good_is_read_counted_and_told(passages, cache, tmp_path, answer, counted, retried):
    text, rows = run(tmp_path / "run", cache, Service(passages, broken(answer)))
    shown = [response for said in turns(tmp_path / "run").values() for _, response in said]
    failed = [response for response in shown if FAILURE in response]
    sums = total(rows)
    assert set(sums) == {"calls", "failures", counted} | ({"retries"} if retried else set())
    # A turn that no longer fits is left out with its response.
    assert 0 < len(failed) <= sums["failures"] < sums["calls"]
    assert sums[counted] == sums["failures"] * (4 if retried else 1)
    for row in rows:
        step = f"step {row['step']}: {row['tool/failures']:.0f} of {row['tool/calls']:.0f} searches failed for good"
        assert (f"warning: {step}" in text) == (row["tool/failures"] > 0)


@pytest.mark.parametrize("mode", ["text", "stop"])
def test_a_server_that_goes_down_stops_the_run_which_later_goes_on(passages, cache, clean, tmp_path, mode):
    """With ``stop`` at the first search that fails, with ``text`` at the end of the step."""
    folder, on_failure = tmp_path / "run", f"search.on_failure={mode}"
    service = Service(passages, lambda number, query: (503, {}) if down() else None)
    display = Told(service)
    down = lambda: display._done >= 1  # noqa: E731
    with Server(service) as server, pytest.raises(ToolError) as caught:
        train(options(folder, cache, f"search.url={server.url}", on_failure), display)
    expected = "step 2: every search failed (" if mode == "text" else f"search.url={server.url}: no answer (status 503)"
    assert str(caught.value).startswith(expected) and "\n" not in str(caught.value)
    assert list(RunFolder(folder).saved()) == [1], "the last whole step is kept"
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == [0, 1]

    run(folder, cache, Service(passages), on_failure)  # the server is on another port now
    assert turns(folder) == clean
    assert not RunFolder(folder).discarded.exists()


def test_a_server_that_finds_nothing_is_told(cache, tmp_path):
    text, rows = run(tmp_path / "run", cache, Service(passages=(PASSAGE_OF_NOTHING,)))
    for row in rows:
        assert row["tool/empty"] == row["tool/calls"] > 0 == row["tool/passages"] == row["tool/failures"]
        told = f"warning: step {row['step']}: none of {row['tool/calls']:.0f} searches found a passage; see that "
        assert told in text


def test_search_in_process_counts_what_it_finds(cache, tmp_path):
    train(options(tmp_path / "run", cache, "train.steps=1"), Recorder())
    (row,) = RunFolder(tmp_path / "run").read_metrics()[1:]
    assert row["tool/calls"] > row["tool/empty"] >= 0 and row["tool/passages"] > 0 and "tool/failures" not in row


def test_a_missing_path_ends_the_run_at_its_start(cache, tmp_path):
    def answer(number, request):
        return 404, {}

    with Server(answer) as server, pytest.raises(ToolError) as caught:
        url = server.url.removesuffix("/retrieve")
        train(options(tmp_path / "run", cache, f"search.url={url}"), Recorder())
    assert str(caught.value) == f"search.url={url}: a POST gave status 404; add the path: search.url={url}/retrieve"


@pytest.mark.parametrize("mode", ["text", "stop"])
def test_without_a_server_a_run_does_not_begin(cache, tmp_path, mode):
    with Server((200, {})) as gone:
        url = gone.url
    with pytest.raises(ToolError, match=rf"^search\.url={url}: no answer \(.*\) after 4 attempts; is the search"):
        train(options(tmp_path / "run", cache, f"search.url={url}", f"search.on_failure={mode}"), Recorder())
    assert RunFolder(tmp_path / "run").read_metrics() == []


def test_an_evaluation_tells_of_failures(passages, cache, tmp_path):
    class Failing(Service):
        def __call__(self, number, request):
            return (404, {}) if number and len(request["queries"][0]) % 3 == 0 else super().__call__(number, request)

    display = Told(service := Failing(passages))
    with Server(service) as server:
        train(options(tmp_path / "run", cache, f"search.url={server.url}", "train.steps=1"), display)
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert all(row["eval/search_failures"] > 0 for row in rows)
    failures = rows[0]["eval/search_failures"]
    assert f"warning: evaluation: {failures:.0f} searches failed for good" in display.text


def test_a_warm_start_never_learns_from_a_failure(tmp_path, corpus_of_questions):
    questions, passages = corpus_of_questions
    overrides = [
        f"run.dir={tmp_path / 'run'}", f"run.cache={tmp_path / 'cache'}", "data.source=files",
        f"data.train={questions}", f"data.corpus={passages}", "model.tokenizer=bpe", "model.vocab_size=300",
        "model.hidden_size=32", "model.layers=1", "sft.clean_steps=2", "sft.batch_size=2", "rollout.max_tokens=2048",
        "train.questions=2",
    ]  # fmt: skip
    found = {"result": [[{"document": {"id": "p", "contents": "A\nb"}, "score": 1.0}]]}
    # The first request is the look at the server before anything begins.
    with (
        Server((200, found), (404, {})) as server,
        pytest.raises(ToolError, match=r"^warm start: a call of search failed"),
    ):
        train(config.load(None, [*overrides, f"search.url={server.url}"]), Recorder())
    assert not list((tmp_path / "cache").glob("*"))


@pytest.fixture
def corpus_of_questions(tmp_path):
    passages = [{"id": f"p{i}", "title": f"Person {i}", "text": f"Person {i} was born in City {i}."} for i in range(8)]
    questions = [
        {
            "id": f"q{i}",
            "question": f"Where was person {i} born?",
            "answers": [f"City {i}"],
            "steps": [{"question": f"Where was person {i} born?", "answer": f"City {i}", "passage_id": f"p{i}"}],
        }
        for i in range(8)
    ]
    for name, rows in (("questions", questions), ("corpus", passages)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl", tmp_path / "corpus.jsonl"
