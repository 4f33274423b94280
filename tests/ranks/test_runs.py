"""Whole runs of two ranks: what one process samples and learns, resumed in other numbers of ranks and stages."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from igpo_fast import model
from tests.ranks.runs import LAST, arguments, command, same, train
from tests.tiny import STEPS, rows

pytest.importorskip("deepspeed")
TWO = ("algorithm.passes=two", "train.updates=2")
PPO = ("algorithm.name=ppo",)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(), TWO], ids=["one pass", "two passes"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_sample_and_learn_what_one_does(tmp_path, cache, alone, stage, settings):
    train(tmp_path / "run", cache, *settings, f"distributed.zero_stage={stage}", ranks=2)
    same(tmp_path / "run", alone(*settings))
    assert (tmp_path / "run/logs/rank_1.log").exists()
    assert len(list((tmp_path / "run" / LAST).glob("learner-*"))) == 2


@pytest.mark.parametrize("before, after, settings", [
    ((2, 3), (1, 0), ()),
    pytest.param((1, 0), (2, 2), (), marks=pytest.mark.slow),
    pytest.param((2, 2), (2, 3), (), marks=pytest.mark.slow),
    pytest.param((1, 0), (2, 3), PPO, marks=pytest.mark.slow),
    pytest.param((2, 3), (2, 2), PPO, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_run_resumes_in_other_ranks_and_stages(tmp_path, cache, alone, before, after, settings):
    for (ranks, stage), steps in ((before, 4), (after, STEPS)):
        stages = [f"distributed.zero_stage={stage}"] if stage else []
        train(tmp_path / "run", cache, *settings, f"train.steps={steps}", "eval.every=2", *stages, ranks=ranks)
        if ranks == 2:
            parts = list((tmp_path / f"run/checkpoints/step_{steps:06d}").glob("learner-*"))
            assert len(parts) == 2 and (tmp_path / "run/logs/rank_1.log").exists()
    same(tmp_path / "run", alone(*settings))
    wanted = load_file(alone(*settings) / LAST / "model.safetensors")
    for name, weight in load_file(tmp_path / "run" / LAST / "model.safetensors").items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-4)


LORA = ("model.lora_rank=4", "model.lora_alpha=8", "train.lr=1e-2")


@pytest.mark.slow
def test_an_adapter_is_trained_resumed_evaluated_and_exported(tmp_path, cache, alone):
    """On two ranks under ZeRO-3, which samples with merged weights; alone the engine runs the adapter itself."""
    pytest.importorskip("peft")
    folder, out = tmp_path / "run", tmp_path / "out"
    for steps in (4, STEPS):
        train(folder, cache, *LORA, f"train.steps={steps}", "eval.every=2", "distributed.zero_stage=3", ranks=2)
    same(folder, alone(*LORA))
    newest = folder / LAST
    assert (newest / "adapter_model.safetensors").exists() and not (newest / "model.safetensors").exists()
    for words in (
        ["export", str(folder), str(out)],
        ["eval", str(folder), "--json"],
        ["eval", str(alone(*LORA)), "--json"],
    ):
        done = command(*words)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval/f1"] == rows(alone(*LORA))[-1]["eval/f1"]
    exported = AutoModelForCausalLM.from_pretrained(out).eval()
    merged = model.load(str(newest), check=False)
    merged.set_attn_implementation("sdpa")
    ids = torch.arange(9)[None]
    torch.testing.assert_close(exported(ids).logits, merged(ids).logits)
    assert len(AutoTokenizer.from_pretrained(out)) == exported.config.vocab_size


@pytest.mark.slow
def test_one_process_owner_in_two_is_refused_in_one_line(tmp_path, cache):
    done = command(*arguments(tmp_path / "run", cache, "distributed.engine=none"), "--nproc", "2")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: distributed.engine=none trains in one process, and 2 have")
