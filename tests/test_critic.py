"""update/critic.py: advantages and returns by hand and by their definition, rewards, the value loss, the head."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.config import load
from igpo_fast.errors import InputError
from igpo_fast.model import build
from igpo_fast.setup import settings_warnings
from igpo_fast.types import ANSWER, INVALID, SEARCH, Credit, Question, Rollout, Turn
from igpo_fast.update.advantages import Recipe, recipe_of
from igpo_fast.update.critic import (
    CriticSettings,
    ValueHead,
    ValueInputs,
    critic_settings_of,
    estimate,
    turn_rewards,
    value_loss,
)
from igpo_fast.update.learner import Learner
from igpo_fast.update.passes import choose_passes
from igpo_fast.update.policy import LossInputs, make_trees
from igpo_fast.update.scoring import Scoring
from igpo_kernels import pack
from tests import family
from tests.doing import doing
from tests.trees import VOCAB, random_group

RECIPE = Recipe(algorithm="ppo_ig")


def rollout(lengths, actions=None, passages=()):
    """Turns of so many tokens, each but the last with a response of 2."""
    *middle, last = actions or [SEARCH] * (len(lengths) - 1) + [ANSWER]
    found = [*passages, *[()] * (len(lengths) - len(passages))]
    turns = tuple(
        Turn(np.arange(n), np.zeros(n, np.float32), "", doing(action), np.arange(2 if t < len(middle) else 0), "", seen)
        for t, (n, action, seen) in enumerate(zip(lengths, [*middle, last], found, strict=True))
    )
    return Rollout(Question("q", "?", ("x",)), 0, np.arange(3), turns)


def credit(gains, outcome, first=0.0):
    """Of answer values that rise by ``gains``."""
    values = first + np.cumsum([0.0, *gains])
    return Credit(values, np.array(gains, float), outcome, outcome, outcome, np.zeros(len(gains) + 1))


def estimated(lengths, gains, outcome, values, settings, recipe=RECIPE):
    """Advantages, returns and shares of one rollout's tokens, and the metrics."""
    (found,), (targets,), metrics = estimate(
        [rollout(lengths)], [credit(gains, outcome)], [np.array(values, np.float32)], recipe, settings
    )
    return found, targets, metrics


RAW = CriticSettings(whiten=False)


# --- by hand ---

# Turns of 2, 2 and 1 tokens; gains .1 and -.05; the outcome 1; values .4 .5 | .6 .5 | .8.
LENGTHS, GAINS, VALUES = (2, 2, 1), (0.1, -0.05), (0.4, 0.5, 0.6, 0.5, 0.8)


def test_steps_of_tokens_by_hand():
    # Errors: .5 - .4; .1 + .6 - .5; .5 - .6; -.05 + .8 - .5; 1 - .8. Advantages are their sums from behind.
    found, targets, metrics = estimated(LENGTHS, GAINS, 1.0, VALUES, RAW)
    assert found.token_advantages == pytest.approx([0.65, 0.55, 0.35, 0.45, 0.2], abs=1e-6)
    assert found.advantages == pytest.approx([0.6, 0.4, 0.2], abs=1e-6)
    assert targets.returns == pytest.approx([1.05, 1.05, 0.95, 0.95, 1.0], abs=1e-6)
    assert targets.values == pytest.approx(VALUES) and targets.share.tolist() == [1] * 5
    # Variances: of the advantages (returns - values) .0244, of the returns .002.
    assert metrics == pytest.approx({"critic/value_mean": 0.56, "critic/explained_variance": 1 - 0.0244 / 0.002})


def test_lambda_discounts_later_errors():
    # .2; .25 + .95 * .2 = .44; -.1 + .95 * .44 = .318; .2 + .95 * .318 = .5021; .1 + .95 * .5021 = .576995.
    found, targets, _ = estimated(LENGTHS, GAINS, 1.0, VALUES, replace(RAW, gae_lambda=0.95))
    assert found.token_advantages == pytest.approx([0.576995, 0.5021, 0.318, 0.44, 0.2], abs=1e-6)
    assert targets.returns == pytest.approx([0.976995, 1.0021, 0.918, 0.94, 1.0], abs=1e-6)


