"""The embedded engine against plain transformers forwards: eager attention, one sequence a forward."""

import asyncio
from copy import deepcopy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from igpo_fast.engines import noise
from igpo_fast.engines import torch as engine_torch
from igpo_fast.engines.base import Request, Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import DivergedError
from igpo_fast.model import use_attend

V = 32
SMALL = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15, bos_token_id=None,
    eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def make(name: str = "qwen2"):
    torch.manual_seed(0)
    if name == "qwen2":
        lm = Qwen2ForCausalLM(Qwen2Config(**SMALL))
    elif name == "mistral":
        lm = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5))
    else:
        lm = Gemma2ForCausalLM(
            Gemma2Config(
                **SMALL, head_dim=8, query_pre_attn_scalar=8, sliding_window=5, attn_logit_softcapping=2.0,
                final_logit_softcapping=3.0,
            )
        )  # fmt: skip
    return use_attend(lm.eval())


@pytest.fixture(scope="module")
def lm():
    return make()


def text(ids) -> str:
    return "".join(chr(ord("a") + i) if i < 26 else "<>/ \ufffd."[i - 26] for i in ids)


def request(key, ids, max_tokens=6, *, stop_ids=(), stop_strings=(), **sampling):
    stops = tuple(stop_ids), tuple(stop_strings)
    return Request((0, 0, 0, key), np.asarray(ids, np.int32), max_tokens, *stops, Sampling(**sampling))


def run(*coroutines):
    async def together():
        return await asyncio.gather(*coroutines)

    return asyncio.run(together())


def one(engine, *args, **kwargs):
    return run(engine.generate(request(*args, **kwargs)))[0]


def prompts(count, seed=0, low=3, high=20):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, V, rng.integers(low, high)).astype(np.int32) for _ in range(count)]


def plain_logp(lm, ids, temperature=1.0):
    """log pi of every next token: [L, V], by a plain forward of a copy of the model."""
    plain = deepcopy(lm)
    plain.set_attn_implementation("eager")
    with torch.no_grad():
        logits = plain(input_ids=torch.as_tensor(np.asarray(ids))[None].long(), use_cache=False).logits[0]
    return (logits / temperature).log_softmax(-1).numpy()


async def rollout(engine, key, prompt, turns, max_tokens=6, pause=None, **sampling):
    """Turns with made-up responses of ragged lengths: (all ids, [(begin, generation), ...])."""
    rng = np.random.default_rng(key)
    ids, out = prompt, []
    for turn in range(turns):
        generation = await engine.generate(request(key, ids, max_tokens, **sampling))
        out.append((len(ids), generation))
        response = rng.integers(0, V, rng.integers(0, 9)) if turn + 1 < turns else ()
        ids = np.concatenate([ids, generation.ids, response]).astype(np.int32)
        if pause is not None:
            await asyncio.sleep(pause)
    engine.release((0, 0, 0, key))
    return ids, out


@pytest.mark.parametrize("name", ["qwen2", "mistral", "gemma2"])
def test_logp_of_multi_turn_rollouts_equals_plain_forwards(name):
    lm = make(name)
    engine = TorchEngine(lm, max_slots=8, max_tokens=96)
    # Turns of many lengths: prompts, responses and sampling meet in a step.
    results = run(*(rollout(engine, k, p, 3, 2 + k % 5, temperature=0.7) for k, p in enumerate(prompts(16))))
    for ids, turns in results:
        logp = plain_logp(lm, ids, 0.7)
        for begin, generation in turns:
            at = np.arange(begin, begin + len(generation.ids))
            assert (ids[at] == generation.ids).all()
            np.testing.assert_allclose(generation.logp, logp[at - 1, ids[at]], atol=1e-5)


def test_blocks_split_by_the_mask_budget_give_the_same(lm, monkeypatch):
    whole = run(*(rollout(e, k, p, 2) for e in [TorchEngine(lm)] for k, p in enumerate(prompts(9))))
    monkeypatch.setattr(engine_torch, "MASK_ELEMENTS", 40)
    split = run(*(rollout(e, k, p, 2) for e in [TorchEngine(lm)] for k, p in enumerate(prompts(9))))
    assert all((a[0] == b[0]).all() for a, b in zip(whole, split, strict=True))


