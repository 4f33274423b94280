"""Global token weights, and what is counted of a pack beside the loss."""

from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.config import load
from igpo_fast.update.losses import importance_counts, loss_settings_of, measured, token_weights
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
    ],
)
def test_tokens_beyond_the_cap_are_counted(settings, expected):
    assert importance_counts(TRAINER, ENGINE, ROLLOUT, LossSettings(**settings)) == expected


def test_what_was_not_measured_is_left_out():
    sums = {"policy": 0.5, "tokens": 4.0, "kl": 0.0, "mismatch": 0.0, "entropy": 1.0}
    nothing = SimpleNamespace(ref_logp=None, engine_logp=None)
    assert measured(sums, nothing) == {"policy": 0.5, "tokens": 4.0, "entropy": 1.0}
    assert measured(sums, SimpleNamespace(ref_logp=TRAINER, engine_logp=ENGINE)) == sums


def test_loss_settings_are_the_configured_ones():
    given = dict(
        clip_low=0.1, clip_high=0.3, dual_clip=3.0, kl=0.5, entropy=0.25, importance="sequence", importance_mode="mask",
        importance_cap=4.0,
    )  # fmt: skip
    config = load(None, ["algorithm.name=gspo", *(f"algorithm.{key}={value}" for key, value in given.items())])
    assert loss_settings_of(config.algorithm) == LossSettings(sequence_ratio=True, **given)
    assert set(given) | {"sequence_ratio"} == {field.name for field in fields(LossSettings)}
    assert not loss_settings_of(load().algorithm).sequence_ratio


def test_which_settings_need_to_know_the_rollout_of_a_pair():
    assert not LossSettings(importance="token").needs_sequence
    assert LossSettings(importance="sequence").needs_sequence and LossSettings(sequence_ratio=True).needs_sequence
