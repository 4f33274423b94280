"""update/learner.py: what a step changes, and what a dropped one does not."""

from __future__ import annotations

import math

import torch

from igpo_fast.model import build
from igpo_fast.update.learner import Learner


def learner():
    lm = build(13, hidden_size=8, layers=1, heads=1, kv_heads=1, ffn_size=8, max_tokens=16, tie_embeddings=True, seed=0)
    return Learner(lm, lr=1.0, factor=lambda step: 1 - step / 10, max_grad_norm=2.0)


def give_gradients(made, value):
    for parameter in made.policy.parameters():
        parameter.grad = torch.full_like(parameter, value)


def test_a_step_is_clipped_and_told_by_its_norm_before():
    made = learner()
    give_gradients(made, 0.5)
    size = sum(parameter.numel() for parameter in made.policy.parameters())
    assert math.isclose(made.step(), 0.5 * size**0.5, rel_tol=1e-5)
    assert (made.steps, made.lr) == (1, 0.9)
    assert all(parameter.grad is None for parameter in made.policy.parameters())


def test_a_dropped_step_changes_no_weight_but_the_schedule_goes_on():
    """So it counts: whoever saves the step before must know that the schedule is no longer that step's."""
    for value, sound in ((0.5, False), (math.nan, True), (math.inf, True)):
        made = learner()
        before = {name: weight.clone() for name, weight in made.weights()}
        give_gradients(made, value)
        assert made.step(sound) is None
        assert all(torch.equal(weight, before[name]) for name, weight in made.weights())
        assert not made.optimizer.state
        assert (made.steps, made.lr) == (1, 0.9)
