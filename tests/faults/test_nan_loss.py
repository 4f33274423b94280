"""A loss that is not finite costs the update it would have made, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from igpo_fast import model
from igpo_fast.train import Trainer, train
from igpo_fast.update.policy import Policy
from tests.tiny import STEPS, Recorder, rows, settings

MODES = {"one": ("algorithm.passes=one",), "two": ("train.updates=2",)}


class Run:
    """Runs a training and keeps the weights after every step; ``poison`` spoils chosen training passes."""

    def __init__(self, monkeypatch, config, spoil=None, passes=()):
        self.weights, self.display = {}, Recorder()
        step, forward = [0], Policy.forward
        calls = [0]

        def sync(trainer, metrics, real=Trainer.sync):
            real(trainer, metrics)
            step[0] += 1
            self.trainer = trainer
            self.weights[step[0]] = {name: p.detach().clone() for name, p in trainer.learner.lm.named_parameters()}

        def patched(policy, plan, inputs=None, advantages_of=None):
            calls[0] += inputs is not None
            spoiled = inputs is not None and calls[0] in passes
            with monkeypatch.context() as patch:
                if spoiled and spoil == "hidden states":
                    hidden_states = model.hidden_states
                    patch.setattr(model, "hidden_states", lambda *a: hidden_states(*a) * float("nan"))
                scores = forward(policy, plan, inputs, advantages_of)
            if spoiled and spoil == "loss":
                return replace(scores, loss=scores.loss * float("nan"))
            if spoiled and spoil == "gradient":
                parameter = next(policy.parameters())
                hook = parameter.register_hook(lambda gradient: hook.remove() or gradient / 0)
            return scores

        monkeypatch.setattr(Trainer, "sync", sync)
        monkeypatch.setattr(Policy, "forward", patched)
        self.folder = train(config, self.display).path
        self.rows = rows(self.folder)


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("spoil", ["loss", "gradient", "hidden states"])
@pytest.mark.parametrize("mode", MODES)
def test_the_update_is_skipped_and_counted(monkeypatch, tmp_path, cache, mode, spoil):
    passes = {"one": (3,), "two": (5, 6)}[mode]  # all of step 3
    run = Run(monkeypatch, settings(tmp_path / "run", cache, *MODES[mode], "algorithm.kl=0"), spoil, passes)

    assert [row.get("loss/skipped") for row in run.rows] == [None, None, None, len(passes), None, None, None]
    assert run.rows[3]["loss/grad_norm"] is None
    assert all(row["loss/grad_norm"] > 0 for row in run.rows[1:] if row["step"] != 3)
    assert equal(run.weights[3], run.weights[2])
    assert not equal(run.weights[4], run.weights[3])
    for parameter, state in run.trainer.learner.optimizer.state.items():
        assert parameter.isfinite().all() and all(value.isfinite().all() for value in state.values())
        assert state["step"] == (STEPS - 1) * len(passes)
    warning = "step 3: the loss or its gradient is not finite; this update is skipped"
    assert run.display.text.count(f"warning: {warning}") == len(passes)
    assert "lower train.lr or use train.precision=float32" in run.display.text
    assert len(list((run.folder / "rollouts").glob("step_*"))) == STEPS


def test_values_that_are_not_finite_are_no_gains(monkeypatch, tmp_path, cache):
    config = settings(tmp_path / "run", cache, *MODES["one"], "algorithm.kl=0")
    run = Run(monkeypatch, config, "hidden states", (3,))
    gains = 16 * (run.rows[3]["turns/mean"] - 1)
    assert run.rows[3]["reward/ig_nan"] == gains > 0
    assert run.rows[3]["reward/ig_mean"] == 0
    assert [row["reward/ig_nan"] for row in run.rows[1:] if row["step"] != 3] == [0.0] * (STEPS - 1)


def test_one_spoiled_update_of_two_costs_only_itself(monkeypatch, tmp_path, cache):
    run = Run(monkeypatch, settings(tmp_path / "run", cache, *MODES["two"]), "loss", (5,))
    assert run.rows[3]["loss/skipped"] == 1
    assert not equal(run.weights[3], run.weights[2])
    assert {float(state["step"]) for state in run.trainer.learner.optimizer.state.values()} == {2.0 * STEPS - 1}
