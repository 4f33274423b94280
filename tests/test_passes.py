"""passes.py: which mode a configuration gets, and that one which it cannot honour is refused by name."""

import pytest

from igpo_fast.config import load
from igpo_fast.errors import InputError
from igpo_fast.update.advantages import Recipe
from igpo_fast.update.passes import choose_passes, groups_per_pack, most_decision_tokens
from igpo_fast.update.scoring import Scoring

SMALL = ("rollout.group_size=4", "rollout.max_tokens=90", "rollout.max_turns=2", "train.token_budget=1000")
DYNAMIC = ("rollout.oversample=4", "rollout.skip_collapsed=true")


def chosen(*overrides, answer_tokens=5):
    config = load(None, [*SMALL, *overrides])
    recipe = Recipe(algorithm=config.algorithm.name)
    return choose_passes(config, recipe, Scoring(None, answer_tokens if recipe.needs_values else 0))


@pytest.mark.parametrize(
    "overrides, passes",
    [
        ((), "one"),
        (("algorithm.passes=two",), "two"),
        (("train.updates=2",), "two"),
        (("train.token_budget=399",), "two"),
        (DYNAMIC, "two"),
        ((*DYNAMIC, "algorithm.name=grpo"), "one"),
        (("rollout.oversample=4", "rollout.straggler_share=0.9"), "one"),
        (("rollout.oversample=4", "rollout.keep=arrival"), "one"),
    ],
)
def test_auto(overrides, passes):
    assert chosen(*overrides) == passes


def test_groups_chosen_by_their_gains_need_two():
    with pytest.raises(
        InputError, match=r"^algorithm.passes=one: rollout.skip_collapsed chooses groups by their gains;"
    ):
        chosen(*DYNAMIC, "algorithm.passes=one")


def test_collapsed_means_nothing_where_advantages_are_the_batchs():
    with pytest.raises(InputError, match=r"^rollout.skip_collapsed: algorithm.name=reinforce_pp normalises over the"):
        chosen(*DYNAMIC, "algorithm.name=reinforce_pp")


@pytest.mark.parametrize("budget, groups", [(399, 1), (400, 1), (799, 1), (800, 2), (1999, 4), (2000, 5)])
def test_whole_groups_that_surely_fit_a_pack(budget, groups):
    # A rollout takes at most 90 tokens and 2 answers of 5: 100, a group 400.
    config = load(None, [*SMALL, f"train.token_budget={budget}"])
    assert groups_per_pack(config, Scoring(None, 5)) == groups


@pytest.mark.parametrize("turn_tokens, most", [(20, 40), (44, 88), (45, 90), (60, 90)])
def test_no_rollout_has_more_decision_tokens(turn_tokens, most):
    # Two turns, and 90 tokens in all.
    assert most_decision_tokens(load(None, [*SMALL, f"rollout.max_turn_tokens={turn_tokens}"])) == most


@pytest.mark.parametrize(
    "overrides, message",
    [
        (("rollout.oversample=4",), "rollout.oversample needs something to choose by"),
        (("rollout.skip_collapsed=true",), "choose among spare groups; set rollout.oversample"),
        (("rollout.keep=arrival",), "choose among spare groups; set rollout.oversample"),
        ((*DYNAMIC, "rollout.keep=arrival"), "rollout.keep=arrival ends a step before gains are known"),
        (("rollout.straggler_share=0",), "rollout.straggler_share"),
        (("rollout.straggler_factor=0.5",), "rollout.straggler_factor"),
        (("search.timeout=0",), "search.timeout"),
    ],
)
def test_configurations_that_say_nothing_are_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load(None, overrides)
