"""The tools of a run and of a rollout: opening, limits, counters, failures; tools of users' own; visit."""

import asyncio
from collections import Counter

import numpy as np
import pytest

from igpo_fast import config
from igpo_fast.data.load import Data
from igpo_fast.errors import InputError, ToolError
from igpo_fast.rollouts.dialect.parsing import fits
from igpo_fast.rollouts.tools.base import Tool, Tools
from igpo_fast.rollouts.tools.make import make_tools
from igpo_fast.rollouts.tools.search import NoSearch
from igpo_fast.rollouts.tools.visit import Visit
from igpo_fast.types import Action, Passage, Question, Rollout, ToolResult, Turn, answer_with
from tests.contracts.tool import told

NOTHING = np.zeros(0, np.int32)
ASKED = Question("q", "Who?", ("Goethe",))


def answered(question, answer):
    """A rollout of one turn, which gives the answer, or is malformed."""
    actions = () if answer is None else (answer_with(answer),)
    none = np.zeros(0, np.int32)
    turn = Turn(np.ones(1, np.int32), np.zeros(1, np.float32), "", actions, none)
    return Rollout(question, 0, np.ones(1, np.int32), (turn,))


def schema(name):
    return {"type": "function", "function": {"name": name, "description": "Does it.", "parameters": {}}}


class Echo(Tool):
    """Says its name and argument; remembers what is opened and closed; ``gate`` holds calls back."""

    def __init__(self, *names, gate=None):
        super().__init__()
        self.schemas, self.gate = [schema(name) for name in names], gate
        self.opened, self.closed, self.waiting = [], [], 0

    async def open(self, question):
        self.opened.append(question.id)
        return len(self.opened)

    async def call(self, opened, action):
        self.counts["calls"] += 1
        if self.gate:
            self.waiting += 1
            await self.gate.wait()
        return ToolResult(text=f"{action.tool} {action.text} {opened}")

    async def close(self, opened):
        self.closed.append(opened)


def say(name, text="x"):
    return Action(name, {"text": text})


def run(tools, *turns):
    """The texts of a rollout's turns of calls."""

    async def rollout():
        async with tools.open(ASKED) as opened:
            return [[result.failure or result.text for result in await opened.call(turn)] for turn in turns]

    return asyncio.run(rollout())


def test_a_tool_is_opened_before_its_first_call_and_closed_with_the_rollout():
    used, unused = Echo("a", "b"), Echo("c")
    tools = Tools([used, unused])
    assert run(tools, [say("a")], [say("b"), say("a", "y")]) == [["a x 1"], ["b x 1", "a y 1"]]
    assert (used.opened, used.closed, unused.opened) == (["q"], [1], [])
    assert run(tools, [say("b")]) == [["b x 2"]]
    assert used.closed == [1, 2]


def test_calls_of_one_turn_run_at_once():
    async def rollout():
        gate = asyncio.Event()
        tool = Echo("a", gate=gate)
        async with Tools([tool]).open(ASKED) as opened:
            calls = asyncio.create_task(opened.call([say("a", str(n)) for n in range(3)]))
            while tool.waiting < 3:  # would wait for ever if one waited for another
                await asyncio.sleep(0)
            gate.set()
            return [result.text for result in await calls]

    assert asyncio.run(rollout()) == ["a 0 1", "a 1 1", "a 2 1"]


def test_a_cancelled_rollout_closes_its_tools():
    tool = Echo("a", gate=None)

    async def rollout():
        tool.gate = asyncio.Event()
        async with Tools([tool]).open(ASKED) as opened:
            await opened.call([say("a")])

    async def cancelled():
        task = asyncio.create_task(rollout())
        while not tool.waiting:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    assert tool.closed == [1]


def test_calls_beyond_the_limit_are_not_made():
    tools = Tools([Echo("a", "b"), Echo("c")], {"a": 2})
    refused = "No more calls of a: the limit per rollout is 2."
    assert run(tools, [say("a"), say("b")], [say("a"), say("c")]) == [["a x 1", "b x 1"], [refused, "c x 1"]]
    counts = tools.take()
    assert counts == {"a/calls": 3, "a/failures": 1, "a/over_limit": 1, "c/calls": 1}
    metrics, warning = tools.report(counts, "step 2")
    assert metrics == {
        "tool/calls": 4, "tool/failures": 1, "tool/a/calls": 3, "tool/a/failures": 1, "tool/c/calls": 1,
        "tool/c/failures": 0,
    }  # fmt: skip
    assert warning == "step 2: 1 of 3 calls of a failed (over limit 1)"
    assert tools.take() == Counter()
    assert run(tools, [say("a")]) == [["a x 2"]]  # another rollout has calls of its own


