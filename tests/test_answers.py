"""bench/answers.py: AUCs by hand, and gains that are those of the scorer."""

from dataclasses import replace

import numpy as np
import pytest

from bench.answers import ANSWERS, Found, auc, measure, table, turns_of
from igpo_fast.report.contents import Contents
from igpo_fast.score import load_scorer
from igpo_fast.train import train
from igpo_fast.trajectories import read_records
from tests import tiny


@pytest.mark.parametrize(
    ("gains", "found", "expected"),
    [
        ([1, 2, 3, 4], [False, True, False, True], 3 / 4),
        ([1, 1, 1], [True, False, False], 1 / 2),
        ([2, 1, 1, 0], [False, True, False, False], (0 + 1 / 2 + 1) / 3),
    ],
)
def test_an_auc_counts_pairs(gains, found, expected):
    assert auc(np.array(gains, float), np.array(found)) == expected


def test_turns_without_any_answer_are_what_others_are_compared_with():
    gains = {"nothing": (0.0, 0.0, 0.0, 0.0), "first": (1.0, 1.0, 0.5, 1.0), "other": (-0.5, 1.0, 0.25, 1.0)}
    turns = [Found(of, name == "first", name != "nothing", q) for name, of in gains.items() for q in "abc"]
    found = measure(turns)
    assert {kind: its["turns"] for kind, its in found.items()} == {"any": 6, "first": 3, "other": 3}
    aucs = {kind: [its[name]["auc"] for name in ANSWERS] for kind, its in found.items()}
    assert aucs == {"any": [0.5, 1, 1, 1], "first": [1, 1, 1, 1], "other": [0, 1, 1, 1]}
    assert found["other"]["first"]["gain"] == -0.5 and found["other"]["first"]["gain_without"] == 0
    shown = table([{"name": "x", "turns": 9, "found": found}])
    assert (
        "| others, not the first | 3 | 0.00 (0.00 to 0.00); -0.500 | 1.00" in shown and "| none | 3 | +0.000" in shown
    )


def test_gains_are_the_scorers(cache, tmp_path):
    run = train(tiny.settings(tmp_path / "run", cache, "train.steps=1"), tiny.Recorder())
    (file,) = run.rollouts.glob("step_*.jsonl")
    records = [*read_records(file)]
    names = sorted({record.question.answers[0] for record in records})
    two = [
        replace(r, question=replace(r.question, answers=(names[place % len(names)], *r.question.answers)))
        for place, r in enumerate(records)
    ]
    make = lambda of: load_scorer(str(run.path), basis="prob", answers=of)  # noqa: E731
    shows = Contents("igpo")
    found = [*turns_of(make("max"), two, shows)]
    for column, of in enumerate(ANSWERS):
        expected = []
        for record, scored in zip(two, make(of).score(two), strict=True):
            for turn, gain in zip(record.row["turns"], scored.gains, strict=False):
                expected.append(gain)
                if shows.stands(turn["response"], record.question.answers):
                    break
        assert [turn.gains[column] for turn in found] == pytest.approx(expected, abs=1e-6)
    assert any(turn.any for turn in found) and any(not turn.any for turn in found)
