"""Sampled F1 and EM on held-out questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from igpo_fast.dialect import Dialect
from igpo_fast.engines.base import Engine, Sampling
from igpo_fast.errors import InputError
from igpo_fast.rewards import exact_match, f1_score
from igpo_fast.rollout import Limits, rollout_groups
from igpo_fast.tools.base import Tool
from igpo_fast.types import Question, Rollout

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
        ``eval/f1``, ``eval/em`` and ``eval/turns``, means over questions, and ``eval/f1_se``, the standard error of the
        first (NaN with a single question). Questions of several data sets have these of each, ``eval/NAME/f1`` and so
        on, and the former are then the plain average over data sets, as the papers report it.
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
    sets: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        sets.setdefault(rollout.question.dataset, []).append(rollout)
    means = {name: _means(members, f1_normalisation) for name, members in sets.items()}
    found = {f"eval/{key}": float(np.mean([of[key] for of in means.values()])) for key in ("f1", "em", "turns")}
    found["eval/f1_se"] = float(np.linalg.norm([of["f1_se"] for of in means.values()]) / len(means))
    if len(means) > 1:
        found |= {f"eval/{name}/{key}": value for name, of in means.items() for key, value in of.items()}
    return found


def _means(rollouts: Sequence[Rollout], f1_normalisation: str) -> dict[str, float]:
    """Over the questions of one data set."""
    f1 = [f1_score(rollout.answer, rollout.question.answers, f1_normalisation) for rollout in rollouts]
    em = [exact_match(rollout.answer, rollout.question.answers, f1_normalisation) for rollout in rollouts]
    return {
        "f1": float(np.mean(f1)),
        "f1_se": float(np.std(f1, ddof=1) / len(f1) ** 0.5) if len(f1) > 1 else float("nan"),
        "em": float(np.mean(em)),
        "turns": float(np.mean([len(rollout.turns) for rollout in rollouts])),
    }


def set_names(found: Mapping[str, float]) -> list[str]:
    """The data sets that have metrics of their own in what ``evaluate`` returned; none where there is only one."""
    return [name for key in found if key.endswith("/f1") and (name := key[len("eval/") : -len("/f1")])]