def test_steps_of_turns_by_hand():
    # Values .4, .6, .8; errors .1 + .6 - .4 = .3; -.05 + .8 - .6 = .15; .2; with gamma .5: .1 + .3 - .4 = 0;
    # -.05 + .4 - .6 = -.25; .2, and advantages .2; -.25 + .5 * .2 = -.15; 0 + .5 * -.15 = -.075.
    by_turn = replace(RAW, level="turn")
    found, targets, metrics = estimated(LENGTHS, GAINS, 1.0, VALUES, by_turn)
    assert found.token_advantages == pytest.approx([0.65, 0.65, 0.35, 0.35, 0.2], abs=1e-6)
    assert targets.returns == pytest.approx([1.05, 1.05, 0.95, 0.95, 1.0], abs=1e-6)
    assert targets.share.tolist() == [2, 0, 2, 0, 1]
    # Over the three steps: returns - values .65, .35, .2 (variance .035), returns 1.05, .95, 1 (.005 / 3).
    assert metrics == pytest.approx({"critic/value_mean": 0.6, "critic/explained_variance": 1 - 0.035 / (0.005 / 3)})
    found, targets, _ = estimated(LENGTHS, GAINS, 1.0, VALUES, by_turn, replace(RECIPE, gamma=0.5))
    assert found.advantages == pytest.approx([-0.075, -0.15, 0.2], abs=1e-6)
    assert targets.returns == pytest.approx([0.325, 0.325, 0.45, 0.45, 1.0], abs=1e-6)


def test_whitening_counts_tokens_of_the_whole_batch():
    # Advantages of one rollout .6 over 3 tokens, of the other -.2 over one: mean .4, std sqrt(.12).
    rollouts, credits = [rollout((3,)), rollout((1,))], [credit([], 0.6), credit([], -0.2)]
    for level in ("token", "turn"):
        found, targets, _ = estimate(
            rollouts, credits, [np.zeros(3, np.float32), np.zeros(1, np.float32)], RECIPE, CriticSettings(level=level)
        )
        assert found[0].token_advantages == pytest.approx([0.2 / 0.12**0.5] * 3)
        assert found[1].token_advantages == pytest.approx([-0.6 / 0.12**0.5])
        assert targets[0].returns == pytest.approx([0.6] * 3)  # as earned


def test_rounding_is_not_brought_to_unit_size():
    """Advantages .6 and returns .7, but for 1e-7: over a floor of 1e-4 that is 1e-3."""
    values = [np.full(3, 0.1, np.float32), np.full(1, 0.1 + 1e-7, np.float32)]
    found, _, metrics = estimate(
        [rollout((3,)), rollout((1,))], [credit([], 0.7)] * 2, values, RECIPE, CriticSettings()
    )
    assert 0 < max(abs(f.token_advantages).max() for f in found) < 2e-3
    assert metrics.keys() == {"critic/value_mean"}


def test_equal_advantages_are_whitened_to_exact_zeros():
    """Fifteen .7, whose mean is rounded."""
    found, _, metrics = estimate(
        [rollout((14,)), rollout((1,))], [credit([], 0.7)] * 2, [np.zeros(14), np.zeros(1)], RECIPE, CriticSettings()
    )
    assert [f.token_advantages.tolist() for f in found] == [[0.0] * 14, [0.0]]
    assert metrics == {"critic/value_mean": 0.0}  # nothing varies that could be explained


# --- by definition ---

numbers = st.floats(-2, 2, width=32)


@st.composite
def batches(draw):
    found = []
    for _ in range(draw(st.integers(1, 5))):
        lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
        exactly = lambda n: st.lists(numbers, min_size=n, max_size=n)  # noqa: E731
        found.append((lengths, draw(exactly(len(lengths) - 1)), draw(numbers), draw(exactly(sum(lengths)))))
    return found


