"""Presets and algorithms on one group worked by hand, and the metrics of a step."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from igpo_fast.config import Algorithm
from igpo_fast.types import ANSWER, INVALID, SEARCH, Group, Question, Rollout, Turn, answer_with, search_for, truncation
from igpo_fast.update.advantages import (
    ALGORITHMS,
    Recipe,
    collapsed,
    collapsed_outcome,
    credit_rollouts,
    earn,
    recipe_of,
    reward_metrics,
    token_advantages,
)

QUESTION = Question("q", "Where?", ("new york city",))


def rollout(index: int, turns: int, answer: str | None) -> Rollout:
    """``turns`` turns, the last one answering, or invalid for None."""
    actions = [(search_for("query"),)] * (turns - 1) + [() if answer is None else (answer_with(answer),)]
    ids, logp = np.array([1, 2], dtype=np.int32), np.zeros(2, np.float32)
    return Rollout(QUESTION, index, ids, tuple(Turn(ids, logp, "", a, ids[:1]) for a in actions))


# A answers right (F1 1), B with one of three words (F1 2 * 1 / 4 = .5), C without a well-formed answer.
GROUP = Group(QUESTION, (rollout(0, 3, "New York City"), rollout(1, 2, "york"), rollout(2, 1, None)))
VALUES = [np.array([0.1, 0.3, 0.7]), np.array([0.1, 0.1]), np.array([0.1])]
# A second group of one rollout, right at once.
OTHER = Group(QUESTION, (rollout(0, 1, "new york city"),))


def preset(name: str) -> Recipe:
    return recipe_of(Algorithm(preset=name))


def scored(recipe: Recipe, groups=(GROUP,), values=VALUES):
    return [s.advantages.tolist() for s in credit_rollouts(groups, values, recipe)]


def close(expected):
    return [pytest.approx(row, abs=1e-6) for row in expected]


def test_recipe_defaults_are_the_paper_preset():
    assert Recipe() == preset("paper") == recipe_of(Algorithm())


def test_a_recipe_is_the_configured_algorithm():
    config = Algorithm(
        name="rloo", basis="prob", answers="mean", pool="joint", ig_gate=0.5, ig_center=False, ig_min_std=0.1,
        outcome_min_std=0.2, min_var=0.3, gamma=0.9, format_penalty=-3.0, outcome="em", f1_normalisation="squad",
    )  # fmt: skip
    assert recipe_of(config) == Recipe(
        "rloo", "prob", "mean", "joint", 0.5, False, 0.1, 0.2, 0.3, 0.9, -3.0, "em", "squad"
    )


def test_how_many_answers_are_scored():
    answers = ("a", "b", "c")
    assert answers[: Recipe().scored_answers] == ("a",)
    assert answers[: Recipe(answers="max").scored_answers] == answers
    assert answers[: Recipe(algorithm="grpo", answers="max").scored_answers] == ()


def test_every_configured_algorithm_is_known():
    assert tuple(ALGORITHMS) == Algorithm.model_fields["name"].annotation.__args__


@pytest.mark.parametrize("settings", [dict(pool="turn_index"), dict(pool="raw"), dict(accumulate="none")], ids=str)
def test_what_the_kernel_lacks_is_computed_on_the_host(settings):
    recipe = Recipe(**settings)
    _, earned = earn((GROUP,), VALUES, recipe)
    # On the meta device whatever needs a number of a tensor raises.
    found = token_advantages(earned, recipe, torch.device("meta"))
    assert found.is_meta and found.shape == token_advantages(earned, recipe).shape == (12,)


def test_a_turn_without_tokens_has_its_own_advantage():
    """Turns of trajectories that are only read, as ``score`` makes them, have no tokens of the policy."""
    turns = [replace(turn, ids=turn.ids[:0]) for turn in GROUP.rollouts[0].turns]
    for empty in ([0], [2], [0, 1, 2]):
        some = tuple(turns[t] if t in empty else GROUP.rollouts[0].turns[t] for t in range(3))
        group = Group(QUESTION, (replace(GROUP.rollouts[0], turns=some), *GROUP.rollouts[1:]))
        found, full = (credit_rollouts((g,), VALUES, Recipe()) for g in (group, GROUP))
        assert [c.advantages.tolist() for c in found] == [c.advantages.tolist() for c in full]
        of_calls = credit_rollouts((group,), VALUES, Recipe(credit="query"))
        assert [len(c.token_advantages) for c in of_calls] == [6 - 2 * len(empty), 4, 2]
        assert all(np.isfinite(c.advantages).all() for c in of_calls)


def test_paper():
    # Outcomes {1, .5, -2}: mean -1/6, deviations 7/6, 4/6, -11/6, var 186/108, divisor 1.3123346 + 1e-6.
    a, b, c = 0.8890002, 0.5080001, -1.3970003
    # Gains {.2, .4, 0}: mean .2, var .08/3, sqrt(.0266666767) = .1632993, divisor .1633003: 0, 1.2247371, -1.2247371.
    g = 1.2247371
    assert scored(preset("paper")) == close([[a + g, a + g, a], [b - g, b], [c]])


def test_robust():
    # Outcomes {1, .5, 0}: mean .5, std .4082483. Gains {.2, .4, 0} over .2132993: .9376498, 1.8752996, 0.
    o = 1.2247449
    expected = [[o + 2.8129494, o + 1.8752996, o], [0.0, 0.0], [-o]]
    assert scored(preset("robust")) == close(expected)


def test_robust_gate():
    # Gains {.01, .4, 0} gate to {0, .4, 0}: mean .4/3, std sqrt(.32/9) = .1885618, .4/.2385618 = 1.6767144.
    values = [np.array([0.1, 0.11, 0.51]), *VALUES[1:]]
    o, g = 1.2247449, 1.6767144
    assert scored(preset("robust"), values=values) == close([[o + g, o + g, o], [0.0, 0.0], [-o]])


def test_paper_v1():
    # One pool {.2, .4, 1, 0, .5, -2}: mean .1/6, mean square 5.45/6, std .9529195.
    # z: .1923911, .4022725, 1.0319165; -.0174901, .5072131; -2.1163032; the floors are within the tolerance.
    expected = [[1.6265801, 1.4341890, 1.0319165], [0.4897230, 0.5072131], [-2.1163032]]
    actual = scored(preset("paper_v1"))
    assert actual == [pytest.approx(row, abs=3e-6) for row in expected]


# Of a group whose rollouts hardly differ: gains {1e-5, 3e-5, 0}, outcomes {6e-4, 3e-4, 0}.
DEAD = [np.array([0.1, 0.10001, 0.10004]), np.array([0.1, 0.1]), np.array([0.1])]


def test_what_hardly_differs_is_not_brought_to_unit_size(monkeypatch):
    outcomes = iter([6e-4, 3e-4, 0.0] * 2)
    monkeypatch.setattr("igpo_fast.update.advantages.outcome", lambda *_: next(outcomes))
    # Gains: var 10e-10/3 - 16e-10/9 = 14e-10/9, sqrt(that + 1e-8) = 1.0077478e-4, divisor 1.0177478e-4: -.0327521,
    # .1637603, -.1310082; with 1e-6 alone these would be 7.6 times as large. Outcomes: var 6e-8, sqrt(7e-8) =
    # 2.6457513e-4, divisor 2.6557513e-4: +-3e-4 / that = +-1.1296238.
    a, g, h, last = 1.1296238, -0.0327521, 0.1637603, -0.1310082
    assert scored(preset("paper"), values=DEAD) == close([[g + h + a, h + a, a], [last, 0.0], [-a]])
    # One pool {1e-5, 3e-5, 6e-4, 0, 3e-4, 0}: mean 9.4e-4/6, var 4.51e-7/6 - mean^2 = 5.0622222e-8, sqrt(that + 1e-8) =
    # 2.4621580e-4, divisor 2.4721580e-4: -.5932738, -.5123729, 1.7933050; -.6337243, .5797903; -.6337243.
    expected = [[0.6876583, 1.2809321, 1.7933050], [-0.0539340, 0.5797903], [-0.6337243]]
    assert scored(preset("paper_v1"), values=DEAD) == close(expected)


# With the released floors: outcomes {1, .5, 0}: var 1/6, .5 / (sqrt(.1666666767) + 1e-6); gains {.2, .4, 0} as above.
Z, G = 1.2247418, 1.2247371

ALGORITHM_NUMBERS = {
    "igpo": [[Z + G, Z + G, Z], [-G, 0.0], [-Z]],
    "ig_only": [[G, G, 0.0], [-G, 0.0], [0.0]],
    "grpo": [[Z] * 3, [0.0] * 2, [-Z]],
    "gspo": [[Z] * 3, [0.0] * 2, [-Z]],
    "dr_grpo": [[0.5] * 3, [0.0] * 2, [-0.5]],
    "rloo": [[0.75] * 3, [0.0] * 2, [-0.75]],  # 1 - .25, .5 - .5, 0 - .75
}


@pytest.mark.parametrize("name", ALGORITHM_NUMBERS)
def test_algorithms(name):
    assert scored(Recipe(algorithm=name, format_penalty=0.0)) == close(ALGORITHM_NUMBERS[name])


def test_reinforce_pp_normalises_over_the_batch():
    # Rollouts of 6, 4, 2 and 2 tokens, outcomes 1, .5, 0, 1: over 14 tokens mean 10/14, mean square 9/14, var 26/196,
    # std .3642157: deviations 4/14, -3/14, -10/14, 4/14.
    recipe = Recipe(algorithm="reinforce_pp", format_penalty=0.0)
    a, b, c = 0.7844616, -0.5883462, -1.9611541
    assert scored(recipe, (GROUP, OTHER), None) == [pytest.approx(x, abs=1e-5) for x in ([a] * 3, [b] * 2, [c], [a])]


def test_reinforce_pp_is_a_z_score_over_tokens():
    """numpy's, over an array of a number a token."""
    scores = credit_rollouts((GROUP, OTHER), None, Recipe(algorithm="reinforce_pp", min_var=0.0, outcome_min_std=0.0))
    rollouts = GROUP.rollouts + OTHER.rollouts
    tokens = np.concatenate([[s.outcome] * r.decision_tokens for s, r in zip(scores, rollouts, strict=True)])
    for s in scores:
        assert s.advantages == pytest.approx(np.full(len(s.advantages), (s.outcome - tokens.mean()) / tokens.std()))


