"""Objects that settings name: found in modules and files, refused in one line otherwise."""

import sys

import pytest

from igpo_fast.errors import InputError
from igpo_fast.extend import file_of, is_spec, made, named

CODE = """
from __future__ import annotations
import dataclasses

@dataclasses.dataclass
class Judge:
    strict: bool = True

    @staticmethod
    def ask(question: str) -> float:
        return 0.5

loads = []
number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with user code, of which no module stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    known = set(sys.modules)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my_judges.py").write_text(CODE)
    yield tmp_path
    for name in set(sys.modules) - known:
        del sys.modules[name]


@pytest.mark.parametrize("module", ["own/my_judges.py", "own.my_judges"])
def test_files_and_modules(here, module):
    judge = named(f"{module}:Judge", "algorithm.outcome")
    assert judge().strict
    assert named(f"{module}:Judge.ask", "algorithm.outcome")("?") == 0.5
    assert named(f"{module}:Judge", "algorithm.outcome") is judge, "a module is imported once"
    assert (here / file_of(f"{module}:Judge")).samefile(here / "own" / "my_judges.py")


def test_a_users_file_replaces_no_library(here):
    (here / "json.py").write_text("x = lambda: 1")
    (here / "numpy.py").write_text("x = lambda: 1")
    assert named("json:loads", "k")("1") == 1
    with pytest.raises(InputError, match="numpy has no x"):
        named("numpy:x", "k")
    assert named("json.py:x", "k")() == 1
    assert sys.modules["json"].loads("2") == 2


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("judge", "not the name of an object; give package.module:name"),
        ("own.my_judges:", "not the name of an object"),
        ("own.my_judges:3", "not the name of an object"),
        ("own/no.py:judge", "there is no file own/no.py here; correct the path"),
        ("own.no:judge", r"own.no does not import \(ModuleNotFoundError: No module named 'own.no'\)"),
        ("own/my_judges.py:judge", "own/my_judges.py has no judge"),
        ("own/my_judges.py:Judge.tell", "own/my_judges.py has no Judge.tell"),
        ("own/my_judges.py:number", "number is int, not a function or class"),
        ("own/bad.py:f", r"own/bad.py does not import \(SyntaxError: "),
        ("own/lacks.py:f", r"own/lacks.py does not import \(FileNotFoundError: .*prices.csv"),
        ("own/ends.py:f", r"own/ends.py does not import \(SystemExit: 3\)"),
    ],
)
def test_refusals_name_key_spec_and_remedy_in_one_line(here, spec, told):
    (here / "own" / "bad.py").write_text("def f(:\n")
    (here / "own" / "lacks.py").write_text("open('prices.csv')\n")
    (here / "own" / "ends.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(InputError, match=told) as raised:
        named(spec, "algorithm.outcome")
    assert str(raised.value).startswith(f"algorithm.outcome={spec}: ") and "\n" not in str(raised.value)


def test_a_file_that_failed_can_be_corrected(here):
    (here / "fixed.py").write_text("1 / 0")
    with pytest.raises(InputError, match="ZeroDivisionError: division by zero"):
        named("fixed.py:f", "k")
    (here / "fixed.py").write_text("def f(): return 7")
    assert named("fixed.py:f", "k")() == 7


def test_what_has_no_source_file_has_no_name():
    assert file_of("no.such:thing") == file_of("f1") == ""
    assert not is_spec("f1") and not is_spec("a b:c") and is_spec("C:\\own\\judge.py:f")


FACTORIES = """
from igpo_fast.errors import InputError

def works(a, *, b): return a + b
def raises(): raise KeyError("boom")
def forgets(): pass
def refuses(): raise InputError("no such model; give another")
"""


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("raises", r"^rollout\.engine=own\.py:raises: it raised KeyError: 'boom', .*own\.py:5; correct it$"),
        ("forgets", r"^rollout\.engine=own\.py:forgets: it returned None; return what it makes$"),
        ("refuses", "^no such model; give another$"),
        ("works", r"^rollout\.engine=own\.py:works: it raised TypeError: works\(\) missing"),
    ],
)
def test_what_makes_nothing_is_named(here, name, fault):
    (here / "own.py").write_text(FACTORIES)
    with pytest.raises(InputError, match=fault):
        made(f"own.py:{name}", "rollout.engine")
    assert made("own.py:works", "rollout.engine", 1, b=2) == 3
