"""A judge behind an OpenAI-compatible URL: what it is asked, how often, and what happens when it is down."""

import asyncio
import warnings
from pathlib import Path

import pytest

from igpo_fast.errors import ToolError
from igpo_fast.judge import Judge, score_of
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import train
from tests.search_server import Server
from tests.tiny import Recorder, rows, settings

EXAMPLE = Path(__file__).parents[1] / "examples" / "judge.py"


def says(text):
    return 200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}


def ask(judge, *messages):
    """The replies to messages that are asked at once."""

    async def all_of_them():
        return await asyncio.gather(*map(judge, messages))

    return asyncio.run(all_of_them())


def test_the_same_is_asked_once_in_one_loop_and_in_later_ones():
    with Server(says("7"), says("3"), delay=0.02) as server:
        judge = Judge(server.url, "m", key="secret", max_tokens=5)
        assert ask(judge, "A", "A", "A") == ["7"] * 3
        assert ask(judge, "A") == ["7"]
        assert ask(judge, [{"role": "system", "content": "B"}]) == ["3"]
        first, second = server.requests
    assert first == {
        "model": "m", "temperature": 0, "max_tokens": 5, "messages": [{"role": "user", "content": "A"}]
    }  # fmt: skip
    assert second["messages"] == [{"role": "system", "content": "B"}]
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert judge.counts == {"calls": 2}


def test_connections_end_with_their_loop():
    with Server(says("7")) as server, warnings.catch_warnings():
        warnings.simplefilter("error")
        judge, clients = Judge(server.url, "m"), []

        async def once(message):
            await judge(message)
            clients.extend(client for client in judge._endpoint._clients._queue if client)

        for message in "AB":
            asyncio.run(once(message))
            assert len(clients) == ord(message) - ord("A") + 1 and all(client.is_closed for client in clients)


def test_it_is_asked_again_before_it_counts_as_down():
    with Server((503, {}), (429, {}), says("7")) as server:
        assert ask(Judge(server.url, "m", retries=2, backoff=0), "A") == ["7"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ((503, {}), r"no answer \(status 503\) after 2 attempts; is the judge running there\?"),
        ((401, {}), r"a POST gave status 401; give its key: Judge\(key=...\)"),
        ((404, {}), r"a POST gave status 404; are address and model right\?"),
        ((200, {"result": []}), r"its answer is no chat completion \(KeyError: 'choices'\); does it speak"),
        ((200, {"choices": [{"message": 3}]}), r"its answer is no chat completion \(TypeError"),
        ((200, b"<html>"), r"its answer is no chat completion \(JSONDecodeError"),
    ],
)
def test_one_that_is_down_is_told_in_a_line_or_skipped(answer, told):
    with Server(answer) as server:
        with pytest.raises(ToolError, match=rf"^judge http://127.0.0.1:\d+/retrieve: {told}"):
            ask(Judge(server.url, "m", retries=1, backoff=0), "A")
        judge = Judge(server.url, "m", retries=0, on_failure="skip")
        assert ask(judge, "A", "A") == [None, None]
        assert judge.counts["calls"] == judge.counts["failures"] == 1
        server.answers = [says("7")]
        assert ask(judge, "A") == ["7"], "a failure is not kept"


def test_a_rollout_that_is_given_up_takes_no_reply_from_another():
    async def both(judge):
        first, second = (asyncio.create_task(judge("A")) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        return await second

    with Server(says("7"), delay=0.1) as server:
        assert asyncio.run(both(Judge(server.url, "m"))) == "7"
        assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("7", 0.7), ("7/10", 0.7), ("Score: 10 out of 10.", 1.0), ("In 1999, so 4", 0.4), ("0", 0.0), ("2.5", 0.25),
        ("<think>at first 3</think> 8", 0.8), ("none", None), ("-1", None), ("11", None), ("", None), (None, None),
    ],
)  # fmt: skip
def test_score_of(reply, score):
    assert score_of(reply, most=10) == score


def test_the_example_trains(tmp_path, cache, monkeypatch):
    """A judge that likes answers of an even number of letters."""
    code = [line for line in EXAMPLE.read_text().partition('"""\n\n')[2].splitlines() if line.strip()]
    assert len(code) <= 30

    def answer(number, request):
        given = request["messages"][0]["content"].partition("Given answer: ")[2].partition("\n")[0]
        return says(f"{10 * (len(given) % 2 == 0)}/10")

    with Server(answer) as server:
        monkeypatch.setenv("JUDGE_URL", server.url)
        options = (f"algorithm.outcome={EXAMPLE}:reward", "train.steps=2", "eval.every=0", "algorithm.name=grpo")
        train(settings(tmp_path / "run", cache, *options), Recorder())
        asked = [request["messages"][0]["content"] for request in server.requests]
    assert len(asked) == len(set(asked))
    said = set()
    for rollout, credit in RunFolder(tmp_path / "run").read_rollouts("step_000002"):
        assert credit.outcome == (rollout.answer is not None and len(rollout.answer) % 2 == 0)
        said.add(credit.outcome)
    assert said == {0, 1} and "reward/judged" in rows(tmp_path / "run")[-1]
