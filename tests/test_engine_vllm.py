"""What surrounds vLLM: fingerprints, weights on their way, requests, replicas that fail. None of it needs vLLM."""

import asyncio
import json
import os
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_fast import adapter, config
from igpo_fast.engines import vllm
from igpo_fast.engines.base import Request, Sampling
from igpo_fast.engines.fingerprint import block_sum, combine, fingerprint
from igpo_fast.engines.vllm import colocated, serve, weights
from igpo_fast.engines.vllm.requests import generation, sampling_parameters, seed_of
from igpo_fast.engines.vllm.serve import Guard, WeightsInFile, arguments
from igpo_fast.engines.vllm.servers import VllmServers
from igpo_fast.errors import DivergedError, EngineError, InputError
from igpo_fast.model import build
from igpo_fast.ranks import Ranks
from igpo_fast.update.learner import Learner
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
    for dtype, limit in ((torch.float32, 16), (torch.bfloat16, 8)):
        found = [[(len(t), t.dtype) for _, t in bucket] for bucket in weights.Walk(pairs, dtype, limit)]
        assert found == [[(n, dtype) for n in sizes] for sizes in ([1, 2], [9], [3, 1], [1])]


def test_a_walk_fingerprints_what_the_engine_gets():
    tied = drawn(2, 2)
    pairs = [("model.embed_tokens.weight", tied), ("model.norm.weight", drawn(2)), ("lm_head.weight", tied)]
    for dtype in (torch.float32, torch.bfloat16):
        walk, found = weights.Walk(pairs, dtype, 17), {}
        for bucket in walk:
            found |= safetensors.torch.load(weights.encode(bucket))
        assert found.keys() == dict(pairs).keys() and all(t.dtype == dtype for t in found.values())
        assert walk.fingerprints == {name: fingerprint(tensor.to(dtype)) for name, tensor in pairs}
        assert {name: fingerprint(tensor) for name, tensor in found.items()} == walk.fingerprints


@pytest.mark.parametrize("rank", [0, 4])
def test_a_learner_gives_a_tied_head_under_its_own_name(rank):
    size = dict(hidden_size=8, layers=1, heads=1, kv_heads=1, ffn_size=8)
    lm = build(9, **size, max_tokens=8, tie_embeddings=True, seed=0)
    plain = lm.state_dict()
    if rank:
        adapter.add(lm, rank, 8, "all-linear")
    learner = Learner(lm, lr=1e-3, factor=lambda number: 1.0)
    assert "lm_head.weight" in plain and [name for name, _ in learner.weights()] == list(plain)


class Gathered:
    """Weights as ZeRO-3 gathers them: each is made when it is asked for, and lives as long as somebody holds it."""

    def __init__(self, sizes):
        self._sizes, self._live, self.most = sizes, 0, 0

    def __iter__(self):
        return self.walk()

    def walk(self):
        for number, size in enumerate(self._sizes):
            array = np.full(size, number, np.float32)
            self._live += array.nbytes
            self.most = max(self.most, self._live)
            weakref.finalize(array, self._freed, array.nbytes)
            tensor = torch.from_numpy(array)  # its storage holds the array
            del array
            yield f"{number}.weight", tensor
            del tensor

    def _freed(self, size):
        self._live -= size


SIZES, LIMIT = (3, 20, 1, 4, 4, 4, 4, 4, 4, 20, 7, 7, 7, 7), 60


@pytest.mark.parametrize("sharded", [False, True])
def test_a_sync_holds_a_bucket_and_a_tensor_at_most(replicas, sleepy, sharded):
    engine, inner = sleepy(bucket_bytes=LIMIT)
    inner.tensors.clear()
    remote = servers(*replicas, bucket_bytes=LIMIT)
    for receiver in (engine, remote):
        gathered = Gathered(SIZES)
        receiver.load_weights(gathered.walk() if sharded else gathered)
        assert 80 <= gathered.most <= LIMIT + 80
    for tensors in (inner.tensors, *(replica.tensors for replica in replicas)):
        wanted = {f"{number}.weight": [number] * size for number, size in enumerate(SIZES)}
        assert {name: tensor.tolist() for name, tensor in tensors.items()} == wanted


