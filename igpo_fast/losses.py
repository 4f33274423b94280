"""The loss's global token weights. Its settings and the op itself are ``igpo_kernels.policy_loss``'s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from igpo_kernels import LossSettings

__all__ = ["Aggregation", "LossSettings", "token_weights"]

Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"]


def token_weights(decision_tokens_per_rollout: Sequence[int], aggregation: Aggregation) -> np.ndarray:
    """The weight of every decision token of each rollout: float64 [R].

    ``token_mean``: 1 / all tokens; ``seq_mean_token_mean``: 1 / (R len_r) (the paper's Eq. 7);
    ``seq_mean_token_sum``: 1 / R (the authors' code).
    Global: ``decision_tokens_per_rollout`` [R] lists the rollouts of the whole update, all packs and ranks,
    whatever their advantages, so that packs, accumulation and ranks only add.

    Raises:
        ValueError: no rollouts, or a rollout without decision tokens.

    >>> token_weights([1, 4], "seq_mean_token_mean").tolist()
    [0.5, 0.125]
    """
    lengths = np.asarray(decision_tokens_per_rollout, dtype=np.float64)
    if lengths.size == 0 or lengths.min() < 1:
        raise ValueError("token_weights: expected one rollout or more, each with at least one decision token")
    if aggregation == "token_mean":
        return np.full(len(lengths), 1 / lengths.sum())
    if aggregation == "seq_mean_token_mean":
        return 1 / (len(lengths) * lengths)
    return np.full(len(lengths), 1 / len(lengths))
