"""One step's numbers: collected from the packs of its updates, timed, put in order."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch

KEYS = (
    "step", "train/lr", "reward/outcome", "reward/f1", "reward/em", "reward/ig_mean", "reward/ig_abs", "reward/ig_zero",
    "reward/ig_gated", "reward/ig_cum_negative", "reward/ig_nan", "value/first", "value/last",
    "group/collapsed_outcome", "group/collapsed", "turns/mean", "turns/format_error", "turns/truncated_tokens",
    "turns/truncated_turns", "tokens/packed", "tokens/rollout", "tokens/scored", "sharing/ratio", "loss/policy",
    "loss/kl", "loss/entropy", "loss/clip_frac", "loss/grad_norm", "critic/loss", "critic/clipped",
    "critic/explained_variance", "critic/value_mean", "mismatch/logp_abs_diff", "mismatch/logp_abs_max",
    "mismatch/capped", "mismatch/masked", "importance/ess", "tool/", "time/rollout", "time/score", "time/train",
    "time/sync", "time/step", "time/eval", "memory/peak_gb", "eval/f1", "eval/f1_se", "eval/em", "eval/turns",
    "eval/search_failures",
)  # fmt: skip
"""Order of a row's keys; one that ends in a slash stands for all keys with that prefix, and other keys follow."""

TOKEN_MEANS = {
    "loss/kl": "kl",
    "loss/entropy": "entropy",
    "loss/clip_frac": "clipped",
    "mismatch/logp_abs_diff": "mismatch",
    "mismatch/capped": "capped",
    "mismatch/masked": "masked",
}
"""Row key -> the pack's sum that is divided by its ``tokens``."""
SUMS = (
    "policy", "tokens", "importance", "squared_importance", "value", "value_steps", "value_clipped",
    *TOKEN_MEANS.values(),
)  # fmt: skip
"""A pack's sums that are added up over a step."""
EVALUATION = "eval"
"""The phase that is not counted in ``time/step``."""


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

    def __getitem__(self, key: str) -> float:
        """A number that was set or counted so far."""
        return self._values[key]

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds spent inside to ``time/PHASE``; work queued on a GPU counts."""
        start = self._clock()
        try:
            yield
        finally:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self._times[f"time/{phase}"] = self._times.get(f"time/{phase}", 0.0) + self._clock() - start

    def set(self, values: Mapping[str, float]) -> None:
        """Put finished numbers into the row; of a key set twice the later value counts."""
        self._values |= values

    def add(self, values: Mapping[str, float]) -> None:
        """Add to the row's counts (tokens of each pack)."""
        for key, value in values.items():
            self._values[key] = self._values.get(key, 0) + value

    def largest(self, values: Mapping[str, float]) -> None:
        """Keep the larger of these values and the row's under the same keys; NaN stays."""
        for key, value in values.items():
            self._values[key] = float(np.maximum(self._values.get(key, -math.inf), value))

    def update(self, packs: Iterable[Mapping[str, float | torch.Tensor]], grad_norm: float | torch.Tensor) -> None:
        """Count one optimiser update.

        Args:
            packs: per pack, the results of ``igpo_kernels.policy_loss``: sums over its pairs (``policy``, weighted, and
                ``tokens``, ``kl``, ``entropy``, ``clipped``, ``mismatch``), ``losses.importance_sums``, and
                ``critic.value_loss``'s sums.
                Unmeasured ones are left out (``losses.measured``). Scalars; tensors are read in ``row`` only, so that
                nothing waits for the GPU.
            grad_norm: gradient norm before clipping.
        """
        for pack in packs:
            for name in SUMS:
                if name in pack:
                    self._sums[name] = self._sums.get(name, 0.0) + pack[name]
        self._grad_norms.append(grad_norm)

    def row(self) -> dict[str, float]:
        """The row, keys in the order of ``KEYS``.

        ``loss/policy``, ``critic/loss`` and ``loss/grad_norm`` are means over updates, ``critic/clipped`` is one over
        the critic's steps, keys of ``TOKEN_MEANS`` are means over decision tokens; a mean over nothing is absent.
        ``importance/ess`` is the effective sample size of the bounded importance
        weights as a share of all decision tokens (Kish; masked ones weigh 0): 1 where all are equal, 0 where all are 0.
        Times are in seconds; ``time/step`` counts from this object's creation, without ``time/eval``.
        """
        row = dict(self._values)
        sums = {name: float(value) for name, value in self._sums.items()}
        if updates := len(self._grad_norms):
            row["loss/policy"] = sums["policy"] / updates
            row["loss/grad_norm"] = sum(map(float, self._grad_norms)) / updates
            if "value" in sums:
                row["critic/loss"] = sums["value"] / updates
                row["critic/clipped"] = sums["value_clipped"] / sums["value_steps"]
        if tokens := sums.get("tokens"):
            row |= {key: sums[name] / tokens for key, name in TOKEN_MEANS.items() if name in sums}
            if "importance" in sums:
                row["importance/ess"] = sums["importance"] ** 2 / (tokens * sums["squared_importance"] or 1.0)
        row |= self._times
        row["time/step"] = self._clock() - self._start - self._times.get(f"time/{EVALUATION}", 0.0)
        row["memory/peak_gb"] = peak_memory_gb()
        return ordered(row)


def ordered(row: Mapping[str, float]) -> dict[str, float]:
    """A row with its keys in the order of ``KEYS``; others follow."""
    known = [key for place in KEYS for key in row if key == place or (place[-1] == "/" and key.startswith(place))]
    return {key: row[key] for key in known} | row


def peak_memory_gb() -> float:
    """Most memory held so far, in GB (1e9 bytes): torch's on a GPU in use, else the resident set."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