def test_reinforce_pp_of_equal_outcomes_gives_exact_zeros():
    assert scored(Recipe(algorithm="reinforce_pp"), (OTHER, OTHER), None) == [[0.0], [0.0]]


@pytest.mark.parametrize("pool", ["joint", "scaled_separate"])
@pytest.mark.parametrize("name", ALGORITHM_NUMBERS)
def test_pool_matters_only_where_both_rewards_count(name, pool):
    recipe = Recipe(algorithm=name, pool=pool, format_penalty=0.0)
    same = scored(recipe) == close(ALGORITHM_NUMBERS[name])
    assert same == (name != "igpo")


def test_gamma_discounts_igpo_but_not_outcome_only():
    # ig_only, gamma .5: 0 + .5 G, G, 0.
    halved = dict(gamma=0.5, format_penalty=0.0)
    assert scored(Recipe(algorithm="ig_only", **halved)) == close([[G / 2, G, 0.0], [-G, 0.0], [0.0]])
    for name in ("grpo", "gspo", "dr_grpo", "rloo"):
        assert scored(Recipe(algorithm=name, **halved)) == close(ALGORITHM_NUMBERS[name])


def test_which_algorithms_need_values():
    assert {name for name, a in ALGORITHMS.items() if a.needs_values} == {"igpo", "ig_only", "ppo_ig"}