def test_workers_blocks_make_whole_fingerprints_and_copies_that_differ_do_not():
    """Two workers: rows, columns and key heads are split, a norm is in both."""
    rows, columns, norm = drawn(4, 6), drawn(6, 4), drawn(5)

    def worker(rank, norm=norm):
        r, c = slice(2 * rank, 2 * rank + 2), slice(2 * rank, 2 * rank + 2)
        return {
            "rows": [[r.start, 0, block_sum(rows[r], r.start, 0)]],
            "columns": [[0, c.start, block_sum(columns[:, c], 0, c.start)]],
            "packed": [[0, 0, block_sum(rows[:1], 0, 0)], [1, 0, block_sum(rows[1:], 1, 0)]],
            "norm": [[0, 0, fingerprint(norm)]],
        }

    expected = {name: fingerprint(t) for name, t in dict(rows=rows, columns=columns, packed=rows, norm=norm).items()}
    assert weights.whole([worker(0), worker(1)]) == expected
    changed = norm.clone()
    changed.view(torch.int32)[3] ^= 1
    assert weights.whole([worker(0), worker(1, changed)])["norm"] != expected["norm"]
    assert weights.whole([worker(1)])["rows"] != expected["rows"]


def test_what_differs_is_named():
    weights.compare({"a": 1, "b": 2}, {"a": 1, "b": 2}, "here")
    for engine, words in [
        ({"a": 1, "b": 3}, r"^here: .* b is not the trainer's \(1 of 2 tensors\)"),
        ({"a": 1}, r"after the weight sync the trainer has b, the engine does not \(1 of 2 tensors\)"),
        ({"a": 1, "b": 2, "c": 0}, "the engine has c, the trainer does not"),
    ]:
        with pytest.raises(InputError, match=words):
            weights.compare(engine, {"a": 1, "b": 2}, "here")


LM = SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))


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
    for logp in (float("nan"), -9999.0):  # the second is what a server makes of the first
        with pytest.raises(DivergedError, match="logits are not finite"):
            generation(request(), [1, 2], [-0.5, logp], True)


def test_without_vllm_the_refusal_names_the_remedy(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"vllm is not installed here; .*requirements/vllm-cpu.txt.*engine=torch"):
        vllm.make_engine(config.load(None, ["rollout.engine=vllm"]), LM, str)


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_engines_dtype_is_the_trainers_unless_set(dtype, expected):
    settings = config.load(None, ["rollout.engine=vllm", "rollout.server=[http://h:1]", f"rollout.dtype={dtype}"])
    assert vllm.make_engine(settings, LM, str)._dtype == expected


def test_each_rank_has_its_share_of_the_replicas():
    settings = config.load(None, ["rollout.engine=vllm", "rollout.server=[http://a:1,http://b:1,http://c:1]"])
    engines = [vllm.make_engine(settings, LM, str, rank) for rank in of(2)]
    shares = [[replica.url for replica in engine._replicas] for engine in engines]
    assert shares == [["http://a:1", "http://c:1"], ["http://b:1"]]
    settings_2 = config.load(None, ["rollout.engine=vllm", "rollout.tensor_parallel=2"])
    with pytest.raises(InputError, match=r"of 2 ranks each has one GPU .* replicas with --tensor-parallel-size=2 and"):
        vllm.make_engine(settings_2, LM, str, of(2)[0])
    with pytest.raises(InputError, match=r"rollout.server: each of 4 ranks needs a replica .* there are 3; start more"):
        vllm.make_engine(settings, LM, str, of(4)[1])


def of(size):
    """The ranks of a run of ``size`` processes, as far as shares go."""
    ranks = [Ranks() for _ in range(size)]
    for number, rank in enumerate(ranks):
        rank.number, rank.size = number, size
    return ranks


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
        (["rollout.server=[http://h:1]"], "rollout.server needs rollout.engine=vllm"),
        (["rollout.engine=vllm", "rollout.server=[h:1]"], "'h:1' is not a URL"),
        (["rollout.tensor_parallel=2"], "for a vLLM without rollout.server; .*replicas with --tensor-parallel-size"),
        (["rollout.engine=vllm", "rollout.transfer=http"], "rollout.transfer is for the replicas of rollout.server"),
        (["rollout.dtype=bfloat16"], "rollout.dtype needs rollout.engine=vllm"),
        (["rollout.engine=vllm", "rollout.top_p=0.9"], r"unknown key rollout\.top_p; did you mean eval\.top_p\?"),
    ],
)
def test_refused_settings(overrides, words):
    with pytest.raises(InputError, match=words):
        config.load(None, overrides)


