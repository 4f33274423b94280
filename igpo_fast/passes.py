"""How often an update reads a rollout's tokens: decided once a run, from the configuration alone."""

from __future__ import annotations

from igpo_fast.advantages import Recipe
from igpo_fast.config import Config
from igpo_fast.errors import InputError


def choose_passes(config: Config, recipe: Recipe, answer_tokens: int) -> str:
    """``one`` or ``two`` passes over a rollout's tokens per update (design.md); fixed for the run.

    Args:
        answer_tokens: most tokens that forced answers take after one prefix.
    Raises:
        InputError: ``algorithm.passes=one`` with a configuration that it cannot honour, or a rollout may exceed
            ``train.token_budget``.
    """
    rollout, asked, budget = config.rollout, config.algorithm.passes, config.train.token_budget
    longest = rollout.max_tokens + rollout.max_turns * answer_tokens * recipe.needs_values
    largest = rollout.group_size * longest
    if longest > budget:
        raise InputError(
            f"train.token_budget={budget}: a rollout and its forced answers may take {longest} tokens; raise it, or "
            "lower rollout.max_tokens"
        )
    hindrance = None
    if config.train.updates > 1:
        hindrance = f"train.updates={config.train.updates} needs old log-probabilities"
    elif recipe.needs_values and recipe.normaliser.scope == "batch":
        hindrance = f"algorithm.name={recipe.algorithm} normalises gains over the batch"
    elif largest > budget:
        hindrance = f"a group may take {largest} tokens, over train.token_budget={budget}"
    if hindrance is None:
        return "two" if asked == "two" else "one"
    if asked == "one":
        raise InputError(f"algorithm.passes=one: {hindrance}; use algorithm.passes=two or auto")
    return "two"
