"""evaluate.py: hand-worked means, and noise that training cannot touch."""

import math

import pytest

from igpo_fast.dialect import make_dialect
from igpo_fast.engines.base import Sampling
from igpo_fast.errors import InputError
from igpo_fast.evaluate import EVAL_STEP, evaluate
from igpo_fast.rollout import Limits, question_key
from igpo_fast.types import Question
from tests.scripted import ScriptedEngine, ScriptedTool, words_tokenizer

DIALECT = make_dialect("tags", words_tokenizer(), max_passage_tokens=8, max_answer_tokens=4, max_answers=2)
QUESTIONS = [Question(f"q{i}", "A born ?", ("C D",)) for i in range(4)]
# F1 1, 2/3, 0, and never an answer.
SAID = {
    "q0": "<answer> D C </answer>",
    "q1": "<answer> C </answer>",
    "q2": "<answer> A </answer>",
    "q3": "A <eos>",
}
BY_KEY = {question_key(question): SAID[question.id] for question in QUESTIONS}


def run(questions, engine, **options):
    return evaluate(
        questions,
        engine=engine,
        tool=ScriptedTool(),
        dialect=DIALECT,
        limits=Limits(max_turns=3, max_turn_tokens=6, max_tokens=64),
        sampling=Sampling(),
        concurrency=8,
        f1_normalisation="igpo",
        **{"seed": 5, **options},
    )


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


def test_no_questions_are_refused():
    with pytest.raises(InputError, match="evaluation: there are no questions; "):
        run([], ScriptedEngine(lambda key, turn: ""))
