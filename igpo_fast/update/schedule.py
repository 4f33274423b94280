"""The learning-rate schedule."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def schedule_factor(update: int, warmup: int, total: int, schedule: Schedule) -> float:
    """Factor of the peak learning rate in an update.

    It is never 0 within a run, because such an update costs as much as any other. (transformers' schedules begin their
    warm-up at 0.)

    Args:
        update: number of the update, from 0.
        warmup: updates of the warm-up; the last of them has the peak rate.
        total: updates of the run.

    >>> [schedule_factor(update, 2, 6, "linear") for update in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    if update < warmup:
        return (update + 1) / warmup
    if schedule == "constant":
        return 1.0
    left = max(0.0, (total - update) / max(1, total - warmup))
    return left if schedule == "linear" else (1 - math.cos(math.pi * left)) / 2
