"""What every Engine owes (igpo_fast/engines/base.py)."""

import asyncio
import inspect

import numpy as np
import pytest

from igpo_fast.engines.base import Request, Sampling


def request(number, ids, max_tokens=3, *, stop_ids=(), stop_strings=(), **sampling):
    """Of rollout ``number``."""
    stops = tuple(stop_ids), tuple(stop_strings)
    return Request((0, 0, number, 0), np.asarray(ids, np.int32), max_tokens, *stops, Sampling(**sampling))


def ask(engine, *requests):
    """The generations of requests that are made at once, in an event loop of their own."""

    async def together():
        try:
            return await asyncio.gather(*(engine.generate(request) for request in requests))
        finally:
            if hasattr(engine, "aclose"):
                await engine.aclose()

    return asyncio.run(together())


class EngineContract:
    """Fixtures: ``make_engine``, which gives an engine that has weights and keeps no rollout; ``weights``, what
    ``load_weights`` takes; ``prompts``, some eight of different tokens, int32 [L] each."""

    @pytest.fixture
    def engine(self, make_engine):
        return make_engine()

    def test_it_says_what_it_is(self, engine):
        assert isinstance(engine.name, str) and engine.name
        assert isinstance(engine.version, int)
        assert isinstance(engine.remote, bool) and isinstance(engine.keeps_rollouts, bool)
        assert inspect.iscoroutinefunction(engine.generate)

    def test_a_generation_is_tokens_and_their_log_probabilities(self, engine, prompts):
        for found in ask(engine, *(request(k, prompt) for k, prompt in enumerate(prompts))):
            assert found.ids.dtype == np.int32 and found.logp.dtype == np.float32
            assert found.ids.shape == found.logp.shape and 1 <= len(found.ids) <= 3
            assert np.isfinite(found.logp).all() and (found.logp <= 0).all()
            assert found.finished or len(found.ids) == 3

    def test_draws_follow_from_the_key_whatever_the_company(self, make_engine, prompts):
        asked = [request(k, prompt) for k, prompt in enumerate(prompts)]
        together = ask(make_engine(), *asked)
        alone = [ask(make_engine(), one)[0] for one in reversed(asked)][::-1]
        assert [g.ids.tolist() for g in together] == [g.ids.tolist() for g in alone]
        np.testing.assert_allclose(
            np.concatenate([g.logp for g in together]), np.concatenate([g.logp for g in alone]), atol=1e-5
        )

    def test_a_rollout_goes_on_with_what_was_sampled_and_answered(self, engine, prompts):
        async def rollout(number, ids):
            for _ in range(3):
                found = await engine.generate(request(number, ids))
                ids = np.concatenate([ids, found.ids, prompts[0][:2]]).astype(np.int32)
            engine.release((0, 0, number, 0))
            return len(ids)

        async def together():
            return await asyncio.gather(*(rollout(k, prompt) for k, prompt in enumerate(prompts)))

        lengths = asyncio.run(together())
        assert all(
            len(prompt) + 9 <= length <= len(prompt) + 15 for prompt, length in zip(prompts, lengths, strict=True)
        )

    def test_a_cancelled_request_leaves_the_others_alone(self, make_engine, prompts):
        (expected,) = ask(make_engine(), request(2, prompts[1]))
        engine = make_engine()

        async def cancelled():
            given_up = asyncio.create_task(engine.generate(request(1, prompts[0])))
            kept = asyncio.create_task(engine.generate(request(2, prompts[1])))
            await asyncio.sleep(0)
            given_up.cancel()
            engine.release((0, 0, 1, 0))
            return await kept

        assert asyncio.run(cancelled()).ids.tolist() == expected.ids.tolist()

    def test_new_weights_have_a_new_number(self, engine, weights, prompts):
        before = engine.version
        engine.load_weights(weights)
        assert engine.version > before
        ask(engine, request(1, prompts[0]))
        engine.sleep()
        engine.load_weights(weights)
        assert len(ask(engine, request(2, prompts[0]))[0].ids)

    def test_what_failed_is_counted_by_metric(self, engine):
        assert all(isinstance(name, str) and value >= 0 for name, value in engine.counts().items())


class SamplingContract(EngineContract):
    """An engine that samples a model itself. More fixtures: ``plain_logp``, a function of tokens and a temperature that
    gives log pi of the next token by plain forwards, [V]."""

    def test_a_turn_ends_by_length(self, make_engine, prompts):
        for n in (1, 5):
            (found,) = ask(make_engine(), request(1, prompts[0], n))
            assert len(found.ids) == n and not found.finished

    def test_a_stop_token_ends_the_turn_and_is_kept(self, make_engine, prompts):
        (free,) = ask(make_engine(), request(1, prompts[0], 8))
        stop = free.ids[3]
        at = free.ids.tolist().index(stop)
        (stopped,) = ask(make_engine(), request(1, prompts[0], 8, stop_ids=[int(stop)]))
        assert stopped.finished and stopped.ids.tolist() == free.ids[: at + 1].tolist()
        np.testing.assert_allclose(stopped.logp, free.logp[: at + 1], atol=1e-5)

    def test_other_keys_draw_otherwise(self, engine, prompts):
        drawn = ask(engine, *(request(k, prompts[0], 6, temperature=1.5) for k in range(8)))
        assert len({tuple(g.ids.tolist()) for g in drawn}) > 1

    def test_log_probabilities_are_at_the_sampling_temperature(self, make_engine, prompts, plain_logp):
        for temperature in (0.5, 1.0, 1.7):
            (found,) = ask(make_engine(), request(7, prompts[0], 1, temperature=temperature))
            assert found.logp[0] == pytest.approx(plain_logp(prompts[0], temperature)[found.ids[0]], abs=1e-5)

    def test_greedy_is_the_argmax_at_temperature_1(self, engine, prompts, plain_logp):
        (found,) = ask(engine, request(1, prompts[0], 1, temperature=0))
        logp = plain_logp(prompts[0], 1.0)
        assert logp[found.ids[0]] == pytest.approx(logp.max(), abs=1e-6)
        assert found.logp[0] == pytest.approx(logp.max(), abs=1e-5)

    def test_first_tokens_follow_the_policy(self, engine, prompts, plain_logp):
        n = 2000
        drawn = ask(engine, *(request(k, prompts[0], 1, temperature=1.3) for k in range(n)))
        logp = plain_logp(prompts[0], 1.3)
        counts = np.bincount([g.ids[0] for g in drawn], minlength=len(logp))
        expected = n * np.exp(logp.astype(np.float64))
        likely = expected > 5
        chi2 = ((counts - expected) ** 2 / expected)[likely].sum()
        assert likely.sum() > 1 and chi2 < likely.sum() + 4 * np.sqrt(2 * likely.sum())
