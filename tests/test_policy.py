"""policy.py and sft.py: which implementation of the kernels they ask for. (What they compute: tests/parity.)"""

from __future__ import annotations

from functools import partial
from importlib import import_module

import pytest

from igpo_fast.run.metrics import StepMetrics
from igpo_fast.train import Trainer
from igpo_fast.update import policy
from igpo_kernels import Pairs
from tests.tiny import Recorder, settings

OPS = ("tree_attention", "linear_logprob", "policy_loss", "linear_policy_loss")


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        (("algorithm.name=gspo",), "policy_loss"),
        (("algorithm.ratio=turn",), "policy_loss"),
        (("algorithm.importance=sequence",), "policy_loss"),
        (("algorithm.importance=token",), "linear_policy_loss"),
        (("algorithm.kl=0.1",), "linear_policy_loss"),
    ],
    ids=lambda value: str(value),
)
def test_every_op_is_asked_for_the_configured_implementation(monkeypatch, tmp_path, options, loss):
    asked = set()
    for name in OPS:
        module = import_module(f"igpo_kernels.{name}")

        def choose(op, backend, *arguments, real=module.choose, **more):
            asked.add((op, backend))
            return real(op, backend, *arguments, **more)

        monkeypatch.setattr(module, "choose", choose)
    for name in ("linear_logprob", "linear_policy_loss"):
        monkeypatch.setattr(policy, name, partial(with_pairs, getattr(policy, name)))
    more = ("model.kernels=reference", "model.probe=false", "sft.clean_steps=1", "train.questions=1")
    trainer = Trainer(settings(tmp_path / "run", tmp_path / "cache", *more, *options), Recorder())
    metrics = StepMetrics(1)
    batch, found = trainer.collect(trainer.rollouts(trainer.questions(1), 1, metrics), 1, metrics)
    trainer.update(batch, found, metrics)
    assert asked == {(op, "reference") for op in ("tree_attention", "linear_logprob", loss)}


def with_pairs(op, hidden, weight, labels, *arguments, **more):
    assert isinstance(labels, Pairs)  # grouped on the host: nothing is sorted, or waited for
    return op(hidden, weight, labels, *arguments, **more)
