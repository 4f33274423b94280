import doctest
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import igpo_fast.metrics as metrics_module
from igpo_fast.config import Config
from igpo_fast.metrics import EARLY, KEYS, PATIENCE, SIGNATURES, StepMetrics, tracker, warnings_for


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


def test_a_step_without_updates_has_nan_losses():
    row = StepMetrics(0).row()
    assert math.isnan(row["loss/policy"]) and math.isnan(row["loss/grad_norm"])


def test_keys_come_in_the_documented_order_others_last():
    metrics = StepMetrics(3)
    metrics.set({"mine": 1.0, "eval/f1": 0.5, "reward/f1": 0.25})
    metrics.add({"tokens/packed": 10})
    metrics.add({"tokens/packed": 5})
    with metrics.phase("rollout"):
        pass
    keys = list(row := metrics.row())
    assert [KEYS.index(key) for key in keys[:-1]] == sorted(KEYS.index(key) for key in keys[:-1])
    assert keys[0] == "step" and keys[-1] == "mine"
    assert (row["step"], row["tokens/packed"], row["reward/f1"]) == (3, 15, 0.25)
    assert len(set(KEYS)) == len(KEYS) == 48


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
        with metrics.phase("rollout"):
            clock.now += seconds
    with pytest.raises(RuntimeError), metrics.phase("train"):
        clock.now += 4
        raise RuntimeError
    clock.now += 1
    row = metrics.row()
    assert (row["time/rollout"], row["time/train"], row["time/step"]) == (5, 4, 10)


@pytest.mark.skipif(not sys.platform.startswith("linux") or torch.cuda.is_initialized(), reason="reads /proc")
def test_peak_memory_is_in_gigabytes():
    high_water = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    assert metrics_module.peak_memory_gb() == pytest.approx(int(high_water.split()[1]) * 1024 / 1e9, rel=0.05)


# --- warnings ---


def rows_of(key, values):
    return [{"step": step, key: value} for step, value in enumerate(values, 1)]


def warned_at(key, values):
    """Steps (1-based) at which a run that logs these values is warned."""
    rows = rows_of(key, values)
    return [n for n in range(1, len(rows) + 1) if warnings_for(rows[:n])]


BAD = [
    ("reward/ig_zero", 0.5, 0.97),
    ("reward/ig_cum_negative", 0.4, 0.8),
    ("group/collapsed", 0.5, 0.95),
    ("loss/entropy", 0.8, 1.21),  # over 1.5 x 0.8
    ("loss/entropy", 1.0, 1.35),  # over 1.3, though not by half
    ("turns/mean", 4.0, 2.3),
    ("loss/clip_frac", 0.1, 0.4),
    ("mismatch/logp_abs_diff", 0.01, 0.2),
]
PATIENCE_OF = {signature.key: signature.patience for signature in SIGNATURES}


@pytest.mark.parametrize("key, good, bad", BAD)
def test_each_signature_warns_once_in_one_line(key, good, bad):
    assert warned_at(key, [good] * EARLY + [bad] * 20) == [EARLY + PATIENCE_OF[key]]
    message = warnings_for(rows_of(key, [good] * EARLY + [bad] * PATIENCE_OF[key]))[0]
    assert key in message and f"{bad:.3g}" in message and "\n" not in message


@pytest.mark.parametrize("key, good, bad", BAD)
def test_a_short_spell_is_not_worth_a_warning(key, good, bad):
    assert warned_at(key, [good] * EARLY + ([bad] * (PATIENCE_OF[key] - 1) + [good]) * 5) == []


@pytest.mark.parametrize("key, good, bad", BAD)
def test_it_warns_again_only_after_a_clear_recovery(key, good, bad):
    patience = PATIENCE_OF[key]
    spell = [bad] * patience
    again = warned_at(key, [good] * EARLY + spell + [good] + spell)
    assert again == [EARLY + patience, EARLY + 2 * patience + 1]


def test_a_mismatch_warns_at_once_over_the_limit_given():
    key = "mismatch/logp_abs_diff"
    assert PATIENCE_OF[key] == 1
    assert warnings_for(rows_of(key, [0.2]), {key: 0.3}) == []
    (message,) = warnings_for(rows_of(key, [0.2]), {key: 0.1})
    assert f"{key} 0.2, above 0.1;" in message


@pytest.mark.parametrize("bad", [None, math.nan, math.inf])
def test_a_mismatch_that_is_not_finite_warns(bad):
    rows = rows_of("mismatch/logp_abs_diff", [0.01, bad])
    assert [warning.partition(";")[0] for warning in warnings_for(rows)] == [
        "engine and trainer disagree: mismatch/logp_abs_diff inf, above 0.1"
    ]
    assert warnings_for(rows_of("mismatch/logp_abs_diff", [0.01, bad, bad])) == []
    assert warnings_for([*rows, {"step": 3}]) == []


def test_hovering_about_the_limit_warns_once():
    hovering = ([0.96] * PATIENCE + [0.94]) * 5
    assert warned_at("reward/ig_zero", hovering) == [PATIENCE]


@pytest.mark.parametrize(
    "key, values",
    [
        ("reward/ig_zero", [0.95] * 30),
        ("loss/entropy", [0.8] * EARLY + [1.19] * 30),
        ("loss/entropy", [1.4] * EARLY + [2.0] * 30),
        ("turns/mean", [4.0] * EARLY + [2.5] * 30),
        ("turns/mean", [4.0] * EARLY + [9.0] * 30),
        ("loss/entropy", [1.0] * EARLY + [0.1] * 30),
    ],
)
def test_levels_short_of_the_limit_are_quiet(key, values):
    assert warned_at(key, values) == []


def test_entropy_that_begins_high_is_measured_against_its_beginning():
    assert warned_at("loss/entropy", [1.4] * EARLY + [2.2] * 9) == [EARLY + PATIENCE]


def test_missing_null_and_nan_values_are_left_out():
    rows = rows_of("group/collapsed", [None, math.nan, 1.0, None, 1.0, 1.0])
    assert len(warnings_for([{"step": 0, "eval/f1": 0.1}, *rows])) == 1
    assert warnings_for([*rows, {"step": 7}]) == []
    assert warnings_for([]) == []


def test_several_signatures_speak_together():
    rows = [{"step": n, "reward/ig_zero": 1.0, "group/collapsed": 1.0} for n in range(PATIENCE)]
    assert len(warnings_for(rows)) == 2


def test_signatures_name_keys_that_exist():
    dumped = Config().model_dump()
    for signature in SIGNATURES:
        assert signature.key in KEYS
        named = re.findall(r"\b([a-z]+)\.([a-z_]+)", signature.remedy)
        assert named and all(key in dumped[section] for section, key in named), signature.remedy


# --- trackers ---


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_gets_the_numbers_and_a_resume_hides_what_it_repeats(tmp_path):
    with tracker("tensorboard", tmp_path, 0) as log:
        for step in (1, 2, 3):
            log({"step": step, "reward/f1": step / 4, "loss/kl": None, "loss/policy": math.nan})
    with tracker("tensorboard", tmp_path, 1) as log:
        log({"step": 2, "reward/f1": 0.75})
    assert scalars(tmp_path) == {"reward/f1": [(1, 0.25), (2, 0.75)]}


def test_no_tracker_writes_nothing(tmp_path):
    with tracker("none", tmp_path, 0) as log:
        log({"step": 1, "reward/f1": 0.5})
    assert list(tmp_path.iterdir()) == []