def test_a_server_is_told_what_the_trainer_needs():
    command = arguments("DIR", ["--port=1", "--dtype=bfloat16"], dtype="float32", on_cpu=True)
    assert "--model=DIR" in command and "--logprobs-mode=processed_logprobs" in command
    assert "--generation-config=vllm" in command and command[-1] == "--dtype=bfloat16"
    whole = "--no-enable-chunked-prefill"
    assert whole in command and whole not in arguments("DIR", [], dtype="float32", on_cpu=False)
    assert "--enable-prefix-caching" in command and '--weight-transfer-config={"backend": "igpo"}' in command
    *_, inner, outer = [option for option in command if option.startswith("--middleware=")]
    assert inner.endswith("WeightsInFile") and outer.endswith("Guard"), "the last is asked first"


def test_the_recipes_command_starts_a_replica_that_fits():
    root = Path(__file__).parents[1]
    command = r"serve (\S+) --port \d+ --dtype=(\w+) --max-model-len=(\d+)\n.*--config (\S+) 'rollout.server="
    ((model, dtype, longest, file),) = re.findall(command, (root / "docs/recipes.md").read_text())
    recipe = config.load(root / file)
    assert recipe.rollout.dtype == "auto"
    assert (recipe.model.path, recipe.train.precision, recipe.rollout.max_tokens) == (model, dtype, int(longest))


def test_a_servers_bucket_is_a_file_while_it_is_loaded():
    """``WeightsInFile`` between a client that sends b"weights" in two parts and vLLM's route, which takes JSON."""
    seen = []

    async def route(scope, receive, send):
        message = await receive()
        file = Path(json.loads(message["body"])["update_info"]["file"])
        seen.append((dict(scope["headers"]), len(message["body"]), message["more_body"], file, file.read_bytes()))

    parts = iter([(b"wei", True), (b"ghts", False)])

    async def receive():
        body, more = next(parts)
        return {"type": "http.request", "body": body, "more_body": more}

    headers = [(b"content-type", b"application/octet-stream"), (b"content-length", b"7"), (b"authorization", b"x")]
    scope = {"type": "http", "path": "/update_weights", "headers": headers}
    asyncio.run(WeightsInFile(route)(scope, receive, None))
    ((headers, length, more, file, content),) = seen
    expected = {b"content-type": b"application/json", b"content-length": b"%d" % length, b"authorization": b"x"}
    assert (headers, more, content) == (expected, False, b"weights") and not file.exists()
    other = scope | {"path": "/health"}

    async def passed(scope, receive_, send):
        assert scope is other and receive_ is receive

    asyncio.run(WeightsInFile(passed)(other, receive, None))


def answer(middleware, path, body=b"", type="http", **headers):
    """The status that ``middleware`` around an application that reads and answers 200 gives, and what it read."""
    told, read, parts = [], [], iter([(body[:3], True), (body[3:], False)])

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            read.append(message["body"])
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive():
        part, more = next(parts)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message):
        told.append(message)

    pairs = [(name.replace("_", "-").encode(), str(value).encode()) for name, value in headers.items()]
    asyncio.run(middleware(app)({"type": type, "path": path, "headers": pairs}, receive, send))
    return told[0].get("status", told[0]["type"]), b"".join(read)


ABOUT = b'{"method": "igpo_about"}'


@pytest.mark.parametrize("key", ["", "secret"])
def test_a_replica_answers_what_a_trainer_asks_and_nothing_else(monkeypatch, key):
    monkeypatch.setenv("IGPO_REPLICA_KEY", key)
    ours = {"authorization": f"Bearer {key}"} if key else {}
    assert answer(Guard, "/collective_rpc", ABOUT, **ours) == (200, ABOUT)
    assert answer(Guard, "/pause", b"{}", **ours) == (200, b"{}")
    assert answer(Guard, "/health") == (200, b"")
    for body in (
        b'{"method": "save_sharded_state", "kwargs": {"path": "/tmp/x"}}', b'{"method": "igpo_about", "args": [1]}',
        b'{"method": ["igpo_about"]}', b"[" * 60_000, b"[]", b"", ABOUT + b" " * 70_000,
    ):  # fmt: skip
        assert answer(Guard, "/collective_rpc", body, **ours) == (403, b"")
    for path in ("/v1/load_lora_adapter", "/sleep", "/update_weight_version", "/", "/collective_rpc/"):
        assert answer(Guard, path, **ours) == (404, b"")
    assert answer(Guard, "/v1/realtime", type="websocket", **ours)[0] == "websocket.close"


