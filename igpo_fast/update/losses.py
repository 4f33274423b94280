"""The loss's settings and global token weights; the op itself is ``igpo_kernels.policy_loss``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from igpo_fast.types import Aggregation
from igpo_kernels import LossSettings

if TYPE_CHECKING:
    from igpo_fast import config
    from igpo_fast.update.policy import LossInputs


def loss_settings_of(algorithm: config.Algorithm) -> LossSettings:
    """The settings that the configuration's section ``algorithm`` describes."""
    return LossSettings(
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
        kl=algorithm.kl,
        entropy=algorithm.entropy,
        surrogate=algorithm.surrogate,
        ratio=algorithm.ratio,
        importance=algorithm.importance,
        importance_mode=algorithm.importance_mode,
        importance_cap=algorithm.importance_cap,
        importance_floor=algorithm.importance_floor,
    )


def token_weights(
    decision_tokens_per_rollout: Sequence[int], aggregation: Aggregation, most_tokens: int | None = None
) -> np.ndarray:
    """The weight of every decision token of each rollout: float64 [R].

    ``token_mean``: 1 / all tokens; ``seq_mean_token_mean``: 1 / (R len_r) (the paper's Eq. 7);
    ``seq_mean_token_sum``: 1 / R (the authors' code); ``seq_mean_token_sum_norm``: 1 / (R most_tokens) (Dr. GRPO).
    Weights are global: ``decision_tokens_per_rollout`` [R] lists the rollouts of the whole update, of all packs and
    ranks and with any advantage, so that packs, accumulation and ranks only add.

    Args:
        most_tokens: decision tokens of the longest rollout that the settings allow (``passes.most_decision_tokens``).
    Raises:
        ValueError: no rollouts, a rollout without decision tokens, or ``most_tokens`` is needed and missing.

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
    if aggregation == "seq_mean_token_sum":
        return np.full(len(lengths), 1 / len(lengths))
    if not most_tokens:
        raise ValueError("token_weights: seq_mean_token_sum_norm needs most_tokens=")
    return np.full(len(lengths), 1 / (len(lengths) * most_tokens))


def importance_sums(
    trainer_logp: np.ndarray, engine_logp: np.ndarray, rollout: np.ndarray, settings: LossSettings
) -> dict[str, float]:
    """Sums over a pack's decision tokens of their importance weights, which a step's shares come from.

    Args:
        trainer_logp: numerator of the importance weights: the old log-probabilities, else this pass's. float32 [D].
        engine_logp: the engine's sampled log-probabilities: float32 [D].
        rollout: each token's rollout: integers [D]; with ``importance`` of ``sequence`` and ``geometric`` the pack has
            all tokens of each.
    Returns:
        The number of tokens whose weight is outside its bounds, as ``capped`` or, with ``importance_mode=mask``,
        ``masked``; and the sums of weights and of their squares, once bounded, as ``importance`` and
        ``squared_importance``. Nothing without a correction.
    """
    if settings.importance == "none":
        return {}
    gap = np.asarray(trainer_logp, dtype=np.float64) - engine_logp
    if settings.needs_sequence:
        number = np.unique(rollout, return_inverse=True)[1]
        total = np.bincount(number, gap)
        gap = (total / np.bincount(number) if settings.importance == "geometric" else total)[number]
    floor, cap = settings.importance_floor, settings.importance_cap
    with np.errstate(over="ignore"):  # a weight of inf is above the cap
        weight = np.exp(gap)
    outside = (weight < floor) | (weight > cap)
    masked = settings.importance_mode == "mask"
    weight = np.where(outside, 0.0, weight) if masked else weight.clip(floor, cap)
    return {
        "masked" if masked else "capped": int(outside.sum()),
        "importance": float(weight.sum()),
        "squared_importance": float(np.square(weight).sum()),
    }


def measured(sums: Mapping[str, float], inputs: LossInputs) -> dict[str, float]:
    """``policy_loss``'s sums without those that are 0 only because their input was not given."""
    sources = {"kl": inputs.ref_logp, "mismatch": inputs.engine_logp}
    return {name: value for name, value in sums.items() if name not in sources or sources[name] is not None}
