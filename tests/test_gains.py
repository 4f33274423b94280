"""gains.py and the family of gains in advantages.py: hand-worked numbers, and the papers' formulas on ragged groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.config import PRESETS, Algorithm, load
from igpo_fast.setup import settings_warnings
from igpo_fast.types import ANSWER, INVALID, SEARCH, Group, Question, Rollout, Turn
from igpo_fast.update.advantages import Recipe, credit_rollouts, recipe_of, reward_metrics
from igpo_fast.update.gains import earning_turns, information_gain, repeated_passages, values_of
from igpo_fast.update.scoring import Values
from tests import family
from tests.doing import doing

PLAIN = dict(min_std=0.0, outcome_min_std=0.0, min_var=0.0)
A2TGPO = Recipe(basis="prob", pool="turn_index", accumulate="sum_over_sqrt", adaptive_clip=0.3, **PLAIN)


def rollout(index, actions, passages=()):
    ids, logp = np.array([1], np.int32), np.zeros(1, np.float32)
    found = [*passages, *[()] * len(actions)]
    turns = tuple(Turn(ids, logp, "", doing(a), ids, passages=tuple(p)) for a, p in zip(actions, found, strict=False))
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


IG_SEARCH = replace(recipe_of(Algorithm(preset="ig_search")), **PLAIN)


def with_lengths(monkeypatch, actions, lengths, calls, outcomes, gains, recipe):
    """Credits of one group of rollouts whose turns have so many tokens, the call's from a place on."""
    told = iter(outcomes)
    monkeypatch.setattr("igpo_fast.update.advantages.outcome", lambda *_: next(told))
    made = []
    for i, (acts, sizes, places) in enumerate(zip(actions, lengths, calls, strict=True)):
        turns = tuple(
            Turn(np.ones(n, np.int32), np.zeros(n, np.float32), "", doing(a), np.ones(1, np.int32), call=place)
            for a, n, place in zip(acts, sizes, places, strict=True)
        )
        made.append(Rollout(Question("q", "?", ("x",)), i, np.ones(1, np.int32), turns))
    values = [Values(np.array([0.0, *np.nan_to_num(row)]), np.where(np.isnan(row), np.nan, 0.0)) for row in gains]
    return credit_rollouts([Group(made[0].question, tuple(made))], values, recipe)


def test_ig_search_by_hand(monkeypatch):
    # Outcomes 1 and 0: A 1 and -1. Turn 1: .3 * .6 / 6 = .03 on the last 6 of 8 tokens; turn 2: -.4 * .3 / 4 on all 4.
    nothing = np.zeros(0)
    first, second = with_lengths(
        monkeypatch, [[S, S, A], [A]], [[8, 4, 3], [2]], [[2, 0, 1], [0]], [1.0, 0.0], [np.array([0.6, -0.4]), nothing],
        IG_SEARCH,
    )  # fmt: skip
    assert first.token_advantages.tolist() == pytest.approx([1, 1, *[1.03] * 6, *[0.97] * 4, 1, 1, 1])
    assert first.advantages.tolist() == pytest.approx([1 + 0.18 / 8, 0.97, 1.0])
    assert second.token_advantages.tolist() == [-1.0, -1.0] and second.advantages.tolist() == [-1.0]


def test_a_call_gets_no_gain_of_another_turn(monkeypatch):
    # The malformed turn earns nothing; with credit=turn it would share the next one's gain.
    rows = dict(actions=[[I, S, A], [A]], lengths=[[2, 4, 1], [1]], calls=[[0, 2, 0], [0]], outcomes=[0.0, 0.0])
    gains = [np.array([np.nan, 0.5]), np.zeros(0)]
    (found, _) = with_lengths(monkeypatch, **rows, gains=gains, recipe=IG_SEARCH)
    assert found.token_advantages.tolist() == pytest.approx([0, 0, 0, 0, 0.075, 0.075, 0])
    (shared, _) = with_lengths(monkeypatch, **rows, gains=gains, recipe=replace(IG_SEARCH, credit="turn"))
    assert shared.token_advantages is None and shared.advantages.tolist() == pytest.approx([0.15, 0.15, 0])


def test_infopo_by_hand(monkeypatch):
    # Gains .8 .1 | .3 -.2, mean .25, std .3640055; outcomes 1 0: A 1 -1, sample std .7071068, gate .1955704, weight .5.
    found = with_lengths(
        monkeypatch, [[S, S, A]] * 2, [[4, 2, 3], [2, 5, 2]], [[0] * 3] * 2, [1.0, 0.0],
        [np.array([0.8, 0.1]), np.array([0.3, -0.2])], replace(recipe_of(Algorithm(preset="infopo")), **PLAIN),
    )  # fmt: skip
    assert [c.advantages.tolist() for c in found] == [
        pytest.approx([1 + 0.0977852 * 1.5109662, 1 - 0.0977852 * 0.4120817, 1.0], abs=1e-6),
        pytest.approx([-1 + 0.0977852 * 0.1373606, -1 - 0.0977852 * 1.2362451, -1.0], abs=1e-6),
    ]


