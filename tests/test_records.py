"""run/records.py: what is written is what is read."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.run.records import VERSION, record_of, rollout_of
from igpo_fast.types import SEARCH, Action, Credit, Question, Rollout, Turn, answer_with

NUMBER = st.floats(-1e3, 1e3)
ARGUMENTS = st.dictionaries(st.text(max_size=3), st.one_of(st.text(max_size=5), st.integers(-9, 9)), max_size=2)
CALLS = st.lists(st.builds(Action, st.sampled_from([SEARCH, "python"]), ARGUMENTS), max_size=2).map(tuple)
ACTIONS = st.one_of(CALLS, st.text(max_size=5).map(lambda text: (answer_with(text),)))
IDS = st.lists(st.integers(0, 1 << 20), max_size=4)


@st.composite
def turns(draw):
    ids = draw(st.lists(st.integers(0, 1 << 20), min_size=1, max_size=4))
    return Turn(
        ids=np.array(ids, np.int32),
        logp=np.array(draw(st.lists(NUMBER, min_size=len(ids), max_size=len(ids))), np.float32),
        text=draw(st.text(max_size=5)),
        actions=draw(ACTIONS),
        response_ids=np.array(draw(IDS), np.int32),
        response=draw(st.text(max_size=5)),
        passages=tuple(draw(st.lists(st.text(max_size=3), max_size=2))),
        found=draw(st.booleans()),
        failed=draw(st.booleans()),
    )


@st.composite
def scored_rollouts(draw):
    question = Question(
        draw(st.text(min_size=1, max_size=4)), "?", ("a", "b"), corpus=draw(st.text(max_size=3)), dataset="NQ"
    )
    made = draw(st.lists(turns(), min_size=1, max_size=3))
    rollout = Rollout(question, draw(st.integers(0, 9)), np.array(draw(IDS), np.int32), tuple(made))
    number = st.one_of(NUMBER, st.just(float("nan")))
    array = lambda n: np.array(draw(st.lists(number, min_size=n, max_size=n)), np.float64)  # noqa: E731
    values, gains = array(len(made)), array(len(made) - 1)
    if np.isnan([*values, *gains]).all():
        gains = np.empty(0)  # not scored
    compared = draw(st.sampled_from([None, array(len(made) - 1)]))
    return rollout, Credit(values, gains, draw(NUMBER), 0.5, 1.0, array(len(made)), baselines=compared)


@given(scored_rollouts(), st.booleans())
def test_a_record_says_everything(pair, scored):
    rollout, scores = pair
    record = json.loads(json.dumps(record_of(rollout, scores if scored else None), allow_nan=False))
    read, earned = rollout_of(record)
    assert read.question == rollout.question and read.index == rollout.index
    assert read.ids.tolist() == rollout.ids.tolist() and read.ids.dtype == np.int32
    assert read.turn_of_token.tolist() == rollout.turn_of_token.tolist()
    assert read.boundaries.tolist() == rollout.boundaries.tolist()
    assert read.logp.tolist() == rollout.logp.tolist()
    for turn, same in zip(read.turns, rollout.turns, strict=True):
        for name in ("text", "action", "argument", "response", "passages", "failed"):
            assert getattr(turn, name) == getattr(same, name)
    assert (earned is None) == (not scored)
    if scored:
        assert (earned.baselines is None) == (scores.baselines is None)
        for name in ("values", "gains", "advantages", "baselines"):
            np.testing.assert_array_equal(getattr(earned, name), getattr(scores, name))
        assert (earned.outcome, earned.f1, earned.em) == (scores.outcome, scores.f1, scores.em)
    assert record_of(read, earned) == record


def test_a_later_version_is_refused():
    turn = Turn(np.ones(1, np.int32), np.zeros(1, np.float32), "a", (answer_with("a"),), np.zeros(0, np.int32))
    record = record_of(Rollout(Question("q", "?", ("a",)), 0, np.ones(1, np.int32), (turn,)))
    with pytest.raises(ValueError, match="version 2; this igpo-fast reads up to 1"):
        rollout_of(record | {"version": VERSION + 1})
