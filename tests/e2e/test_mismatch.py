"""What the trainer makes of an engine whose log-probabilities are not its own: here the torch engine's, 0.3 too low."""

from __future__ import annotations

import math

import pytest

from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import DivergedError
from igpo_fast.train import train
from tests.tiny import Recorder, rows, settings

GAP = 0.3
ONE_STEP = ("train.steps=1", "eval.every=0", "eval.questions=2", "algorithm.kl=0", "algorithm.entropy=0")


@pytest.fixture(autouse=True)
def shifted(monkeypatch):
    real = TorchEngine._sample

    def sample(engine, *arguments):
        tokens, logp = real(engine, *arguments)
        return tokens, logp - GAP

    monkeypatch.setattr(TorchEngine, "_sample", sample)


def first_step(folder, cache, *overrides):
    display = Recorder()
    train(settings(folder, cache, *ONE_STEP, *overrides), display)
    return rows(folder)[1], display.text


@pytest.mark.parametrize("passes", ["one", "two"])
def test_it_is_measured(tmp_path, cache, passes):
    row, text = first_step(tmp_path, cache, f"algorithm.passes={passes}")
    assert row["mismatch/logp_abs_diff"] == pytest.approx(GAP, abs=1e-5)
    assert row["mismatch/logp_abs_max"] == pytest.approx(GAP, abs=1e-4)
    assert "engine and trainer disagree: mismatch/logp_abs_diff 0.3, above 0.1; " in text  # at the first step


def test_the_warning_has_its_threshold(tmp_path, cache):
    assert "disagree" not in first_step(tmp_path, cache, "rollout.mismatch_warn=0.31")[1]


def test_the_run_can_be_made_to_stop_before_the_update(tmp_path, cache):
    with pytest.raises(DivergedError, match=r"^step 1: .* by 0.3 on average, more than rollout.mismatch_stop=0.29"):
        first_step(tmp_path, cache, "rollout.mismatch_stop=0.29")
    assert [row["step"] for row in rows(tmp_path)] == [0]
    row, _ = first_step(tmp_path, cache, "rollout.mismatch_stop=0.31")  # goes on
    assert row["step"] == 1


@pytest.mark.parametrize("passes", ["one", "two"])
def test_importance_weights_correct_for_it(tmp_path, cache, passes):
    """Every token's weight is exp(0.3), so the loss is as many times as large; or the cap, or 0 where masked."""

    def loss(*overrides):
        number = len(list(tmp_path.iterdir()))
        return first_step(tmp_path / str(number), cache, f"algorithm.passes={passes}", *overrides)[0]["loss/policy"]

    plain = loss()
    assert abs(plain) > 1e-3
    token = ("algorithm.importance=token",)
    assert loss(*token) == pytest.approx(plain * math.exp(GAP), rel=1e-3)
    assert loss(*token, "algorithm.importance_cap=1.2") == pytest.approx(plain * 1.2, rel=1e-3)
    assert loss(*token, "algorithm.importance_cap=1.2", "algorithm.importance_mode=mask") == 0
    # A sequence's weight is the product over its tokens: far above any cap.
    assert loss("algorithm.importance=sequence", "algorithm.importance_cap=1.1") == pytest.approx(plain * 1.1, rel=1e-3)