@pytest.mark.parametrize("given", [{}, {"authorization": "secret"}, {"authorization": "Bearer secre"}])
def test_without_its_key_a_replica_answers_only_that_it_is_well(monkeypatch, given):
    monkeypatch.setenv("IGPO_REPLICA_KEY", "secret")
    for path in (*serve.ROUTES, "/nowhere"):
        assert answer(Guard, path, ABOUT, **given) == (401, b"")
    assert answer(Guard, "/health", **given)[0] == 200


def test_only_weights_of_a_stated_size_are_stored(monkeypatch, tmp_path):
    monkeypatch.setenv("IGPO_WEIGHTS_FOLDER", str(tmp_path))
    monkeypatch.setattr(serve, "LARGEST_BUCKET", 10)
    stored = []

    def file(**options):
        stored.append(options)
        raise AssertionError("a file was opened")

    octets = {"content_type": "application/octet-stream"}
    with monkeypatch.context() as patch:
        patch.setattr(serve.tempfile, "NamedTemporaryFile", file)
        for path in ("/health", "/nowhere", "/pause"):
            assert answer(WeightsInFile, path, b"weights", content_length=7, **octets) == (200, b"weights")
        assert answer(WeightsInFile, "/update_weights", b"weights", **octets) == (411, b"")
        assert answer(WeightsInFile, "/update_weights", b"weights", content_length=11, **octets) == (413, b"")
        shapes = b'{"update_info": {"shapes": [["a.weight", [2, 3]]]}}'
        json_, both = {"content_type": "application/json"}, b'{"update_info": {"shapes": [], "file": "/etc/passwd"}}'
        assert answer(WeightsInFile, "/update_weights", shapes, **json_) == (200, shapes)
        for other in (
            b'{"update_info": {"file": "/etc/passwd"}}',
            both,
            b"[]",
            b'{"update_info": []}',
            b"x" * (2 << 20),
        ):
            assert answer(WeightsInFile, "/update_weights", other, **json_) == (415, b"")
    assert answer(WeightsInFile, "/update_weights", b"weights", content_length=6, **octets) == (413, b"")
    status, told = answer(WeightsInFile, "/update_weights", b"weights", content_length=7, **octets)
    assert status == 200 and json.loads(told)["update_info"]["file"].startswith(f"{tmp_path}/bucket-")
    assert not stored and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "key", "expected"),
    [
        ([], "", "127.0.0.1"),
        (["--host=localhost"], "", "localhost"),
        (["--host", "::1"], "", "::1"),
        (["--host=0.0.0.0"], "k", "0.0.0.0"),
        (["--host=10.1.2.3", "--api-key=k"], "", "10.1.2.3"),
        (["--hos=0.0.0.0", "--api_key", "k"], "", "0.0.0.0"),
    ],
)
def test_a_replica_listens_on_this_machine_unless_it_has_a_key(more, key, expected):
    environment = {"IGPO_REPLICA_KEY": key}
    rest = serve._take_key([*more, "--port=1"], environment)
    assert rest == [f"--host={expected}", "--port=1"], "the key is in no list of processes"
    assert environment["IGPO_REPLICA_KEY"] == ("k" if "k" in (key, *more) or "--api-key=k" in more else "")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "host", ""])
def test_without_a_key_other_machines_are_kept_out(host):
    with pytest.raises(SystemExit, match=r"anyone who reaches a replica can set its weights; set IGPO_REPLICA_KEY"):
        serve._take_key(["--host", host], {})


# --- replicas ---


PAIRS = [("model.embed_tokens.weight", drawn(4, 3)), ("model.norm.weight", drawn(3))]
PAIRS += [("lm_head.weight", PAIRS[0][1])]


