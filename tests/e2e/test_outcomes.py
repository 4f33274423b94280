"""Runs whose outcomes are a user's function, the tools', or a vote: what trains, what is reported, how faults end."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from igpo_fast.data.load import load_data
from igpo_fast.errors import InputError, RunError, ToolError
from igpo_fast.rollouts.tools.search import Bm25Search
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import train
from igpo_fast.update.rewards import normalise_answer
from tests.tiny import Recorder, rows, settings

TWO = ("train.steps=2", "train.checkpoint_every=1", "eval.every=1")
UNTAUGHT = ("sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0")
FUNCTIONS = """
import asyncio

def length(rollout):
    return 0 if rollout.answer is None else len(rollout.answer) / 8

async def named(rollout):
    await asyncio.sleep(0)
    return {"reward": len(rollout.turns), "answered": rollout.answer is not None}

def sometimes(rollout):
    return None if rollout.index == 1 else float(rollout.index)

def never(rollout):
    return None

def raises(rollout):
    return {}[rollout.question.question]

def nan(rollout):
    return float("nan")

def text(rollout):
    return "good"

def nothing_trains(rollout):
    return {"style": 1.0}

def takes_a_name(rollout):
    return {"reward": 1.0, "ig_mean": 2.0}
"""


@pytest.fixture
def run(tmp_path, cache):
    """Trains two steps with functions of a user's file; returns the folder."""
    (tmp_path / "own.py").write_text(FUNCTIONS)

    def go(outcome, *options, display=None):
        spec = outcome if ":" not in outcome else f"{tmp_path}/{outcome}"
        chosen = settings(tmp_path / "run", cache, *TWO, f"algorithm.outcome={spec}", *options)
        train(chosen, display or Recorder())
        return RunFolder(tmp_path / "run")

    return go


def trained(folder, step=1):
    return list(folder.read_rollouts(f"step_{step:06d}"))


def test_a_functions_number_trains(run):
    folder = run("own.py:length")
    for step, row in enumerate(rows(folder.path)[1:], start=1):
        both = trained(folder, step)
        assert len(both) == 16
        for rollout, credit in both:
            expected = len(rollout.answer or "") / 8
            assert (rollout.rewards, credit.outcome) == ({"reward": expected}, expected)
        assert row["reward/outcome"] == pytest.approx(np.mean([credit.outcome for _, credit in both]))
        assert row["reward/f1"] == pytest.approx(np.mean([credit.f1 for _, credit in both])), "still measured"
        held_out = [rollout for rollout, _ in folder.read_rollouts(f"eval_{step:06d}")]
        assert row["eval/reward"] == pytest.approx(np.mean([len(r.answer or "") / 8 for r in held_out]))
        assert "eval/f1" in row and "rollout/unjudged" in row


def test_named_numbers_are_reported_and_keep_best_takes_them(run):
    folder = run("own.py:named", "algorithm.name=grpo", "train.keep_best=eval/answered")
    row = rows(folder.path)[1]
    both = trained(folder)
    assert row["reward/outcome"] == row["turns/mean"] == np.mean([len(r.turns) for r, _ in both])
    assert row["reward/answered"] == pytest.approx(1 - row["turns/format_error"])
    assert row["eval/reward"] == row["eval/turns"]
    assert 0 <= row["eval/answered"] <= 1 and "eval/outcome" not in row
    assert folder.best() is not None


def test_tools_may_judge(run, monkeypatch):
    async def outcome(self, opened, answer):
        return {"reward": float(opened.answers[0] == answer), "corpus": float(bool(opened.corpus))}

    monkeypatch.setattr(Bm25Search, "outcome", outcome)
    folder = run("tools")
    row = rows(folder.path)[1]
    assert row["reward/outcome"] == row["reward/em"] and row["reward/corpus"] == 1
    assert row["reward/f1"] > row["reward/em"] or row["reward/f1"] == row["reward/em"] > 0


def test_without_a_verdict_a_rollout_is_left_out(run):
    display = Recorder()
    folder = run("own.py:sometimes", display=display)
    assert {rollout.index for rollout, _ in trained(folder)} == {0, 2, 3}
    row = rows(folder.path)[1]
    assert row["rollout/unjudged"] == 4 and row["reward/outcome"] == pytest.approx(5 / 3)
    assert "own.py:sometimes gave no verdict on 4 rollouts, which are left out" in display.text


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("raises", r"it raised KeyError: '.*' for question '.*', rollout \d; correct it"),
        ("nan", r"it returned nan, not a finite number or numbers by name for question '.*', rollout \d"),
        ("text", r"it returned 'good', not a finite number"),
        ("nothing_trains", r"""it returned \{'style': 1.0\}, without "reward" for question"""),
        ("takes_a_name", r"it named a number 'ig_mean', which is taken or no plain name for question"),
        ("never", r"gave no verdict on two rollouts of any group; see that its judge answers"),
    ],
)
def test_faults_end_the_run_in_one_line(run, function, told):
    with pytest.raises(RunError, match=rf"algorithm.outcome=.*own.py:{function}.*{told}") as raised:
        run(f"own.py:{function}", "eval.every=0", "eval.questions=1")
    assert "\n" not in str(raised.value) and not isinstance(raised.value, InputError)


def test_tools_without_an_opinion_are_refused(run):
    with pytest.raises(RunError, match=r"^algorithm\.outcome=tools: none of the run's tools judges rollouts"):
        run("tools")


