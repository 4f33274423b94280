"""Sampled F1, EM and rewards on held-out questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from igpo_fast.errors import InputError
from igpo_fast.ranks import Ranks
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.rollout import Agent
from igpo_fast.types import SEARCH, Evaluation, Group, Question, Rollout
from igpo_fast.update.rewards import exact_match, f1_score, rewards_of

EVAL_STEP = -1
"""Step number in evaluation's sampling keys, so that its noise is its own and the same in every evaluation."""


def evaluate(
    agent: Agent,
    questions: Sequence[Question],
    f1_normalisation: str,
    progress: Callable[[int, int], None] | None = None,
    ranks: Ranks | None = None,
) -> Evaluation:
    """One rollout per question; ``ranks`` share the questions out.

    Returns:
        ``eval/f1``, ``eval/em`` and ``eval/turns``, means over questions, and ``eval/f1_se``, the standard error of the
        first (NaN with a single question); F1 and EM only of questions with a ground truth. If the agent asks for
        outcomes, ``eval/reward`` and the other numbers in ``Rollout.rewards``. With several data sets each has its own,
        ``eval/NAME/f1`` and so on, and ``eval/f1`` is the plain average over data sets, as in the papers. If search
        can fail, ``eval/search_failures`` is the number of searches that failed for good.
    Raises:
        InputError: there are no questions.
        EngineError, ToolError: no engine answers, or every search failed.
    """
    if not questions:
        raise InputError("evaluation: there are no questions; give data.eval, or raise eval.questions")
    ranks = ranks or Ranks()

    def sample() -> tuple[tuple[Group, ...], Counter]:
        groups = rollout_groups(agent, ranks.share(questions), 1, EVAL_STEP, progress=progress)
        return groups, agent.tools.take()

    told = ranks.together(sample)
    shares = [groups for groups, _ in told]
    rollouts = tuple(shares[i % ranks.size][i // ranks.size].rollouts[0] for i in range(len(questions)))
    calls = sum((counts for _, counts in told), Counter())
    ranks.together(lambda: agent.tools.report(calls, "evaluation"))
    sets: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        sets.setdefault(rollout.question.dataset, []).append(rollout)
    means = {name: _means(members, f1_normalisation) for name, members in sets.items()}
    metrics = {}
    for key in dict.fromkeys(key for mean in means.values() for key in mean):
        found = [mean[key] for mean in means.values() if key in mean]
        average = np.linalg.norm(found) / len(found) if key == "f1_se" else np.mean(found)
        metrics[f"eval/{key}"] = float(average)
    if len(means) > 1:
        metrics |= {f"eval/{name}/{key}": value for name, mean in means.items() for key, value in mean.items()}
    if any(tool.name == SEARCH and "failures" in tool.counted for tool in agent.tools):
        metrics["eval/search_failures"] = float(calls[f"{SEARCH}/failures"])
    return Evaluation(metrics, rollouts)


def _means(rollouts: Sequence[Rollout], f1_normalisation: str) -> dict[str, float]:
    """Means over the questions of one data set; those over nothing are absent."""
    known = [(r.answer, r.question.answers, f1_normalisation) for r in rollouts if r.question.answers]
    f1 = [f1_score(*answered) for answered in known]
    numbers = {
        "f1": f1,
        "em": [exact_match(*answered) for answered in known],
        "turns": [len(rollout.turns) for rollout in rollouts],
        **rewards_of(rollouts),
    }
    means = {name: float(np.mean(of_questions)) for name, of_questions in numbers.items() if of_questions}
    if f1:
        means["f1_se"] = float(np.std(f1, ddof=1) / len(f1) ** 0.5) if len(f1) > 1 else float("nan")
    return means


def set_names(metrics: Mapping[str, float]) -> list[str]:
    """The data sets with metrics of their own in the result of ``evaluate``; none if there is only one."""
    return [name for key in metrics if key.endswith("/turns") and (name := key[len("eval/") : -len("/turns")])]
