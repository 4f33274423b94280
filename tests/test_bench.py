"""Rows of the benches, the stages for a GPU machine, and that neither needs what such a machine lacks."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import comparison, gpu, journal
from bench.comparison import Comparison, figures, line
from bench.timing import timed

ROOT = Path(__file__).parents[1]


class Benchmark:
    """pytest-benchmark's fixture with a clock of its own: ours takes 2 ms a call."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(warmup_rounds + rounds):
            setup()
            target()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[0.002] * rounds))


@pytest.fixture
def calls(monkeypatch):
    """What ran, in order; a peer's clock moves by what its calls cost, after a warm-up round that takes far longer."""
    ran, now = [], [0.0]
    monkeypatch.setattr(comparison, "perf_counter", lambda: now[0])

    def side(name, seconds, result):
        def run():
            ran.append(name)
            now[0] += seconds if ran.count(name) > 3 else 100.0
            return result

        return run

    return ran, side


def test_sides_take_turns_and_peers_have_rows(calls):
    ran, side = calls
    x = torch.ones(3)
    sides = {"slow": side("slow", 0.006, x), "floor": side("floor", 0.001, None), "ours": side("ours", 0.5, x)}
    benchmark = Benchmark()
    rows = Comparison("op", {"M": 3}, sides, flops=4e9, agree=dict(atol=0, rtol=0)).rows(benchmark, rounds=2)
    assert ran == ["ours"] * 2 + ["slow"] * 2 + ["floor"] * 2 + ["slow", "floor", "ours"] * 3
    assert [(row["bench"], row["ratio"], row["ratio_spread"]) for row in rows] == [
        ("op/slow", 3.0, [3.0, 3.0]),
        ("op/floor", 0.5, [0.5, 0.5]),
    ]
    assert rows[0]["ours"] == {"median": 2.0, "p20": 2.0, "p80": 2.0, "unit": "ms", "peak_bytes": 0, "tflops": 2.0}
    assert rows[0]["peers"]["slow"]["tflops"] == pytest.approx(0.6667)
    assert benchmark.group == "op" and benchmark.extra_info["rows"] == rows
    assert {"date", "commit", "hardware", "versions", "shape", "flops"} <= set(rows[0])
    assert line(rows[0]).startswith("op/slow: ours 2 ms, slow 6 ms, ratio 3.00 (3.00 - 3.00), peak 0.0 and 0.0 MiB")


def test_a_peer_that_raises_or_differs_is_a_row_without_figures(calls):
    _, side = calls

    def broken():
        raise RuntimeError("no such\ndevice")

    sides = {"ours": side("ours", 1, torch.ones(2)), "broken": broken, "other": side("other", 1, torch.zeros(2))}
    rows = Comparison("op", {}, sides, agree=dict(atol=0.5, rtol=0)).rows(Benchmark(), rounds=1)
    assert [row["bench"] for row in rows] == ["op/broken", "op/other"] and not any("ratio" in row for row in rows)
    assert line(rows[0]) == "op/broken: RuntimeError: no such device" and "not close" in rows[1]["error"]


def test_long_calls_run_once_for_their_memory_and_peers_may_be_sums(calls):
    ran, side = calls
    moved = []

    def slow():
        moved.append(torch.ones(1000, dtype=torch.float64))

    sides = {"ours": slow, "a": side("a", 100.0, None), "b": side("b", 100.0, torch.ones(2))}
    sums = {"both": ("a", "b"), "broken": ("a", "no such side")}
    rows = Comparison("op", {}, sides, long=True, sums=sums, tokens=50, agree=dict(atol=0, rtol=0)).rows(Benchmark(), 2)
    assert len(moved) == 3 and ran == ["a", "b"] * 3, "once for the memory, then two rounds"
    assert [row["bench"] for row in rows] == ["op/a", "op/b", "op/both"]
    assert rows[0]["ours"]["peak_bytes"] == 8000 and rows[0]["ours"]["tokens_per_s"] == 25_000
    both = rows[2]["peers"]["both"]
    assert both["median"] == 200_000 and both["tokens_per_s"] == 0.25 and rows[2]["ratio"] == 100_000
    assert "2.5e+04 and 0.25 tokens/s" in line(rows[2]) and "clock" not in rows[0]


def test_another_clock_is_told(calls):
    _, side = calls
    now = iter(range(0, 1000, 3))
    sides = {"ours": side("o", 1, None), "peer": side("p", 100.0, None)}

    def processor():
        return float(next(now))

    row = Comparison("op", {}, sides, clock=processor).rows(Benchmark(), rounds=1)[0]
    assert row["peers"]["peer"]["median"] == 3000 and row["clock"] == "processor" and row["load"] >= 0


