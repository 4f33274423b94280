"""Global token weights, and what is counted of a pack beside the loss."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.config import load
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.update.losses import importance_sums, loss_settings_of, measured, token_weights
from igpo_kernels import LossSettings

LENGTHS = [1, 2, 5]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 8, 1 / 8, 1 / 8]),
        ("seq_mean_token_mean", [1 / 3, 1 / 6, 1 / 15]),
        ("seq_mean_token_sum", [1 / 3, 1 / 3, 1 / 3]),
        ("seq_mean_token_sum_norm", [1 / 30, 1 / 30, 1 / 30]),
    ],
)
def test_weights(aggregation, expected):
    weights = token_weights(LENGTHS, aggregation, most_tokens=10)
    assert weights.dtype == np.float64
    assert weights == pytest.approx(expected)


def test_weights_are_the_aggregation():
    # Per-token losses 3 | 1 2 | 0 1 2 3 4; sums 3, 3, 10; means 3, 1.5, 2.
    losses = [[3.0], [1.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0]]
    for aggregation, expected in (
        ("token_mean", 16 / 8),
        ("seq_mean_token_mean", 6.5 / 3),
        ("seq_mean_token_sum", 16 / 3),
        ("seq_mean_token_sum_norm", (0.3 + 0.3 + 1) / 3),
    ):
        weights = token_weights(LENGTHS, aggregation, most_tokens=10)
        assert sum(w * sum(t) for w, t in zip(weights, losses, strict=True)) == pytest.approx(expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_mean_aggregations_weigh_one_in_all(lengths):
    for aggregation in ("token_mean", "seq_mean_token_mean"):
        assert token_weights(lengths, aggregation) @ np.array(lengths) == pytest.approx(1.0)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_refuses_rollouts_without_decision_tokens(lengths):
    with pytest.raises(ValueError, match="decision token"):
        token_weights(lengths, "token_mean")


def test_the_constant_length_must_be_given():
    with pytest.raises(ValueError, match="most_tokens"):
        token_weights([1], "seq_mean_token_sum_norm")


def test_a_constant_length_weighs_every_token_alike_whatever_the_lengths():
    # Dr. GRPO: a token of a long rollout weighs what a token of a short one does, in every batch.
    for lengths in ([1, 2], [9, 3]):
        assert token_weights(lengths, "seq_mean_token_sum_norm", 20).tolist() == [1 / 40, 1 / 40]


TRAINER = np.log(np.array([0.5, 0.4, 0.9, 0.3], dtype=np.float32))
ENGINE = np.log(np.array([0.2, 0.4, 0.5, 0.5], dtype=np.float32))
ROLLOUT = np.array([7, 7, 4, 4])
# Weights 2.5, 1, 1.8, .6; of the rollouts 2.5 and 1.08.


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(importance="none"), {}),
        (dict(importance="token"), {"capped": 1}),
        (dict(importance="token", importance_cap=1.5), {"capped": 2}),
        (dict(importance="token", importance_mode="mask"), {"masked": 1}),
        (dict(importance="sequence"), {"capped": 2}),
        (dict(importance="sequence", importance_mode="mask", importance_cap=1.05), {"masked": 4}),
        (dict(importance="sequence", importance_cap=3.0), {"capped": 0}),
        (dict(importance="token", importance_floor=0.8), {"capped": 2}),
        (dict(importance="token", importance_floor=0.8, importance_mode="mask"), {"masked": 2}),
        (dict(importance="geometric", importance_cap=1.5), {"capped": 2}),
        (dict(importance="geometric", importance_cap=1.6), {"capped": 0}),
    ],
)
def test_tokens_outside_the_bounds_are_counted(settings, expected):
    sums = importance_sums(TRAINER, ENGINE, ROLLOUT, LossSettings(**settings))
    assert {name: sums[name] for name in sums if name in ("capped", "masked")} == expected


# Log ratios of three rollouts; token ratios 1.105, .223, 2.226 | 1, 1.051 | .980, 1.010, 1.010, .961.
RATIOS = np.array([0.1, -1.5, 0.8, 0, 0.05, -0.02, 0.01, 0.01, -0.04])
OWNER = np.repeat([2, 0, 5], [3, 2, 4])


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(importance="token", importance_cap=1e6), 0.8297919983),
        (dict(importance="token"), 0.8578443868),
        (dict(importance="token", importance_mode="mask", importance_floor=0.5), 0.7762923627),
        (dict(importance="sequence"), 0.9409542259),
        (dict(importance="geometric", importance_mode="mask", importance_floor=0.99), 0.6664831375),
        (dict(importance="token", importance_mode="mask", importance_floor=0.5, importance_cap=0.6), 0.0),
        (dict(importance="token", importance_floor=2.0), 1.0),  # all weigh 2
    ],
)
def test_the_effective_sample_size_by_hand(settings, expected):
    # In packs of two rollouts and of one; shares of 9 tokens, masked ones included.
    packs = []
    for some in (OWNER != 0, OWNER == 0):
        sums = importance_sums(RATIOS[some], np.zeros(some.sum()), OWNER[some], LossSettings(**settings))
        packs.append(sums | {"policy": 0.0, "tokens": some.sum()})
    metrics = StepMetrics(1)
    metrics.update(packs, 1.0)
    assert metrics.row()["importance/ess"] == pytest.approx(expected, abs=1e-9)


def test_weights_that_overflow_are_capped():
    sums = importance_sums(np.array([1e4]), np.zeros(1), np.zeros(1), LossSettings(importance="token"))
    assert sums == {"capped": 1, "importance": 2.0, "squared_importance": 4.0}


def test_what_was_not_measured_is_left_out():
    sums = {"policy": 0.5, "tokens": 4.0, "kl": 0.0, "mismatch": 0.0, "entropy": 1.0}
    nothing = SimpleNamespace(ref_logp=None, engine_logp=None)
    assert measured(sums, nothing) == {"policy": 0.5, "tokens": 4.0, "entropy": 1.0}
    assert measured(sums, SimpleNamespace(ref_logp=TRAINER, engine_logp=ENGINE)) == sums


def test_loss_settings_are_the_configured_ones():
    given = dict(
        clip_low=0.1, clip_high=0.3, kl=0.5, entropy=0.25, surrogate="vespo", ratio="turn", importance="sequence",
        importance_mode="mask", importance_cap=4.0, importance_floor=0.5,
    )  # fmt: skip
    config = load(None, [f"algorithm.{key}={value}" for key, value in given.items()])
    assert loss_settings_of(config.algorithm) == LossSettings(**given)
    named = {field.name for field in fields(LossSettings) if not field.name.startswith(("sapo_", "vespo_"))}
    assert {*given, "dual_clip", "unbiased_kl"} == named
    assert loss_settings_of(load(None, ["algorithm.dual_clip=3"]).algorithm).dual_clip == 3
    ratio = lambda *overrides: loss_settings_of(load(None, overrides).algorithm).ratio  # noqa: E731
    assert (ratio(), ratio("algorithm.name=gspo")) == ("token", "sequence")
    assert ratio("algorithm.name=gspo", "algorithm.ratio=turn") == "turn"


def test_which_settings_need_to_know_the_turn_or_rollout_of_a_pair():
    needs = lambda **given: (LossSettings(**given).needs_segment, LossSettings(**given).needs_sequence)  # noqa: E731
    assert needs(importance="token") == (False, False)
    assert needs(importance="sequence") == needs(importance="geometric") == (False, True)
    assert needs(ratio="sequence") == needs(ratio="turn", importance="token") == (True, False)