@pytest.fixture
def replicas():
    made = [Replica(), Replica()]
    yield made
    for replica in made:
        replica.dead or replica.kill()


def servers(*replicas, timeout=20.0, **options):
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
            "igpo_about", "pause", "start_weight_update", "update_weights", "finish_weight_update",
            "reset_prefix_cache", "igpo_fingerprints", "resume",
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
    assert engine.counts()["engine/replicas_recovered"] == back[0].log.count("start_weight_update") == 1
    assert back[0].version == replicas[0].version
    back[0].kill()


def test_weights_that_are_walked_over_once_reach_a_replica_that_comes_back_at_the_next_sync(replicas):
    """Ranks under ZeRO-3 gather each weight together, so one of them cannot send it again in the middle of a batch."""
    engine = servers(*replicas, timeout=5.0)
    engine.load_weights(iter(PAIRS))
    replicas[1].dies_at = 5
    sample(engine)
    back = Replica(replicas[1].port)
    sample(engine, count=4, turns=1)
    assert not back.log
    engine.load_weights(iter(PAIRS))
    sample(engine)
    assert back.generations == 24
    back.version = replicas[0].version = "default"
    with pytest.raises(EngineError, match=r"no replica answers .*lost its weights, which .*only send at a sync"):
        sample(engine)
    back.kill()


def test_a_replica_that_only_stuttered_goes_on_with_weights_that_are_walked_over_once(replicas):
    engine = servers(replicas[0], timeout=5.0)
    engine.load_weights(iter(PAIRS))
    engine._lose(engine._replicas[0])
    sample(engine, count=2)
    assert engine.counts()["engine/replicas_recovered"] == replicas[0].log.count("start_weight_update") == 1


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
        engine.load_weights([PAIRS[0], ("model.norm.weight", PAIRS[1][1] * (1 + 1e-6)), PAIRS[2]])


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "dtype",
            "bfloat16",
            "its dtype is bfloat16 and must be float32; start it with --dtype=float32, or set rollout.dtype=bfloat16$",
        ),
        ("logprobs_mode", "raw_logprobs", "raw_logprobs and .*; start it with --logprobs-mode=processed_logprobs$"),
        ("transfer", None, "this server has no igpo weight transfer; start replicas with: python -m igpo_fast"),
        ("max_tokens", 63, "--max-model-len is 63, less than rollout.max_tokens=64; start it with --max-model-len=64$"),
        (
            "unreadable",
            "RoutedExperts",
            "cannot be compared .* fingerprint of RoutedExperts layers is not written yet; use rollout.engine=torch",
        ),
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


def test_trainer_and_replica_share_a_key(replicas):
    replicas[0].key = "secret"
    engine = servers(*replicas, key="secret")
    engine.load_weights(PAIRS)
    sample(engine)
    for wrong in ("", "other"):
        with pytest.raises(InputError, match=r"refused without its key; set IGPO_REPLICA_KEY to the key it was"):
            servers(*replicas, key=wrong).load_weights(PAIRS)
    with pytest.raises(InputError, match="printable ASCII"):
        servers(*replicas, key="schlüssel\n")


def test_a_runs_key_is_the_environments(monkeypatch):
    monkeypatch.setenv("IGPO_REPLICA_KEY", "secret")
    settings = config.load(None, ["rollout.engine=vllm", "rollout.server=[http://h:1]"])
    engine = vllm.make_engine(settings, LM, str)
    assert engine._headers == {"Authorization": "Bearer secret"}


