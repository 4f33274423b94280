"""Whole runs of two ranks: what one process samples and learns, resumed in other numbers of ranks and stages, and ended
whole when a rank fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from igpo_fast import model
from tests.ranks.launch import start
from tests.tiny import SETTINGS, STEPS, WORLD, files, rows

pytest.importorskip("deepspeed")
LAST = f"checkpoints/step_{STEPS:06d}"


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    return ["-m", "igpo_fast", "train", *SETTINGS, *WORLD, f"run.dir={folder}", f"run.cache={cache}", *more]


def train(folder: Path, cache: Path, *more: str, ranks: int = 1) -> str:
    """Train by the command line; what it printed."""
    options = ["--nproc", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *arguments(folder, cache, *more), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def alone(tmp_path_factory, cache):
    """Name -> a run of one process with the settings of that name."""
    runs = {}

    def run(*more):
        if more not in runs:
            runs[more] = tmp_path_factory.mktemp("alone") / "run"
            train(runs[more], cache, *more)
        return runs[more]

    return run


def same(ours: Path, theirs: Path, first: int = 0) -> None:
    """The same rollouts token for token from step ``first`` on, and the same curves but for rounding."""
    for name, content in files(theirs / "rollouts").items():
        if int(name[-12:-6]) >= first:
            mine = [json.loads(line) for line in files(ours / "rollouts")[name].splitlines()]
            wanted = [json.loads(line) for line in content.splitlines()]
            for one, other in zip(mine, wanted, strict=True):
                assert [turn["ids"] for turn in one["turns"]] == [turn["ids"] for turn in other["turns"]]
    for row, wanted in zip(rows(ours), rows(theirs), strict=True):
        assert list(row) == list(wanted)
        for key, value in wanted.items():
            assert row[key] == pytest.approx(value, rel=1e-3, abs=1e-5), (row["step"], key)


TWO = ("algorithm.passes=two", "train.updates=2")
ONE_EACH = [pytest.param(stage, (), marks=pytest.mark.slow) for stage in (1, 2)] + [(3, ())]
TWO_EACH = [pytest.param(stage, TWO, marks=pytest.mark.slow) for stage in (1, 3)] + [(2, TWO)]


@pytest.mark.parametrize("stage, settings", [*ONE_EACH, *TWO_EACH])
def test_two_ranks_sample_and_learn_what_one_does(tmp_path, cache, alone, stage, settings):
    train(tmp_path / "run", cache, *settings, f"distributed.zero_stage={stage}", ranks=2)
    same(tmp_path / "run", alone(*settings))
    assert (tmp_path / "run/logs/rank_1.log").exists()
    assert len(list((tmp_path / "run" / LAST).glob("learner-*"))) == 2


@pytest.mark.parametrize("before, after", [
    ((2, 3), (1, 0)), ((1, 0), (2, 2)), pytest.param((2, 2), (2, 3), marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_resumes_in_other_ranks_and_stages(tmp_path, cache, alone, before, after):
    for (ranks, stage), steps in ((before, 4), (after, STEPS)):
        stages = [f"distributed.zero_stage={stage}"] if stage else []
        train(tmp_path / "run", cache, f"train.steps={steps}", "eval.every=2", *stages, ranks=ranks)
    same(tmp_path / "run", alone())
    wanted = load_file(alone() / LAST / "model.safetensors")
    for name, weight in load_file(tmp_path / "run" / LAST / "model.safetensors").items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4)


LORA = ("model.lora_rank=4", "model.lora_alpha=8", "train.lr=1e-2")


def test_an_adapter_is_trained_resumed_evaluated_and_exported(tmp_path, cache, alone):
    """On two ranks under ZeRO-3, which samples with merged weights; alone the engine runs the adapter itself."""
    pytest.importorskip("peft")
    folder, out = tmp_path / "run", tmp_path / "out"
    for steps in (4, STEPS):
        train(folder, cache, *LORA, f"train.steps={steps}", "eval.every=2", "distributed.zero_stage=3", ranks=2)
    same(folder, alone(*LORA))
    newest = folder / LAST
    assert (newest / "adapter_model.safetensors").exists() and not (newest / "model.safetensors").exists()
    for command in (
        ["export", str(folder), str(out)],
        ["eval", str(folder), "--json"],
        ["eval", str(alone(*LORA)), "--json"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "igpo_fast", *command], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval/f1"] == rows(alone(*LORA))[-1]["eval/f1"]
    exported = AutoModelForCausalLM.from_pretrained(out).eval()
    merged = model.load(str(newest), check=False)
    merged.set_attn_implementation("sdpa")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(exported(ids).logits, merged(ids).logits)
    assert len(AutoTokenizer.from_pretrained(out)) == exported.config.vocab_size


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_ends_the_run_and_costs_no_saved_step(tmp_path, cache, alone, rank):
    folder = tmp_path / "run"
    started = start(arguments(folder, cache, "train.checkpoint_every=1"), 2)
    checkpoints = folder / "checkpoints"
    while not (checkpoints.is_dir() and len([p for p in checkpoints.iterdir() if p.name[0] != "."]) >= 2):
        assert all(process.poll() is None for process in started)
        time.sleep(0.05)
    started[rank].send_signal(signal.SIGKILL)
    other = started[1 - rank]
    printed = other.communicate(timeout=60)[0]
    assert other.returncode == 2, printed
    if rank == 1:
        assert "error: rank 0: another rank has died; its log says why" in printed
    train(folder, cache, "train.checkpoint_every=1", ranks=2)
    same(folder, alone())


def test_an_error_of_one_rank_is_one_line_and_costs_no_finished_step(tmp_path, cache, alone):
    folder = tmp_path / "run"
    command = ["-m", "tests.ranks.faulty", "1", "4", *arguments(folder, cache, "train.checkpoint_every=6")[2:]]
    started = start(command, 2)
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], printed
    assert printed[0].splitlines()[-1] == "error: rank 1: step 4: planted" and "Traceback" not in printed[0]
    assert "error: step 4: planted" in (folder / "logs/rank_1.log").read_text()
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3] and (folder / "checkpoints/step_000003").is_dir()
    train(folder, cache, "train.checkpoint_every=6", ranks=2)
    same(folder, alone())


def test_one_process_owner_in_two_is_refused_in_one_line(tmp_path, cache):
    command = [sys.executable, *arguments(tmp_path / "run", cache, "distributed.engine=none"), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: distributed.engine=none trains in one process, and 2 have")
