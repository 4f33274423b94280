"""Whole runs of the baselines and value models: resumed exactly, with records that add up."""

from __future__ import annotations

import json

import pytest
import torch

from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import train
from tests.tiny import STEPS, Recorder, rows, settings

RUNS = {
    "random": ("algorithm.baseline=random", "algorithm.baseline_samples=2"),
    "masked": ("algorithm.baseline=masked", "algorithm.passes=two"),
    "reference": ("algorithm.value_model=reference", "algorithm.kl=0.01"),
    "teacher": ("algorithm.value_model=teacher", "algorithm.teacher_every=3", "algorithm.kl=0.01"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, cache, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(settings(whole, cache, *RUNS[name]), Recorder())
    for steps in (4, STEPS):
        train(settings(parts, cache, *RUNS[name], f"train.steps={steps}"), Recorder())
    assert rows(parts) == rows(whole)
    ours, theirs = (RunFolder(path).saved()[STEPS] for path in (parts, whole))
    held = [torch.load(path / "learner-00000-of-00001.pt")["states"] for path in (ours, theirs)]
    for weight, kinds in held[1].items():
        assert all(torch.equal(held[0][weight][kind], tensor) for kind, tensor in kinds.items()), weight
    assert (theirs / "teacher.pt").exists() == (name == "teacher")
    gains, scored = 0, 0
    for step in range(1, STEPS + 1):
        for line in (whole / f"rollouts/step_{step:06d}.jsonl").read_text().splitlines():
            record = json.loads(line)
            for t, turn in enumerate(record["turns"][:-1]):
                if turn["info_gain"] is None:
                    assert name in ("random", "masked") and turn["action"] != "search" and turn["baseline"] is None
                    continue
                scored += 1
                gains += abs(turn["info_gain"]) > 1e-6
                before = turn["baseline"] if name in ("random", "masked") else record["values"][t]
                assert turn["info_gain"] == pytest.approx(turn["value"] - before, abs=1e-12)
    assert gains > scored / 2 > 20
