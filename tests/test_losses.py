"""Global token weights."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.losses import token_weights

LENGTHS = [1, 2, 5]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        ("token_mean", [1 / 8, 1 / 8, 1 / 8]),
        ("seq_mean_token_mean", [1 / 3, 1 / 6, 1 / 15]),
        ("seq_mean_token_sum", [1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_weights(aggregation, expected):
    weights = token_weights(LENGTHS, aggregation)
    assert weights.dtype == np.float64
    assert weights == pytest.approx(expected)


def test_weights_are_the_aggregation():
    # Per-token losses 3 | 1 2 | 0 1 2 3 4; sums 3, 3, 10; means 3, 1.5, 2.
    losses = [[3.0], [1.0, 2.0], [0.0, 1.0, 2.0, 3.0, 4.0]]
    for aggregation, expected in (
        ("token_mean", 16 / 8),
        ("seq_mean_token_mean", 6.5 / 3),
        ("seq_mean_token_sum", 16 / 3),
    ):
        weights = token_weights(LENGTHS, aggregation)
        assert sum(w * sum(t) for w, t in zip(weights, losses, strict=True)) == pytest.approx(expected)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_mean_aggregations_weigh_one_in_all(lengths):
    for aggregation in ("token_mean", "seq_mean_token_mean"):
        assert token_weights(lengths, aggregation) @ np.array(lengths) == pytest.approx(1.0)


@pytest.mark.parametrize("lengths", [[], [3, 0]])
def test_refuses_rollouts_without_decision_tokens(lengths):
    with pytest.raises(ValueError, match="decision token"):
        token_weights(lengths, "token_mean")