def test_greedy_is_the_argmax_of_plain_forwards_at_temperature_1(lm):
    prompt = prompts(1)[0]
    generation = one(TorchEngine(lm), 1, prompt, 8, temperature=0)
    ids = list(prompt)
    for token, logp in zip(generation.ids, generation.logp, strict=True):
        plain = plain_logp(lm, ids)[-1]
        assert token == plain.argmax()
        assert logp == pytest.approx(plain.max(), abs=1e-5)
        ids.append(token)


def test_every_token_is_fed_once(lm):
    engine = TorchEngine(lm)
    results = run(*(rollout(engine, k, p, 4, pause=0) for k, p in enumerate(prompts(5))))
    # All but the last token of each rollout, which nothing follows; a turn's last is fed with the next turn.
    decoded = sum(len(g.ids) - 1 for _, turns in results for _, g in turns)
    total = sum(len(ids) - 1 for ids, _ in results)
    assert (engine.stats.tokens_decoded, engine.stats.tokens_prefilled) == (decoded, total - decoded)
    assert engine.stats.forwards == 4 * 6  # five rollouts in step: none ever waits for another


def test_draws_do_not_depend_on_company_or_order(lm):
    crowd = prompts(7)
    alone = [run(rollout(TorchEngine(lm), k, p, 2))[0][0] for k, p in enumerate(crowd)]
    engine = TorchEngine(lm, max_slots=3)
    order = [4, 2, 6, 0, 1, 5, 3]
    together = run(*(rollout(engine, k, crowd[k], 2) for k in order))
    assert all((ids == alone[k]).all() for k, (ids, _) in zip(order, together, strict=True))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    again = one(TorchEngine(lm), 3, crowd[3])
    torch.set_rng_state(state)
    assert (again.ids == alone[3][len(crowd[3]) :][:6]).all()
    assert (one(TorchEngine(lm), 99, crowd[3], 12).ids != one(TorchEngine(lm), 3, crowd[3], 12).ids).any()


def test_noise_is_indexed_by_the_token_in_the_rollout(lm):
    prompt = prompts(1)[0]
    engine, ids = TorchEngine(lm), prompt
    for _ in range(8):
        ids = np.concatenate([ids, one(engine, 1, ids, 1).ids])
    assert (one(TorchEngine(lm), 1, prompt, 8).ids == ids[len(prompt) :]).all()


def test_noise_is_uniform_and_its_streams_unrelated():
    streams = np.array([noise.stream((7, 0, 0, k)) for k in range(200)])
    u = np.array([noise.uniform(streams, np.full(200, i)) for i in range(300)])
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 100, (0, 1))[0]
    assert ((counts - 600) ** 2 / 600).sum() < 99 + 4 * np.sqrt(2 * 99)
    correlation = np.corrcoef(u.T) - np.eye(200)
    assert np.abs(correlation).max() < 6 / np.sqrt(300)
    keys = [(0, 0), (0, 1), (1, 0), (-1, 0), (0,), (0, 0, 0)]
    assert len({int(noise.stream(key)) for key in keys}) == len(keys)


def test_draw_inverts_the_distribution_function():
    logits = torch.log(torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0]))
    u = [0.0, 0.2499, 0.2501, 0.7499, 0.7501, 1 - 2.0**-53]
    n = len(u)
    token, logp = noise.draw(logits.expand(n, -1), torch.ones(n), torch.tensor(u, dtype=torch.float64))
    assert token.tolist() == [1, 1, 3, 3, 4, 4]
    assert logp.exp().tolist() == pytest.approx([0.25, 0.25, 0.5, 0.5, 0.25, 0.25])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 300), st.sampled_from([0.0, 1 - 2.0**-53]))
def test_draw_never_picks_the_impossible(seed, size, u):
    generator = torch.Generator().manual_seed(seed)
    logits = 40 * torch.randn(1, size, generator=generator)
    impossible = torch.rand(1, size, generator=generator) < 0.5
    impossible[0, seed % size] = False
    logits[impossible] = -torch.inf
    token, logp = noise.draw(logits, torch.ones(1), torch.tensor([u], dtype=torch.float64))
    assert not impossible[0, token]
    assert torch.isfinite(logp)