def test_a_proxy_does_not_stand_before_replicas_on_this_machine(replicas, monkeypatch):
    for name in ("HTTP_PROXY", "ALL_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    sample(engine)


@pytest.mark.parametrize("url", ["http://[::", "http://h:99999", "http://h:x", "h:1", "http://a..b", "ftp://h"])
def test_a_url_that_cannot_be_asked_is_told_at_once(url):
    with pytest.raises(InputError, match=r"^rollout\.server=.*; give URLs like http://127\.0\.0\.1:8000$"):
        VllmServers([url], decode=str, dtype=torch.float32, max_tokens=8)


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


@pytest.mark.parametrize("before_abort", [0, 2])
def test_a_torn_connection_costs_one_request(replicas, before_abort):
    """Four more are in flight on the only replica: it is not lost, they are not aborted."""
    engine = servers(replicas[0])
    engine.load_weights(PAIRS)
    replicas[0].torn_at, replicas[0].together, replicas[0].before_abort = 1, 6, before_abort
    sample(engine, count=5, turns=1)
    counts = {name: count for name, count in engine.counts().items() if count}
    assert counts == {"engine/requests_repeated": 1}
    assert replicas[0].generations == 6 and replicas[0].log.count("pause") == 1


@pytest.mark.parametrize("before_abort", [0, 2])
def test_aborted_requests_are_made_again(replicas, before_abort):
    """Another session takes the replica while five are in flight; the first that ends finds it so."""
    engine, other = servers(replicas[0]), servers(replicas[0])
    engine.load_weights(PAIRS)
    replicas[0].together, replicas[0].before_abort = 6, before_abort

    async def taken():
        rollouts = [asyncio.create_task(engine.generate(request((0, 0, 0, k)))) for k in range(5)]
        while replicas[0].generations < 5:
            await asyncio.sleep(0.001)
        replicas[0].together = 0
        await asyncio.to_thread(other.load_weights, PAIRS)
        return await asyncio.gather(*rollouts)

    found = asyncio.run(taken())
    assert [g.ids.tolist() for g in found] == [tokens_of(seed_of(request((0, 0, 0, k)))) for k in range(5)]
    counts = engine.counts()
    assert counts["engine/aborted_answers"] == 5 and counts["engine/replicas_lost"] >= 1
    assert counts["engine/requests_repeated"] == sum(counts[f"engine/{why}_answers"] for why in ("aborted", "stale"))


def test_a_replica_that_only_seemed_lost_is_not_given_weights_again(replicas):
    engine = servers(replicas[0])
    engine.load_weights(PAIRS)
    replicas[0].torn_at = 1
    replicas[0].answers["weight_info"] = (503, {})

    async def asked():
        turn = asyncio.create_task(engine.generate(request()))
        while engine._replicas[0].up:
            await asyncio.sleep(0)
        del replicas[0].answers["weight_info"]
        return await turn

    asyncio.run(asked())
    counts = engine.counts()
    assert counts["engine/replicas_lost"] == counts["engine/replicas_recovered"] == 1
    assert replicas[0].log.count("pause") == replicas[0].log.count("update_weights") == 1


WHOLE = {
    "token_ids": [1, 2], "logprobs": {"content": [{"logprob": -1.0}] * 2}, "finish_reason": "stop", "stop_reason": 9,
    "weight_versions": [{"version": "default", "start": 0, "end": 2}],
}  # fmt: skip


@pytest.mark.parametrize(
    "broken",
    [
        b"<html>", [], {}, {"choices": []},
        {"weight_versions": None}, {"weight_versions": []},
        {"weight_versions": [{"version": "default", "start": 0, "end": 1}]},
        {"token_ids": [], "logprobs": {"content": []}, "weight_versions": []},
        {"logprobs": None}, {"logprobs": {"content": [{"logprob": -1.0}]}}, {"finish_reason": None},
    ],
)  # fmt: skip
def test_an_answer_that_is_not_understood_is_none(replicas, broken):
    """One replica answers so, the other as it should."""
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    if isinstance(broken, dict) and broken.keys() & WHOLE.keys():
        broken = {"choices": [WHOLE | broken]}
    replicas[0].answers["inference/v1/generate"] = (200, broken)
    sample(engine, count=2)
    counts = {name: count for name, count in engine.counts().items() if count}
    assert counts == {"engine/broken_answers": 1, "engine/requests_repeated": 1}


def test_a_replica_whose_logits_are_not_finite_stops_the_run(replicas):
    engine = servers(replicas[0])
    engine.load_weights(PAIRS)
    ours = {"weight_versions": [{"version": replicas[0].version, "start": 0, "end": 2}]}
    nan = {"logprobs": {"content": [{"logprob": -1.0}, {"logprob": -9999.0}]}}
    replicas[0].answers["inference/v1/generate"] = (200, {"choices": [WHOLE | ours | nan]})
    with pytest.raises(DivergedError, match="logits are not finite"):
        sample(engine, count=1)


@pytest.mark.parametrize("broken", [b"<html>", {}, {"results": []}, {"results": ["no"]}])
@pytest.mark.parametrize("route", ["igpo_about", "igpo_fingerprints"])
def test_a_server_that_is_none_is_lost_at_the_sync(replicas, route, broken):
    replicas[0].answers[route] = (200, broken)
    with pytest.raises(EngineError, match="no replica answers"):
        servers(replicas[0], timeout=0.05).load_weights(PAIRS)
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    sample(engine)
    assert replicas[1].generations == 48


def test_a_cache_that_is_kept_is_a_fault(replicas):
    replicas[0].answers["reset_prefix_cache"] = (200, {"success": False})
    with pytest.raises(EngineError, match="prefix cache cannot be dropped"):
        servers(replicas[0], timeout=0.05).load_weights(PAIRS)


def test_weights_are_broadcast_over_one_link_per_replica(replicas):
    engine = servers(*replicas, backend="gloo", bucket_bytes=24)
    assert engine.name == "vllm (2 servers, weights by gloo broadcast)"
    for scale in (1, 2):
        pairs = [(name, tensor * scale) for name, tensor in PAIRS]
        engine.load_weights(pairs)
        for replica in replicas:
            assert replica.log.count("init_weight_transfer_engine") == 1
            assert all(torch.equal(replica.tensors[name], tensor) for name, tensor in pairs)
    sample(engine)
    assert not any(engine.counts().values())


def test_a_replica_that_dies_in_the_middle_of_a_broadcast_is_lost_and_comes_back(replicas):
    """The timeout is longer than the suite lasts: its closed connections are what tells."""
    engine = servers(*replicas, backend="gloo", bucket_bytes=24, timeout=9999)
    engine.load_weights(PAIRS)
    replicas[1].dies_at_bucket = 5  # of 3 per sync
    engine.load_weights([(name, tensor + 1) for name, tensor in PAIRS])
    assert engine.counts()["engine/replicas_lost"] == 1
    sample(engine)
    assert replicas[0].generations == 48
    back = Replica(replicas[1].port)
    engine.load_weights(PAIRS)
    assert engine.counts()["engine/replicas_recovered"] == 1
    assert [replica.log.count("init_weight_transfer_engine") for replica in (replicas[0], back)] == [1, 1]
    sample(engine)
    assert back.generations == 24
    back.kill()


def test_a_replica_that_was_started_again_gets_a_new_link(replicas):
    engine = servers(replicas[0], backend="gloo")
    engine.load_weights(PAIRS)
    replicas[0].link, replicas[0]._group = "", None  # as in a new process
    engine.load_weights(PAIRS)
    assert replicas[0].log.count("init_weight_transfer_engine") == 2


def test_a_replica_that_does_not_come_to_the_broadcast_is_lost_and_then_gets_a_new_link(replicas):
    replicas[0].answers["update_weights"] = (200, {})
    engine = servers(replicas[0], backend="gloo", timeout=2)
    with pytest.raises(EngineError, match=r"no replica answers .*broadcast of its weights failed"):
        engine.load_weights([("a", torch.zeros(10_000_000))])
    del replicas[0].answers["update_weights"]
    engine.load_weights(PAIRS)
    assert replicas[0].log.count("init_weight_transfer_engine") >= 2


@pytest.mark.parametrize(
    ("transfer", "device", "how"),
    [("auto", "cpu", "over HTTP"), ("broadcast", "cpu", "by gloo broadcast"), ("http", "cuda", "over HTTP"),
     ("auto", "cuda", "by nccl broadcast")],
)  # fmt: skip
def test_weights_are_broadcast_where_the_trainer_is_on_a_gpu(transfer, device, how):
    options = ["rollout.engine=vllm", "rollout.server=[http://h:1]", f"rollout.transfer={transfer}"]
    lm = SimpleNamespace(dtype=torch.float32, device=torch.device(device))
    assert vllm.make_engine(config.load(None, options), lm, str).name == f"vllm (1 server, weights {how})"


def test_buckets_are_encoded_once_and_rounded_to_the_engines_dtype(replicas, monkeypatch):
    encoded = []
    real = weights.encode
    monkeypatch.setattr(weights, "encode", lambda bucket: encoded.append(len(bucket)) or real(bucket))
    for replica in replicas:
        replica.about["dtype"] = "bfloat16"
    servers(*replicas, dtype=torch.bfloat16, bucket_bytes=24).load_weights(PAIRS)
    assert encoded == [1, 1, 1]  # 24, 6 and 24 bytes
    for replica in replicas:
        assert replica.log.count("update_weights") == 3
        assert torch.equal(replica.tensors["model.norm.weight"], PAIRS[1][1].bfloat16())


def test_connections_end_with_their_event_loop(replicas):
    engine = servers(*replicas)
    engine.load_weights(PAIRS)
    clients = []
    for _ in range(2):
        sample(engine, count=2, turns=1)
        clients.append(engine._http)
    assert clients[0] is not clients[1] and all(client.is_closed for client in clients)


# --- in this process: what a CPU cannot do ---


class SleepyEngine:
    """vLLM's engine as far as sleep and weights go: records what it is told, and takes over what it is sent."""

    def __init__(self):
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_sleep_mode=True))
        self.log, self.tensors, self.resets = [], {}, True

    def sleep(self, level):
        self.log.append(f"sleep {level}")
        self.tensors = {}  # discarded

    def wake_up(self, tags):
        self.log.append(f"wake {' '.join(tags)}")

    def reset_prefix_cache(self):
        self.log.append("reset")
        return self.resets

    def collective_rpc(self, method, kwargs=None):
        self.log.append(method)
        if method == "update_weights":
            self.tensors |= {name: tensor.clone() for name, tensor in kwargs["update_info"]["tensors"]}
        return [{name: [(0, 0, fingerprint(tensor))] for name, tensor in self.tensors.items()}]


