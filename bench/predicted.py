"""The arithmetic of ``igpo-fast plan`` and of ``doctor`` against the measured rows of bench/results/.

    python -m bench.predicted

Scoring: FLOPs of the other ways to get the answer values of every prefix, over those of the packed pass, against the
ratio of their times. Memory: bytes of an update, against what resident memory rose by.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import Qwen2Config

from igpo_fast.config import load
from igpo_fast.estimate import Work, forward_flops, work_of
from igpo_fast.run.memory import shape_of
from igpo_kernels import Branch, RolloutTokens, Tree, pack

RESULTS = Path(__file__).parent / "results"
QWEN2_40M = dict(
    vocab_size=32_768, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
    intermediate_size=1408, tie_word_embeddings=True,
)  # fmt: skip
"""The model of test_scoring.py."""


class Comparison(NamedTuple):
    """A predicted ratio beside the measured one."""

    what: str
    when: str
    """Date, commit and hardware of the row."""
    predicted: float
    measured: float


def comparisons() -> Iterator[Comparison]:
    """Of every committed row that the arithmetic speaks of."""
    for row in _rows("scoring_cpu.jsonl"):
        shape = row["shape"]
        about = f"{shape['turns']} x {shape['tokens_a_turn']} tokens"
        yield Comparison(f"scoring, {row['peer']} / ours, {about}", _when(row), scoring_ratio(row), row["ratio"])
    for row in _rows("memory_cpu.jsonl"):
        of = row["predicted_bytes"] / 1e9, row["measured_bytes"] / 1e9
        yield Comparison(f"GB of an update, {row['shape']['case']}", _when(row), *of)


def scoring_ratio(row: dict) -> float:
    """FLOPs of a row's peer over those of the packed pass."""
    s = row["shape"]
    length, own = s["turns"] * s["tokens_a_turn"], s["wrapper"] + s["answer"]
    prefixes = np.arange(1, s["turns"] + 1) * s["tokens_a_turn"]
    ids = np.arange(length)  # no two tokens are shared
    branch = Branch(np.zeros(own, np.int32), s["wrapper"], own)
    ours = work_of([pack([Tree([RolloutTokens(0, ids, np.full(length, -1), prefixes)], [branch])])])
    paths = prefixes + own - 1  # an answer's last token is a label only
    separate = Work(paths.sum(), (paths * (paths + 1) / 2).sum(), 0, s["turns"] * s["answer"])
    peers = {
        "trunk_only": Work(length, length * (length + 1) / 2, 0, 1),
        "kv_reuse": Work(ours.tokens, ours.pairs, 0, s["turns"] * (1 + s["answer"])),
        "last_hidden": separate,
        "full_logits": Work(separate.tokens, separate.pairs, 0, separate.tokens),
    }
    shape = shape_of(load(), Qwen2Config(**QWEN2_40M))
    return forward_flops(shape, peers[row["peer"]]) / forward_flops(shape, ours)


def _rows(name: str) -> list[dict]:
    file = RESULTS / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _when(row: dict) -> str:
    return f"{row['date']}, {row['commit']}, {row['hardware']}"


def main() -> None:
    table = Table("", "row", "predicted", "measured", "predicted / measured", box=box.MARKDOWN)
    for found in comparisons():
        numbers = found.predicted, found.measured, found.predicted / found.measured
        table.add_row(found.what, found.when, *(f"{number:.2f}" for number in numbers))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
