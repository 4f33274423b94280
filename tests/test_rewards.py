"""F1, exact match, outcomes, values and gains, on numbers worked by hand."""

import re
import string
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_fast.types import Group, Question, Rollout, Turn
from igpo_fast.update.gains import information_gain, values_of
from igpo_fast.update.rewards import agreement, exact_match, f1_score, normalise_answer, outcome, with_majority
from tests.doing import doing


@pytest.mark.parametrize(
    ("text", "normalisation", "expected"),
    [
        ("  The U.S.A.,  today! ", "igpo", "the u s a today"),
        ("  The U.S.A.,  today! ", "squad", "usa today"),
        ("Jean-Paul's", "igpo", "jean paul s"),
        ("Jean-Paul's", "squad", "jeanpauls"),
        ("another anthem", "squad", "another anthem"),  # articles are whole words
        ("The The", "squad", "the the"),  # nothing would be left
        ("?", "igpo", "?"),
        ("1,000", "igpo", "1 000"),
        ("1,000", "hotpot", "1000"),
        ("The Yes-men", "hotpot", "yesmen"),
        ("e\u0301t\u00e9", "igpo", "été"),  # accents typed apart
        ("「東京」。", "igpo", "東 京"),  # no spaces: characters are words
        ("《红楼梦》", "squad", "红 楼 梦"),
        ("in 東京", "igpo", "in 東 京"),
        (" ", "igpo", ""),
    ],
)
def test_normalise_answer(text, normalisation, expected):
    assert normalise_answer(text, normalisation) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "normalisation", "f1", "em"),
    [
        ("Paris", ["paris."], "igpo", 1.0, 1.0),
        ("in Paris", ["Paris"], "igpo", 2 / 3, 0.0),  # precision 1/2, recall 1
        ("york", ["new york city"], "igpo", 0.5, 0.0),  # precision 1, recall 1/3
        (
            "Goethe",
            ["Schiller", "J. W. Goethe", "Goethe"],
            "igpo",
            1.0,
            1.0,
        ),  # the best answer, not the first
        ("paris paris", ["Paris"], "igpo", 2 / 3, 0.0),  # words are counted, not only seen
        ("new new york", ["new york new"], "igpo", 1.0, 0.0),
        ("the river", ["river"], "igpo", 2 / 3, 0.0),
        ("the river", ["river"], "squad", 1.0, 1.0),
        ("London", ["Paris"], "igpo", 0.0, 0.0),
        ("", ["Paris"], "igpo", 0.0, 0.0),
        ("", ["The The"], "squad", 0.0, 0.0),
        (None, ["Paris"], "igpo", 0.0, 0.0),
        ("Cafe\u0301", ["Café"], "igpo", 1.0, 1.0),
        ("北京", ["北京市"], "igpo", 0.8, 0.0),  # 2 of 2 and 2 of 3 characters
        ("東京、日本", ["日本"], "squad", 2 / 3, 0.0),
        ("東京。", ["東京"], "squad", 1.0, 1.0),
        ("สวัสดี", ["สวัสดี"], "igpo", 1.0, 1.0),
        ("yes they are", ["yes"], "squad", 0.5, 0.0),
        ("yes they are", ["yes"], "hotpot", 0.0, 0.0),
        ("no", ["no one", "nobody"], "hotpot", 0.0, 0.0),
        ("Yes.", ["yes"], "hotpot", 1.0, 1.0),
        ("yes", ["no", "yes"], "hotpot", 1.0, 1.0),  # the rule is one of each answer
        ("1000 men", ["1,000 men"], "hotpot", 1.0, 1.0),
        ("in Paris", ["Paris"], "hotpot", 2 / 3, 0.0),
    ],
)
def test_f1_and_exact_match(prediction, answers, normalisation, f1, em):
    assert f1_score(prediction, answers, normalisation) == pytest.approx(f1)
    assert exact_match(prediction, answers, normalisation) == em


words = st.lists(st.sampled_from("abcd"), min_size=1, max_size=5).map(" ".join)


@given(words, words)
def test_f1_is_symmetric_bounded_and_one_when_exact(one, other):
    score = f1_score(one, [other])
    assert score == f1_score(other, [one])
    assert 0 <= score <= 1
    assert score == 1 or not exact_match(one, [other])


def hotpotqa_f1(prediction: str, answer: str) -> float:
    """As hotpot_evaluate_v1.py writes it."""
    exclude = set(string.punctuation)
    normal = lambda s: " ".join(  # noqa: E731
        re.sub(r"\b(a|an|the)\b", " ", "".join(c for c in s.lower() if c not in exclude)).split()
    )
    p, a = normal(prediction), normal(answer)
    if (p in ["yes", "no", "noanswer"] or a in ["yes", "no", "noanswer"]) and p != a:
        return 0.0
    common = Counter(p.split()) & Counter(a.split())
    if not sum(common.values()):
        return 0.0
    precision, recall = sum(common.values()) / len(p.split()), sum(common.values()) / len(a.split())
    return 2 * precision * recall / (precision + recall)


plain = st.lists(st.sampled_from(["yes", "no", "The x", "u.s.", "1,000", "1000", "x"]), min_size=1, max_size=3)


@settings(derandomize=True)
@given(plain.map(" ".join), plain.map(" ".join))
def test_hotpot_is_hotpotqas_own(prediction, answer):
    assert f1_score(prediction, [answer], "hotpot") == pytest.approx(hotpotqa_f1(prediction, answer))