@pytest.fixture
def sleepy(monkeypatch):
    """A ``VllmEngine`` that has been given weights, and its ``SleepyEngine``."""

    def make(**options):
        inner = SleepyEngine()
        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0"))
        monkeypatch.setattr(colocated, "check_version", lambda: None)
        monkeypatch.setattr(colocated, "_live", inner)
        engine = colocated.VllmEngine(SimpleNamespace(dtype=torch.float32), decode=str, **options)
        engine._llm = inner
        engine.load_weights(PAIRS)
        inner.log.clear()
        return engine, inner

    return make


UPDATES = ["start_weight_update", "update_weights", "finish_weight_update"]


def test_a_sleeping_engine_wakes_for_weights_before_its_cache(sleepy):
    engine, inner = sleepy()
    engine.sleep()
    engine.sleep()  # once is enough
    with pytest.raises(RuntimeError, match="call load_weights first"):
        asyncio.run(engine.generate(request()))
    engine.load_weights(PAIRS)
    asleep = ["sleep 2", "wake weights"]
    assert inner.log == [*asleep, *UPDATES, "wake kv_cache", "reset", "igpo_fingerprints"]
    engine.load_weights(PAIRS)  # awake
    assert inner.log[len(asleep) + len(UPDATES) + 3 :] == [*UPDATES, "reset", "igpo_fingerprints"]
    assert engine.version == 3


