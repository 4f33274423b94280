"""Sampling: noise seeded by rollout and position, and the distributions to draw from.

A draw depends on (key, index, probabilities) only: not on the batch, the order of requests or a generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from igpo_fast.engines.base import Sampling
from igpo_fast.errors import DivergedError

_WEYL = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood, 2014): a bijection of uint64 in which every output bit
    depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream(key: Sequence[int]) -> np.uint64:
    """The noise stream of a rollout: a hash of its key, a sequence of integers."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix((state ^ np.uint64(part % 2**64)) + _WEYL)
    return state[0]


def uniform(streams_B: np.ndarray, index_B: np.ndarray) -> np.ndarray:
    """One number in [0, 1) for each (stream, counter): uint64 [B], int64 [B] -> float64 [B]."""
    bits = _mix(streams_B + (index_B.astype(np.uint64) + np.uint64(1)) * _WEYL)
    return (bits >> np.uint64(11)) * 2.0**-53


def draw(
    logits_BV: torch.Tensor, temperature_B: torch.Tensor, uniform_B: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row from softmax(logits / temperature) by inverting its distribution function.

    Args:
        logits_BV: float32 [B, V].
        temperature_B: float32 [B]; 0 takes the likeliest token, with its log-probability at temperature 1.
        uniform_B: float64 [B] in [0, 1).
    Returns:
        tokens int64 [B] and their log-probabilities float32 [B] in nats; NaN where the logits are not finite.
    """
    greedy_B = temperature_B == 0
    logp_BV = (logits_BV / temperature_B.masked_fill(greedy_B, 1)[:, None]).log_softmax(-1)
    # The first token whose cumulative probability exceeds u * total: the sum rises there, so it is possible.
    cumulative_BV = logp_BV.exp().cumsum(-1, dtype=torch.float64)
    threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
    token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True).squeeze(-1)
    token_B = torch.where(greedy_B, logp_BV.argmax(-1), token_B)
    token_B = token_B.clamp(max=logp_BV.shape[-1] - 1)  # NaN logits: report NaN instead of indexing outside
    return token_B, logp_BV.gather(-1, token_B[:, None]).squeeze(-1)


def require_finite(logp: np.ndarray) -> None:
    """Raises DivergedError if a sampled token's log-probability is not finite."""
    if not np.isfinite(logp).all():
        raise DivergedError(
            "sampling: the model's logits are not finite, so training has diverged; lower train.lr (at step 1 "
            "sft.lr) or set train.precision=float32"
        )


def restrict(logits_V: torch.Tensor, sampling: Sampling, seen: torch.Tensor) -> torch.Tensor:
    """Logits under a repetition penalty, top-k and top-p, in this order; excluded tokens get -inf.

    For evaluation only: log-probabilities are then of the restricted distribution, not of the policy.

    Args:
        logits_V: float32 [V].
        seen: int64 [n], the tokens of prompt and turns so far, to which the penalty applies.
    """
    logits_V = logits_V.clone()
    if sampling.repetition_penalty != 1:
        old = logits_V[seen]
        penalty = sampling.repetition_penalty
        logits_V[seen] = torch.where(old > 0, old / penalty, old * penalty)
    if 0 < sampling.top_k < len(logits_V):
        kept = logits_V.topk(sampling.top_k).indices
        logits_V = torch.full_like(logits_V, -torch.inf).index_copy(0, kept, logits_V[kept])
    if sampling.top_p < 1:
        values, order = (logits_V / (sampling.temperature or 1)).sort(descending=True)
        probability = values.softmax(-1)
        # A token stays if the likelier tokens together do not reach top_p, so the likeliest one always stays.
        beyond = probability.cumsum(-1) - probability >= sampling.top_p
        beyond[0] = False
        logits_V[order[beyond]] = -torch.inf
    return logits_V