@given(batches(), st.floats(0, 1), st.floats(0, 1), st.sampled_from(["token", "turn"]))
def test_ragged_batches_follow_the_definition(batch, gamma, lam, level):
    rollouts = [rollout(lengths) for lengths, *_ in batch]
    credits = [credit(gains, outcome) for _, gains, outcome, _ in batch]
    values = [np.array(v, np.float32) for *_, v in batch]
    recipe, settings = replace(RECIPE, gamma=gamma), replace(RAW, level=level, gae_lambda=lam)
    found, targets, _ = estimate(rollouts, credits, values, recipe, settings)
    white, *_ = estimate(rollouts, credits, values, recipe, replace(settings, whiten=True))
    expected = [family.ppo(lengths, [*gains, outcome], v, gamma, lam, level) for lengths, gains, outcome, v in batch]
    pool = np.concatenate([advantages for advantages, _ in expected])
    for ours, theirs, target, (lengths, *_), (advantages, returns) in zip(
        found, white, targets, batch, expected, strict=True
    ):
        assert ours.token_advantages == pytest.approx(advantages, abs=1e-5)
        assert target.returns == pytest.approx(returns, abs=1e-5)
        means = [part.mean() for part in np.split(np.array(advantages), np.cumsum(lengths)[:-1])]
        assert ours.advantages == pytest.approx(means, abs=1e-5)
        if pool.std() > 1e-3:
            whitened = (np.array(advantages) - pool.mean()) / (pool.var() + 1e-8) ** 0.5
            assert theirs.token_advantages == pytest.approx(whitened, abs=1e-3)


# --- rewards ---


def test_what_turns_earn():
    found = rollout((1, 1, 1, 1), [SEARCH, INVALID, SEARCH, ANSWER], [("a", "b"), (), ("b", "c")])
    gains = credit([0.3, 0.2, -0.01], 0.5)
    earned = lambda **recipe: turn_rewards(found, gains, replace(RECIPE, **recipe))  # noqa: E731
    assert earned() == pytest.approx([0.3, 0.2, -0.01, 0.5])
    assert earned(ig_weight=2.0) == pytest.approx([0.6, 0.4, -0.02, 0.5])
    assert earned(gate=0.2) == pytest.approx([0.3, 0.2, 0.0, 0.5])
    assert earned(turn_format_penalty=0.7, ig_weight=2.0) == pytest.approx([0.6, -1.4, -0.02, 0.5])
    assert earned(redundancy_penalty=0.6) == pytest.approx([0.3, 0.2, -0.01 - 0.3, 0.5])
    assert earned(algorithm="ppo") == pytest.approx([0, 0, 0, 0.5])
    none = replace(gains, gains=np.array([np.nan, 0.5, np.nan]))
    assert turn_rewards(found, none, RECIPE) == pytest.approx([0, 0.5, 0, 0.5])


# Two answers: log(e^-2 + e^-3), log(e^-1.2 + e^-2.5), log(e^-.4 + e^-2).
PHI = [log(exp(-2.0) + exp(-3.0)), log(exp(-1.2) + exp(-2.5)), log(exp(-0.4) + exp(-2.0))]


TIPS = replace(RECIPE, ig_weight=0.02, potential=True)


def test_tips_by_hand():
    """arXiv 2603.22293, its code: alpha .02, the score 1.2."""
    expected = [0.014555, 0.014858, 1.204322]
    assert family.tips(PHI, 1.2, 0.02) == pytest.approx(expected, abs=1e-6)
    found = turn_rewards(rollout((1, 1, 1)), credit(np.diff(PHI), 1.2, PHI[0]), TIPS)
    assert found == pytest.approx(expected, abs=1e-6) and found.sum() == pytest.approx(1.2 - 0.02 * PHI[0])
    # Without a search the last turn is the first.
    once = turn_rewards(rollout((1,)), credit([], 1.2, PHI[0]), TIPS)
    assert once == pytest.approx([1.2 - 0.02 * PHI[0]])


@given(batches(), st.sampled_from([0.02, 0.5]))
def test_ragged_batches_earn_what_tips_pays(batch, alpha):
    for lengths, gains, outcome, _ in batch:
        phi = 0.3 + np.cumsum([0.0, *gains])
        made = Credit(phi, np.array(gains, np.float64), outcome, 0.0, 0.0, np.zeros(len(lengths)))
        found = turn_rewards(rollout(lengths), made, replace(TIPS, ig_weight=alpha))
        assert found == pytest.approx(family.tips(phi.tolist(), outcome, alpha), abs=1e-9)


