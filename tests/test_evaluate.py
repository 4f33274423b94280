"""evaluate.py: hand-worked means, and noise that training cannot touch."""

import math
from dataclasses import replace

import pytest

from igpo_fast.engines.base import Sampling
from igpo_fast.errors import InputError
from igpo_fast.evaluate import EVAL_STEP, evaluate, set_names
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.rollout import Agent, Limits, question_key
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import Question
from tests.scripted import ScriptedEngine, ScriptedTool, words_tokenizer

DIALECT = make_dialect(
    "tags", words_tokenizer(), (SEARCH_TOOL,), max_passage_tokens=8, max_answer_tokens=4, max_answers=2
)
QUESTIONS = [Question(f"q{i}", "A born ?", ("C D",)) for i in range(4)]
# F1 1, 2/3, 0, and never an answer.
SAID = {
    "q0": "<answer> D C </answer>",
    "q1": "<answer> C </answer>",
    "q2": "<answer> A </answer>",
    "q3": "A <eos>",
}
BY_KEY = {question_key(question): SAID[question.id] for question in QUESTIONS}


def run(questions, engine, seed=5, **options):
    limits = Limits(max_turns=3, max_turn_tokens=6, max_tokens=64)
    agent = Agent(engine, Tools([ScriptedTool()]), DIALECT, limits, Sampling(), seed, concurrency=8)
    return evaluate(agent, questions, "igpo", **options).metrics


def test_hand_worked():
    done = []
    engine = ScriptedEngine(lambda key, turn: BY_KEY[key[2]])
    metrics = run(QUESTIONS, engine, progress=lambda *at: done.append(at))
    f1 = [1, 2 / 3, 0, 0]
    mean = 5 / 12
    assert metrics == pytest.approx(
        {
            "eval/f1": mean,
            "eval/f1_se": math.sqrt(sum((x - mean) ** 2 for x in f1) / 3 / 4),
            "eval/em": 0.0,  # "D C" has the words of "C D" but is not it
            "eval/turns": (1 + 1 + 1 + 3) / 4,
        }
    )
    assert done[-1] == (4, 4)


def test_exact_match_counts():
    assert run(QUESTIONS, ScriptedEngine(lambda key, turn: "<answer> C D </answer>"))["eval/em"] == 1.0


def test_keys_are_its_own():
    engine = ScriptedEngine(lambda key, turn: "<answer> C </answer>")
    run(QUESTIONS, engine, seed=5)
    assert {request.key for request in engine.requests} == {
        (5, EVAL_STEP, question_key(question), 0) for question in QUESTIONS
    }
    assert EVAL_STEP < 0  # no training step


def test_one_question_has_no_standard_error():
    metrics = run(QUESTIONS[:1], ScriptedEngine(lambda key, turn: "<answer> C D </answer>"))
    assert (metrics["eval/f1"], math.isnan(metrics["eval/f1_se"])) == (1.0, True)


def test_several_data_sets_are_averaged_plainly():
    """Three questions of one set with F1 1, 2/3 and 0, one of the other without an answer: not the mean of four."""
    asked = [replace(question, dataset="NQ" if i < 3 else "PopQA") for i, question in enumerate(QUESTIONS)]
    metrics = run(asked, ScriptedEngine(lambda key, turn: BY_KEY[key[2]]))
    mean = 5 / 9
    se = math.sqrt(((1 - mean) ** 2 + (2 / 3 - mean) ** 2 + mean**2) / 2 / 3)
    assert (metrics["eval/NQ/f1"], metrics["eval/PopQA/f1"]) == pytest.approx((mean, 0.0))
    assert (metrics["eval/NQ/turns"], metrics["eval/PopQA/turns"]) == (1.0, 3.0)
    assert (metrics["eval/f1"], metrics["eval/turns"]) == pytest.approx((mean / 2, 2.0))
    assert metrics["eval/NQ/f1_se"] == pytest.approx(se)
    assert math.isnan(metrics["eval/PopQA/f1_se"]) and math.isnan(metrics["eval/f1_se"])
    assert set_names(metrics) == ["NQ", "PopQA"]
    assert set_names(run(QUESTIONS, ScriptedEngine(lambda key, turn: BY_KEY[key[2]]))) == []


def test_the_averages_standard_error():
    """Of independent sets: the root of the summed squares, over their number."""
    said = {"q0": "<answer> C D </answer>", "q1": "<answer> A </answer>"} | {"q2": "<answer> C D </answer>"}
    by_key = {question_key(question): said.get(question.id, "A <eos>") for question in QUESTIONS}
    asked = [replace(question, dataset=f"set{i // 2}") for i, question in enumerate(QUESTIONS)]
    metrics = run(asked, ScriptedEngine(lambda key, turn: by_key[key[2]]))
    assert metrics["eval/set0/f1_se"] == metrics["eval/set1/f1_se"] == pytest.approx(0.5)
    assert metrics["eval/f1_se"] == pytest.approx(math.sqrt(0.5**2 + 0.5**2) / 2)


def test_no_questions_are_refused():
    with pytest.raises(InputError, match="evaluation: there are no questions; "):
        run([], ScriptedEngine(lambda key, turn: ""))