def test_restrict_by_hand():
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    none = torch.tensor([], dtype=torch.long)

    def kept(**sampling):
        return torch.isfinite(noise.restrict(logits, Sampling(**sampling), none)).tolist()

    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.65) == [True, True, False, False]
    assert kept(top_p=0.75) == [True, True, True, False]
    assert kept(top_p=0.0) == [True, False, False, False]
    penalised = noise.restrict(
        torch.tensor([2.0, -2.0, 2.0]), Sampling(repetition_penalty=2.0), torch.tensor([0, 1, 1])
    )
    assert penalised.tolist() == [1.0, -4.0, 2.0]


def test_restricted_sampling_in_the_engine(lm):
    prompt = prompts(1)[0]
    greedy = one(TorchEngine(lm), 1, prompt, temperature=0)
    first = one(TorchEngine(lm), 2, prompt, top_k=1)
    assert (first.ids == greedy.ids).all()
    assert first.logp.tolist() == [0.0] * 6
    fresh = one(TorchEngine(lm), 3, prompt, 10, temperature=0, repetition_penalty=1e6)
    assert len({*fresh.ids.tolist(), *prompt.tolist()}) == 10 + len(set(prompt.tolist()))


@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_half_precision_heads_give_logits_in_float32(name):
    """As linear_logprob does in training: nothing but the states and weights themselves is rounded to bfloat16."""
    lm = make(name).to(torch.bfloat16)
    hidden = torch.randn(5, SMALL["hidden_size"], generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = TorchEngine(lm)._logits(hidden)
    exact = hidden.double() @ lm.lm_head.weight.double().T
    exact = 3 * torch.tanh(exact / 3) if name == "gemma2" else exact
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=2e-6)


def test_a_half_precision_engine_sees_updates_of_its_head():
    lm, prompt = make().to(torch.bfloat16), prompts(1)[0]
    engine = TorchEngine(lm)
    one(engine, 1, prompt)
    with torch.no_grad():
        lm.lm_head.weight.mul_(3)
    engine.load_weights()
    updated, fresh = one(engine, 2, prompt), one(TorchEngine(lm), 2, prompt)
    assert updated.ids.tolist() == fresh.ids.tolist() and updated.logp.tolist() == fresh.logp.tolist()


def test_stop_ids_end_the_turn_and_are_kept(lm):
    prompt = prompts(1)[0]
    free = one(TorchEngine(lm), 1, prompt, 8)
    assert not free.finished
    stop = free.ids[3]
    at = free.ids.tolist().index(stop)
    stopped = one(TorchEngine(lm), 1, prompt, 8, stop_ids=[stop, 10**6])
    assert stopped.finished
    assert stopped.ids.tolist() == free.ids[: at + 1].tolist()
    np.testing.assert_allclose(stopped.logp, free.logp[: at + 1], atol=1e-6)


def test_stop_strings_end_the_turn_where_the_text_completes_one(lm):
    prompt = prompts(1)[0]
    free = one(TorchEngine(lm), 1, prompt, 40)
    for width in (1, 2, 3):
        for begin in range(0, 40 - width, 7):
            string = text(free.ids[begin : begin + width])
            end = text(free.ids).index(string) + width
            stopped = one(TorchEngine(lm, decode=text), 1, prompt, 40, stop_strings=["\n", string])
            assert stopped.finished
            assert stopped.ids.tolist() == free.ids[:end].tolist()
    # Text of the prompt does not count.
    across = text(prompt) + text(free.ids[:1])
    assert not one(TorchEngine(lm, decode=text), 1, prompt, 40, stop_strings=[across]).finished


