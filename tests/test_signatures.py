"""Warnings: of failures that rows tell of, and of settings that do nothing."""

import math
import re

import pytest

from igpo_fast.config import Config, load
from igpo_fast.run.metrics import KEYS
from igpo_fast.run.signatures import EARLY, PATIENCE, SIGNATURES, warnings_for
from igpo_fast.setup import settings_warnings


def rows_of(key, values):
    return [{"step": step, key: value} for step, value in enumerate(values, 1)]


def warned_at(key, values):
    """Steps (1-based) at which a run that logs these values is warned."""
    rows = rows_of(key, values)
    return [n for n in range(1, len(rows) + 1) if warnings_for(rows[:n])]


BAD = [
    ("reward/ig_zero", 0.5, 0.97),
    ("reward/ig_gated", 0.3, 0.99),
    ("turns/format_error", 0.5, 1.0),
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


def test_what_the_run_began_with_is_no_drift():
    """Two updates whose gradient was 0, and rollouts that lose information from the first on."""
    key = "reward/ig_cum_negative"
    rows = [{"step": n, key: 0.7, "loss/grad_norm": norm} for n, norm in enumerate([0.0, 0.0] + [1.0] * 30, 1)]
    assert not any(warnings_for(rows[:n]) for n in range(1, len(rows) + 1))
    # It drifts where that gets worse: past 1.2 x 0.7 = 0.84.
    worse = [{"step": n, key: 0.85, "loss/grad_norm": 1.0} for n in range(33, 36)]
    (message,) = warnings_for(rows + worse)
    assert f"{key} 0.85, above 0.84 for 3 steps (early level 0.7)" in message
    assert warned_at(key, [0.5] * EARLY + [0.61] * 9) == [EARLY + PATIENCE]  # half or fewer at first: 0.6


def test_nothing_drifts_before_the_policy_changes():
    """Noise of a policy that stands still is its early level, however long that takes."""
    key, still = "turns/mean", 12
    levels = [4.0, 2.0] * (still // 2)  # mean 3, limit 1.8; of the first five 3.2, limit 1.92
    rows = [{"step": n, key: level, "loss/grad_norm": 0.0} for n, level in enumerate(levels, 1)]
    rows += [{"step": still + n, key: 1.85, "loss/grad_norm": 1.0} for n in range(1, 9)]
    assert not any(warnings_for(rows[:n]) for n in range(1, len(rows) + 1))
    rows += [{"step": still + 8 + n, key: 1.0, "loss/grad_norm": 1.0} for n in range(1, PATIENCE + 1)]
    assert not warnings_for(rows[:-1]) and len(warnings_for(rows)) == 1


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


@pytest.mark.parametrize("override, ratio", [("algorithm.name=gspo", "sequence"), ("algorithm.ratio=turn", "turn")])
def test_ratios_over_tokens_with_one_update_are_said_to_be_1(override, ratio):
    (warning,) = settings_warnings(load(None, [override]))
    assert "\n" not in warning
    equal = " (gspo then equals grpo)" * (override == "algorithm.name=gspo")
    assert warning.startswith(f"algorithm.ratio={ratio} with train.updates=1 never clips{equal}: all ratios are 1")
    assert settings_warnings(load(None, [override, "train.updates=2"])) == []
    assert settings_warnings(load(None, ["algorithm.name=grpo"])) == []


def test_other_surrogates_with_one_update_are_said_to_be_the_clip():
    (warning,) = settings_warnings(load(None, ["algorithm.surrogate=cispo"]))
    assert warning.startswith("algorithm.surrogate=cispo with train.updates=1 trains as surrogate=clip does")
    assert settings_warnings(load(None, ["algorithm.surrogate=cispo", "train.updates=2"])) == []


@pytest.mark.parametrize("surrogate", ["sapo", "vespo"])
def test_clip_ranges_of_what_clips_nothing_are_pointed_out(surrogate):
    given = [f"algorithm.surrogate={surrogate}", "algorithm.ratio=turn", "train.updates=2"]
    assert settings_warnings(load(None, given)) == []
    (warning,) = settings_warnings(load(None, [*given, "algorithm.clip_low=0.1"]))
    assert warning == f"algorithm.clip_low=0.1 does nothing: algorithm.surrogate={surrogate} clips nothing"


def test_one_ratio_per_rollout_is_said_to_spread_gains():
    (warning,) = settings_warnings(load(None, ["algorithm.ratio=sequence", "train.updates=2"]))
    assert warning.startswith("algorithm.ratio=sequence gives all tokens of a rollout the same gradient")
    assert settings_warnings(load(None, ["algorithm.name=grpo", "algorithm.ratio=sequence", "train.updates=2"])) == []


def test_a_presets_gate_under_another_basis_is_pointed_out():
    (warning,) = settings_warnings(load(None, ["algorithm.preset=robust", "algorithm.basis=log_prob"]))
    assert warning.startswith("algorithm.ig_gate=0.02 is preset robust's, for basis=prob;") and "\n" not in warning
    for given in (["preset=robust"], ["preset=robust", "basis=log_prob", "ig_gate=0.1"], ["basis=prob"]):
        assert settings_warnings(load(None, [f"algorithm.{override}" for override in given])) == []