@given(batches(), st.floats(0, 1), st.sampled_from(["token", "turn"]))
def test_a_potential_moves_values_and_not_advantages(batch, lam, level):
    """With gamma 1 and values lower by the potential of their turn's prefix."""
    plain, shaped = [], []
    for lengths, gains, outcome, values in batch:
        phi = 0.3 + np.cumsum([0.0, *gains])
        lower = np.array(values, np.float32) - np.repeat(phi, lengths).astype(np.float32)
        settings = replace(RAW, gae_lambda=lam, level=level)
        one = [rollout(lengths)], [credit(gains, outcome, 0.3)]
        plain += estimate(*one, [np.array(values, np.float32)], replace(RECIPE, algorithm="ppo"), settings)[0]
        shaped += estimate(*one, [lower], replace(RECIPE, potential=True), settings)[0]
    for ours, theirs in zip(shaped, plain, strict=True):
        assert ours.token_advantages == pytest.approx(theirs.token_advantages, abs=1e-4)


# --- the value loss and the head ---


def tensor(*numbers):
    return torch.tensor(numbers, requires_grad=True)


def test_the_clipped_value_loss_by_hand():
    # Clipped values .9, 1, .65, .4, .85; squared errors .0025 .0225 .09 .3025 .0225, of the clipped .0225 .0025 .09
    # .3025 .0225.
    values = tensor(1.0, 1.2, 0.65, 0.4, 0.85)
    inputs = ValueInputs(*(np.array(x, np.float32) for x in ([0.2] * 5, [1.05, 1.05, 0.95, 0.95, 1.0], VALUES)))
    loss, sums = value_loss(values, inputs, 0.5)
    assert loss.item() == pytest.approx(0.046)
    assert {name: float(x) for name, x in sums.items()} == pytest.approx(
        {"value": 0.046, "value_steps": 5, "value_clipped": 1}
    )
    loss.backward()  # .2 (V - return), 0 at the token that is too far
    assert values.grad.tolist() == pytest.approx([0.0, 0.03, -0.06, -0.11, -0.03])
    loss, sums = value_loss(values, inputs, 0.0)
    assert loss.item() == pytest.approx(0.044) and sums["value_clipped"] == 0


def test_tokens_without_weight_are_no_steps():
    inputs = ValueInputs(*(np.array(x, np.float32) for x in ([0.5, 0.0], [1.0, 1.0], [0.0, 0.0])))
    loss, sums = value_loss(tensor(2.0, 9.0), inputs, 0.5)
    assert loss.item() == pytest.approx(0.25)  # 2 is .5 (clipped: error .25) and .5 * 1 / 2 is the larger
    assert (int(sums["value_steps"]), int(sums["value_clipped"])) == (1, 0)