def test_ours_must_run():
    def broken():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        Comparison("op", {}, {"peer": lambda: None, "ours": broken})


def test_several_calls_are_timed_together(calls):
    ran, side = calls
    timed(side("ours", 1, None), calls=4)()
    assert ran == ["ours"] * 4
    sides = {"ours": side("o", 1, None), "peer": side("p", 0.001, None)}
    row = Comparison("op", {}, sides, calls=5).rows(Benchmark(), rounds=1)[0]
    assert row["ours"]["median"] == pytest.approx(2.0 / 5) and row["peers"]["peer"]["median"] == pytest.approx(1.0)


def test_figures():
    found = figures([0.004, 0.001, 0.002, 0.003, 0.005, 0.006], 7, None)
    assert found == {"median": 3.5, "p20": 2.0, "p80": 5.0, "unit": "ms", "peak_bytes": 7}


@pytest.mark.skipif(torch.cuda.is_available(), reason="refuses only without a GPU")
def test_the_gpu_script_refuses_in_one_line(tmp_path, capsys):
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    said = "bench/gpu.py: no CUDA device is visible; run it on a machine with one, or with --dry\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry", [False, True])
def test_stages_fit_one_command_each(dry, tmp_path):
    stages = gpu.stages(tmp_path, tmp_path / "library.so", dry)
    assert list(stages) == ["quick", "attention", "tune", "rest", "scoring"], "most valuable first"
    assert gpu.STAGE_SECONDS <= 540 and len(gpu.FILES) <= 6
    for stage, steps in stages.items():
        assert sum(step.seconds for step in steps) <= gpu.STAGE_SECONDS, stage
        assert steps[0].name == "facts" and str(tmp_path / "library.so") in steps[0].command
    steps = [step for found in stages.values() for step in found[1:]]
    assert len(steps) == len({step.name for step in steps}), "the journal knows steps by name"
    assert all(step.seconds > 2 * gpu.GRACE for step in steps)
    by_name = {step.name: step.command for step in steps}
    assert [part for part in by_name["head"] if part.startswith("bench/")] == [
        "bench/test_loss.py", "bench/test_logprob.py", "bench/test_advantages.py",
    ]  # fmt: skip
    assert all(("bench.pretend" in step.command) == dry for step in steps if step.command[0] == "pytest")
    named = {part for step in steps for part in step.command if Path(part).parent == tmp_path}
    assert {Path(part).name for part in named} <= set(gpu.FILES), "nothing else is written"


def test_what_the_tuner_is_asked_for_is_shortlisted(tmp_path):
    tune = pytest.importorskip("igpo_kernels.tune")
    module, *options = gpu.stages(tmp_path)["tune"][1].command
    known = {tunable.kernel for _, tunable in tune.wanted(tune.parsed(options))}
    assert module == tune.__name__ and {row["kernel"] for row in tune.shortlist()} <= known
    command = gpu.stages(tmp_path)["attention"][2].command
    table = command[command.index("--table") + 1]
    assert {row["kernel"] for row in tune.shortlist() if row.get("name") == table} == {
        f"tree_attention_{part}" for part in ("forward", "backward_q", "backward_kv")
    }


def step(name, command, seconds=60, **rest):
    return gpu.Step(name, seconds, command, **rest)


@pytest.fixture
def staged(tmp_path, monkeypatch, capsys):
    """``staged(steps, *arguments)`` runs them as one stage; returns the exit code and what was said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "GRACE", 1)

    def run(steps, *arguments):
        monkeypatch.setattr(gpu, "stages", lambda *_: {"only": steps})
        monkeypatch.setattr(gpu.time, "strftime", lambda form: " at noon")
        return gpu.main(["--out", str(tmp_path / "out"), *arguments]), capsys.readouterr().out

    return run


def test_a_step_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, staged):
    (tmp_path / "part.py").write_text(
        "import os, signal, sys, time\nprint(os.environ.get('TRITON_INTERPRET'), flush=True)\n"
        "sys.argv[1] == 'deaf' and signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "time.sleep(600 if sys.argv[1] in ('hang', 'deaf') else 0)\nsys.exit(int(sys.argv[1] == 'fail'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    parts = [step(how, ["part", how], 3 if how in ("hang", "deaf") else 60) for how in ("fail", "hang", "deaf", "well")]
    code, said = staged([*parts, step("absent", ["part", "fail"], tool="no-such-tool --tool x")])
    assert code == 1 and said.endswith("failed: only/fail, only/hang, only/deaf\n")
    assert "only/fail: exit code 1" in said and "only/well: ok" in said
    assert said.count("stopped after 2 s") == 4 and "left out: no-such-tool is not there" in said  # table and lines
    rows = [json.loads(row) for row in (tmp_path / "out/stages.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == ["fail", "hang", "deaf", "well", "absent"]
    assert (tmp_path / "out/log.txt").read_text().count("None\n") == 4, "not in the interpreter"


def test_what_a_stopped_step_has_started_is_gone():
    """The pipe ends only when the last process that holds it does."""
    code = "import signal, subprocess; signal.signal(2, signal.SIG_IGN); subprocess.Popen(['sleep', '600']).wait()"
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as log:
        assert gpu.watched([sys.executable, "-c", code], 3, log, dict(os.environ)) is None
    with os.fdopen(reading) as ended:
        assert ended.read() == ""


TESTS = """
import os, signal
import pytest