def test_an_engine_that_wakes_with_other_weights_stops_the_run(sleepy):
    engine, inner = sleepy()
    engine.sleep()
    with pytest.raises(InputError, match=r"the trainer has model.norm.weight, the engine does not"):
        inner.collective_rpc = forgetful(inner)
        engine.load_weights(PAIRS)


def forgetful(inner):
    """Its collective_rpc, that loses one of the tensors."""
    real = inner.collective_rpc

    def call(method, kwargs=None):
        found = real(method, kwargs)
        inner.tensors.pop("model.norm.weight", None)
        return found

    return call


def test_what_vllm_itself_raises_ends_the_run_in_a_line(sleepy, monkeypatch):
    def step():
        raise RuntimeError("Unsupported CPU attention\nconfiguration: head_dim=16")

    engine, inner = sleepy()
    inner.step, inner.abort_request = step, lambda names: None
    monkeypatch.setattr(engine, "_add", lambda name, request: None)
    with pytest.raises(EngineError, match=r"vLLM failed \(Unsupported CPU attention configuration: head_dim=16\); see"):
        asyncio.run(engine.generate(request()))


def test_a_prefix_cache_of_old_weights_is_refused(sleepy):
    engine, inner = sleepy()
    inner.resets = False
    with pytest.raises(RuntimeError, match="did not drop the prefix cache"):
        engine.load_weights(PAIRS)
