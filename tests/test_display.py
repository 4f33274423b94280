import doctest
import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

import igpo_fast.run.display as display_module
from igpo_fast.run.display import BARS, Display, sparkline

ROW = {
    "step": 3, "reward/f1": 0.3125, "reward/ig_mean": 0.0241, "group/collapsed": 0.25, "turns/mean": 3.14,
    "tokens/rollout": 5000, "time/step": 4.0,
}  # fmt: skip


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def make(terminal, clock=None, **options):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=60 if not terminal else 160, color_system=None)
    return Display(console=console, clock=clock or Clock(), **options), out


def test_doctests():
    assert doctest.testmod(display_module).failed == 0


def test_a_log_has_one_plain_line_a_step_however_narrow():
    clock = Clock()
    display, out = make(False, clock, steps=100, done=2)
    with display:
        display.phase("rollout", total=128)
        display.advance(64)
        clock.now += 4
        display.phase("train", total=None)
        display.step(ROW)
    assert out.getvalue() == (
        "step 3/100  f1 0.312  gain +0.0241  collapsed 0.25  turns 3.1  1,250 tokens/s  4.0 s  eta 6:28\n"
    )


def test_only_long_phases_are_worth_a_line():
    clock = Clock()
    display, out = make(False, clock, steps=5, done=2)
    with display:
        display.phase("warm start")
        clock.now += 12
        display.phase("rollout", total=8)
        clock.now += 80
        display.phase("train")
        clock.now += 9
        display.step({**ROW, "time/rollout": 75.0, "time/score": 0.0, "time/train": 9.0, "time/sync": 30.0})
        clock.now += 10
        display.step({"step": 4})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 3/5  warm start 12 s  rollout 1:15  sync 30 s"  # the row's times, where it has them
    assert lines[1].startswith("step 3/5  f1") and lines[2].startswith("step 4/5  ") and len(lines) == 3


def test_phases_after_a_resume_are_those_of_the_rows_step():
    clock = Clock()
    display, out = make(False, clock, steps=12)  # which does not know yet that steps 1 to 6 are done
    with display:
        display.phase("rollout", total=8)
        clock.now += 20
        display.step({"step": 7, "time/rollout": 20.0})
    assert out.getvalue().splitlines()[0] == "step 7/12  rollout 20 s"


def test_a_log_is_not_silent_for_long():
    clock = Clock()
    display, out = make(False, clock, steps=5)
    with display:
        display.phase("rollout", total=8)
        for _ in range(8):
            clock.now += 25
            display.advance()
    assert out.getvalue().splitlines() == ["rollout 3/8", "rollout 6/8"]


def test_markup_and_credentials():
    display, out = make(True, steps=1)
    with display:
        display.phase("[bold]x[/bold]", total=2)
        display.note("in [red]runs[/red] at http://me:secret@h/")
        display.warn("[bold]http://me:secret@h/")
        display._live.refresh()
    shown = out.getvalue()
    assert "secret" not in shown and "http://***@h/" in shown
    assert "[bold]x[/bold]" in shown and "in [red]runs[/red]" in shown and "[bold]http" in shown


def test_time_left_follows_this_session_not_earlier_ones():
    clock = Clock()
    display, out = make(False, clock, steps=10, done=6)
    with display:
        display.step({"step": 6})  # nothing timed yet is a step of 0 s
        clock.now += 20
        display.step({"step": 7})
        clock.now += 40
        display.step({"step": 8})
    assert [line.split("eta ")[1] for line in out.getvalue().splitlines()] == ["0 s", "30 s", "40 s"]


def test_time_left_follows_the_last_twenty_steps():
    clock = Clock()
    display, out = make(False, clock, steps=122)
    with display:
        for step in range(1, 122):
            clock.now += 1000 if step <= 101 else 2
            display.step({"step": step})
    assert out.getvalue().endswith("step 121/122    eta 2 s\n")


