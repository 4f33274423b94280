"""FLOPs of a training step of ours, with gains and without, and of TRL's GRPOTrainer, counted while they run.

    python -m bench.flops

The shapes are those of test_peers.py, on a CPU. torch's FlopCounterMode counts products; what it does not know is
counted here: products that are added in place, and attention, by its (query, key) pairs (half of them if it is causal).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from bench.steps import ours
from bench.test_peers import FULL, SHAPES, TRL, data_of, grpo_trainer

aten = torch.ops.aten


def product(total, left, right, **_) -> int:
    """2 m k n of [m, k] times [k, n], added to a total."""
    return 2 * left[0] * left[1] * right[1]


def forward(q, k, v, dropout=0.0, is_causal=False, **_) -> int:
    """Two products per pair."""
    return _pairs(q, k, is_causal) * 2 * 2 * q[3]


def backward(grad, q, k, v, out, lse, dropout=0.0, is_causal=False, **_) -> int:
    """Five products per pair: the probabilities are computed again."""
    return _pairs(q, k, is_causal) * 5 * 2 * q[3]


def _pairs(q, k, is_causal: bool) -> int:
    batch, heads, queries, _ = q
    return batch * heads * queries * k[2] // (2 if is_causal else 1)


ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
}


def gigaflop(step: Callable[[], None]) -> tuple[float, float, float]:
    """Products of a step, its attention, and both."""
    with FlopCounterMode(display=False, custom_mapping={**ATTENTION, aten.addmm_: product}) as counter:
        step()
    of = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in of.items() if op in ATTENTION)
    return (sum(of.values()) - attention) / 1e9, attention / 1e9, sum(of.values()) / 1e9


def main() -> None:
    parts = "products", "attention", "in all"
    heads = [f"{who}: {part}" for who in ("ours", "TRL") for part in parts]
    table = Table("GFLOP", *heads, "TRL / ours", "IGPO / outcome-only", box=box.MARKDOWN)
    for name, size in {**SHAPES, **FULL}.items():
        data = data_of(name, size)
        with tempfile.TemporaryDirectory() as folder:
            sides = ours(size, data), grpo_trainer(size, data, Path(folder), **TRL), ours(size, data, algorithm="grpo")
            mine, theirs, plain = map(gigaflop, sides)
        numbers = (f"{x:,.0f}" for x in (*mine, *theirs))
        table.add_row(name, *numbers, f"{theirs[2] / mine[2]:.2f}", f"{mine[2] / plain[2]:.3f}")
    Console(width=180).print(table)


if __name__ == "__main__":
    main()
