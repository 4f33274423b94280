"""Presets and algorithms on one group worked by hand, and the metrics of a step."""

import numpy as np
import pytest

from igpo_fast.advantages import (
    ALGORITHMS,
    Recipe,
    collapsed,
    collapsed_outcome,
    reward_metrics,
    score_rollouts,
)
from igpo_fast.config import PRESETS, Algorithm
from igpo_fast.types import ANSWER, INVALID, SEARCH, Group, Question, Rollout, Turn

QUESTION = Question("q", "Where?", ("new york city",))


def rollout(index: int, turns: int, answer: str | None) -> Rollout:
    """``turns`` turns, the last one answering, or invalid for None."""
    actions = [(SEARCH, "query")] * (turns - 1) + [(INVALID, "") if answer is None else (ANSWER, answer)]
    ids, logp = np.array([1, 2], dtype=np.int32), np.zeros(2, np.float32)
    return Rollout(QUESTION, index, ids, tuple(Turn(ids, logp, "", a, arg, ids[:1]) for a, arg in actions))


# A answers right (F1 1), B with one of three words (F1 2 * 1 / 4 = .5), C without a well-formed answer.
GROUP = Group(QUESTION, (rollout(0, 3, "New York City"), rollout(1, 2, "york"), rollout(2, 1, None)))
VALUES = [np.array([0.1, 0.3, 0.7]), np.array([0.1, 0.1]), np.array([0.1])]
# A second group of one rollout, right at once.
OTHER = Group(QUESTION, (rollout(0, 1, "new york city"),))


def preset(name: str) -> Recipe:
    p = PRESETS[name]
    return Recipe(
        basis=p["basis"],
        pool=p["pool"],
        gate=p["ig_gate"],
        center=p["ig_center"],
        min_std=p["ig_min_std"],
        format_penalty=p["format_penalty"],
    )


def scored(recipe: Recipe, groups=(GROUP,), values=VALUES):
    return [s.advantages.tolist() for s in score_rollouts(groups, values, recipe)]


def close(expected):
    return [pytest.approx(row, abs=1e-6) for row in expected]


def test_recipe_defaults_are_the_paper_preset():
    assert Recipe() == preset("paper")
    config = Algorithm(**PRESETS["paper"])
    default = Recipe()
    assert (default.outcome, default.f1_normalisation) == (config.outcome, config.f1_normalisation)
    assert (default.answers, default.gamma, default.algorithm) == (config.answers, config.gamma, config.name)


def test_every_configured_algorithm_is_known():
    assert tuple(ALGORITHMS) == Algorithm.model_fields["name"].annotation.__args__


def test_paper():
    # Outcomes {1, .5, -2}: mean -1/6, deviations 7/6, 4/6, -11/6, var 186/108, std 1.3123346.
    a, b, c = 0.8890009, 0.5080005, -1.3970014
    # Gains {.2, .4, 0}: mean .2, std sqrt(.08/3) = .1632993, divisor .1633003: 0, 1.2247374, -1.2247374.
    g = 1.2247374
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
    # z: .1923911, .4022725, 1.0319165; -.0174901, .5072131; -2.1163032; the floor of 1e-6 is within
    # the tolerance.
    expected = [[1.6265801, 1.4341890, 1.0319165], [0.4897230, 0.5072131], [-2.1163032]]
    actual = scored(preset("paper_v1"))
    assert actual == [pytest.approx(row, abs=3e-6) for row in expected]


Z, G = 1.2247449, 1.2247374  # of outcomes {1, .5, 0} and of gains {.2, .4, 0}, as above

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
    # Outcomes {1, .5, 0} and {1}: mean .625, deviations .375, -.125, -.625, .375, var .6875/4, std .4145781.
    recipe = Recipe(algorithm="reinforce_pp", format_penalty=0.0)
    a, b, c = 0.9045340, -0.3015113, -1.5075567
    assert scored(recipe, (GROUP, OTHER), None) == close([[a] * 3, [b] * 2, [c], [a]])


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


