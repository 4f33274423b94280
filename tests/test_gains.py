"""gains.py and the family of gains in advantages.py: hand-worked numbers, and the papers' formulas on ragged groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.config import Algorithm
from igpo_fast.types import ANSWER, INVALID, SEARCH, Group, Question, Rollout, Turn
from igpo_fast.update.advantages import Recipe, credit_rollouts, recipe_of, reward_metrics
from igpo_fast.update.gains import earning_turns, information_gain, repeated_passages
from tests import family

PLAIN = dict(min_std=0.0, outcome_min_std=0.0, min_var=0.0)
A2TGPO = Recipe(basis="prob", pool="turn_index", accumulate="sum_over_sqrt", adaptive_clip=0.3, **PLAIN)


def rollout(index, actions, passages=()):
    ids, logp = np.array([1], np.int32), np.zeros(1, np.float32)
    found = [*passages, *[()] * len(actions)]
    turns = tuple(Turn(ids, logp, "", a, "", ids, passages=tuple(p)) for a, p in zip(actions, found, strict=False))
    return Rollout(Question("q", "?", ("x",)), index, ids, turns)


def credits(monkeypatch, group, recipe):
    """Credits of a group as tests/family.py describes it."""
    outcomes = iter([outcome for _, _, outcome, _ in group])
    monkeypatch.setattr("igpo_fast.update.advantages.outcome", lambda *_: next(outcomes))
    rollouts = tuple(rollout(i, actions, passages) for i, (actions, _, _, passages) in enumerate(group))
    made = Group(rollouts[0].question, rollouts)
    return credit_rollouts([made], [np.array(v, np.float64) for _, v, _, _ in group], recipe)


def close(rows):
    return [pytest.approx(row, abs=1e-9) for row in rows]


S, I, A = SEARCH, INVALID, ANSWER  # noqa: E741
RAGGED = [([S, S, A], [0.0, 0.5, 0.6], 1.0, ()), ([S, S, A], [0.0, 0.2, 0.5], 0.0, ()), ([S, A], [0.0, -0.1], 0.0, ())]


def test_a2tgpo_by_hand(monkeypatch):
    # Gains of turn 1 {.5, .2, -.1}: 1.2247449, 0, -1.2247449; of turn 2 {.1, .3}: -1, 1. Outcomes 1.4142136, -.7071068.
    found = credits(monkeypatch, RAGGED, A2TGPO)
    assert [c.advantages.tolist() for c in found] == close([
        [1.5731321850, 0.4142135624, 1.4142135624], [0.0, 0.2928932188, -0.7071067812], [-1.9318516526, -0.7071067812],
    ])  # fmt: skip
    assert [c.clip_scale.tolist() for c in found] == close([
        [1.1637384883, 0.8613648528, 1.0], [1.0, 1.1386351472, 1.0], [0.8362615117, 1.0],
    ])  # fmt: skip


def test_the_weight_of_gains_by_hand(monkeypatch):
    found = credits(monkeypatch, RAGGED, replace(A2TGPO, ig_weight=0.3))
    assert [c.advantages.tolist() for c in found] == close([
        [1.4618891492, 1.1142135624, 1.4142135624], [-0.4949747468, -0.4071067812, -0.7071067812],
        [-1.0745302426, -0.7071067812],
    ])  # fmt: skip
    assert found[0].clip_scale.tolist() == pytest.approx([1.1637384883, 0.8613648528, 1.0])  # of the gain alone


def test_the_weight_of_gains_goes_in_equal_parts():
    recipe = Recipe(ig_weight=1.0, ig_weight_end=0.5, steps=5)
    assert [recipe.at(step).ig_weight for step in range(1, 6)] == [1.0, 0.875, 0.75, 0.625, 0.5]
    assert Recipe(ig_weight=0.7, steps=5).at(3).ig_weight == 0.7
    config = Algorithm(ig_weight=0.0, ig_weight_end=1.0)
    assert recipe_of(config, 3).at(2).normaliser.gain_weight == 0.5


# DR-Venus: only "visit" (here: search) turns earn; r1 searches (here: malformed) first.
FILTERED = [([I, S, S, A], [-2.0, -1.9, -1.0, -0.8], 1.0, ()), ([S, I, A], [-2.0, -1.5, -1.4], 0.0, ())]
DR_VENUS = Recipe(pool="scaled_separate", gamma=0.95, ig_tools=("search",), **PLAIN)


def test_turns_that_earn_nothing_share_the_next_ones_advantage(monkeypatch):
    # Gains since the last that earned: 1, .2; .5. Scaled: 1.5, -1.2692308; -.2307692. Not discounted between.
    found = credits(monkeypatch, FILTERED, DR_VENUS)
    assert [c.advantages.tolist() for c in found] == close([
        [1.1967307692, 1.1967307692, -0.3192307692, 1.0], [-1.1807692308, -1.0, -1.0],
    ])  # fmt: skip
    gains = [c.gains.tolist() for c in found]
    assert gains == [pytest.approx([np.nan, 1.0, 0.2], nan_ok=True), pytest.approx([0.5, np.nan], nan_ok=True)]
    group = Group(Question("q", "?", ("x",)), tuple(rollout(i, actions) for i, (actions, *_) in enumerate(FILTERED)))
    metrics = reward_metrics([group], found)
    assert metrics["reward/ig_mean"] == pytest.approx(1.7 / 3) and metrics["reward/ig_cum_negative"] == 0.0


def test_a_malformed_turn_pays_in_place_of_its_gain(monkeypatch):
    group = [([S, S, S, A], [-2.0, -1.9, -1.0, -0.8], 1.0, ()), ([I, S, A], [-2.0, -1.5, -1.4], 0.0, ())]
    found = credits(monkeypatch, group, replace(DR_VENUS, turn_format_penalty=1.0, gamma=0.9))
    expected = family.dr_venus(group, (S,), 1, 1.0, 0.9)
    assert [c.advantages.tolist() for c in found] == close(expected)
    assert family.dr_venus(group, (S,), 1, 0.0, 0.9) != expected


turns = st.lists(st.sampled_from([SEARCH, SEARCH, INVALID]), max_size=5)
numbers = st.integers(-300, 0).map(lambda n: n / 100)


@st.composite
def groups(draw):
    made = []
    for _ in range(draw(st.integers(1, 5))):
        actions = [*draw(turns), ANSWER]
        values = draw(st.lists(numbers, min_size=len(actions), max_size=len(actions)))
        passages = draw(st.lists(st.lists(st.sampled_from("abcd"), max_size=3), max_size=len(actions) - 1))
        passages += [[]] * (len(actions) - 1 - len(passages))
        made.append((actions, values, draw(st.sampled_from([0.0, 0.5, 1.0])), passages))
    return made


@given(groups(), st.sampled_from([0.5, 1.0]), st.sampled_from([0.1, 0.9]), st.sampled_from([0.3, 1.0]))
def test_a2tgpo_as_its_formulas(group, gamma, beta, weight):
    with pytest.MonkeyPatch.context() as patch:
        found = credits(patch, group, replace(A2TGPO, gamma=gamma, adaptive_clip=beta, ig_weight=weight))
    advantages, factors = family.a2tgpo(group, gamma, beta, weight)
    assert [c.advantages.tolist() for c in found] == close(advantages)
    assert [c.clip_scale.tolist() for c in found] == close(factors)


@given(groups(), st.sampled_from([(), (SEARCH,)]), st.integers(1, 3), st.sampled_from([0.0, 1.0]))
def test_dr_venus_as_its_formulas(group, tools, every, penalty):
    recipe = replace(DR_VENUS, ig_tools=tools, ig_every=every, turn_format_penalty=penalty)
    with pytest.MonkeyPatch.context() as patch:
        found = credits(patch, group, recipe)
    assert [c.advantages.tolist() for c in found] == close(family.dr_venus(group, tools, every, penalty, 0.95))


@given(groups(), st.sampled_from(["sum", "none"]))
def test_repeated_passages_cost_their_share(group, accumulate):
    recipe = Recipe(gamma=0.9, accumulate=accumulate, **PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        free = credits(patch, group, recipe)
        found = credits(patch, group, replace(recipe, redundancy_penalty=0.6))
    for (*_, passages), before, after in zip(group, free, found, strict=True):
        costs = [0.6 * share for share in family.redundancy(passages)] + [0.0]
        if accumulate == "sum":
            for t in reversed(range(len(costs) - 1)):
                costs[t] += 0.9 * costs[t + 1]
        assert (before.advantages - after.advantages).tolist() == pytest.approx(costs, abs=1e-9)


def test_repeated_passages_by_hand():
    found = rollout(0, [S, S, S, S, A], ["abc", "ade", "adx", "ffg"])
    assert repeated_passages(found).tolist() == pytest.approx([0.0, 1 / 3, 2 / 3, 1 / 3])


def test_turns_that_earn():
    made = rollout(0, [S, I, S, S, A])
    assert earning_turns(made, (), 1, False).tolist() == [True] * 4
    assert earning_turns(made, (S,), 1, False).tolist() == [True, False, True, True]
    assert earning_turns(made, (), 2, False).tolist() == [False, True, False, True]
    assert earning_turns(made, (S,), 2, True).tolist() == [False, True, False, True]
    assert earning_turns(rollout(0, [A]), (S,), 1, True).tolist() == []


def test_an_undefined_value_costs_the_gains_on_its_both_sides():
    gains, undefined = information_gain([0.0, np.nan, 1.0, 3.0], np.array([True, False, True]))
    assert gains.tolist() == pytest.approx([0.0, np.nan, 0.0], nan_ok=True) and undefined == 2


@pytest.mark.parametrize("bad, message", [
    (dict(ig_weight=0.0), "use algorithm.name=grpo"),
    (dict(adaptive_clip=0.3, pool="raw"), "pool=raw normalises none"),
    (dict(adaptive_clip=1.0), "less than 1"),
    (dict(ig_every=0), "ig_every"),
])  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Algorithm(**bad)