def test_namesakes_are_replaced_and_limits_stay():
    kept, replaced, other = Echo("a"), Echo("b"), Echo("b")
    tools = Tools([kept, replaced], {"b": 1}).with_others(other, Echo("c"))
    assert list(tools) == [kept, other]
    assert run(tools, [say("b")], [say("b")])[1] == ["No more calls of b: the limit per rollout is 1."]


def test_names_are_taken_once():
    for names in (["a", "a"], ["answer"], ["invalid"]):
        with pytest.raises(InputError, match=r"^rollout\.tools: the name '\w+' is taken"):
            Tools([Echo(name) for name in names])


def test_a_tool_that_ends_the_run_is_named_with_its_step():
    class Down(Echo):
        def warning(self, counts):
            raise ToolError("nothing works")

    tools = Tools([Down("a")])
    with pytest.raises(ToolError, match=r"^step 4: nothing works$"):
        tools.report(tools.take(), "step 4")


def test_visit_reads_a_whole_passage_of_the_questions_collection():
    tool = Visit({"": [Passage("7", "Faust", "A play.")], "other": [Passage("7", "", "Another.")]})

    def visit(id, corpus=""):
        return asyncio.run(tool.call(Question("q", "?", ("a",), corpus=corpus), Action("visit", {"id": id})))

    assert visit("7").text == "Faust\nA play." and visit("[7]").text == "Faust\nA play."
    assert visit("7", "other").text == "Another."
    assert visit("8").text == "There is no such passage." == visit("7", "third").text
    assert told(tool, "step 1") == ({"tool/calls": 5, "tool/empty": 2}, "")