def test_a_judge_that_goes_down_costs_no_finished_step(run, tmp_path, monkeypatch):
    asked = []

    async def outcome(self, opened, rollout):
        asked.append(rollout)
        if len(asked) > 8 + 16 + 8 + 3:  # evaluation, step 1, evaluation, a part of step 2
            raise ToolError("judge: no answer; is it running?")
        return {"reward": len(rollout.answer or "") / 8}

    monkeypatch.setattr(Bm25Search, "outcome", outcome)
    options = ("train.checkpoint_every=20",)
    with pytest.raises(ToolError, match="judge: no answer"):
        run("tools", *options)
    assert list(RunFolder(tmp_path / "run").saved()) == [1]
    asked.clear()
    asked.extend([None] * -1000)

    async def well(self, opened, rollout):
        return {"reward": len(rollout.answer or "") / 8}

    monkeypatch.setattr(Bm25Search, "outcome", well)
    folder = run("tools", *options)
    assert [row["step"] for row in rows(folder.path)] == [0, 1, 2]


def test_an_edited_function_is_noticed(run, tmp_path):
    run("own.py:length")
    (tmp_path / "own.py").write_text(FUNCTIONS.replace("/ 8", "/ 9"))
    with pytest.raises(InputError, match=r"own.py \(algorithm.outcome\): holds something else than when"):
        run("own.py:length", "train.steps=3")


def test_a_majority_takes_the_place_of_the_truth(run):
    folder = run("f1", "algorithm.pseudo_answer=majority", "algorithm.format_penalty=-1", "rollout.temperature=1")
    row, both = rows(folder.path)[1], trained(folder)
    groups = {}
    for rollout, credit in both:
        groups.setdefault(rollout.question.id, []).append((rollout, credit))
    agreed = []
    for members in groups.values():
        said = [normalise_answer(rollout.answer or "") for rollout, _ in members]
        accepted = members[0][0].question.answers
        voted = max((said.count(answer) for answer in said if answer), default=0)
        agreed.append(voted / 4)
        assert len(accepted) == (voted > 0)
        assert all(rollout.question.answers == accepted and rollout.question.truth for rollout, _ in members)
        if accepted:
            assert said.count(normalise_answer(accepted[0])) == voted
            assert all(credit.outcome == 1 for (_, credit), s in zip(members, said, strict=True)
                       if s == normalise_answer(accepted[0]))  # fmt: skip
            assert all(np.isfinite(credit.values).all() for _, credit in members)
        else:
            assert all(np.isnan(credit.values).all() and np.isnan(credit.gains).all() for _, credit in members)
            assert not any(credit.advantages.any() for _, credit in members)
    assert row["group/majority"] == pytest.approx(np.mean(agreed))
    assert row["reward/em"] == pytest.approx(np.mean([credit.em for _, credit in both])), "against the truth"
    assert row["reward/outcome"] != row["reward/f1"]


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("preset", ["paper", "ig_search", "infopo", "tips"])
def test_a_policy_that_never_answers_has_no_majority(run, preset, passes):
    if preset == "tips" and passes == "one":
        pytest.skip("a critic takes two passes")
    options = (
        f"algorithm.preset={preset}",
        f"algorithm.passes={passes}",
        "train.steps=1",
        "eval.questions=1",
        *UNTAUGHT,
    )
    folder = run("f1", "algorithm.pseudo_answer=majority", *options)
    row = rows(folder.path)[1]
    assert row["turns/format_error"] == 1 and row["group/majority"] == 0
    assert np.isfinite(row["loss/grad_norm"])
    if preset != "infopo":
        assert row["reward/ig_nan"] == 0 and "value/first" not in row


def question_files(folder, cache):
    """The tiny world's questions and passages as files, the questions without answers."""
    data = load_data(settings(folder / "x", cache))
    passages = {p.id: p for collection in data.collections.values() for p in collection}
    (folder / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "title": p.title, "text": p.text}) + "\n" for p in passages.values())
    )
    asked = dict.fromkeys(question.question for question in data.train)
    (folder / "train.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in list(asked)[:24]))
    return (
        "data.source=files", f"data.train={folder}/train.jsonl", f"data.corpus={folder}/corpus.jsonl",
        "model.tokenizer=bpe", "model.vocab_size=300", "rollout.max_tokens=400", "train.steps=1", *UNTAUGHT,
    )  # fmt: skip


def test_questions_without_answers(run, tmp_path, cache):
    files = question_files(tmp_path, cache)
    with pytest.raises(InputError, match=r"train.jsonl line 1: question without answers; .*pseudo_answer=majority"):
        run("f1", *files)
    with pytest.raises(InputError, match=r"question without answers"):
        run("own.py:length", *files)  # igpo's gains need answers
    folder = run("own.py:length", "algorithm.name=grpo", *files)
    row = rows(folder.path)[-1]
    assert {key for key in row if re.match(r"eval/|reward/(f1|em|outcome)", key)} == {
        "reward/outcome", "eval/reward", "eval/turns"
    }  # fmt: skip
    assert all(np.isnan(credit.f1) for _, credit in trained(folder))


def test_questions_without_answers_have_a_majority(run, tmp_path, cache):
    files = question_files(tmp_path, cache)
    folder = run("f1", "algorithm.pseudo_answer=majority", *files)
    row = rows(folder.path)[-1]
    assert "eval/f1" not in row and "reward/f1" not in row and row["eval/turns"] > 0 and "group/majority" in row