@given(groups(), st.data())
def test_ig_search_and_infopo_as_their_formulas(group, data):
    outcomes = [outcome for _, _, outcome, _ in group]
    lengths = [[data.draw(st.integers(1, 5)) for _ in actions] for actions, *_ in group]
    calls = [[data.draw(st.integers(0, n - 1)) for n in row] for row in lengths]
    searched = [[a if a == SEARCH else None for a in actions[:-1]] for actions, *_ in group]
    gains = [np.array([np.nan if a is None else v for a, v in zip(row, values[1:], strict=True)])
        for row, (_, values, _, _) in zip(searched, group, strict=True)]  # fmt: skip
    rows = dict(actions=[actions for actions, *_ in group], lengths=lengths, calls=calls, outcomes=outcomes)
    known = [[None if np.isnan(g) else float(g) for g in row] for row in gains]
    with pytest.MonkeyPatch.context() as patch:
        found = with_lengths(patch, **rows, gains=gains, recipe=IG_SEARCH)
    for credit, expected in zip(found, family.ig_search_advantages(outcomes, known, calls, lengths, 0.3), strict=True):
        assert credit.token_advantages.tolist() == pytest.approx([a for turn in expected for a in turn], abs=1e-6)
    every = [np.array(values[1:]) for _, values, _, _ in group]
    rows["actions"] = [[S] * (len(actions) - 1) + [A] for actions in rows["actions"]]  # others earn nothing
    recipe = replace(recipe_of(Algorithm(preset="infopo")), **PLAIN)
    with pytest.MonkeyPatch.context() as patch:
        found = with_lengths(patch, **rows, gains=every, recipe=recipe)
    assert [c.advantages.tolist() for c in found] == close(family.infopo_advantages(outcomes, every, 0.5, 0.5))


def test_the_spread_of_outcomes_gates_gains(monkeypatch):
    # Equal outcomes: half of ig_weight. One rollout has no spread, either.
    for outcomes in ([0.5, 0.5], [0.5]):
        n = len(outcomes)
        rows = dict(actions=[[S, S, A]] * n, lengths=[[1] * 3] * n, calls=[[0] * 3] * n, outcomes=outcomes)
        gains = [np.array([0.0, 1.0])] * n
        recipe = Recipe(baseline="none", accumulate="none", ig_spread=0.5, **PLAIN)
        found = with_lengths(monkeypatch, **rows, gains=gains, recipe=recipe)
        assert [c.advantages.tolist() for c in found] == [[-0.5, 0.5, 0.0]] * n


def test_each_group_has_its_own_gate():
    one, two = (Group(Question(q, "?", ("x",)), (rollout(0, [S, A]), rollout(1, [S, A]))) for q in "ab")
    answered = lambda r, argument: replace(r, turns=(r.turns[0], replace(r.turns[1], actions=doing(ANSWER, argument))))  # noqa: E731
    one = replace(one, rollouts=(answered(one.rollouts[0], "x"), answered(one.rollouts[1], "y")))
    two = replace(two, rollouts=(answered(two.rollouts[0], "x"), answered(two.rollouts[1], "x")))
    recipe = Recipe(baseline="none", accumulate="none", ig_spread=0.5, **PLAIN)
    values = [Values(np.array([0.0, v]), np.zeros(1)) for v in (1.0, 0.0, 1.0, 0.0)]
    found = [c.advantages.tolist() for c in credit_rollouts([one, two], values, recipe)]
    gate = 1 / (1 + np.exp(0.5**0.5 / 0.5))
    assert found == close([[1 + gate, 1], [-1 - gate, -1], [0.5, 0], [-0.5, 0]])


def test_the_sum_of_answers_by_hand():
    # TIPS's potential: log(exp(-2) + exp(-3)), and so on.
    logp = [[-2.0, -1.2, -0.4], [-3.0, -2.5, -2.0]]
    assert values_of(logp, "log_prob", "sum").tolist() == pytest.approx([-1.686738, -0.958992, -0.216099], abs=1e-6)
    assert values_of(logp, "prob", "sum").tolist() == pytest.approx(np.exp([-1.686738, -0.958992, -0.216099]), abs=1e-6)
    assert np.isnan(values_of([[np.nan], [-1.0]], "log_prob", "sum")).all()


def test_query_credit_is_refused_where_gains_are_summed():
    with pytest.raises(ValueError, match=r"algorithm.credit=query gives .*; set algorithm.accumulate=none"):
        Algorithm(credit="query")
    with pytest.raises(
        ValueError, match=r"algorithm.credit=query needs .* algorithm.name=ppo_ig has a critic; use igpo"
    ):
        Algorithm(credit="query", accumulate="none", name="ppo_ig")


def test_presets_of_papers_with_a_critic_bring_it():
    assert Algorithm(preset="tips").name == "ppo_ig" and Algorithm(preset="stepsearch").name == "ppo"
    assert Algorithm(preset="tips", name="igpo").name == "igpo"


@pytest.mark.parametrize("settings, named", [
    (["name=grpo", "ig_weight=3", "baseline=random"], "algorithm.baseline=random, algorithm.ig_weight=3.0 do nothing"),
    (["name=ppo", "value_model=teacher"], "algorithm.value_model=teacher does nothing: algorithm.name=ppo has no"),
    (["preset=infopo", "answers=max"], "algorithm.answers=max does nothing: baseline=masked scores no answers"),
    (["baseline_samples=9"], "algorithm.baseline_samples=9 does nothing: baseline=previous draws no responses"),
    (["teacher_every=5"], "algorithm.teacher_every=5 does nothing: value_model=policy is no teacher"),
])  # fmt: skip
def test_keys_that_do_nothing_are_told(settings, named):
    (warning,) = settings_warnings(load(None, [f"algorithm.{setting}" for setting in settings]))
    assert warning.startswith(named)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_warn_of_nothing_but_their_single_update(preset):
    for name in ([], ["algorithm.name=grpo"], ["algorithm.name=igpo"]):
        for warning in settings_warnings(load(None, [f"algorithm.preset={preset}", *name])):
            assert "with train.updates=1 never" in warning, warning


def test_a_potential_that_is_none_is_refused():
    for bad in ("baseline=none", "gamma=0.9", "ig_gate=0.5"):
        with pytest.raises(ValueError, match=r"algorithm.ig_potential pays back .*; set these, or leave it out"):
            load(None, ["algorithm.preset=tips", f"algorithm.{bad}"])
