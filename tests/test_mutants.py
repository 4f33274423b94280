"""The table of ``make mutants`` stays true: every fault still fits its source, every test it names exists."""

import functools
import importlib
from collections import Counter

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant


def test_every_fault_fits_its_source_once():
    assert [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1] == []
    assert [m.misfit(ROOT) for m in MUTANTS if m.misfit(ROOT)] == []
    assert [m.name for m in MUTANTS if m.old == m.new or not m.tests] == []


def exists(name):
    file, *parts = name.split("::")
    try:
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        return bool(parts) and callable(functools.reduce(getattr, parts, module))
    except pytest.skip.Exception:  # what the whole file needs is not installed
        return True
    except (ImportError, AttributeError):
        return False


def test_every_named_test_exists():
    named = sorted({test for mutant in MUTANTS for test in mutant.tests})
    assert [name for name in named if "[" in name or not exists(name)] == [], "name functions, not files or parameters"


def test_a_fault_that_no_longer_fits_is_named(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\nb = 1\n")
    stale, fits = (Mutant("m", "x.py", old, f"{old}1", ("tests/x.py::test",)) for old in ("= 1", "a = 1"))
    assert stale.misfit(tmp_path) == "m: x.py holds '= 1' 2 times, not once"
    assert fits.misfit(tmp_path) is None
    fits.apply(tmp_path)
    assert (tmp_path / "x.py").read_text() == "a = 11\nb = 1\n"
