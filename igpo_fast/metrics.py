"""One step's numbers: collected from the packs of its updates, timed, warned about, sent to a tracker."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch

from igpo_fast.files import storage
from igpo_fast.tools.base import COUNTS

KEYS = (
    "step", "reward/outcome", "reward/f1", "reward/em", "reward/ig_mean", "reward/ig_abs", "reward/ig_zero",
    "reward/ig_cum_negative", "value/first", "value/last", "group/collapsed_outcome", "group/collapsed",
    "turns/mean", "turns/format_error", "tokens/packed", "tokens/rollout", "tokens/scored", "sharing/ratio",
    "loss/policy", "loss/kl", "loss/entropy", "loss/clip_frac", "loss/grad_norm", "mismatch/logp_abs_diff",
    "mismatch/logp_abs_max", *(f"tool/{name}" for name in COUNTS),
    "time/rollout", "time/score", "time/train", "time/sync", "time/step", "memory/peak_gb",
    "eval/f1", "eval/f1_se", "eval/em", "eval/turns", "eval/search_failures",
)  # fmt: skip
"""The order of a row; other keys follow."""

TOKEN_MEANS = {
    "loss/kl": "kl",
    "loss/entropy": "entropy",
    "loss/clip_frac": "clipped",
    "mismatch/logp_abs_diff": "mismatch",
}
"""Row key -> the pack sum that is divided by the pack's ``tokens``."""