MODULE = '''
import asyncio


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: The other.
    """
    if a == 13:
        raise ValueError("unlucky: http://user:secret@host/")
    if a == 14:
        return b"bytes"
    if a == 15:
        import os
        os._exit(1)
    return a + b


class Counter:
    def open(self, question: dict):
        if question["id"] == "bad":
            raise KeyError("bad")
        self.left = len(question["answers"])

    async def count(self) -> int:
        """Count on."""
        await asyncio.sleep(0)
        self.left += 1
        return self.left

    def outcome(self, answer):
        return {"reward": self.left / 10, "right": float(answer == "Goethe")}
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A function that gives the tools of a run; users' are in the module mine_NAME, which it has made."""
    name = f"mine_{tmp_path.name}".replace("-", "_").replace("[", "_").replace("]", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    made = []

    def make(*tools, **limits):
        named = [f"{name}:{tool}" if tool in ("add", "Counter") else tool for tool in tools]
        settings = config.Config(rollout={"tools": named}, tools=limits)
        made.append(make_tools(settings, Data((), (), {"": ()}), NoSearch()))
        return made[-1]

    yield make
    for tools in made:
        asyncio.run(tools.aclose())


def test_a_function_of_ones_own_is_called_and_fails_in_words(mine):
    tools = mine("search", "add")
    add = lambda a: Action("add", {"a": a, "b": 1})  # noqa: E731
    assert [schema["function"]["name"] for schema in tools.schemas] == ["search", "add"]
    ((one, two), (raised,), (odd,), (died,), (after,)) = run(
        tools, [add(1), add(2)], [add(13)], [add(14)], [add(15)], [add(5)]
    )
    assert (one, two, after) == ("2", "3", "6")
    assert raised == "add failed: ValueError: unlucky: http://***@host/"
    assert odd == "add failed: its result is no text" and died == "add failed: its process ended"
    metrics, warning = tools.report(tools.take(), "step 1")
    assert metrics["tool/add/calls"] == 6 and metrics["tool/failures"] == metrics["tool/add/failures"] == 3
    assert [metrics[f"tool/add/{cause}"] for cause in ("raised", "malformed", "died", "timeouts")] == [1, 1, 1, 0]
    assert warning == "step 1: 3 of 6 calls of add failed (malformed 1, raised 1, died 1)"


def test_what_only_raised_is_no_warning(mine):
    tools = mine("add")
    run(tools, [Action("add", {"a": 13, "b": 1})], [Action("add", {"a": 1, "b": 1})])
    assert tools.report(tools.take(), "step 1")[1] == ""


def test_an_object_of_ones_own_lives_as_long_as_its_rollout_and_judges_it(mine):
    tools = mine("Counter")
    count = Action("count", {})

    async def rollout(question):
        async with tools.open(question) as opened:
            said = [(await opened.call([count]))[0].text for _ in range(2)]
            return said, await opened.outcome(answered(question, "Goethe"))

    async def both():
        return await asyncio.gather(rollout(ASKED), rollout(Question("r", "?", ("a", "b", "c"))))

    assert asyncio.run(both()) == [
        (["2", "3"], {"reward": 0.3, "right": 1.0}), (["4", "5"], {"reward": 0.5, "right": 1.0}),
    ]  # fmt: skip


def test_an_object_that_does_not_open_fails_each_call(mine):
    tools = mine("Counter")

    async def rollout():
        async with tools.open(Question("bad", "?", ("a",))) as opened:
            results = [await opened.call([Action("count", {})]) for _ in range(2)]
            with pytest.raises(ToolError, match=r"^Counter: its open\(\) failed \(KeyError: 'bad'.*\); correct it$"):
                await opened.outcome(Rollout(ASKED, 0, NOTHING, ()))
            return [result.failure for (result,) in results]

    assert asyncio.run(rollout()) == ["count failed: KeyError: 'bad'"] * 2


def test_one_tool_judges_a_rollout():
    class Judge(Echo):
        async def outcome(self, opened, rollout):
            return {"reward": 1.0, self.name: 2.0}

    async def judged(*tools):
        async with Tools(tools).open(ASKED) as opened:
            return await opened.outcome(Rollout(ASKED, 0, NOTHING, ()))

    assert asyncio.run(judged(Judge("a"), Echo("b"))) == {"reward": 1.0, "a": 2.0}
    with pytest.raises(
        ToolError, match=r"^rollout\.tools: b and a tool before it both judge 'reward'; let one of them"
    ):
        asyncio.run(judged(Judge("a"), Judge("b")))


@pytest.mark.parametrize(
    ("tools", "limits", "fault"),
    [
        (("serch",), {}, "rollout.tools: there is no tool 'serch'; give search, "),
        (("add", "add"), {}, "rollout.tools: two tools are named 'add'; rename one"),
        (("add",), {"limits": {"Counter": {}}}, "tools.limits: no tool is named 'Counter'; the run's are add"),
    ],
)
def test_refusals(mine, tools, limits, fault):
    with pytest.raises(InputError) as caught:
        mine(*tools, **limits)
    assert str(caught.value).startswith(fault)


def test_limits_by_name_come_before_those_of_all(mine):
    tools = mine("add", "Counter", calls=2, limits={"add": {"calls": 1}})
    add, count = Action("add", {"a": 1, "b": 1}), Action("count", {})
    said = run(tools, [add], [add], [count], [count], [count])
    no_more = "No more calls of {}: the limit per rollout is {}.".format
    assert [texts[0] for texts in said] == ["2", no_more("add", 1), "2", "3", no_more("count", 2)]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (
            "{search: {cals: 3}}",
            "command line: unknown limit tools.limits.search.cals; the limits are calls, seconds and",
        ),
        ("{search: {calls: -1}}", "command line: tools.limits.search.calls: "),
        ("{search: 3}", "command line: tools.limits.search: "),
    ],
)
def test_limits_that_are_none(given, fault):
    with pytest.raises(InputError) as caught:
        config.load(None, [f"tools.limits={given}"])
    assert str(caught.value).startswith(fault)


def test_one_tool_needs_no_list():
    assert config.load(None, ["rollout.tools=visit"]).rollout.tools == ("visit",)


def test_a_value_is_one_of_those_that_the_schema_names():
    colour = {"type": "string", "enum": ["red", "blue"]}
    assert fits("red", colour) and not fits("green", colour)
