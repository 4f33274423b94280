"""Values of the reference and of a teacher: other weights than the policy's, in one forward of theirs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from igpo_fast import config
from igpo_fast.setup import make_learner
from igpo_fast.update.advantages import credit_rollouts
from igpo_kernels import LossSettings
from tests.parity import naive
from tests.parity.test_parity import TEMPERATURE, Case, assert_same_gradients, models
from tests.test_mutant_gaps import Updates


def moved(lm):
    """The weights after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in lm.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return lm


@pytest.mark.parametrize("value_model, passes, packs", [
    ("reference", "one", "one pack"), ("reference", "one", "several"), ("reference", "two", "several"),
    ("teacher", "one", "several"), ("teacher", "two", "one pack"),
])  # fmt: skip
def test_values_are_the_other_models_and_gradients_the_policys(monkeypatch, value_model, passes, packs):
    case, (ours, plain) = Case(7, groups=3), models()
    room = max(plan.n_tokens for plan in case.plans(1 if packs == "one pack" else 3))
    settings = [f"algorithm.value_model={value_model}", f"algorithm.passes={passes}", f"train.token_budget={room}"]
    forwards = {"policy": 0, "reference": 0, "teacher": 0}

    def before(trainer):
        moved(ours)
        learner = trainer.learner
        known = {"policy": ours, "reference": learner._reference.lm}
        if value_model == "teacher":
            known["teacher"] = learner._teacher.lm
        for name, lm in known.items():
            lm.model.embed_tokens.register_forward_hook(
                lambda module, args, out, name=name: forwards.update({name: forwards[name] + 1})
            )

    run = Updates(monkeypatch, case, ours, *settings, "algorithm.kl=0.1", "algorithm.answers=max", before=before)
    scores = credit_rollouts(case.groups, case.naive_values(plain, "prob"), run.trainer.update.recipe)
    for found, expected in zip(run.credits, scores, strict=True):
        np.testing.assert_allclose(found.values, expected.values, atol=1e-4)
    policy = moved(copy.deepcopy(plain))
    with torch.no_grad():
        ref_logp = [naive.logprobs(plain, r.ids, TEMPERATURE)[r.turn_of_token[1:] >= 0].numpy() for r in case.rollouts]
    advantages = [credit.advantages for credit in scores]
    case.naive_loss(policy, advantages, None, LossSettings(kl=0.1), "seq_mean_token_mean", ref_logp).backward()
    (gradients,) = run.gradients
    assert_same_gradients(gradients, {name: p.grad for name, p in policy.named_parameters()})
    if packs == "one pack":  # a pass of each model, and KL takes the reference's from the pass that gave the values
        once = 1 if passes == "one" else 2
        teacher = value_model == "teacher"
        assert forwards == {"policy": once, "reference": 1, "teacher": int(teacher)}


def test_a_group_of_known_advantages_may_span_packs(monkeypatch):
    """Values that come from elsewhere do not need the group in one pack."""
    case, (ours, _) = Case(7), models()
    room = max(max(plan.n_tokens for plan in case.plans(5)) // 2, 90)
    run = Updates(monkeypatch, case, ours, "algorithm.value_model=reference", "algorithm.passes=one",
        f"train.token_budget={room}")  # fmt: skip
    assert run.trainer.update.passes == "one" and np.isfinite(run.row["loss/grad_norm"])


def test_a_teacher_stands_still_between_refreshes():
    ours, _ = models()
    learner = make_learner(config.load(None, ["algorithm.value_model=teacher"]), ours, ranks=Alone())
    first = {name: weight.clone() for name, weight in ours.state_dict().items()}
    moved(ours)
    held = learner._teacher.lm.state_dict()
    assert all(torch.equal(held[name], weight) for name, weight in first.items())
    learner.refresh_teacher()
    assert all(torch.equal(held[name], weight) for name, weight in ours.state_dict().items())


def test_a_teacher_under_zero_3_is_refused_in_one_line():
    pytest.importorskip("deepspeed")
    settings = ["algorithm.value_model=teacher", "distributed.engine=deepspeed", "distributed.zero_stage=3"]
    with pytest.raises(ValueError, match=r"value_model=teacher keeps a whole model per process.*use zero_stage=2"):
        make_learner(config.load(None, settings), models()[0], ranks=Alone())


def test_outcome_only_algorithms_run_no_value_model():
    learner = make_learner(
        config.load(None, ["algorithm.value_model=teacher", "algorithm.name=grpo"]), models()[0], ranks=Alone()
    )
    assert learner.value_model == "policy" and learner._teacher is None


class Alone:
    size, number, local, first = 1, 0, 0, True
