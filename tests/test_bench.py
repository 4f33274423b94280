"""Rows of the benches, the script for a GPU machine, and that neither needs what such a machine lacks."""

import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import comparison, gpu
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
    assert capsys.readouterr().err == "bench/gpu.py: no CUDA device is visible; run it on a machine with one\n"
    assert not (tmp_path / "out").exists()


def test_every_kernel_that_can_be_tuned_is_tuned(tmp_path):
    tune = pytest.importorskip("igpo_kernels.tune")
    module, *options = gpu.commands(tmp_path)["tune"]
    tuned = {tunable.kernel for _, tunable in tune.wanted(tune.parsed(options))}
    assert module == tune.__name__ and tuned == {tunable.kernel for *_, tunable in tune.tunables()}


def test_a_stage_that_fails_or_hangs_does_not_stop_the_next(tmp_path, monkeypatch, capsys):
    (tmp_path / "stage.py").write_text(
        "import os, sys, time\nprint(os.environ.get('TRITON_INTERPRET'), flush=True)\n"
        "time.sleep(60 if sys.argv[1] == 'hang' else 0)\nsys.exit(int(sys.argv[1] == 'fail'))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stages = {"tests": "fail", "bench": "hang", "tune": "succeed"}
    monkeypatch.setattr(gpu, "commands", lambda out: {stage: ["stage", how] for stage, how in stages.items()})
    monkeypatch.setitem(gpu.LIMITS, "bench", 1)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "tests: exit code 1 in " in said and "bench: stopped after 1 s in " in said and "tune: ok in " in said
    assert said.endswith("failed: tests, bench\n")
    assert (tmp_path / "out/tune.log").read_text() == "None\n"  # not in the interpreter
    assert gpu.main(["tune", "--out", str(tmp_path / "only")]) == 0
    assert [path.name for path in (tmp_path / "only").iterdir()] == ["tune.log"]


def test_wheels_are_unpacked_for_the_run(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "carried-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried.py", "print('carried')")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "commands", lambda out: {"tests": ["carried"]})
    assert gpu.main(["--out", str(tmp_path / "out"), "--wheels", str(tmp_path)]) == 0
    assert (tmp_path / "out/tests.log").read_text() == "carried\n"


def test_a_gpu_image_can_collect_its_tests_and_benches():
    missing = ["pydantic", "bm25s", "datasets", "tensorboard"]
    code = f"import sys\nfor name in {missing}: sys.modules[name] = None\nimport pytest\n"
    code += "sys.exit(pytest.main(['--collect-only', '-qq', '-p', 'no:cacheprovider', *sys.argv[1:]]))"
    folders = ["tests/kernels", "tests/parity", "bench"]
    run = subprocess.run([sys.executable, "-c", code, *folders], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:]
    assert all(f"{folder}/" in run.stdout for folder in folders)
