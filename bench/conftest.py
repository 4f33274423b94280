"""Fixtures of all benches: sides are timed in turns in one run, with one row per comparison.

``pytest bench/ [-k NAME] [--full] [--results FILE]`` prints each comparison and, with --results, appends its row. Times
of ours are pytest-benchmark's own (its table and options hold); those of the peers lie in its ``extra_info``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench.comparison import Comparison, line
from bench.peers import left_out


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=None, help="append JSON lines here")
    parser.addoption("--full", action="store_true", help="model shapes, for a GPU")


def pytest_terminal_summary(terminalreporter):
    for peer, why in left_out.items():
        terminalreporter.write_line(f"left out: {peer} ({why})")


@pytest.fixture
def compare(benchmark, request, capsys):
    """``compare(bench, shape, {"ours": f, peer: g, ...}, rounds, **options)``: all sides in turns, by
    ``Comparison``, which takes the options; once per test."""
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled: nothing to compare")

    def run(bench: str, shape: dict, sides: dict[str, Callable[[], object]], rounds: int = 3, **options) -> dict:
        comparison = Comparison(bench, shape, sides, **options)
        rows = comparison.rows(benchmark, rounds)
        with capsys.disabled():
            print("", *map(line, rows), sep="\n")
        if results := request.config.getoption("--results"):
            with open(results, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return comparison.found

    return run
