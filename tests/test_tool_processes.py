"""Users' tools in processes of their own: whatever one does costs its call, and nothing is left behind."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.errors import InputError
from igpo_fast.rollouts.tools import processes as processes_module
from igpo_fast.rollouts.tools import worker
from igpo_fast.rollouts.tools.processes import Processes
from tests.leftovers import AMPLE, MARK, eventually, marked, nothing_is_left, outcome, run  # noqa: F401

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.fixture
def start():
    """Makes ``Processes`` of tests/hostile.py and ends them."""
    made = []

    def make(name="misbehave", **options):
        options = {"seconds": AMPLE, "max_characters": 1000, "concurrency": 64, **options}
        made.append(Processes(f"tests.hostile:{name}" if ":" not in name else name, **options))
        return made[-1]

    yield make
    for processes in made:
        processes.end()


SHORT = 0.3
"""Seconds of a call that is to run out of time."""
BEHAVIOUR = {
    "quick": "quick",
    "spin": "timeouts",
    "sleep": "timeouts",
    "sleep_async": "timeouts",
    "ignore_sigterm": "timeouts",
    "write_half_an_answer": "timeouts",
    "flood_result": "too_large",
    "flood_output": "printed",
    "flood_memory": "raised",
    "say": "raised",
    "say_rudely": "raised",
    "leave": "raised",
    "interrupt": "raised",
    "recurse": "raised",
    "data": "malformed",
    "nested_data": "malformed",
    "thing": "malformed",
    "circle": "malformed",
    "deep": "malformed",
    "generator": "malformed",
    "surrogate": "a?b",
    "exit_hard": "died",
    "kill_itself": "died",
    "segfault": "died",
    "kill_forkserver": "died",
    "fork_child": "parent",
    "fork_and_return": "parent",
    "daemon": "parent",
    "daemon_then_die": "died",
    "close_descriptors": "died",
    "close_descriptors_and_hang": "died",
    "thread": "started",
    "write_rubbish": "too_large",
    "write_no_json": "malformed",
    "write_deep_json": "malformed",
    "write_list": "malformed",
    "write_another_answer": "malformed",
    "write_unknown_cause": "malformed",
}
"""What ``tests.hostile`` does, and the text or the cause that its caller gets."""
HANGS = [how for how, what in BEHAVIOUR.items() if what == "timeouts"]


def test_a_function_may_do_anything(start):
    processes = start(memory=10**9 + 3 * 10**8)
    assert not processes.stateful

    async def main():
        handle = await processes.open({"id": "q"})
        for how, expected in BEHAVIOUR.items():
            processes.seconds = SHORT if how in HANGS else AMPLE
            got = await outcome(processes.call(handle, "misbehave", {"how": how}))
            assert got == expected, (how, got)
            processes.seconds = AMPLE
            for _ in range(2):
                assert await processes.call(handle, "misbehave", {"how": "quick"}) == "quick", how
            if how in HANGS:  # it has ended by now, or soon
                eventually(lambda: len(marked()) == 2, marked)
            await processes.aclose()
            assert len(marked()) == 1, how  # the forkserver
        await processes.close(handle)

    run(main())


def test_an_object_may_do_anything(start):
    """Another rollout's object is not disturbed, and one whose process is gone says so."""
    processes = start("Room", memory=10**9 + 3 * 10**8)
    assert processes.stateful

    async def main():
        for how, expected in BEHAVIOUR.items():
            if how == "kill_forkserver":  # ends all
                continue
            other, handle = await processes.open({"id": "other"}), await processes.open({"id": "q"})
            assert await processes.call(handle, "hear", {"word": "a"}) == "q a"
            processes.seconds = SHORT if how in HANGS else AMPLE
            assert await outcome(processes.call(handle, "misbehave", {"how": how})) == expected, how
            processes.seconds = AMPLE
            gone = expected in ("timeouts", "died") or how.startswith("write_")
            after = await outcome(processes.call(handle, "hear", {"word": "b"}))
            assert after == ("died" if gone else "q a b"), how
            assert await processes.call(other, "hear", {"word": "c"}) == "other c"
            await processes.close(handle)
            await processes.aclose()
            assert len(marked()) == 1, how

    run(main())