@pytest.mark.parametrize(
    ("pieces", "string", "expected"),
    [
        ([b"\xe2\x96", b"\x81", b"x"], "\u2581", [2, 2, 0, 1]),
        ([b"a<", b"/s>", b"b"], "</s>", [2, 2, 0, 1]),
        ([b"<", b"/", b"s>y"], "</s>", [2, 2, 0, 1, 2]),
    ],
)
def test_stop_strings_over_token_borders_and_cut_characters(lm, pieces, string, expected, monkeypatch):
    calls = []

    def decode(ids):
        calls.append(len(ids))
        return b"".join(pieces[i] for i in ids).decode(errors="replace")

    engine = TorchEngine(lm, decode=decode)
    script = iter([2, 2, 0, 1, 2, 2])
    sample = lambda *_: (np.array([next(script)]), np.zeros(1, np.float32))  # noqa: E731
    monkeypatch.setattr(engine, "_sample", sample)
    generation = one(engine, 1, [5, 6], 6, stop_strings=[string])
    assert generation.ids.tolist() == expected
    assert len(calls) <= 2 * len(expected)


def test_slots_are_reused_and_grow_only_as_needed(lm):
    engine = TorchEngine(lm, max_slots=64, max_tokens=4096)
    for k, prompt in enumerate(prompts(6)):
        run(rollout(engine, k, prompt, 2))
    keys, _ = engine._cache.layers[0]
    assert keys.shape[0] == 1
    assert keys.shape[2] < 128
    results = run(*(rollout(engine, k, p, 2) for k, p in enumerate(prompts(9, high=60))))
    assert engine._cache.layers[0][0].shape[0] < 64
    for ids, turns in results:
        logp = plain_logp(lm, ids)
        for begin, g in turns:
            np.testing.assert_allclose(g.logp, logp[begin - 1 : begin + 5][range(6), g.ids], atol=1e-5)


def test_more_rollouts_than_slots_wait_and_all_finish(lm):
    engine = TorchEngine(lm, max_slots=2)
    results = run(*(rollout(engine, k, p, 3, pause=0.001) for k, p in enumerate(prompts(7))))
    assert [len(turns) for _, turns in results] == [3] * 7
    assert engine._cache.layers[0][0].shape[0] == 2


def test_prefill_budget_bounds_a_step_and_lets_a_long_request_pass(lm, monkeypatch):
    engine = TorchEngine(lm, prefill_tokens=16)
    rows = []
    inner = engine_torch.hidden_states
    monkeypatch.setattr(
        engine_torch, "hidden_states", lambda lm, ids, *rest: rows.append(len(ids)) or inner(lm, ids, *rest)
    )
    run(*(engine.generate(request(k, np.zeros(n), 2)) for k, n in enumerate((8, 8, 30, 1, 15))))
    # 8 + 8; then two decode rows beside the long one; then its row beside 1 + 15; then their two.
    assert rows == [16, 2 + 30, 1 + 16, 2]


def test_slow_tools_do_not_hold_others_and_nothing_spins(lm):
    engine = TorchEngine(lm)
    ended = []

    async def timed(key, pause):
        await rollout(engine, key, prompts(1)[0], 2, pause=pause)
        ended.append(key)

    run(timed(0, 0.2), timed(1, None))
    assert ended == [1, 0]
    assert engine.stats.forwards == 6 + 6 + 6  # the first turns together, and each second turn on its own


def test_the_next_turn_joins_the_very_next_step(lm):
    engine = TorchEngine(lm)
    prompt = prompts(1)[0]
    run(rollout(engine, 0, prompt, 1, 6), rollout(engine, 1, prompt, 2, 3, pause=0))
    assert engine.stats.forwards == 6


def test_in_place_updates_are_seen_after_load_weights():
    lm, prompt = make(), prompts(1)[0]
    engine = TorchEngine(lm)
    first = one(engine, 1, prompt)
    ids = np.concatenate([prompt, first.ids])
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(1.2)
    engine.load_weights(lm.state_dict().items())
    assert engine.version == 1
    second = one(engine, 1, ids)
    logp = plain_logp(lm, np.concatenate([ids, second.ids]))[len(ids) - 1 :]
    np.testing.assert_allclose(second.logp, logp[range(6), second.ids], atol=1e-5)

    other = {name: torch.randn_like(x) for name, x in lm.state_dict().items()}
    engine.load_weights(other.items())
    assert all(torch.equal(x, other[name]) for name, x in lm.state_dict().items())
    with pytest.raises(ValueError, match="nonsense"):
        engine.load_weights([("nonsense", torch.zeros(1))])