def test_the_head_begins_at_0_and_sees_directions_only():
    head = ValueHead(4)
    hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert head(hidden).tolist() == [0.0] * 3
    with torch.no_grad():
        head.weight.copy_(torch.tensor([3.0, 0.0, 4.0, 0.0]))
        head.bias.fill_(0.5)
    assert head(torch.tensor([[6.0, 0.0, -2.0, 0.0]])).item() == pytest.approx((3 * 6 - 4 * 2) / 8 + 0.5)
    assert torch.allclose(head(hidden), head(100 * hidden))
    assert head(hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("coefficient", [0.0, 0.25])
def test_the_coefficient_scales_what_reaches_the_model_and_nothing_else(coefficient):
    found = []
    for head in (ValueHead(4, coefficient), ValueHead(4)):
        with torch.no_grad():
            head.weight.copy_(torch.tensor([3.0, 0.0, 4.0, 1.0]))
        hidden = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        value = head(hidden)
        value.square().sum().backward()
        found.append((value, head.weight.grad, head.bias.grad, hidden.grad))
    (*ours, reached), (*theirs, whole) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert whole.abs().max() > 0.1
    assert reached is None if not coefficient else torch.allclose(reached, coefficient * whole)


# --- settings ---


def test_a_critics_settings_are_the_sections():
    given = "lr=0.5 coefficient=0.75 level=turn gae_lambda=0.25 clip=0.125 whiten=false"
    config = load(None, ["algorithm.name=ppo", *(f"critic.{key}" for key in given.split())])
    recipe = recipe_of(config.algorithm)
    assert critic_settings_of(config, recipe) == CriticSettings(0.5, 0.75, "turn", 0.25, 0.125, False)
    assert critic_settings_of(config, Recipe()) is None
    assert CriticSettings() == critic_settings_of(load(None, ["algorithm.name=ppo"]), recipe)


def test_gamma_is_1_unless_given():
    of = lambda *given: recipe_of(load(None, [f"algorithm.{key}" for key in given]).algorithm).discount  # noqa: E731
    assert of("name=ppo", "preset=dr_venus") == of("name=ppo_ig", "preset=dr_venus") == 1.0
    assert of("name=ppo", "gamma=0.9") == of("name=ppo_ig", "gamma=0.9") == 0.9
    assert of("name=grpo", "gamma=0.9") == 1.0


@pytest.mark.parametrize(
    "given", ["pool=joint", "ig_center=false", "ig_min_std=1", "outcome_min_std=1", "min_var=1", "accumulate=none",
              "adaptive_clip=0.3"],
)  # fmt: skip
def test_normalisation_of_groups_is_refused_where_given(tmp_path, given):
    with pytest.raises(InputError) as refused:
        load(None, ["algorithm.name=ppo_ig", f"algorithm.{given}"])
    assert f"algorithm.{given.partition('=')[0]} does nothing with algorithm.name=ppo_ig" in str(refused.value)
    assert "\n" not in str(refused.value)
    for preset in ("paper", "paper_v1", "robust", "a2tgpo", "dr_venus"):
        config = load(None, ["algorithm.name=ppo", f"algorithm.preset={preset}"])
        (tmp_path / "stored.yaml").write_text(config.dump())
        assert load(tmp_path / "stored.yaml") == config and config.algorithm.adaptive_clip == 0


def test_a_critic_without_its_algorithm_is_told():
    (warning,) = settings_warnings(load(None, ["critic.lr=0.5", "critic.level=turn"]))
    assert warning == (
        "critic.lr=0.5, critic.level=turn does nothing: algorithm.name=igpo has no critic; use ppo or ppo_ig"
    )
    assert settings_warnings(load(None, ["algorithm.name=ppo", "critic.lr=0.5"])) == []
    (warning,) = settings_warnings(load(None, ["algorithm.name=ppo", "algorithm.ig_potential=true"]))
    assert warning == "algorithm.ig_potential=True does nothing: algorithm.name=ppo has no gains"


NOTHING = Scoring(lambda question: ())


def test_a_critic_takes_two_passes():
    config = load(None, ["algorithm.name=ppo", "rollout.group_size=1"])
    recipe = recipe_of(config.algorithm)
    assert choose_passes(config, recipe, NOTHING) == "two"
    asked = load(None, ["algorithm.name=ppo", "algorithm.passes=one"])
    with pytest.raises(InputError, match=r"^algorithm.passes=one: algorithm.name=ppo needs the critic's values of the"):
        choose_passes(asked, recipe, NOTHING)
    chosen = load(None, ["algorithm.name=ppo", "rollout.oversample=4", "rollout.skip_collapsed=true"])
    with pytest.raises(InputError, match=r"^rollout.skip_collapsed: algorithm.name=ppo estimates advantages with a"):
        choose_passes(chosen, recipe, NOTHING)


# --- that it learns ---


def test_values_learn_what_hidden_states_tell():
    """Returns that depend on the question alone: 0 or 1."""
    rng = np.random.default_rng(0)
    groups = [random_group(rng) for _ in range(6)]
    numbers = np.split(np.arange(24), 6)
    lm = build(VOCAB, hidden_size=32, layers=1, heads=2, kv_heads=2, ffn_size=32, max_tokens=64, tie_embeddings=True,
               seed=0)  # fmt: skip
    learner = Learner(lm, lr=1e-3, factor=lambda step: 1.0, critic=CriticSettings(lr=0.1, coefficient=1.0, clip=0.0))
    plan = pack(make_trees(groups, None, numbers))
    n = plan.n_decisions
    returns, zeros = (plan.rollout[:n] // 4 % 2).astype(np.float32), np.zeros(n, np.float32)
    assert learner(plan).critic.tolist() == [0.0] * n
    for _ in range(60):
        inputs = ValueInputs(np.full(n, 1 / n, np.float32), returns, zeros)
        learner.backward(learner(plan, LossInputs(zeros, zeros, critic=inputs)).loss)
        learner.step()
    assert (learner(plan).critic - returns).var() < 0.1 * returns.var()