@pytest.mark.parametrize("how", ["sleep", "say", "kill_itself", "daemon"])
def test_opening_and_closing_may_fail(start, how):
    processes = start("Room")
    seconds, expected = (SHORT if how in HANGS else AMPLE), {"daemon": None}.get(how, BEHAVIOUR[how])

    async def main():
        processes.seconds = seconds
        opened = await outcome(processes.open({"id": "q", "open": how}))
        assert opened == expected if expected else not isinstance(opened, str)
        processes.seconds = AMPLE
        handle = await processes.open({"id": "q"})
        await processes.call(handle, "hear", {"word": how})
        processes.seconds = seconds
        assert await outcome(processes.close(handle)) == expected
        assert await outcome(processes.close(handle)) is None  # closed already
        assert await outcome(processes.call(handle, "hear", {"word": "b"})) == "died"
        await processes.aclose()
        assert len(marked()) == 1

    run(main())


def test_an_object_opens_and_closes_once(start, tmp_path):
    log = tmp_path / "log"
    processes = start("Room", settings={"prefix": "> ", "log": str(log)})

    async def main():
        first, second = [await processes.open({"id": f"q{i}"}) for i in range(2)]
        assert await processes.call(first, "hear", {"word": "a"}) == "> q0 a"
        assert [await processes.call(second, "loop", {}) for _ in range(3)] == ["false", "true", "true"]
        assert await outcome(processes.call(first, "open", {"question": {}})) == "raised"
        assert await outcome(processes.call(first, "_do", {"how": "quick"})) == "raised"
        await processes.close(second)
        await processes.close(first)
        await processes.close(first)
        assert log.read_text() == "closed q1\nclosed q0\n"
        assert len(marked()) >= 1
        await processes.aclose()

    run(main())


def test_rollouts_do_not_see_each_other(start):
    """64 objects, each spoken to by two concurrent callers."""
    processes = start("Room", concurrency=16)

    async def rollout(number):
        handle = await processes.open({"id": str(number)})
        words = [f"{number}-{i}" for i in range(6)]
        await asyncio.gather(*(processes.call(handle, "hear", {"word": word}) for word in words[:-1]))
        heard = await processes.call(handle, "hear", {"word": words[-1]})
        await processes.close(handle)
        assert sorted(heard.split()) == sorted([str(number), *words])

    async def main():
        await asyncio.gather(*map(rollout, range(64)))
        await processes.aclose()
        assert len(marked()) == 1

    run(main())


def test_a_loop_after_another_has_the_same_forkserver(start):
    processes = start()

    async def step():
        handle = await processes.open({})
        texts = await asyncio.gather(*(processes.call(handle, "misbehave", {"how": "quick"}) for _ in range(20)))
        assert set(texts) == {"quick"}
        await processes.aclose()
        await processes.aclose()
        return marked()

    first, second = run(step()), run(step())
    assert first == second and len(first) == 1


def test_calls_run_at_once_but_not_more_than_allowed(start, tmp_path):
    """Two calls that wait for each other; then five that must not meet."""
    code = """
import os, pathlib, time

def meet(me: str, other: str, folder: str) -> str:
    '''Meet.

    Args:
        me: Whom to announce.
        other: Whom to wait for.
        folder: Where.
    '''
    pathlib.Path(folder, me).touch()
    while not pathlib.Path(folder, other).exists():
        time.sleep(0.001)
    return me

def alone(folder: str) -> str:
    '''Be alone.

    Args:
        folder: Where.
    '''
    path = pathlib.Path(folder, "lock")
    path.touch(exist_ok=False)
    time.sleep(0.01)
    path.unlink()
    return "alone"
"""
    (tmp_path / "meetings.py").write_text(code)
    sys.path.insert(0, str(tmp_path))
    try:
        many, one = start("meetings:meet", concurrency=2), start("meetings:alone", concurrency=1)
    finally:
        sys.path.remove(str(tmp_path))

    async def main():
        handle, folder = await many.open({}), str(tmp_path)
        pairs = [("a", "b"), ("b", "a")]
        calls = [many.call(handle, "meet", {"me": me, "other": other, "folder": folder}) for me, other in pairs]
        assert await asyncio.gather(*calls) == ["a", "b"]
        handle = await one.open({})
        calls = [one.call(handle, "alone", {"folder": folder}) for _ in range(5)]
        assert await asyncio.gather(*calls) == ["alone"] * 5
        await many.aclose()
        await one.aclose()

    run(main())


