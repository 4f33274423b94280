"""Who is asked what a rollout earned, when, and what counts as an answer."""

import asyncio
import threading

import numpy as np
import pytest
import torch

from igpo_fast import config
from igpo_fast.contents import sources
from igpo_fast.engines.base import Sampling
from igpo_fast.errors import InputError, RunError
from igpo_fast.evaluate import evaluate
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.outcome import Outcome, make_outcome
from igpo_fast.rollouts.rollout import Agent, Limits
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.run.records import record_of, rollout_of
from igpo_fast.setup import settings_warnings
from igpo_fast.types import Question
from igpo_fast.update.advantages import ALGORITHMS, Recipe, credit_rollouts
from tests.scripted import ScriptedEngine, ScriptedTool, words_tokenizer

DIALECT = make_dialect(
    "tags", words_tokenizer(), (SEARCH_TOOL,), max_passage_tokens=8, max_answer_tokens=4, max_answers=2
)
QUESTIONS = [Question(f"q{i}", "A born ?", ("C D",)) for i in range(2)]


def agent(function=None, kind="own.py:f", engine=None, tool=None):
    limits = Limits(max_turns=2, max_turn_tokens=6, max_tokens=64)
    engine = engine or ScriptedEngine(lambda key, turn: "<answer> C </answer>")
    tools = Tools([tool or ScriptedTool()])
    return Agent(engine, tools, DIALECT, limits, Sampling(), 0, concurrency=8, outcome=Outcome(kind, function))


def earned(function, questions=QUESTIONS[:1], size=2, **more):
    groups = rollout_groups(agent(function, **more), questions, size, 1)
    return [dict(rollout.rewards) for group in groups for rollout in group.rollouts]


@pytest.mark.parametrize(
    ("given", "numbers"),
    [
        (1, {"reward": 1.0}),
        (True, {"reward": 1.0}),
        (np.float32(0.5), {"reward": 0.5}),
        (np.array(0.5), {"reward": 0.5}),
        (torch.tensor(0.5), {"reward": 0.5}),
        ({"reward": 0, "style.x": np.bool_(True)}, {"reward": 0.0, "style.x": 1.0}),
        (None, {}),
    ],
)
def test_what_counts_as_a_verdict(given, numbers):
    assert earned(lambda rollout: given) == [numbers] * 2

    async def later(rollout):
        return given

    assert earned(later) == [numbers] * 2


@pytest.mark.parametrize(
    "given",
    [
        "0.5", b"1", float("inf"), float("nan"), [0.5], (1.0,), np.zeros(2), object(), 1j, 10**400, {}, {"score": 1},
        {"reward": None}, {"reward": "1"}, {"reward": 1, "x": float("nan")}, {"reward": 1, 3: 1},
        {"reward": 1, "a/b": 1},
        {"reward": 1, "f1": 1}, {"reward": 1, "ig_x": 1}, {"reward": 1, "turns": 2}, {"reward": 1, "": 2},
    ],
)  # fmt: skip
def test_what_does_not_ends_the_run_and_names_function_and_question(given):
    with pytest.raises(RunError, match=r"^algorithm.outcome=own.py:f: it .* question 'q0', rollout \d; correct it$"):
        earned(lambda rollout: given)


def test_it_sees_the_whole_rollout_also_one_without_an_answer():
    seen = []

    def judge(rollout):
        seen.append((rollout.question.id, rollout.index, rollout.answer, [turn.action for turn in rollout.turns]))
        return 0.0

    engine = ScriptedEngine(lambda key, turn: "<answer> C </answer>" if key[3] else "<search> A </search>")
    earned(judge, engine=engine)
    assert sorted(seen) == [("q0", 0, None, ["search", "search"]), ("q0", 1, "C", ["answer"])]


def test_one_that_waits_holds_up_neither_sampling_nor_another_and_no_slot():
    """The first rollout's verdict comes only after the last rollout was sampled and its slot was free."""
    engine = ScriptedEngine(lambda key, turn: "<answer> C </answer>")
    everyone, waiting = asyncio.Event(), []

    async def judge(rollout):
        waiting.append(rollout.index)
        if len(waiting) == 4:
            assert len(engine.released) == 4
            everyone.set()
        await everyone.wait()
        return 1.0

    assert earned(judge, size=4, engine=engine) == [{"reward": 1.0}] * 4


def test_a_synchronous_one_runs_in_threads():
    barrier = threading.Barrier(3, timeout=30)

    def judge(rollout):
        barrier.wait()  # breaks unless three wait at once
        return threading.current_thread() is not threading.main_thread()

    assert earned(judge, size=3) == [{"reward": 1.0}] * 3


def test_objects_that_are_called_are_functions_too():
    class Judge:
        async def __call__(self, rollout):
            return 0.25

    assert earned(Judge()) == [{"reward": 0.25}] * 2


def test_tools_are_asked_with_their_state_while_it_is_open():
    told = []

    class Tool(ScriptedTool):
        async def open(self, question):
            return [question.id]

        async def outcome(self, opened, rollout):
            told.append((opened[0], rollout.answer))
            return {"reward": 0.5, "steps": 3}

        async def close(self, opened):
            told.append("closed")

    assert earned(None, kind="tools", tool=Tool(), size=1) == [{"reward": 0.5, "steps": 3.0}]
    assert told == [("q0", "C"), "closed"]


