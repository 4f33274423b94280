"""IGPO's update beside our own outcome-only update: what information gain costs.

The bar is 1 + 1.25 x branch tokens / trunk tokens: a token of an answer may cost a quarter more than another token.
"""

from __future__ import annotations

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("trl", exc_type=ImportError)

from bench.steps import ours
from bench.test_peers import FULL, ROUNDS, SHAPES, data_of, shape_of

SLACK = 1.25
MORE_ROUNDS = 16


def bar_of(shape: dict) -> float:
    return 1 + SLACK * shape["branch_tokens"] / shape["trunk_tokens"]


@pytest.mark.parametrize("name", [*SHAPES, "large"])
def test_step(name, compare, request, capsys):
    if name in FULL and not request.config.getoption("--full"):
        pytest.skip("with --full")
    size = {**SHAPES, **FULL}[name]
    data = data_of(name, size)
    shape = shape_of(name, size, data)
    shape["bar"] = round(bar_of(shape), 3)
    sides = {"ours": ours(size, data), "igpo_vs_grpo": ours(size, data, algorithm="grpo")}
    found = compare(
        "step", shape, sides, MORE_ROUNDS if name in SHAPES else ROUNDS, long=True, tokens=data.decision_tokens
    )
    igpo, outcome_only = (found[name]["median"] for name in sides)
    with capsys.disabled():
        print(f"IGPO / outcome-only: {igpo / outcome_only:.3f}, the bar is {shape['bar']}")