@pytest.mark.parametrize("name", ["misbehave", "Room"])
def test_a_cancelled_call_ends_its_process(start, tmp_path, name, monkeypatch):
    monkeypatch.setenv("FOLDER", str(tmp_path))
    processes, begun = start(name), tmp_path / "begun"

    async def main():
        handle = await processes.open({"id": "q"})
        arguments = {"how": "tell_and_sleep"} | ({"folder": str(tmp_path)} if name == "misbehave" else {})
        call = asyncio.create_task(processes.call(handle, "misbehave", arguments))
        while not begun.exists():
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        after = await outcome(processes.call(handle, "misbehave", {"how": "quick"}))
        assert after == ("died" if processes.stateful else "quick")
        await processes.aclose()
        assert len(marked()) == 1

    run(main())


def test_a_child_that_died_between_calls_costs_no_call(start, tmp_path):
    processes = start()

    async def main():
        handle = await processes.open({})
        pid = int(await processes.call(handle, "misbehave", {"how": "die_later", "folder": str(tmp_path)}))
        (tmp_path / "later").touch()
        eventually(lambda: pid not in marked(), marked)
        assert await processes.call(handle, "misbehave", {"how": "quick"}) == "quick"
        await processes.aclose()

    run(main())


def test_files_and_descriptors(start):
    """A child has the protocol's connection and no other; its temporary files go with it."""
    processes = start()

    async def main():
        handle = await processes.open({})
        ask = lambda how: processes.call(handle, "misbehave", {"how": how})  # noqa: E731
        await asyncio.gather(*(ask("make_file") for _ in range(8)))
        found = await asyncio.gather(*(ask("descriptors") for _ in range(8)))
        assert {tuple(json.loads(text)) for text in found} == {("/dev/null", "/dev/null", "/dev/null", "socket")}
        name = Path(await ask("make_file"))
        assert name.stat().st_size == 1000
        await processes.aclose()
        assert not name.exists()

    run(main())


def test_a_forkserver_is_small(start, monkeypatch):
    """It imports the standard library and the user's module alone, and passes on the environment that it is given."""
    heavy = {"torch", "numpy", "transformers", "pydantic", "httpx"}
    monkeypatch.setenv("KEY", "secret")
    processes = start(max_characters=10**6)
    clean = start(environment={"MARK": MARK, "A": "b"})

    async def main():
        handle = await processes.open({})
        found = json.loads(await processes.call(handle, "misbehave", {"how": "modules"}))
        assert not heavy & set(found) and {"igpo_fast", "tests"} <= set(found)
        passed_on = json.loads(await processes.call(handle, "misbehave", {"how": "environment"}))
        assert passed_on["KEY"] == "secret" and "PYTHONPATH" not in passed_on.keys() - os.environ.keys()
        passed_on = json.loads(await clean.call(await clean.open({}), "misbehave", {"how": "environment"}))
        assert set(passed_on) <= {"MARK", "A", "TMPDIR", "FOLDER", "LC_CTYPE"}
        await processes.aclose()
        await clean.aclose()

    run(main())


