"""Warnings about known failures, recognised from a run's rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from igpo_fast.jsonl import finite

PATIENCE = 3
"""Rows in a row past the limit before a warning."""


@dataclass(frozen=True)
class Signature:
    """A metric that, past a limit, indicates a known way in which training fails."""

    key: str
    what: str
    remedy: str
    limit: float | Callable[[float], float]
    """A number, or a function of the metric's early level if its change is bad. Rows then count as early, and are not
    judged, until the policy has changed, but at least ``EARLY`` of them."""
    above: bool = True
    """Whether high values are bad."""
    patience: int = PATIENCE
    """Rows in a row past the limit before a warning."""
    infinite: bool = False
    """Whether non-finite values (null in metrics.jsonl) are past the limit; else they are not judged."""


EARLY = 5
"""Least number of rows whose mean is a metric's early level."""
RELEASE = 0.1
"""Share of the limit by which a metric must come back before it is warned about again."""

SIGNATURES = (
    Signature(
        "reward/ig_zero",
        "gains are all zero",
        "the answer's probability is saturated or hopeless: try the other algorithm.basis, "
        "algorithm.answers=max, or a longer warm start (sft.noisy_steps)",
        limit=0.95,
    ),
    Signature(
        "reward/ig_gated",
        "the gate drops most gains",
        "algorithm.ig_gate is in the unit of algorithm.basis and may be too large for this model's gains: lower it",
        limit=0.98,  # of a policy that has hardly learnt to search most gains are noise, and rightly gated
        patience=20,
    ),
    Signature(
        "reward/ig_cum_negative",
        "most rollouts lose information",
        "the policy drifts from the correct answers: lower train.lr or raise algorithm.kl",
        limit=lambda early: max(0.6, 1.2 * early),
    ),
    Signature(
        "turns/format_error",
        "no rollout answers",
        "turns/truncated_* tell whether limits end them (rollout.max_turns, rollout.max_turn_tokens, "
        "rollout.max_tokens); else the policy does not write the format: read rollouts/, try another rollout.dialect "
        "or a longer warm start (sft.clean_steps)",
        limit=0.95,
    ),
    Signature(
        "group/collapsed",
        "groups collapse",
        "equal rollouts teach nothing: raise rollout.group_size or rollout.temperature, or lower algorithm.ig_gate",
        limit=0.9,
    ),
    Signature(
        "loss/entropy",
        "entropy rises",
        "the policy becomes random, and shorter rollouts often follow: lower train.lr or algorithm.entropy, "
        "or try algorithm.preset=robust",
        limit=lambda early: min(1.5 * early, 1.3) if early < 1.3 else 1.5 * early,
    ),
    Signature(
        "turns/mean",
        "rollouts shorten",
        "average turns get negative advantages: try algorithm.ig_center=false or a lower algorithm.gamma",
        limit=lambda early: 0.6 * early,
        above=False,
    ),
    Signature(
        "loss/clip_frac",
        "many ratios are clipped",
        "updates move too far: lower train.lr or train.updates",
        limit=0.3,
    ),
    Signature(
        "mismatch/logp_abs_diff",
        "engine and trainer disagree",
        "sampled log-probabilities are of another policy: try algorithm.importance=token or train.precision=float32",
        limit=0.1,
        patience=1,
        infinite=True,
    ),
)


def warnings_for(rows: Sequence[Mapping], limits: Mapping[str, float] = MappingProxyType({})) -> list[str]:
    """Warnings for the last of a run's rows, one line each; ``limits`` replace those of the metrics that they name.

    A signature warns once, after its metric was past the limit for ``patience`` rows, and again only after it came
    back clearly. Warnings depend on the rows alone, so a resumed run repeats none.
    """
    signatures = [replace(s, limit=limits[s.key]) if s.key in limits else s for s in SIGNATURES]
    return [message for signature in signatures if (message := _warning(signature, rows))]


def _warning(signature: Signature, rows: Sequence[Mapping]) -> str | None:
    levels = [_level(row, signature) for row in rows]
    if not levels or levels[-1] is None:
        return None
    values = [level for level in levels if level is not None]
    limit, judged, began = signature.limit, values, ""
    if callable(limit):
        start = max(EARLY, _unchanged([row for row, level in zip(rows, levels, strict=True) if level is not None]))
        early = sum(values[:start]) / len(values[:start])
        limit, judged, began = limit(early), values[start:], f" (early level {early:.3g})"
    sign = 1 if signature.above else -1
    streak, warned, new = 0, False, False
    for value in judged:
        excess = sign * (value - limit)
        streak = streak + 1 if excess > 0 else 0
        warned = warned and excess >= -RELEASE * limit
        new = streak >= signature.patience and not warned
        warned = warned or new
    if not new:
        return None
    steps = f" for {signature.patience} steps" if signature.patience > 1 else ""
    past = f"{'above' if signature.above else 'below'} {limit:.3g}{steps}"
    return f"{signature.what}: {signature.key} {values[-1]:.3g}, {past}{began}; {signature.remedy}"


def _unchanged(rows: Sequence[Mapping]) -> int:
    """Number of rows whose rollouts are of the initial policy: a gradient of 0 changes nothing, and a row's rollouts
    come before its update."""
    changing = (number for number, row in enumerate(rows, 1) if row.get("loss/grad_norm", math.nan) != 0)
    return next(changing, len(rows))


def _level(row: Mapping, signature: Signature) -> float | None:
    """A row's value for judging; None if it is not judged."""
    value = finite(row.get(signature.key))
    if value is not None:
        return value
    return math.inf if signature.infinite and signature.key in row else None