def test_one_turn_question_reduces_to_outcome_only():
    group = Group(QUESTION, tuple(rollout(i, 1, a) for i, a in enumerate(["york", "new york city", None, "new york"])))
    values = [np.array([0.3])] * 4
    expected = scored(Recipe(algorithm="grpo", outcome_min_std=0.05), (group,), None)
    for pool in ("separate", "joint", "scaled_separate"):
        recipe = Recipe(pool=pool, gamma=0.5, min_std=0.05, outcome_min_std=0.05)
        assert scored(recipe, (group,), values) == expected


def test_em_outcome_and_format_penalty():
    scores = credit_rollouts([GROUP], VALUES, Recipe(outcome="em", format_penalty=-1.0))
    assert [s.outcome for s in scores] == [1.0, 0.0, -1.0]
    assert [s.f1 for s in scores] == [1.0, 0.5, 0.0]
    assert [s.em for s in scores] == [1.0, 0.0, 0.0]


def test_undefined_values_cost_their_gains_only():
    values = [np.array([0.1, np.nan, 0.7]), np.array([0.1, 0.5]), VALUES[2]]
    scores = credit_rollouts([GROUP], values, Recipe())
    assert scores[0].gains.tolist() == [0.0, 0.0]
    assert [len(s.advantages) for s in scores] == [3, 2, 1]
    assert all(np.isfinite(s.advantages).all() for s in scores)
    assert reward_metrics([GROUP], scores)["reward/ig_nan"] == 2.0


def test_values_reported_or_absent_for_outcome_only():
    with_values = credit_rollouts([GROUP], VALUES, Recipe(algorithm="grpo"))
    assert with_values[0].gains == pytest.approx([0.2, 0.4])
    without = credit_rollouts([GROUP], None, Recipe(algorithm="grpo"))
    assert [s.gains.size for s in without] == [0, 0, 0]
    assert [s.values.shape for s in without] == [(3,), (2,), (1,)]
    assert all(np.isnan(s.values).all() for s in without)
    assert [s.advantages.tolist() for s in without] == [s.advantages.tolist() for s in with_values]


def test_refuses_missing_or_misshapen_values():
    with pytest.raises(ValueError, match="needs answer values"):
        credit_rollouts([GROUP], None, Recipe())
    for bad in (VALUES[:2], [VALUES[1], VALUES[0], VALUES[2]]):
        with pytest.raises(ValueError, match="values_per_rollout"):
            credit_rollouts([GROUP], bad, Recipe())