def killed_once(code, begun):
    """Run a trainer and kill it once the file ``begun`` is there. The fixture waits until no process is left."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(begun.parent), str(root), str(root / "kernels")])
    code = f"import tempfile\ntempfile.tempdir = {tempfile.gettempdir()!r}\n{code}"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}) as trainer:
        eventually(lambda: begun.exists() or trainer.poll() is not None, marked)
        assert trainer.poll() is None
        trainer.send_signal(signal.SIGKILL)


def test_a_killed_trainer_leaves_nothing(tmp_path):
    """Neither processes nor folders, though its tools hang, ignore signals, and have left processes of their own."""
    code = f"""
import asyncio, pathlib
from igpo_fast.rollouts.tools.processes import Processes

async def main():
    for name in ("misbehave", "Room"):
        processes = Processes(f"tests.hostile:{{name}}", seconds={AMPLE}, max_characters=100)
        kept.append(processes)
        handles = [await processes.open({{"id": "q"}}) for _ in range(3)]
        await processes.call(handles[0], "misbehave", {{"how": "daemon"}})
        await processes.call(handles[1], "misbehave", {{"how": "fork_child"}})
        calls.append(asyncio.create_task(processes.call(handles[2], "misbehave", {{"how": "ignore_sigterm"}})))
    await asyncio.sleep(0.1)
    pathlib.Path({str(tmp_path / "begun")!r}).touch()
    await asyncio.sleep(1000)

kept, calls = [], []
asyncio.run(main())
"""
    killed_once(code, tmp_path / "begun")


HANGS_AT_IMPORT = """
import pathlib, time
pathlib.Path(__file__).with_name("begun").touch()
time.sleep(1000)
"""


def test_a_trainer_killed_during_an_import_leaves_no_process(tmp_path):
    (tmp_path / "slow.py").write_text(HANGS_AT_IMPORT)
    code = """