def test_an_evaluation_before_training_has_no_time_left_yet():
    display, out = make(False, steps=10)
    with display:
        display.step({"step": 0, "eval/f1": 0.25, "eval/f1_se": math.nan})
    assert out.getvalue() == "step 0/10  eval f1 0.250  eta -\n"


def test_notes_and_warnings_are_printed_as_they_are():
    display, out = make(False, steps=1)
    with display:
        display.note("run folder [runs/x] " + "long " * 30)
        display.warn("gains are all zero: 0.97")
    assert out.getvalue().splitlines() == [
        "run folder [runs/x] " + "long " * 30,
        "warning: gains are all zero: 0.97",
    ]


def test_a_log_has_no_control_codes():
    display, out = make(False, steps=4)
    with display:
        display.phase("rollout", total=4)
        display.advance(4)
        display.step(ROW)
        display.warn("x")
    assert "\x1b" not in out.getvalue() and "\r" not in out.getvalue()


def test_a_terminal_shows_bars_for_run_and_phase():
    display, out = make(True, steps=100, done=2)
    with display:
        display.phase("rollout", total=128)
        display.advance(32)
        display._live.refresh()
        shown = out.getvalue()
        assert "\x1b[" in shown and "32/128" in shown and "2/100" in shown and "rollout" in shown
        display.step(ROW)
        display._live.refresh()
    after = out.getvalue()[len(shown) :]
    assert "3/100" in after and "f1 0.312" in after and "1,250 tokens/s" in after


def test_a_terminal_keeps_lines_of_evaluations_notes_and_warnings_only():
    display, out = make(True, steps=100)
    with display:
        display.step(ROW)
        display.step({**ROW, "step": 4, "eval/f1": 0.5, "eval/f1_se": 0.02})
        display.note("noted")
        display.warn("beware")
    shown = out.getvalue()
    assert "step 3/100 " not in shown and "step 4/100 " in shown and "eval f1 0.500 ± 0.020" in shown
    assert "noted" in shown and "warning: beware" in shown


def test_missing_numbers_are_left_out():
    display, out = make(False, steps=2)
    with display:
        display.step({"step": 1, "reward/f1": None, "loss/policy": math.nan, "turns/mean": 2.0})
    assert out.getvalue() == "step 1/2  turns 2.0  eta 0 s\n"


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_ends_the_display(terminal):
    display, _ = make(terminal, steps=2)
    with pytest.raises(RuntimeError), display:
        display.phase("rollout", total=3)
        raise RuntimeError
    assert not display._progress.live.is_started


def test_sparkline_of_hand_worked_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == BARS
    assert sparkline([0.0, 0.5, 1.0], 0, 1) == "▁▅█"
    assert sparkline([0.25, 0.5], 0, 1) == "▃▅"
    assert sparkline([0.4, 0.4]) == "▁▁"
    assert sparkline([None, 1.0, math.nan, 2.0]) == " ▁ █"
    assert sparkline([-1.0, 2.0], 0, 1) == "▁█"
    assert sparkline([None]) == " " and sparkline([]) == ""


@given(st.lists(st.floats(-1e6, 1e6), min_size=1))
def test_sparkline_is_monotone(values):
    line = sparkline(values)
    assert len(line) == len(values)
    ordered = [BARS.index(bar) for _, bar in sorted(zip(values, line, strict=True))]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (59.6, "1:00"), (370, "6:10"), (7380, "2:03:00")])
def test_durations(seconds, text):
    assert display_module.duration(seconds) == text


def test_a_narrow_terminal_keeps_its_bars():
    out = io.StringIO()
    with Display(9, console=Console(file=out, force_terminal=True, width=60)) as display:
        display.phase("rollout", total=128)
        display.step({"step": 1, "reward/f1": 0.3, "turns/mean": 4.5, "tokens/rollout": 9000, "time/step": 1.1})
        display.phase("train", total=4)
        out.truncate(0)
        display._live.refresh()
        shown = out.getvalue()
    assert "step " in shown and "train" in shown and "1/9" in shown and "0/4" in shown and "f1 0.300" in shown