def test_which_algorithms_need_values_and_sequence_ratios():
    assert {name for name, a in ALGORITHMS.items() if a.needs_values} == {"igpo", "ig_only"}
    assert {name for name, a in ALGORITHMS.items() if a.sequence_ratio} == {"gspo"}


def test_one_turn_question_reduces_to_outcome_only():
    group = Group(QUESTION, tuple(rollout(i, 1, a) for i, a in enumerate(["york", "new york city", None, "new york"])))
    values = [np.array([0.3])] * 4
    expected = scored(Recipe(algorithm="grpo"), (group,), None)
    for pool in ("separate", "joint", "scaled_separate"):
        assert scored(Recipe(pool=pool, gamma=0.5, min_std=0.05), (group,), values) == expected


def test_em_outcome_and_format_penalty():
    scores = score_rollouts([GROUP], VALUES, Recipe(outcome="em", format_penalty=-1.0))
    assert [s.outcome for s in scores] == [1.0, 0.0, -1.0]
    assert [s.f1 for s in scores] == [1.0, 0.5, 0.0]
    assert [s.em for s in scores] == [1.0, 0.0, 0.0]


def test_undefined_values_cost_their_gains_only():
    values = [np.array([0.1, np.nan, 0.7]), np.array([0.1, 0.5]), VALUES[2]]
    scores = score_rollouts([GROUP], values, Recipe())
    assert scores[0].gains.tolist() == [0.0, 0.0]
    assert [len(s.advantages) for s in scores] == [3, 2, 1]
    assert all(np.isfinite(s.advantages).all() for s in scores)
    assert reward_metrics([GROUP], scores)["reward/ig_nan"] == 2.0


def test_values_reported_or_absent_for_outcome_only():
    with_values = score_rollouts([GROUP], VALUES, Recipe(algorithm="grpo"))
    assert with_values[0].gains == pytest.approx([0.2, 0.4])
    without = score_rollouts([GROUP], None, Recipe(algorithm="grpo"))
    assert [s.gains.size for s in without] == [0, 0, 0]
    assert [s.values.shape for s in without] == [(3,), (2,), (1,)]
    assert all(np.isnan(s.values).all() for s in without)
    assert [s.advantages.tolist() for s in without] == [s.advantages.tolist() for s in with_values]


def test_refuses_missing_or_misshapen_values():
    with pytest.raises(ValueError, match="needs answer values"):
        score_rollouts([GROUP], None, Recipe())
    for bad in (VALUES[:2], [VALUES[1], VALUES[0], VALUES[2]]):
        with pytest.raises(ValueError, match="values_per_rollout"):
            score_rollouts([GROUP], bad, Recipe())


def test_metrics():
    groups = [GROUP, OTHER]
    values = [VALUES[0], np.array([0.3, 0.1]), VALUES[2], np.array([0.9])]
    # Gains {.2, .4}, {-.2}; the second group cannot spread.
    assert reward_metrics(groups, score_rollouts(groups, values, Recipe())) == pytest.approx(
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
        }
    )


def test_metrics_without_values_have_no_gain_keys():
    metrics = reward_metrics([GROUP], score_rollouts([GROUP], None, Recipe(algorithm="grpo")))
    assert metrics and not [key for key in metrics if key.startswith(("reward/ig", "value/"))]


def test_metrics_of_one_turn_rollouts_are_finite():
    metrics = reward_metrics([OTHER], score_rollouts([OTHER], [np.array([0.9])], Recipe()))
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["reward/ig_mean"] == 0.0


def test_equal_outcomes_still_learn_from_gains():
    group = Group(QUESTION, (rollout(0, 2, "york"), rollout(1, 2, "york")))
    values = [np.array([0.1, 0.5]), np.array([0.1, 0.10005])]
    learning = score_rollouts([group], values, Recipe())
    assert (collapsed_outcome([group], learning), collapsed([group], learning)) == (1.0, 0.0)
    assert reward_metrics([group], learning)["reward/ig_zero"] == 0.5
    gated = score_rollouts([group], values, Recipe(gate=0.9))
    assert collapsed([group], gated) == 1.0