@pytest.mark.parametrize("i", range(4))
def test_a(i):
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    assert i != 2, "two"
"""


def test_a_step_goes_on_behind_the_test_that_killed_it(tmp_path, staged):
    (tmp_path / "test_some.py").write_text(TESTS)
    told = tmp_path / "out/tests.jsonl"
    command = ["pytest", "-p", "no:cacheprovider", "-p", "bench.journal", "--journal", str(told)]
    command += ["--step", "some at noon"]
    code, said = staged([step("some", [*command, "--rootdir", str(tmp_path), str(tmp_path / "test_some.py")])])
    rows = [json.loads(line) for line in told.read_text().splitlines()]
    assert [(row["test"][-2], row["outcome"]) for row in rows if "test" in row] == [
        ("0", "begun"), ("0", "passed"), ("1", "begun"),
        ("2", "begun"), ("2", "failed"), ("3", "begun"), ("3", "passed"),
    ]  # fmt: skip
    assert code == 1 and "2 passed, 1 failed, 1 without an end" in said
    assert "begun and not ended: test_some.py::test_a[1]" in said and "AssertionError: two" in said


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "tests.jsonl").write_text('{"step": "s", "test": "a", "outcome": "begun"}\n{"step": "s", "te')
    assert journal.begun(tmp_path / "tests.jsonl", "s") == {"a"} and journal.begun(tmp_path / "no", "s") == set()
    assert gpu.progress(gpu.told("s", tmp_path, "")) == (1, False) and gpu.told("s", tmp_path, " later") == []


def test_wheels_are_unpacked_for_the_run(tmp_path, staged):
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "print('carried')")
    assert staged([step("some", ["carried"])], "--wheels", str(tmp_path))[0] == 0
    assert (tmp_path / "out/log.txt").read_text().endswith("carried\n")


def pretended(*arguments):
    """pytest on the pretended GPU, without what a GPU's image lacks."""
    missing = ["pydantic", "bm25s", "datasets"]
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\nimport pytest\n"
    code += "sys.exit(pytest.main(['-p', 'no:cacheprovider', '-p', 'bench.pretend', *sys.argv[1:]]))"
    inherited = ("TRITON_INTERPRET", "PYTEST_XDIST")  # pytest-benchmark times nothing in a worker of pytest-xdist
    environment = {name: value for name, value in os.environ.items() if not name.startswith(inherited)}
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def test_a_gpu_image_can_collect_what_the_stages_name():
    found = pretended("--collect-only", "--full", "tests/kernels/triton", "tests/parity", "bench").split("\n")
    assert {line.split("/")[0] for line in found if "::" in line} == {"tests", "bench"}
    for name in gpu.CHECKED:
        assert f"tests/kernels/triton/{name}" in found
    for shape in gpu.FIRST:
        assert f"bench/test_attention.py::test_attention[{shape}-qwen2.5-7b-backward]" in found
    assert sum("::test_flex[" in line for line in found) == 2 * 2
    for name in ("test_inspect", "test_tune", "test_traps", "pipelined", "unspecialised", "ahead_of_time"):
        assert any(name in line for line in found) and any(name in part for part in gpu.HOST)


def test_a_dry_run_ends_at_the_first_launch():
    files = ("bench/test_advantages.py", "tests/kernels/triton/test_policy_loss.py")
    said = pretended("-rs", "--full", *files, "-k", "on_the_device or counters_of_their_own")
    assert "launches turn_advantages_kernel" in said and "1 passed, 1 skipped" in said