def test_metrics():
    groups = [GROUP, OTHER]
    values = [VALUES[0], np.array([0.3, 0.1]), VALUES[2], np.array([0.9])]
    # Gains {.2, .4}, {-.2}; the second group cannot spread.
    assert reward_metrics(groups, credit_rollouts(groups, values, Recipe())) == pytest.approx(
        {
            "reward/outcome": (1 + 0.5 - 2 + 1) / 4,
            "reward/f1": 2.5 / 4,
            "reward/em": 2 / 4,
            "reward/ig_mean": 0.4 / 3,
            "reward/ig_abs": 0.8 / 3,
            "reward/ig_zero": 0.0,
            "reward/ig_cum_negative": 1 / 4,
            "reward/ig_nan": 0.0,
            "value/first": (0.1 + 0.3 + 0.1 + 0.9) / 4,
            "value/last": (0.7 + 0.1 + 0.1 + 0.9) / 4,
            "group/collapsed_outcome": 1 / 2,
            "group/collapsed": 1 / 2,
            "turns/mean": 7 / 4,
            "turns/format_error": 1 / 4,
            "turns/truncated_tokens": 0.0,
            "turns/truncated_turns": 0.0,
        }
    )


def test_the_share_of_gains_that_a_gate_drops():
    # Gains {.2, .4}, {0}: not zero are two; none (no gate), none, one and both are dropped.
    scores = credit_rollouts([GROUP], VALUES, Recipe())
    shares = [reward_metrics([GROUP], scores, gate).get("reward/ig_gated") for gate in (0.0, 0.1, 0.3, 0.5)]
    assert shares == [None, 0.0, 0.5, 1.0]
    nothing = credit_rollouts([OTHER], [np.array([0.9])], Recipe())
    assert "reward/ig_gated" not in reward_metrics([OTHER], nothing, 0.1)


@pytest.mark.parametrize(
    "action, finished, out_of_turns, expected",
    [
        (ANSWER, True, True, ""),
        (ANSWER, False, False, ""),  # cut, and yet an answer
        (SEARCH, True, True, "turns"),
        (SEARCH, True, False, "tokens"),  # what it found left no room
        (INVALID, False, True, "tokens"),
        (INVALID, False, False, "tokens"),
        (INVALID, True, True, ""),  # malformed
        (INVALID, True, False, ""),
    ],
)
def test_what_cuts_a_rollout_short(action, finished, out_of_turns, expected):
    assert truncation(action, finished, out_of_turns) == expected


def test_truncated_rollouts_are_told_from_malformed_ones():
    ended = ["tokens", "turns", "turns", ""]
    rollouts = tuple(replace(rollout(i, 1, None), truncated=why) for i, why in enumerate(ended))
    group = Group(QUESTION, (*rollouts, rollout(4, 1, "york")))
    metrics = reward_metrics([group], credit_rollouts([group], None, Recipe(algorithm="grpo")))
    assert [metrics[f"turns/{key}"] for key in ("format_error", "truncated_tokens", "truncated_turns")] == [
        0.8,
        0.2,
        0.4,
    ]


def test_metrics_without_values_have_no_gain_keys():
    metrics = reward_metrics([GROUP], credit_rollouts([GROUP], None, Recipe(algorithm="grpo")))
    assert metrics and not [key for key in metrics if key.startswith(("reward/ig", "value/"))]


def test_a_mean_over_nothing_is_absent():
    metrics = reward_metrics([OTHER], credit_rollouts([OTHER], [np.array([0.9])], Recipe()))
    assert np.isfinite(list(metrics.values())).all()
    assert not {"reward/ig_mean", "reward/ig_abs", "reward/ig_zero"} & set(metrics)
    assert metrics["value/first"] == metrics["value/last"] == 0.9
    undefined = reward_metrics([GROUP], credit_rollouts([GROUP], [np.full(n, np.nan) for n in (3, 2, 1)], Recipe()))
    assert undefined["reward/ig_nan"] == 3.0 and not {"value/first", "value/last"} & set(undefined)


def test_equal_outcomes_still_learn_from_gains():
    group = Group(QUESTION, (rollout(0, 2, "york"), rollout(1, 2, "york")))
    values = [np.array([0.1, 0.5]), np.array([0.1, 0.10005])]
    learning = credit_rollouts([group], values, Recipe())
    assert (collapsed_outcome([group], learning), collapsed([group], learning)) == (1.0, 0.0)
    assert reward_metrics([group], learning)["reward/ig_zero"] == 0.5
    gated = credit_rollouts([group], values, Recipe(gate=0.9))
    assert collapsed([group], gated) == 1.0
