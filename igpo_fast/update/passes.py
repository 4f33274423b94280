"""Number of passes over a rollout's tokens per update, chosen once per run from the configuration alone."""

from __future__ import annotations

from igpo_fast.config import Config
from igpo_fast.errors import InputError
from igpo_fast.update.advantages import Recipe
from igpo_fast.update.scoring import Scoring


def longest_rollout(config: Config, scoring: Scoring) -> int:
    """Most packed tokens that a rollout and what is scored beside it may take."""
    return config.rollout.max_tokens + scoring.most_tokens(config.rollout.max_turns, most_decision_tokens(config))


def most_decision_tokens(config: Config) -> int:
    """Decision tokens of the longest rollout that the limits allow."""
    rollout = config.rollout
    return min(rollout.max_turns * rollout.max_turn_tokens, rollout.max_tokens)


def groups_per_pack(config: Config, scoring: Scoring) -> int:
    """Number of whole groups that always fit a pack, at least 1; they are scored together once all have finished."""
    largest = config.rollout.group_size * longest_rollout(config, scoring)
    return max(1, config.train.token_budget // largest)


def least_budget(config: Config, recipe: Recipe, scoring: Scoring, passes: str) -> int:
    """Tokens that a pack must hold: a rollout, or a group where its advantages come from one pass."""
    rollouts = config.rollout.group_size if recipe.needs_whole_groups(passes) else 1
    return rollouts * longest_rollout(config, scoring)


def choose_passes(config: Config, recipe: Recipe, scoring: Scoring) -> str:
    """``one`` or ``two`` passes over a rollout's tokens per update; fixed for the run.

    Raises:
        InputError: ``algorithm.passes=one`` is impossible with the configuration, a rollout may exceed
            ``train.token_budget``, or ``rollout.skip_collapsed`` is set although groups have no advantages of their
            own.
    """
    rollout, asked, budget = config.rollout, config.algorithm.passes, config.train.token_budget
    longest = longest_rollout(config, scoring)
    largest = rollout.group_size * longest
    if longest > budget:
        raise InputError(
            f"train.token_budget={budget}: a rollout and what is scored beside it may take {longest} tokens; raise it, "
            f"or lower {'algorithm.baseline_samples, search.top_k, ' * scoring.needs_batch}rollout.max_tokens"
        )
    if rollout.skip_collapsed and (recipe.over_tokens or recipe.critic):
        why = "estimates advantages with a critic" if recipe.critic else "normalises over the batch"
        raise InputError(
            f"rollout.skip_collapsed: algorithm.name={recipe.algorithm} {why}, so no group has advantages of its own; "
            "leave it out"
        )
    hindrance = None
    if recipe.critic:
        hindrance = f"algorithm.name={recipe.algorithm} needs the critic's values of the whole batch first"
    elif config.train.updates > 1:
        hindrance = f"train.updates={config.train.updates} needs old log-probabilities"
    elif recipe.needs_values and rollout.skip_collapsed:
        hindrance = "rollout.skip_collapsed chooses groups by their gains"
    elif largest > budget and recipe.needs_whole_groups("one"):
        hindrance = f"a group may take {largest} tokens, over train.token_budget={budget}"
    if hindrance is None:
        return "two" if asked == "two" else "one"
    if asked == "one":
        raise InputError(f"algorithm.passes=one: {hindrance}; use algorithm.passes=two or auto")
    return "two"
