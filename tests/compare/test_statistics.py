"""Statistics of pairs against numbers worked by hand, and what must hold of any numbers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from igpo_fast.compare.statistics import (
    LEVEL,
    TESTABLE,
    area,
    differences,
    interval,
    mean_curve,
    paired,
    reached,
    sentences,
    sign_flip_p,
    summarise,
)
from tests.compare.rows import SCORE, row

SCORES = st.floats(0, 1, width=32)


def compared(rows, baseline="b", at=0.5, stalled=0.15):
    return summarise(rows, baseline, SCORE, at, stalled)


@pytest.mark.parametrize(
    ("d", "flips"),
    [
        # Sums of the 16 sign flips: 10, 8, 6, 4, 4, 2, 2, 0 and their negatives; the pairs' own is 2.
        ([1, 2, 3, -4], 14),
        ([1, 2, 3, 4], 2),
        ([0, 2, 3, 4], 4),
        ([0, 0, 0, 0], 16),
        ([0.1, 0.2, 0.3, -0.4], 14),  # as floats, equal sums differ in their last bit
        ([1e-3, 0.9, -0.9, 1e-3], 12),  # and by more than the sum's own last bit: all but the 4 flips with sum 0
    ],
)
def test_every_flip_of_four_signs_counts(d, flips):
    assert sign_flip_p(np.array(d)) == flips / 16


@given(st.lists(st.floats(-1, 1, width=16), min_size=2, max_size=9))
def test_p_is_scipys(d):
    d = np.array(d) + np.linspace(0.1, 0.3, len(d)) ** 2  # no ties, whose rounding scipy judges by the sum alone
    theirs = stats.permutation_test(
        (d, np.zeros_like(d)),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_p(d) == pytest.approx(theirs.pvalue)


def test_many_pairs_are_flipped_at_random():
    d = np.linspace(-0.4, 0.6, 17)
    exact = np.mean(
        [abs(s @ d) >= abs(d.sum()) - 1e-9 for s in 1 - 2 * (np.arange(2**17)[:, None] >> np.arange(17) & 1)]
    )
    assert sign_flip_p(d) == pytest.approx(exact, abs=0.01)
    assert sign_flip_p(np.ones(40)) == 1 / 2**16, "the pairs as they are count"


def test_four_pairs_by_hand():
    rows = [row("a", s, [0, f]) for s, f in zip((1, 2, 3, 4), (0.5, 0.5, 0.25, 0.75), strict=True)]
    rows += [row("b", s, [0, f]) for s, f in zip((1, 2, 3, 4), (0.25, 0.5, 0.5, 0.0), strict=True)]
    pairs = compared(rows)["pairs"]["a"]["steps"]
    assert pairs["seeds"] == [1, 2, 3, 4] and pairs["at"] == [10] * 4
    assert pairs["score"] == {
        "differences": [0.25, 0.0, -0.25, 0.75],
        "mean": 0.1875,
        "interval": None,  # of four
        # Flips of 0.25, 0.25 and 0.75 (0 doubles each): 1.25, 0.75, 0.75, 0.25 and negatives; 6 of 8 reach 0.75.
        "p": 0.75,
        "ahead": 2,
        "behind": 1,
        "ties": 1,
    }
    assert pairs["area"]["differences"] == [0.125, 0.0, -0.125, 0.375], "half, on a straight way from 0"


def test_differences_at_each_evaluation_by_hand():
    rows = [row("a", 1, [0, 0.5, 0.625]), row("b", 1, [0, None, 0.375]), row("a", 2, [0, 0.25, 0.5])]
    rows += [row("b", 2, [0, 0, 0.25]), row("b", 3, [0, 1, 1])]
    # Of seed 1 step 10 is not known of b: 0.125 lies on the way from 0 to 0.25. Seed 3 has no pair.
    assert compared(rows)["by_step"] == {
        "a": {"x": [0, 10, 20], "mean": [0, (0.125 + 0.25) / 2, 0.25], "low": None, "high": None}
    }


@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=8))
def test_the_other_way_round_signs_flip(pairs):
    rows = [row(name, seed, [0, f]) for seed, both in enumerate(pairs) for name, f in zip("ab", both, strict=True)]
    one, other = (compared(rows, baseline)["pairs"][name] for baseline, name in ("ba", "ab"))
    for budget in one:
        for key in ("score", "area"):
            ours, theirs = one[budget][key], other[budget][key]
            assert ours["differences"] == [-d for d in theirs["differences"]]
            assert ours["mean"] == -theirs["mean"] and ours["p"] == theirs["p"]
            assert (ours["ahead"], ours["ties"], ours["behind"]) == (theirs["behind"], theirs["ties"], theirs["ahead"])


@given(st.lists(st.floats(-1, 1, width=16), min_size=5, max_size=12))
def test_an_interval_contains_the_mean_and_turns_with_its_sign(d):
    low, high = interval(d, 999)
    rounding = 1e-12
    assert min(d) - rounding <= low <= np.mean(d) + rounding and np.mean(d) - rounding <= high <= max(d) + rounding
    assert interval([-x for x in d], 999) == pytest.approx([-high, -low], abs=1e-9)


def test_an_interval_is_bias_corrected_and_accelerated():
    d = [0.0, 0.01, 0.02, 0.03, 0.9]
    low, high = interval(d)
    plain = stats.bootstrap((d,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    assert low > plain.low and high > plain.high + 0.05, "a long tail to the right moves both ends there"


@pytest.mark.parametrize(("d", "ends"), [([0.1] * 7, [0.1, 0.1]), ([0.1] * 4, None), ([], None)])
def test_intervals_of_equal_and_of_few_numbers(d, ends):
    assert interval(d) == ends


def test_equal_seconds_by_hand():
    """b takes twice as long per step: after the 20 s that both have had, a is at step 20 of 20, b at 10 of 20."""
    a = row("a", 1, [0.0, 0.2, 0.8], seconds=[0, 10, 20])
    b = row("b", 1, [0.0, 0.4, 0.6], seconds=[0, 20, 40])
    found = differences(a, b, SCORE, "seconds")
    # Means over the 20 s: a (0.1 + 0.5) / 2, b 0.2.
    assert found == pytest.approx({"at": 20, "score": 0.8 - 0.4, "area": 0.3 - 0.2})
    assert differences(b, a, SCORE, "seconds")["score"] == pytest.approx(-0.4)
    assert differences(a, b, SCORE, "steps") == pytest.approx({"at": 20, "score": 0.2, "area": 0.3 - 0.35})
    late = row("b", 1, [0.0, 0.4, 0.6], seconds=[0, 5, 15])
    assert differences(a, late, SCORE, "seconds")["score"] == pytest.approx(0.5 - 0.6), "a between 10 and 20 s"


def test_evaluations_that_lack_a_number_are_passed_over():
    whole = row("a", 1, [0.0, 0.2, 0.4, 0.6])
    holed = row("b", 1, [None, 0.1, None, 0.3])
    found = differences(whole, holed, SCORE, "steps")
    assert found["score"] == pytest.approx(0.3)
    assert found["area"] == pytest.approx(0.4 - 0.2), "from the first evaluation of both"
    untimed = row("b", 1, [0.0, 0.1, 0.2, 0.3], seconds=[0, None, 40, 60])
    assert differences(whole, untimed, SCORE, "seconds")["score"] == pytest.approx(0.3)
    nothing = row("b", 1, [None] * 4)
    assert differences(whole, nothing, SCORE, "steps") is None
    statistics = compared([whole, nothing])
    assert statistics["pairs"]["a"]["steps"]["seeds"] == [] and statistics["variants"]["b"]["mean"] is None
    assert "nothing is compared" in sentences(statistics)[0]


@pytest.mark.parametrize("seconds", [[0, 20, None], [0, None, None], [0, 0, 0]])
def test_a_pair_counts_if_both_have_spent_something_known(seconds):
    """Else scores before the last evaluations, or before any training, would pass for the last ones."""
    a, b = row("a", 1, [0.0, 0.2, 0.4]), row("b", 1, [0.0, 0.1, 0.3], seconds=seconds)
    assert differences(a, b, SCORE, "seconds") is None and differences(b, a, SCORE, "seconds") is None
    assert compared([a, b])["pairs"]["a"]["seconds"]["seeds"] == []


def test_runs_without_a_partner_are_named():
    rows = [
        row(name, seed, [0.0, 0.5])
        for name, seeds in (("a", (1, 2)), ("c", (1, 3)), ("b", (1, 3, 4)))
        for seed in seeds
    ]
    assert compared(rows)["unpaired"] == {"a-2": "no b-2", "b-4": "no a-4, no c-4"}
    assert "In no pair: a-2 (no b-2), b-4 (no a-4, no c-4)." in sentences(compared(rows))
    assert compared(rows[:2], baseline="a")["unpaired"] == {}


def test_curves_of_other_lengths_and_rhythms():
    """Every 10 steps to 30 and every 20 to 40: compared at 30."""
    short, long = row("a", 1, [0.0, 0.1, 0.2, 0.3]), row("b", 1, [0.0, 0.2, 0.8], steps=[0, 20, 40])
    assert differences(short, long, SCORE, "steps") == pytest.approx(
        {"at": 30, "score": 0.3 - 0.5, "area": 0.15 - 0.55 / 3}
    )
    curve = mean_curve([short, long], SCORE, "steps")
    assert curve["x"] == [0, 10, 20, 30] and curve["mean"] == pytest.approx([0.0, 0.1, 0.2, 0.4])
    assert curve["low"] is None and curve["high"] is None
    band = mean_curve([row("a", seed, [0.0, seed / 10]) for seed in range(5)], SCORE, "steps")
    assert band["low"][0] == band["high"][0] == 0 and band["low"][1] < 0.2 < band["high"][1]
    assert mean_curve([], SCORE, "steps")["x"] == []


@given(st.lists(st.tuples(st.floats(0.1, 9), SCORES), min_size=2, max_size=8), st.floats(0, 1), st.floats(0, 1))
def test_an_area_is_a_mean(points, one, other):
    xs = np.cumsum([gap for gap, _ in points])
    ys = np.array([y for _, y in points])
    first, last = sorted(xs[0] + share * (xs[-1] - xs[0]) for share in (one, other))
    assert min(ys) - 1e-9 <= area(xs, ys, first, last) <= max(ys) + 1e-9
    assert area(xs, 0 * ys + 0.5, first, last) == pytest.approx(0.5)


def test_what_a_score_costs():
    run = row("a", 1, [0.1, None, 0.5, 0.4], seconds=[0, 1, 2, 3], tokens=[0, 7, None, 9])
    assert reached(run, SCORE, 0.5) == {"steps": 20, "seconds": 2, "tokens": None}
    assert reached(run, SCORE, 0.51) is None


def test_runs_that_never_got_there_are_censored_not_left_out():
    fast, slow, never = [0.0, 0.6, 0.6], [0.0, 0.2, 0.6], [0.0, 0.1, 0.1]
    told = lambda *curves: compared([row("b", i, c) for i, c in enumerate(curves)])["variants"]["b"]["reached"]  # noqa: E731
    assert told(fast, slow, never) == {"runs": 2, "never": 1, "steps": 20, "seconds": 40, "tokens": 2000}
    assert told(fast, never, never) == {"runs": 1, "never": 2, "steps": None, "seconds": None, "tokens": None}
    assert told(fast, never)["steps"] is None and told(fast, slow)["steps"] == 15


def test_a_variant_in_numbers():
    rows = [
        row("b", s, [0.0, f], **{"group/collapsed": c}) for s, f, c in ((1, 0.1, 0.2), (2, 0.5, 0.4), (3, 0.9, None))
    ]
    found = compared(rows)
    assert found["pairs"] == {} and sentences(found)[0] == "Runs of b alone count: nothing is compared."
    known = found["variants"]["b"]
    assert known["runs"] == 3 and known["stalls"] == 1
    assert known["mean"] == pytest.approx(0.5) and known["collapsed"] == pytest.approx(0.3)
    assert known["standard_error"] == pytest.approx(0.4 / math.sqrt(3))
    assert compared(rows[:1])["variants"]["b"]["standard_error"] is None


@pytest.mark.parametrize(
    ("d", "verdict"),
    [
        ([0.1, 0.2, 0.1, 0.2], "a ended 0.150 higher than b in eval/f1 at equal steps (p = 0.12), ahead in 4 of 4 "
         "pairs; with fewer than 6 pairs p cannot be below 0.05: not shown to be higher."),
        ([0.1, -0.1, 0.1, -0.1, 0.0], "level with b"),
        ([-0.1, -0.2, -0.1, -0.2, -0.15], "p = 0.062), ahead in 0 of 5 pairs; with "
         "fewer than 6 pairs p cannot be below 0.05: not shown to be lower."),
        ([0.1, -0.1, 0.1, -0.1, 0.0, 0], "2 of 6 pairs and level in 2; the interval includes 0: not shown to be"),
        ([-0.1, 0.1, -0.1, 0.05, 0.0, 0], "includes 0: not shown to be lower."),
        ([0.1, 0.2, 0.1, 0.2, 0.15, -0.01], "leaves 0 out, but p is not below 0.05: not shown to be higher."),
        ([-0.1, -0.2, -0.1, -0.2, -0.15, -0.1], "lower than b in eval/f1 at equal steps (95 % interval -"),
        ([-0.1, -0.2, -0.1, -0.2, -0.15, -0.1], "; lower here, by interval and test."),
    ],
)  # fmt: skip
def test_what_is_said(d, verdict):
    rows = [row(name, s, [0.3, 0.3 + f]) for s, x in enumerate(d) for name, f in (("a", x), ("b", 0))]
    first, second, last = sentences(compared(rows))
    assert verdict in first
    assert second.startswith("a - b: ") and "at equal seconds" in second and "at equal tokens" in second
    assert last == f"Ended below 0.15: {sum(0.3 + x < 0.15 for x in d)} of {len(d)} runs of a, 0 of {len(d)} runs of b."


@pytest.mark.parametrize("count", [TESTABLE - 1, TESTABLE])
def test_how_many_pairs_can_show_something(count):
    assert (sign_flip_p(np.full(count, 0.1)) < LEVEL) == (count == TESTABLE)


def test_nothing_paired_has_no_numbers():
    assert paired([]) == {
        "differences": [],
        "mean": None,
        "interval": None,
        "p": None,
        "ahead": 0,
        "behind": 0,
        "ties": 0,
    }
    alone = compared([row("a", 1, [0, 1]), row("b", 2, [0, 1])])
    assert alone["pairs"]["a"]["steps"]["seeds"] == []