from igpo_fast.rollouts.tools.processes import Processes
Processes("slow:tool", seconds=1, max_characters=1)
"""
    killed_once(code, tmp_path / "begun")
    eventually(lambda: not marked(), marked)
    for folder in Path(tempfile.gettempdir()).iterdir():  # nobody is left to remove it
        folder.rmdir()


def test_an_import_that_hangs(tmp_path, monkeypatch):
    (tmp_path / "slow.py").write_text(HANGS_AT_IMPORT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(processes_module, "PATIENCE", SHORT)
    monkeypatch.setattr(processes_module, "_LAST_WAIT", SHORT)
    with pytest.raises(InputError, match="slow:tool: importing it takes more than 0"):
        Processes("slow:tool", seconds=1, max_characters=1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def test_any_json_value_becomes_a_text(start):
    processes = start("echo", max_characters=5000)

    @given(JSON)
    def check(value):
        async def main():
            return await processes.call(await processes.open({}), "echo", {"value": value})

        text = run(main())
        assert text == value if isinstance(value, str) else json.loads(text) == value

    check()


def echoed(processes, values):
    """What the tool answers to each value."""

    async def main():
        handle = await processes.open({})
        answers = [await outcome(processes.call(handle, "echo", {"value": value})) for value in values]
        await processes.aclose()
        return answers

    return run(main())


def test_texts_by_hand(start):
    values = [3, 2.5, True, None, [1, "é"], {"a": {}}, "", "\ud800x", "\U0001f600", "\0", math.inf]
    expected = ["3", "2.5", "true", "null", '[1, "é"]', '{"a": {}}', "", "?x", "\U0001f600", "\0", "Infinity"]
    assert echoed(start("echo"), values) == expected


def test_the_longest_text(start):
    """The limit is in characters, whatever their bytes in JSON."""
    texts = [character * n for character in ("x", "\0", "\U0001f600") for n in (1000, 1001)]
    answers = echoed(start("echo", max_characters=1000), texts)
    assert answers == [text if len(text) == 1000 else "too_large" for text in texts]


def test_schemas(start):
    hear, loop, misbehave = start("Room").schemas
    assert hear == {
        "type": "function",
        "function": {
            "name": "hear",
            "description": "Hear a word.",
            "parameters": {
                "type": "object",
                "properties": {"word": {"type": "string", "description": "The word."}},
                "required": ["word"],
            },
            "return": {"type": "string"},
        },
    }
    assert [schema["function"]["name"] for schema in (loop, misbehave)] == ["loop", "misbehave"]


@pytest.mark.parametrize("hidden", [False, True])
def test_settings_are_hidden(start, hidden):
    processes = start(settings={"folder": "here"} if hidden else {})
    (schema,) = processes.schemas
    parameters = schema["function"]["parameters"]
    assert set(parameters["properties"]) == ({"how"} if hidden else {"how", "folder"})
    assert parameters["required"] == ["how"]


FAULTS = {
    "no_colon": ("", "no_colon: is not of the form package.module:name"),
    "a:b:c": ("", "a:b:c: is not of the form"),
    "../x:f": ("", "../x:f: is not of the form"),
    "missing_module_x:f": ("", "missing_module_x:f: no module missing_module_x; it is looked for in {cwd}"),
    "tool:g": ("def f(): pass", "tool:g: {file} defines no g"),
    "tool:f": ("f = 3", "tool:f: f in {file} is of type int; name a function or a class"),
    "tool:f ": ("", "is not of the form"),
    "tool:import_error": (
        "\nimport missing_module_y",
        "importing it fails: ModuleNotFoundError: No module named 'missing",
    ),
    "tool:raises": ("\n\n1/0", "tool:raises: importing it fails: ZeroDivisionError: division by zero ({file}:3)"),
    "tool:syntax": ("def f(:", "tool:syntax: importing it fails: SyntaxError"),
    "tool:exits": ("import sys; sys.exit(3)", "tool:exits: importing it fails: SystemExit: 3"),
    "tool:dies": ("import os; os._exit(3)", "tool:dies: the process that imports it died"),
    "tool:silent": ("def silent(): return 1", "{file}:1: tool:silent: cannot be described"),
    "tool:untyped": (
        '\ndef untyped(a):\n  "Do."',
        "{file}:2: tool:untyped: cannot be described: Argument a is missing a",
    ),
    "tool:bare": (
        'def bare(a: int):\n  "Do."',
        "no description for the argument 'a'; give bare a docstring whose Args",
    ),
    "tool:loose": ('def loose(*words):\n  "Do."', "tool:loose: loose takes *args or **kwargs, which no schema"),
    "tool:Empty": ("class Empty: pass", "tool:Empty: the class has no public method beside open, close, outcome"),
    "tool:Needs": (
        'class Needs:\n  def __init__(self, a): pass\n  def f(self):\n    "Do."',
        "tool:Needs: its settings do not fit: missing a required argument: 'a'",
    ),
}


@pytest.mark.parametrize("target", FAULTS)
def test_what_cannot_be_used(target, tmp_path, monkeypatch):
    code, expected = FAULTS[target]
    (tmp_path / "tool.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError) as caught:
        Processes(target, seconds=AMPLE, max_characters=100)
    assert expected.format(file=tmp_path / "tool.py", cwd=os.getcwd()) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_that_do_not_fit():
    with pytest.raises(InputError, match="misbehave: its settings do not fit: got an unexpected keyword"):
        Processes("tests.hostile:misbehave", seconds=AMPLE, max_characters=100, settings={"colour": "red"})


def test_a_module_may_start_a_process_for_all(start, tmp_path, monkeypatch):
    """It lives as long as the forkserver; a child's end does not end it."""
    code = """
import subprocess, sys
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])

def alive() -> bool:
    '''Whether the helper is alive.'''
    import os
    return os.path.exists(f"/proc/{helper.pid}") and os.readlink(f"/proc/{helper.pid}/exe") != ""
"""
    (tmp_path / "helped.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    processes = start("helped:alive")

    async def main():
        for _ in range(2):
            assert await processes.call(await processes.open({}), "alive", {}) == "true"
            await processes.aclose()
        assert len(marked()) == 2

    run(main())


def test_children_are_found_without_the_kernels_list():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        assert child.pid in set(worker._children_searched()) == set(worker._children_listed())
        child.stdin.close()
