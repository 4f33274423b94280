"""An update that finds no memory is repeated with half as large packs, once."""

from __future__ import annotations

import pytest
import torch

from igpo_fast.errors import RunError
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import train
from igpo_fast.update.learner import Learner
from igpo_fast.update.packs import Packer
from tests.ranks.runs import same
from tests.test_checkpoint import build
from tests.tiny import STEPS, Recorder, rows, settings

BUDGET = 1000
MODES = {"one": ("algorithm.passes=one",), "two": ("algorithm.passes=two",)}
NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more lines")


@pytest.fixture(scope="module", params=MODES)
def mode(request, cache, tmp_path_factory):
    """Settings, and a run that nothing disturbed."""
    options = (*MODES[request.param], f"train.token_budget={BUDGET}", "train.checkpoint_every=100")
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder, cache, *options), Recorder())
    return options, folder


def without_memory(monkeypatch, step, times, error=NO_MEMORY):
    """Raise ``times`` times in the backward of a later pack of ``step``; returns the numbers of packs per update."""
    backward, packs, counts = Learner.backward, Packer.packs, []
    left = [times]

    def packed(packer, batch, share, scored):
        made = packs(packer, batch, share, scored)
        counts.append((batch.step, len(made)))
        return made

    def failing(learner, loss):
        backward(learner, loss)
        if counts[-1][0] == step and left[0] and any(p.grad is not None for p in learner.lm.parameters()):
            left[0] -= 1
            raise error

    monkeypatch.setattr(Packer, "packs", packed)
    monkeypatch.setattr(Learner, "backward", failing)
    return counts


@pytest.mark.parametrize("error", [NO_MEMORY, MemoryError()], ids=lambda error: type(error).__name__)
def test_the_update_is_repeated_with_half_as_large_packs(monkeypatch, cache, mode, tmp_path, error):
    """Gradients of the failed attempt do not count."""
    options, undisturbed = mode
    counts, display = without_memory(monkeypatch, 3, 1, error), Recorder()
    train(settings(tmp_path, cache, *options), display)
    same(tmp_path, undisturbed)
    text = " ".join(display.text.split())
    assert text.count("out of memory") == 1
    assert f"step 3: out of memory; the update is repeated with packs of {BUDGET // 2} tokens" in text
    sizes = [packs for step, packs in counts if step == 3]
    assert sizes[-1] > sizes[-2]
    assert list(RunFolder(tmp_path).saved()) == [STEPS]


def test_the_second_time_ends_the_run_and_costs_no_finished_step(monkeypatch, cache, mode, tmp_path):
    options, undisturbed = mode
    with monkeypatch.context() as patch:
        without_memory(patch, 3, 2)
        with pytest.raises(RunError, match=r"^step 3: out of memory \(CUDA .*GiB\); lower train") as caught:
            train(settings(tmp_path, cache, *options), Recorder())
    assert "\n" not in str(caught.value)
    assert list(RunFolder(tmp_path).saved()) == [2] and [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    train(settings(tmp_path, cache, *options, f"train.token_budget={BUDGET // 2}"), Recorder())  # as the line says
    same(tmp_path, undisturbed)


def test_packs_too_small_for_a_group_are_none(monkeypatch, cache, tmp_path):
    without_memory(monkeypatch, 2, 1)
    display = Recorder()
    with pytest.raises(RunError, match=r"^step 2: out of memory"):
        train(settings(tmp_path, cache, "algorithm.passes=one", "train.token_budget=600"), display)
    assert "repeated" not in display.text


def test_between_two_updates_nothing_is_repeated(monkeypatch, cache, tmp_path):
    """Weights have changed by then."""
    step = Learner.step

    def stepped(learner, sound=True):
        norm = step(learner, sound)
        if learner.steps == 3:
            raise NO_MEMORY
        return norm

    monkeypatch.setattr(Learner, "step", stepped)
    with pytest.raises(RunError, match=r"^step 2: out of memory"):
        train(settings(tmp_path, cache, "train.updates=2"), Recorder())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_gradient_of_a_failed_attempt_stays(dtype):
    """Neither in the masters nor in a bfloat16 weight whose gradient could not be moved there."""
    learner = build(dtype=dtype)
    ids = torch.arange(8)[None]
    learner.backward(learner.lm(input_ids=ids, labels=ids).loss)
    last = list(learner.lm.parameters())[-1]
    last.grad = torch.ones_like(last)
    assert learner.forget()
    parameters = [*learner.lm.parameters(), *learner.optimizer.param_groups[0]["params"]]
    assert all(p.grad is None for p in parameters)
