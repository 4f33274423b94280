"""What ``make mutants`` found unguarded, or guarded only by tests that run for long."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from igpo_fast import config, train
from igpo_fast.run.display import Display
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.types import Batch
from igpo_fast.update.advantages import credit_rollouts
from igpo_fast.update.policy import Policy
from igpo_fast.update.scoring import Scoring
from igpo_kernels import LossSettings, Tree, linear_logprob, linear_policy_loss, pack, pack_within, tree_attention
from igpo_kernels.workspace import CPU_BYTES
from tests.allocations import peak_bytes
from tests.kernels.test_plan import plan_of, rollout
from tests.kernels.test_tree_attention import comb
from tests.parity import naive
from tests.parity.test_parity import TEMPERATURE, Case, assert_same_gradients, models


@pytest.mark.parametrize("seed", range(5))
def test_pairs_come_in_the_documented_order(seed):
    plan = plan_of(seed)[-1]
    n = plan.n_decisions
    decisions = list(zip(plan.rollout[:n], plan.token[:n], strict=True))
    answers = list(zip(*(column[n:] for column in (plan.rollout, plan.turn, plan.answer, plan.token)), strict=True))
    assert len(answers) > 1
    assert decisions == sorted(decisions) and answers == sorted(answers)


def test_every_token_knows_where_its_tree_starts():
    trees = [Tree([rollout(i, [1, *[2] * n], [-1, *[0] * n])]) for i, n in enumerate((2, 4, 1))]
    assert pack(trees).tree_start.tolist() == [0, 0, 2, 2, 2, 2, 6]


def test_no_pack_exceeds_the_budget():
    trees = [Tree([rollout(i, [1, *[2] * n], [-1, *[0] * n])]) for i, n in enumerate((6, 4, 4, 3, 2))]
    assert [plan.n_tokens for plan in pack_within(trees, 8)] == [8, 8, 3]
    assert [plan.n_tokens for plan in pack_within(trees, 9)] == [9, 8, 2]


@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_given_scale_multiplies_the_queries(backend, softcap):
    plan = plan_of(3)[-1]
    q, k, v = (torch.randn(plan.n_tokens, 2, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))

    def run(q_used, **scale):
        out = tree_attention(q_used, k, v, plan, softcap=softcap, backend=backend, **scale)
        return [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]

    torch.testing.assert_close(run(q, scale=0.7), run(q * 0.7 * 16**0.5))


def test_one_plan_serves_several_windows():
    # Gemma's layers alternate: what is kept for one window must not be taken for another.
    plan = comb(700, 4)
    q, k, v = (torch.randn(plan.n_tokens, 2, 16) for _ in range(3))
    for window in (100, None, 300):
        expected = tree_attention(q, k, v, plan, window=window, backend="reference")
        torch.testing.assert_close(tree_attention(q, k, v, plan, window=window, backend="torch"), expected)


def test_a_models_own_scaling_is_used():
    ours, plain = models()
    for layer in (*ours.model.layers, *plain.model.layers):
        layer.self_attn.scaling *= 1.5
    ids = np.arange(9)
    plan = pack([Tree([rollout(0, ids, np.where(ids > 0, 0, -1))])])
    logp = Policy(ours, TEMPERATURE, LossSettings())(plan).decision_logp
    np.testing.assert_allclose(logp, naive.logprobs(plain, ids, TEMPERATURE).detach(), atol=1e-4)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_of_the_lm_head_equal_finite_differences(softcap):
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (3, 6))
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    labels, rows = torch.tensor([5, 0, 0, 2]), torch.tensor([2, 0, 0, 0])
    torch.autograd.gradcheck(
        lambda *x: linear_logprob(*x[:2], labels, rows, x[2], temperature=1.7, softcap=softcap, entropy=True),
        (hidden, weight, bias),
    )


def test_the_fused_loss_makes_no_tensor_of_all_logits():
    hidden, weight = torch.randn(3000, 8, requires_grad=True), torch.randn(20_000, 8, requires_grad=True)
    labels, ones = torch.randint(0, 20_000, (3000,)), torch.ones(3000)
    peak, _ = peak_bytes(lambda: linear_policy_loss(hidden, weight, labels, None, None, ones, ones)[0].backward())
    assert weight.nbytes < peak <= CPU_BYTES


class Updates:
    """A Trainer's update on the random groups of a parity ``Case``, with the gradients of its optimiser steps.

    The model stands still (the learning rate is nothing), so the gradients of several steps are of one model.
    """

    def __init__(self, monkeypatch, case, lm, *overrides, before=lambda trainer: None, **scoring):
        branches = {g.question.id: tuple(b) for g, b in zip(case.groups, case.branches, strict=True)}
        setup = SimpleNamespace(
            lm=lm,
            agent=None,
            warnings=(),
            scoring=Scoring(**{"branches_of": lambda question: branches[question.id], "answer_tokens": 1} | scoring),
            summary=lambda passes, parameters: "",
        )
        monkeypatch.setattr(train, "set_up", lambda config, **_: setattr(setup, "config", config) or setup)
        settings = [f"rollout.temperature={TEMPERATURE}", "train.lr=1e-12", "train.max_grad_norm=1e9"]
        settings += ["rollout.group_size=2", "rollout.max_turns=2", "rollout.max_tokens=2"]
        settings += ["algorithm.preset=robust", "algorithm.answers=max", *overrides]
        self.trainer = train.Trainer(config.load(None, settings), Display(1))
        before(self.trainer)
        self.gradients = []
        self.trainer.learner.optimizer.register_step_pre_hook(
            lambda *_: self.gradients.append({name: p.grad.clone() for name, p in lm.named_parameters()})
        )
        metrics = StepMetrics(1)
        self.credits = self.trainer.update(Batch(1, tuple(case.groups)), {}, metrics).credits
        self.row = metrics.row()


def budget(case, packs):
    """A token budget under which the groups, whole, take one pack, or several."""
    return case.plans(1)[0].n_tokens if packs == "one pack" else max(p.n_tokens for p in case.plans(5))


def naive_gradients(case, plain, scores, settings, inside):
    """Of the loss of the rollouts ``inside``."""
    part = copy.copy(case)
    part.rollouts = [case.rollouts[i] for i in inside]
    plain.zero_grad()
    advantages = [scores[i].advantages for i in inside]
    part.naive_loss(plain, advantages, None, settings, "seq_mean_token_mean").backward()
    return {name: p.grad for name, p in plain.named_parameters()}


@pytest.mark.parametrize("packs", ["one pack", "several"])
def test_a_one_pass_update_has_the_naive_gradient(monkeypatch, packs):
    case, (ours, plain) = Case(7), models()
    options = ["algorithm.passes=one", "algorithm.entropy=0.01", f"train.token_budget={budget(case, packs)}"]
    run = Updates(monkeypatch, case, ours, *options)
    scores = credit_rollouts(case.groups, case.naive_values(plain, "prob"), run.trainer.update.recipe)
    for ours_scored, expected in zip(run.credits, scores, strict=True):
        np.testing.assert_allclose(ours_scored.values, expected.values, atol=1e-4)
        np.testing.assert_allclose(ours_scored.advantages, expected.advantages, atol=1e-3)
    (gradients,) = run.gradients
    everyone = range(len(case.rollouts))
    expected = naive_gradients(case, plain, scores, LossSettings(entropy=0.01), everyone)
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("updates", [1, 2])
def test_a_two_pass_step_has_the_naive_gradient_of_each_share(monkeypatch, updates):
    # The model stands still, so every ratio is 1, unless old log-probabilities went to other tokens.
    case, (ours, plain) = Case(7), models()
    options = ["algorithm.passes=two", f"train.updates={updates}", f"train.token_budget={budget(case, 'several')}"]
    run = Updates(monkeypatch, case, ours, *options)
    scores = credit_rollouts(case.groups, case.naive_values(plain, "prob"), run.trainer.update.recipe)
    for share, gradients in zip(np.array_split(np.arange(len(case.groups)), updates), run.gradients, strict=True):
        inside = np.flatnonzero(np.isin(case.group_of, share))
        assert_same_gradients(gradients, naive_gradients(case, plain, scores, LossSettings(), inside))


@pytest.mark.parametrize("passes", ["one", "two"])
def test_the_first_step_stands_where_the_reference_and_the_engine_do(monkeypatch, passes):
    case, (ours, plain) = Case(7), models()
    for r in case.rollouts:
        with torch.no_grad():
            vars(r)["logp"] = naive.logprobs(plain, r.ids, TEMPERATURE)[r.turn_of_token[1:] >= 0].numpy()
    row = Updates(monkeypatch, case, ours, f"algorithm.passes={passes}", "algorithm.kl=0.1").row
    assert row["loss/kl"] == pytest.approx(0, abs=1e-9)
    assert row["mismatch/logp_abs_diff"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_answers_are_scored_once_a_step(monkeypatch, passes):
    case, (ours, _) = Case(5), models()
    run = Updates(monkeypatch, case, ours, f"algorithm.passes={passes}")
    answers = sum(
        len(r.turns) * sum(b.stop - b.start for b in case.branches[case.group_of[i]])
        for i, r in enumerate(case.rollouts)
    )
    assert run.row["tokens/scored"] == answers
    with_branches, without = case.plans(1)[0].n_tokens, case.plans(1, branches=False)[0].n_tokens
    assert run.row["tokens/packed"] == with_branches + (without if passes == "two" else 0)