def test_load_weights_refuses_while_requests_are_pending(lm):
    engine = TorchEngine(lm)

    async def both():
        task = asyncio.create_task(engine.generate(request(1, [1, 2])))
        await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="pending"):
            engine.load_weights()
        await task

    asyncio.run(both())


def test_bad_requests_are_refused(lm):
    engine = TorchEngine(lm, max_tokens=20)
    generation = one(engine, 1, [1, 2, 3], 4)
    whole = [1, 2, 3, *generation.ids]
    for ids, kwargs in {
        "second": ([2, 2, 3, *generation.ids, 4], {}),
        "shorter": (whole[:-1], {}),
        "empty": ([], {}),
        "long": (np.zeros(17), {"max_tokens": 4}),
        "none": (whole, {"max_tokens": 0}),
        "decode": (whole, {"stop_strings": ["x"]}),
    }.values():
        with pytest.raises(ValueError, match="request"):
            one(engine, 1, ids, **kwargs)
    assert len(one(engine, 1, whole, 4).ids) == 4

    async def twice():
        both = (engine.generate(request(5, [1], 2)) for _ in "ab")
        return await asyncio.gather(*both, return_exceptions=True)

    first, second = asyncio.run(twice())
    assert len(first.ids) == 2
    assert isinstance(second, ValueError)


def test_cancelled_requests_leave_no_trace(lm):
    engine = TorchEngine(lm, max_slots=1)
    prompt = prompts(1)[0]

    async def story():
        first = asyncio.create_task(engine.generate(request(1, prompt, 400)))
        waiting = asyncio.create_task(engine.generate(request(2, prompt, 400)))
        after = asyncio.create_task(engine.generate(request(3, prompt)))
        for _ in range(20):
            await asyncio.sleep(0)
        first.cancel()
        waiting.cancel()
        return await after

    generation = asyncio.run(story())
    assert (generation.ids == one(TorchEngine(lm), 3, prompt).ids).all()
    engine.release((0, 0, 0, 3))
    assert len(one(engine, 1, prompt).ids) == 6


@pytest.mark.parametrize("moment", range(4, 12))
def test_a_request_cancelled_at_any_moment_does_not_hurt_others(lm, moment):
    engine = TorchEngine(lm)
    prompt = prompts(1)[0]

    async def story():
        task, other = (asyncio.create_task(engine.generate(request(k, prompt, 4))) for k in (1, 2))
        for _ in range(moment):
            await asyncio.sleep(0)
        task.cancel()
        return await other

    assert (asyncio.run(story()).ids == one(TorchEngine(lm), 2, prompt, 4).ids).all()


def test_a_failing_step_fails_its_requests_and_the_engine_goes_on():
    lm, prompt = make(), prompts(1)[0]
    engine = TorchEngine(lm.train(), max_slots=1)
    weight = lm.lm_head.weight.detach().clone()
    with torch.no_grad():
        lm.lm_head.weight.fill_(torch.nan)

    async def pair():
        both = (engine.generate(request(k, prompt)) for k in (1, 2))
        return await asyncio.gather(*both, return_exceptions=True)

    errors = asyncio.run(pair())
    assert [type(error) for error in errors] == [DivergedError] * 2
    assert "train.lr" in str(errors[0]) and "\n" not in str(errors[0])
    assert lm.training
    engine.load_weights([("lm_head.weight", weight)])
    assert len(one(engine, 1, prompt).ids) == 6


def test_a_failing_decode_fails_the_turns_that_ended_with_it(lm):
    def decode(ids):
        raise OverflowError

    engine = TorchEngine(lm, decode=decode)

    async def pair():
        both = (engine.generate(request(k, [1], 1, stop_strings="x" * k)) for k in (0, 1))
        return await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 5)

    assert [type(error) for error in asyncio.run(pair())] == [OverflowError] * 2
