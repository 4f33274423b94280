"""Sampled F1 and EM on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from igpo_fast.dialect import Dialect
from igpo_fast.engines.base import Engine, Sampling
from igpo_fast.errors import InputError
from igpo_fast.rewards import exact_match, f1_score
from igpo_fast.rollout import Limits, rollout_groups
from igpo_fast.tools.base import Tool
from igpo_fast.types import Question

EVAL_STEP = -1
"""Stands for the step in sampling keys: evaluation has its own noise, the same whenever it runs."""


def evaluate(
    questions: Sequence[Question],
    *,
    engine: Engine,
    tool: Tool,
    dialect: Dialect,
    limits: Limits,
    sampling: Sampling,
    seed: int,
    concurrency: int,
    f1_normalisation: str,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """One rollout a question.

    Returns:
        ``eval/f1``, ``eval/em`` and ``eval/turns``, means over questions, and ``eval/f1_se``, the standard
        error of the first (NaN with a single question).
    Raises:
        InputError: there are no questions.
    """
    if not questions:
        raise InputError("evaluation: there are no questions; give data.eval, or raise eval.questions")
    groups = rollout_groups(
        questions,
        1,
        seed=seed,
        step=EVAL_STEP,
        engine=engine,
        tool=tool,
        dialect=dialect,
        limits=limits,
        sampling=sampling,
        concurrency=concurrency,
        progress=progress,
    )
    rollouts = [group.rollouts[0] for group in groups]
    f1 = [f1_score(rollout.answer, rollout.question.answers, f1_normalisation) for rollout in rollouts]
    em = [exact_match(rollout.answer, rollout.question.answers, f1_normalisation) for rollout in rollouts]
    return {
        "eval/f1": float(np.mean(f1)),
        "eval/f1_se": float(np.std(f1, ddof=1) / len(f1) ** 0.5) if len(f1) > 1 else float("nan"),
        "eval/em": float(np.mean(em)),
        "eval/turns": float(np.mean([len(rollout.turns) for rollout in rollouts])),
    }
