"""update/learner.py: what a step changes, and what a dropped one does not."""

from __future__ import annotations

import math

import pytest
import torch

from igpo_fast.model import build
from igpo_fast.update.learner import Learner, Masters


def tiny(dtype=torch.float32):
    lm = build(13, hidden_size=8, layers=1, heads=1, kv_heads=1, ffn_size=8, max_tokens=16, tie_embeddings=True, seed=0)
    return lm.to(dtype)


def learner():
    return Learner(tiny(), lr=1.0, factor=lambda step: 1 - step / 10, max_grad_norm=2.0)


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


# --- float32 masters of a bfloat16 model ---

STEPS, RATE = 400, 1e-6
"""Adam moves a weight by about RATE a step, together by 4e-4; bfloat16 weights near 0.02 are 1.2e-4 apart."""


def descend(step, lm):
    """STEPS updates along a gradient of 1."""
    for _ in range(STEPS):
        sum(parameter.float().sum() for parameter in lm.parameters()).backward()
        step()
    return {name: weight.detach().clone() for name, weight in lm.named_parameters()}


def whole(lm):
    """A learner whose gradients are not clipped."""
    return Learner(lm, lr=RATE, factor=lambda step: 1.0, max_grad_norm=1e9)


def test_updates_below_a_weights_rounding_are_not_lost():
    exact = tiny(torch.bfloat16).float()
    rounded, exact = tiny(torch.bfloat16), descend(whole(exact).step, exact)
    found = descend(whole(rounded).step, rounded)
    assert all(torch.equal(found[name], exact[name].bfloat16()) for name in exact)


def test_without_masters_they_are():
    """What masters are for: AdamW on the bfloat16 weights themselves leaves those of usual size where they were."""
    lm = tiny(torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in lm.named_parameters()}
    optimizer = torch.optim.AdamW(lm.parameters(), lr=RATE, weight_decay=0.0)
    after = descend(lambda: (optimizer.step(), optimizer.zero_grad()), lm)
    for name, weight in before.items():
        usual = weight.abs() > 0.01
        assert torch.equal(after[name][usual], weight[usual])


def test_gradients_of_packs_are_added_up_in_float32():
    """In bfloat16 1 + 1/512 is 1."""
    lm = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    masters = Masters(lm)
    for gradient in (1.0, *[1 / 512] * 512):
        (lm.weight * gradient).sum().backward()
        assert lm.weight.grad is None
    assert masters.of["weight"].grad.item() == 2.0


def test_a_float32_models_masters_are_its_parameters():
    lm = tiny()
    masters = Masters(lm)
    assert all(a is b for a, b in zip(masters.of.values(), lm.parameters(), strict=True))
    assert masters.copied == {}


def test_tied_weights_have_one_master():
    lm = tiny(torch.bfloat16)
    assert len(Masters(lm).of) == len(list(lm.parameters()))


def test_frozen_parameters_have_no_master():
    lm = tiny(torch.bfloat16)
    lm.model.embed_tokens.weight.requires_grad_(False)
    assert "model.embed_tokens.weight" not in Masters(lm).of


def test_masters_that_are_not_the_models_weights_are_refused(tmp_path):
    made = Learner(tiny(torch.bfloat16), lr=RATE, factor=lambda step: 1.0)
    made.snapshot()(tmp_path)
    file = tmp_path / "learner-00000-of-00001.pt"
    held = torch.load(file, weights_only=True)
    held["states"]["model.norm.weight"]["master"][3] += 0.1
    torch.save(held, file)
    with pytest.raises(ValueError, match=r"float32 master of model\.norm\.weight does not round to the model's"):
        made.load(tmp_path)
    file.rename(tmp_path / "learner-00000-of-00002.pt")
    with pytest.raises(ValueError, match="parts of the optimiser's state are missing"):
        made.load(tmp_path)