class StepMetrics:
    """Collects a step's row.

    >>> metrics = StepMetrics(step=3)
    >>> metrics.update([{"policy": 0.5, "tokens": 4, "kl": 1}, {"policy": 0.25, "tokens": 4, "kl": 3}], 2)
    >>> row = metrics.row()
    >>> row["loss/policy"], row["loss/kl"], row["loss/grad_norm"]
    (0.75, 0.5, 2.0)
    """

    def __init__(self, step: int, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start = clock()
        self._values: dict[str, float] = {"step": step}
        self._times: dict[str, float] = {}
        self._sums: dict[str, float | torch.Tensor] = {}
        self._grad_norms: list[float | torch.Tensor] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/NAME``; work queued on a GPU counts."""
        start = self._clock()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._times[f"time/{name}"] = self._times.get(f"time/{name}", 0.0) + self._clock() - start

    def set(self, values: Mapping[str, float]) -> None:
        """Put finished numbers into the row; a key set twice takes the later one."""
        self._values |= values

    def add(self, values: Mapping[str, float]) -> None:
        """Add to the row's counts (tokens of each pack)."""
        for key, value in values.items():
            self._values[key] = self._values.get(key, 0) + value

    def largest(self, values: Mapping[str, float]) -> None:
        """Keep the larger of these and what the row has under the same keys; NaN stays."""
        for key, value in values.items():
            self._values[key] = float(np.maximum(self._values.get(key, -math.inf), value))

    def update(self, packs: Iterable[Mapping[str, float | torch.Tensor]], grad_norm: float | torch.Tensor) -> None:
        """Count one optimiser update.

        Args:
            packs: per pack, what ``igpo_kernels.policy_loss`` reports: sums over its pairs (``policy``,
                weighted, and ``tokens``, ``kl``, ``entropy``, ``clipped``, ``mismatch``). Scalars; tensors
                are read in ``row`` only, so that no GPU is waited for.
            grad_norm: before clipping.
        """
        for pack in packs:
            for name in ("policy", "tokens", *TOKEN_MEANS.values()):
                if name in pack:
                    self._sums[name] = self._sums.get(name, 0.0) + pack[name]
        self._grad_norms.append(grad_norm)

    def row(self) -> dict[str, float]:
        """The row, keys in the order of ``KEYS``.

        ``loss/policy`` and ``loss/grad_norm`` are means over updates; ``loss/kl``, ``loss/entropy``,
        ``loss/clip_frac`` and ``mismatch/logp_abs_diff`` over decision tokens; times are seconds,
        ``time/step`` since this object was made. NaN where a mean is over nothing.
        """
        row = dict(self._values)
        updates = len(self._grad_norms)
        sums = {name: float(value) for name, value in self._sums.items()}
        row["loss/policy"] = _ratio(sums.get("policy", 0.0), updates)
        row["loss/grad_norm"] = _ratio(sum(map(float, self._grad_norms)), updates)
        row |= {key: _ratio(sums[name], sums["tokens"]) for key, name in TOKEN_MEANS.items() if name in sums}
        row |= self._times
        row["time/step"] = self._clock() - self._start
        row["memory/peak_gb"] = peak_memory_gb()
        return ordered(row)


def ordered(row: Mapping[str, float]) -> dict[str, float]:
    """A row with its keys in the order of ``KEYS``; others follow."""
    return {key: row[key] for key in KEYS if key in row} | row


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan


def peak_memory_gb() -> float:
    """Most memory held so far, in GB (1e9 bytes): torch's on a GPU in use, else the resident set."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


PATIENCE = 3
"""Rows in a row past the limit before a warning."""


@dataclass(frozen=True)
class Signature:
    """A metric that, past a limit, tells of a known failure (algorithm.md, "What is known to go wrong")."""

    key: str
    what: str
    remedy: str
    limit: float | Callable[[float], float]
    """A number, or a function of the metric's early level; then the early rows themselves are not judged."""
    above: bool = True
    """Whether high values are the bad ones."""
    patience: int = PATIENCE
    """Rows in a row past the limit before a warning."""
    infinite: bool = False
    """Whether what is not finite (null in metrics.jsonl) is past the limit; else it is not judged."""


EARLY = 5
"""Rows whose mean is a metric's early level."""
RELEASE = 0.1
"""A metric must come back by this share of the limit before it can be warned about again."""

SIGNATURES = (
    Signature(
        "reward/ig_zero",
        "gains are all zero",
        "the answer's probability is saturated or hopeless: try the other algorithm.basis, "
        "algorithm.answers=max, or a longer warm start (sft.noisy_steps)",
        limit=0.95,
    ),
    Signature(
        "reward/ig_cum_negative",
        "most rollouts lose information",
        "the policy drifts from the truth: lower train.lr or raise algorithm.kl",
        limit=0.6,
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
        "the policy dissolves, shorter rollouts often follow: lower train.lr or algorithm.entropy, "
        "or try algorithm.preset=robust",
        limit=lambda early: min(1.5 * early, 1.3) if early < 1.3 else 1.5 * early,
    ),
    Signature(
        "turns/mean",
        "rollouts shorten",
        "average turns are punished: try algorithm.ig_center=false or a lower algorithm.gamma",
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
        "sampled log-probabilities are of another policy: try algorithm.importance=token or model.dtype=float32",
        limit=0.1,
        patience=1,
        infinite=True,
    ),
)


def warnings_for(rows: Sequence[Mapping], limits: Mapping[str, float] = MappingProxyType({})) -> list[str]:
    """Warnings that the last of a run's rows raises, a line each; ``limits`` replace those of the metrics they name.

    A signature warns once, when its metric has been past the limit for ``patience`` rows, and again only
    after it came back clearly. It depends on the rows alone, so a resumed run repeats nothing.
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
        early = sum(values[:EARLY]) / len(values[:EARLY])
        limit, judged, began = limit(early), values[EARLY:], f" (early level {early:.3g})"
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


def _level(row: Mapping, signature: Signature) -> float | None:
    """A row's value as it is judged; None if it is not."""
    value = row.get(signature.key)
    if _finite(value):
        return value
    return math.inf if signature.infinite and signature.key in row else None


def _finite(value) -> bool:
    return value is not None and math.isfinite(value)


@contextmanager
def tracker(name: str, folder: Path, step: int) -> Iterator[Callable[[Mapping], None]]:
    """What sends rows to ``run.tracker``.

    Args:
        name: ``none`` or ``tensorboard``.
        folder: where TensorBoard's files go.
        step: the last finished one; what an earlier session logged after it is hidden.
    """
    if name == "none":
        yield lambda row: None
        return
    from torch.utils.tensorboard import SummaryWriter

    with storage(folder):
        writer = SummaryWriter(str(folder), purge_step=step + 1)

    def log(row: Mapping) -> None:
        with storage(folder):
            for key, value in row.items():
                if key != "step" and _finite(value):
                    writer.add_scalar(key, value, int(row["step"]))
            writer.flush()

    try:
        yield log
    finally:
        with storage(folder):
            writer.close()