@settings(derandomize=True)
@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_is_normalised_as_ever(text):
    spaced = text.lower().translate(str.maketrans(string.punctuation, " " * 32)).split()
    assert normalise_answer(text, "igpo") == (" ".join(spaced) or text.lower().strip())


def rollout(action: str, argument: str) -> Rollout:
    ids = np.array([1], dtype=np.int32)
    turn = Turn(ids, np.zeros(1, np.float32), "", doing(action, argument), np.array([], dtype=np.int32))
    return Rollout(Question("q", "?", ("new york",)), 0, ids, (turn,))


@pytest.mark.parametrize(
    ("action", "argument", "kind", "expected"),
    [
        ("answer", "york", "f1", 2 / 3),
        ("answer", "york", "em", 0.0),
        ("answer", "New York", "em", 1.0),
        ("answer", "wrong", "f1", 0.0),  # well-formed: no penalty
        ("answer", "", "f1", 0.0),
        ("invalid", "", "f1", -2.0),
        ("search", "new york", "em", -2.0),  # ran out of turns
    ],
)
def test_outcome(action, argument, kind, expected):
    assert outcome(rollout(action, argument), kind, "igpo", -2.0) == pytest.approx(expected)


def test_an_outcome_that_is_no_score_is_the_rollouts_own():
    judged = replace(rollout("invalid", ""), rewards={"reward": 0.25, "style": 1.0})
    assert outcome(judged, "own.py:judge", "igpo", -2.0) == outcome(judged, "tools", "igpo", -2.0) == 0.25


@pytest.mark.parametrize(
    ("said", "normalisation", "accepted", "share"),
    [
        (["B", "A", "A", None], "igpo", ("A",), 1 / 2),
        (["A", "B", "B", "A"], "igpo", ("B",), 1 / 2),  # B was the first with two
        (["A", "B", "A", "B"], "igpo", ("A",), 1 / 2),
        (["C", "A", "B"], "igpo", ("C",), 1 / 3),
        (["New York", " new  york!", "Boston"], "igpo", ("New York",), 2 / 3),  # one answer, in its first words
        (["Boston", " The U.S. ", "us", "US"], "squad", ("The U.S.",), 3 / 4),
        (["Boston", "The U.S.", "us", "US"], "igpo", ("us",), 1 / 2),  # "the u s" is another
        (["", " ", "", "A"], "igpo", ("A",), 1 / 4),  # who says nothing has no vote
        ([None, None, None], "igpo", (), 0.0),
        (["", None], "igpo", (), 0.0),
        (["?", "?", "A"], "igpo", ("?",), 2 / 3),
    ],
)
def test_the_majority_of_a_group(said, normalisation, accepted, share):
    members = [rollout("invalid" if text is None else "answer", text or "") for text in said]
    voted = with_majority(Group(members[0].question, tuple(members)), normalisation)
    for question in (voted.question, *(member.question for member in voted.rollouts)):
        assert (question.answers, question.truth, question.ground_truth) == (accepted, ("new york",), ("new york",))
    assert [member.answer for member in voted.rollouts] == said
    assert agreement(voted, normalisation) == pytest.approx(share)
    right = [outcome(member, "em", normalisation, -2.0) for member in voted.rollouts]
    assert right.count(1.0) == round(share * len(said)) and right.count(-2.0) == said.count(None)
    assert with_majority(voted, normalisation).question.ground_truth == ("new york",), "the truth stays"


# Two answers at two prefixes, as probabilities {1/2, 1/4} and {1/8, 1}.
LOGP = np.log([[0.5, 0.25], [0.125, 1.0]])


@pytest.mark.parametrize(
    ("basis", "answers", "expected"),
    [
        ("prob", "first", [0.5, 0.25]),
        ("prob", "max", [0.5, 1.0]),
        ("prob", "mean", [0.3125, 0.625]),  # of probabilities, not exp of the mean log
        ("log_prob", "first", [-0.6931472, -1.3862944]),
        ("log_prob", "max", [-0.6931472, 0.0]),
        ("log_prob", "mean", [-1.3862944, -0.6931472]),  # -(1 + 3)/2 and -(2 + 0)/2 times ln 2
    ],
)
def test_values_of(basis, answers, expected):
    values = values_of(LOGP.astype(np.float32), basis, answers)
    assert values.dtype == np.float64
    assert values == pytest.approx(expected, abs=1e-6)


def test_values_of_keeps_nan_and_refuses_other_shapes():
    with_nan = np.array([[-1.0, -2.0], [np.nan, -1.0]])
    assert np.isnan(values_of(with_nan, "log_prob", "max")).tolist() == [True, False]
    assert not np.isnan(values_of(with_nan, "log_prob", "first")).any()
    for bad in (np.zeros(3), np.zeros((0, 3))):
        with pytest.raises(ValueError, match="answer_logp"):
            values_of(bad, "prob", "first")


@pytest.mark.parametrize(
    ("values", "gains", "undefined"),
    [
        ([0.1, 0.4, 0.3], [0.3, -0.1], 0),
        ([0.5], [], 0),
        ([0.1, np.nan, 0.3, 0.5], [0.0, 0.0, 0.2], 2),  # a NaN value spoils the gains on both its sides
        ([-np.inf, -1.0, -np.inf], [0.0, 0.0], 2),
    ],
)
def test_information_gain(values, gains, undefined):
    result, count = information_gain(values)
    assert result.dtype == np.float64
    assert result == pytest.approx(gains)
    assert count == undefined
