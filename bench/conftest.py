"""Fixtures of all benches: sides are timed in turns in one run, with one row per comparison.

``pytest bench/ [-k NAME] [--full] [--results FILE]`` prints each comparison and, with --results, appends its row. Times
of ours are pytest-benchmark's own (its table and options hold); those of the peers lie in its ``extra_info``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import load_timer

from bench.comparison import Comparison, line
from bench.peers import left_out
from bench.timing import DEVICE, circumstances

# Huge pages for large tensors: outputs are new in every call, and their page faults took 5 % of a loss on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, default=None, help="append JSON lines here")
    parser.addoption("--full", action="store_true", help="model shapes, for a GPU")
    parser.addoption(
        "--table", help="configurations of this name in igpo_kernels/shortlist.json, not the committed ones"
    )


@pytest.fixture(scope="session", autouse=True)
def table(request) -> str | None:
    """The name of the configurations that all benches take, in force; None for the committed ones."""
    if name := request.config.getoption("--table"):
        from igpo_kernels.triton_variants import arch_of
        from igpo_kernels.tune import apply_named

        apply_named(name, arch_of(torch.device(DEVICE)))
    return name


def pytest_terminal_summary(terminalreporter, config):
    for peer, why in left_out.items():
        terminalreporter.write_line(f"left out: {peer} ({why})")
    if left_out and (results := config.getoption("--results")):
        with open(results, "a") as file:
            file.write(json.dumps({"left_out": left_out, **circumstances()}) + "\n")


@pytest.fixture
def compare(benchmark, request, capsys, table):
    """``compare(bench, shape, {"ours": f, peer: g, ...}, rounds, **options)``: all sides in turns, by
    ``Comparison``, which takes the options; once per test."""
    if benchmark.disabled:
        pytest.skip("benchmarks are disabled: nothing to compare")

    def run(bench: str, shape: dict, sides: dict[str, Callable[[], object]], rounds: int = 3, **options) -> dict:
        timer = load_timer(request.config.getoption("benchmark_timer")).target
        comparison = Comparison(bench, {**shape, "table": table} if table else shape, sides, clock=timer, **options)
        rows = comparison.rows(benchmark, rounds)
        with capsys.disabled():
            print("", *map(line, rows), sep="\n")
        if results := request.config.getoption("--results"):
            with open(results, "a") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        return comparison.found

    return run
