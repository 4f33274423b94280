import doctest
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import igpo_fast.run.metrics as metrics_module
from igpo_fast.run.metrics import KEYS, StepMetrics, ordered


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def pack(tokens, policy=0.0, **means):
    """What policy_loss reports of a pack, from means over its tokens."""
    return {"tokens": tokens, "policy": policy, **{name: mean * tokens for name, mean in means.items()}}


def test_doctests():
    assert doctest.testmod(metrics_module).failed == 0


def test_token_means_weigh_packs_by_their_tokens():
    metrics = StepMetrics(1)
    metrics.update([pack(30, entropy=1.0, clipped=0.0), pack(10, entropy=2.0, clipped=0.4)], 1.0)
    metrics.update([pack(60, entropy=0.5, clipped=0.1)], 3.0)
    row = metrics.row()
    assert row["loss/entropy"] == pytest.approx((30 * 1 + 10 * 2 + 60 * 0.5) / 100)
    assert row["loss/clip_frac"] == pytest.approx(0.1)
    assert row["loss/grad_norm"] == 2.0
    assert "loss/kl" not in row


def test_policy_loss_adds_over_packs_and_averages_over_updates():
    metrics = StepMetrics(1)
    metrics.update([pack(1, policy=0.25), pack(9, policy=0.5)], 1.0)
    metrics.update([pack(5, policy=0.25)], 1.0)
    assert metrics.row()["loss/policy"] == 0.5


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 6))
def test_splitting_an_update_into_packs_changes_nothing(tokens, size):
    rows = []
    for groups in ([tokens], [tokens[i : i + size] for i in range(0, len(tokens), size)]):
        metrics = StepMetrics(1)
        packs = [{"policy": sum(g) / 8, "tokens": sum(g), "kl": sum(t * t for t in g) / 8} for g in groups]
        metrics.update(packs, 1.0)
        rows.append({key: value for key, value in metrics.row().items() if key.startswith("loss")})
    assert rows[0] == rows[1]


def test_tensors_become_floats():
    metrics = StepMetrics(1)
    sums = {"policy": torch.tensor(0.5), "tokens": torch.tensor(4.0), "mismatch": torch.tensor(1.0)}
    metrics.update([sums], torch.tensor(2.0))
    row = metrics.row()
    assert row["mismatch/logp_abs_diff"] == 0.25 and row["loss/grad_norm"] == 2.0
    assert all(type(row[key]) is float for key in row if key.startswith(("loss", "mismatch")))


def test_what_was_not_measured_is_absent():
    assert not [key for key in StepMetrics(0).row() if key.startswith(("loss", "mismatch", "time/eval"))]
    metrics = StepMetrics(1)
    metrics.update([{"policy": math.nan, "tokens": 4, "kl": math.nan}], math.nan)  # measured, and not finite
    row = metrics.row()
    assert all(math.isnan(row[key]) for key in ("loss/policy", "loss/kl", "loss/grad_norm"))
    assert "loss/entropy" not in row
    nothing = StepMetrics(1)
    nothing.update([pack(0, kl=0.0)], 0.0)
    assert "loss/kl" not in nothing.row() and nothing.row()["loss/policy"] == 0.0


def test_shares_beyond_the_importance_cap():
    metrics = StepMetrics(1)
    metrics.update([pack(6) | {"masked": 1}, pack(2) | {"masked": 3}], 1.0)
    row = metrics.row()
    assert row["mismatch/masked"] == 0.5 and "mismatch/capped" not in row


def test_keys_come_in_the_documented_order_others_last():
    metrics = StepMetrics(3)
    metrics.set({"mine": 1.0, "eval/f1": 0.5, "reward/f1": 0.25})
    metrics.add({"tokens/packed": 10})
    metrics.add({"tokens/packed": 5})
    with metrics.timed("rollout"):
        pass
    keys = list(row := metrics.row())
    assert [KEYS.index(key) for key in keys[:-1]] == sorted(KEYS.index(key) for key in keys[:-1])
    assert keys[0] == "step" and keys[-1] == "mine"
    assert (row["step"], row["tokens/packed"], row["reward/f1"]) == (3, 15, 0.25)
    assert len(set(KEYS)) == len(KEYS)


def test_keys_of_any_tool_stand_together():
    row = dict.fromkeys(
        ["mine", "time/step", "tool/late", "toolbox", "tool/calls", "mismatch/logp_abs_max", "step"], 0.0
    )
    assert list(ordered(row)) == [
        "step", "mismatch/logp_abs_max", "tool/late", "tool/calls", "time/step", "mine", "toolbox",
    ]  # fmt: skip


def test_the_largest_of_a_step_is_kept():
    metrics = StepMetrics(1)
    for value in (0.2, 0.5, 0.3):
        metrics.largest({"mismatch/logp_abs_max": value})
    assert metrics.row()["mismatch/logp_abs_max"] == 0.5
    metrics.largest({"mismatch/logp_abs_max": float("nan")})
    metrics.largest({"mismatch/logp_abs_max": 1.0})
    assert math.isnan(metrics.row()["mismatch/logp_abs_max"])


def test_phases_add_up_even_when_they_fail():
    clock = Clock()
    metrics = StepMetrics(1, clock)
    for seconds in (2.0, 3.0):
        with metrics.timed("rollout"):
            clock.now += seconds
    with pytest.raises(RuntimeError), metrics.timed("train"):
        clock.now += 4
        raise RuntimeError
    clock.now += 1
    row = metrics.row()
    assert (row["time/rollout"], row["time/train"], row["time/step"]) == (5, 4, 10)


def test_a_steps_time_is_without_its_evaluation():
    clock = Clock()
    metrics = StepMetrics(1, clock)
    clock.now += 2
    with metrics.timed("eval"):
        clock.now += 5.5
    row = metrics.row()
    assert (row["time/step"], row["time/eval"]) == (2, 5.5)


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_initialized(), reason="reads /proc")
def test_peak_memory_is_in_gigabytes():
    high_water = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    assert metrics_module.peak_memory_gb() == pytest.approx(int(high_water.split()[1]) * 1024 / 1e9, rel=0.05)