def test_evaluation_reports_numbers_and_measures_only_what_is_known():
    questions = [Question("q0", "A born ?", ("C",)), Question("q1", "A born ?", ()), Question("q2", "A born ?", ())]
    judged = {"q0": {"reward": 1, "style": 4}, "q1": {"reward": 0}, "q2": None}
    found = evaluate(agent(lambda rollout: judged[rollout.question.id]), questions, "igpo").metrics
    assert np.isnan(found.pop("eval/f1_se"))
    assert found == {"eval/f1": 1.0, "eval/em": 1.0, "eval/turns": 1.0, "eval/reward": 0.5, "eval/style": 4.0}
    found = evaluate(agent(lambda rollout: 1.0), questions[1:], "igpo").metrics
    assert found == {"eval/turns": 1.0, "eval/reward": 1.0}


def test_records_keep_verdicts_and_truth():
    (group,) = rollout_groups(agent(lambda rollout: {"reward": 0.5, "style": 1}), QUESTIONS[:1], 1, 1)
    (rollout,) = group.rollouts
    asked = Question("q0", "A born ?", ("A",), truth=("C D",))
    for question in (asked, QUESTIONS[0], Question("q0", "A born ?", (), truth=())):
        rollout = type(rollout)(question, 0, rollout.prompt_ids, rollout.turns, "", rollout.rewards)
        record = record_of(rollout)
        again, credit = rollout_of(record)
        assert credit is None and (again.rewards, again.question) == (rollout.rewards, question)
        assert record_of(again) == record
    record.pop("rewards")
    assert rollout_of(record)[0].rewards == {}


def test_unknown_ground_truth_is_no_score_of_zero():
    (group,) = rollout_groups(agent(lambda rollout: 0.5), [Question("q", "A born ?", ())], 2, 1)
    credits = credit_rollouts([group], None, Recipe("grpo", outcome="own.py:f"))
    assert all(np.isnan([credit.f1, credit.em]).all() and credit.outcome == 0.5 for credit in credits)
    again, credit = rollout_of(record_of(group.rollouts[0], credits[0]))
    assert np.isnan(credit.f1) and record_of(again, credit)["f1"] is None


@pytest.mark.parametrize("algorithm", [name for name, a in ALGORITHMS.items() if a.needs_values])
def test_without_an_answer_to_score_no_turn_earns(algorithm):
    engine = ScriptedEngine(lambda key, turn: "<answer> C </answer>" if turn == key[3] else "<search> A </search>")
    (group,) = rollout_groups(agent(lambda rollout: 0.5, engine=engine), [Question("q", "A born ?", ())], 2, 1)
    values = [np.full(len(rollout.turns), np.nan) for rollout in group.rollouts]
    credits = credit_rollouts([group], values, Recipe(algorithm, outcome="own.py:f"))
    assert [len(credit.gains) for credit in credits] == [0, 1]
    assert np.isnan(credits[1].gains).all() and not any(credit.undefined for credit in credits)
    assert not any(credit.advantages.any() for credit in credits)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (
            ["algorithm.outcome=f2"],
            "algorithm.outcome: 'f2' is no outcome; give f1, em, tools, package.module:function",
        ),
        (["algorithm.outcome=judge.py"], "'judge.py' is no outcome"),
        (["algorithm.pseudo_answer=reference", "algorithm.outcome=em"], "only who writes the whole text"),
        (
            ["algorithm.pseudo_answer=majority", "algorithm.name=ppo", "rollout.group_size=1"],
            "calls every answer right",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(InputError, match=told):
        config.load(None, settings)


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ([], True),
        (["name=grpo"], True),
        (["name=grpo", "outcome=own.py:f"], False),
        (["outcome=own.py:f"], True),
        (["outcome=tools", "baseline=masked"], False),
        (["baseline=masked"], True),
        (["pseudo_answer=majority"], False),
        (["pseudo_answer=reference"], True),
    ],
)
def test_who_needs_answers(settings, needed):
    assert config.load(None, [f"algorithm.{setting}" for setting in settings]).algorithm.needs_answers is needed


def test_config_and_algorithms_agree_on_who_has_gains():
    assert set(config.WITH_GAINS) == {name for name, algorithm in ALGORITHMS.items() if algorithm.needs_values}


def test_settings_without_effect_are_told():
    idle = ["algorithm.outcome=own.py:f", "algorithm.format_penalty=-1", "algorithm.pseudo_answer=majority"]
    told = "\n".join(settings_warnings(config.load(None, [*idle, "algorithm.name=grpo"])))
    assert "format_penalty=-1.0 does nothing: algorithm.outcome=own.py:f judges" in told
    assert "pseudo_answer=majority does nothing: nothing is compared with answers" in told
    assert "pseudo_answer" not in "\n".join(settings_warnings(config.load(None, idle)))


def test_the_file_of_a_function_is_part_of_a_run(tmp_path):
    (tmp_path / "own.py").write_text("def f(rollout): return 0")
    spec = f"{tmp_path}/own.py:f"
    assert sources(config.load(None, [f"algorithm.outcome={spec}"])) == {"algorithm.outcome": f"{tmp_path}/own.py"}
    assert sources(config.load(None, ["algorithm.outcome=em"])) == {}
    assert make_outcome("em") is None and isinstance(make_outcome(spec), Outcome)
    with pytest.raises(InputError, match=r"own.py has no g"):
        make_outcome(f"{tmp_path}/own.py:g")
