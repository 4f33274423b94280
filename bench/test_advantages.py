"""Turn rewards to advantages: whole calls against the torch path and the definition, and on a GPU the device's own time
against a copy of as many bytes."""

import pytest
import torch

from bench.timing import DEVICE
from igpo_kernels.turn_advantages import GAIN, OUTCOME, Normaliser, turn_advantages

GROUP = 16
"""Rollouts per question."""
BYTES_A_TURN = 4 + 1 + 4
"""Reward and kind in, advantage out."""


def batch(rollouts: int, turns: int):
    """Arguments of ``turn_advantages``: rollouts of as many turns each, in groups of 16; kinds of one byte."""
    generator = torch.Generator().manual_seed(0)
    kinds = torch.full((rollouts, turns), GAIN, dtype=torch.int8)
    kinds[:, -1] = OUTCOME
    tensors = (
        torch.randn(rollouts * turns, generator=generator), kinds.flatten(),
        torch.arange(0, rollouts * turns + 1, turns), torch.arange(0, rollouts + 1, GROUP),
    )  # fmt: skip
    return *(x.to(DEVICE) for x in tensors), 1.0, Normaliser()


def test_advantages(compare):
    rollouts, turns = (4096, 128) if DEVICE == "cuda" else (512, 10)
    args = batch(rollouts, turns)
    backends = {"ours": "auto", "torch": "torch"} | ({} if DEVICE == "cuda" else {"reference": "reference"})
    compare(
        "advantages",
        {"rollouts": rollouts, "turns": turns, "group": GROUP, "kinds": "int8"},
        {name: lambda backend=backend: turn_advantages(*args, backend=backend) for name, backend in backends.items()},
        rounds=10,
        agree=dict(atol=1e-5, rtol=1e-5),
    )


@pytest.mark.skipif(DEVICE == "cpu", reason="the device's own time")
def test_advantages_on_the_device(compare):
    rollouts, turns = 4096, 128
    args = batch(rollouts, turns)
    source = torch.empty(rollouts * turns * BYTES_A_TURN // 2, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    compare(
        "advantages",
        {"rollouts": rollouts, "turns": turns, "group": GROUP, "kinds": "int8", "time": "device"},
        {"ours": lambda: turn_advantages(*args, backend="triton"), "copy": copy},
        rounds=20,
        calls=50,
        graph=True,
    )
