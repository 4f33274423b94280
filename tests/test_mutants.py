"""The table of ``make mutants`` stays true: every fault still fits its source, every test it names exists."""

import functools
import importlib
from collections import Counter

import pytest

from tests.mutants import MUTANTS, ROOT, Mutant

NAMED_TESTS = sorted({test for mutant in MUTANTS for test in mutant.tests})


def test_names_are_unique():
    assert [name for name, count in Counter(m.name for m in MUTANTS).items() if count > 1] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_every_fault_fits_its_source_once(mutant):
    assert mutant.misfit(ROOT) is None
    assert mutant.old != mutant.new and mutant.tests


@pytest.mark.parametrize("name", NAMED_TESTS)
def test_every_named_test_exists(name):
    file, *parts = name.split("::")
    assert parts and "[" not in name, "name functions, not files or parameters"
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    assert callable(functools.reduce(getattr, parts, module))


def test_a_fault_that_no_longer_fits_is_named(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\nb = 1\n")
    stale, fits = (Mutant("m", "x.py", old, f"{old}1", ("tests/x.py::test",)) for old in ("= 1", "a = 1"))
    assert stale.misfit(tmp_path) == "m: x.py holds '= 1' 2 times, not once"
    assert fits.misfit(tmp_path) is None
    fits.apply(tmp_path)
    assert (tmp_path / "x.py").read_text() == "a = 11\nb = 1\n"
