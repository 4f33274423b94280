"""A run that was killed or stopped anywhere, and started again, equals one that never was."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from igpo_fast.engines.torch import TorchEngine
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.interrupt import Interrupted
from igpo_fast.train import train
from tests.tiny import STEPS, Recorder, files, rows, settings

MODES = {
    "one": ("algorithm.kl=0.05", "algorithm.passes=one"),
    "two": ("algorithm.kl=0", "train.updates=2", "algorithm.importance=token", "algorithm.name=ppo_ig"),
}
"""``one`` has a reference model, which a later session makes again from the warm start. ``two`` has none, so that a
later session needs its checkpoint alone; it has old log-probabilities, a critic and two updates per step."""
STOPPED = 130


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def when_sampling(act, step: int, forward: int = 3):
    """``act`` before a forward of the rollouts of ``step``, after some of their tokens were sampled."""
    real, seen = TorchEngine._step, [0]

    def patched(engine):
        seen[0] += any(job.request.key[1] == step for job in engine._running.values())
        if seen[0] == forward:
            seen[0] += 1
            act()
        return real(engine)

    TorchEngine._step = patched


def in_rollout(step):
    when_sampling(die, step)


def in_evaluation(count):
    when_sampling(die, -1, forward=count)


def in_backward(call):
    """Inside the ``call``-th backward: the loss's gradient is known, no parameter's is."""
    real, calls = torch.Tensor.backward, [0]

    def patched(loss, *arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            loss.register_hook(lambda gradient: die())
        return real(loss, *arguments, **options)

    torch.Tensor.backward = patched


def in_checkpoint(call):
    """When half of the ``call``-th checkpoint's state.pt is written."""
    real, calls = torch.save, [0]

    def patched(state, file):
        if Path(getattr(file, "name", "")).name == "state.pt":
            calls[0] += 1
            if calls[0] == call:
                real(state, content := io.BytesIO())
                file.write(content.getvalue()[: content.tell() // 2])
                file.flush()
                die()
        return real(state, file)

    torch.save = patched


def after_rename(step):
    """When the checkpoint of ``step`` has its name, before old ones are deleted."""
    real = os.replace

    def patched(source, target):
        real(source, target)
        if Path(target).name == f"step_{step:06d}":
            die()

    os.replace = patched


def before_row(step):
    """When the rollouts of ``step`` are written and its row is not."""
    in_row(step, share=0.0)


def in_row(step, share=0.5):
    real = RunFolder.append_metrics

    def patched(run, row):
        if row["step"] == step:
            line = json.dumps(row).encode()
            with open(run.metrics, "ab") as file:
                file.write(line[: int(len(line) * share)])
            die()
        real(run, row)

    RunFolder.append_metrics = patched


def stopped(number, step):
    when_sampling(lambda: os.kill(os.getpid(), number), step)


def session(folder, cache, overrides, fault=None, *where):
    """Train to the end of the run, or to the fault."""
    if fault:
        fault(*where)
    try:
        train(settings(folder, cache, *overrides), Recorder())
    except Interrupted:
        os._exit(STOPPED)


@pytest.fixture(scope="module")
def run_both(cache):
    """Runs a session of each mode, both at once; returns their exit codes."""
    # Not forked from here: this process may have threads, and on a GPU machine a CUDA context.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.test_kill"])

    def run(folder, *fault, modes=tuple(MODES)):
        children = [context.Process(target=session, args=(folder / mode, cache, MODES[mode], *fault)) for mode in modes]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        return [child.exitcode for child in children]

    return run


@pytest.fixture(scope="module")
def uninterrupted(run_both, tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert run_both(folder, modes=["one"]) == [0]  # alone: it leaves the warm start for all others
    assert run_both(folder, modes=["two"]) == [0]
    for mode in MODES:
        assert [row["step"] for row in rows(folder / mode)] == list(range(STEPS + 1))
        assert {row["eval/turns"] for row in rows(folder / mode) if row["step"] in (0, 2, 4, 6)} != {1.0}
    return folder


def assert_same(folder, reference):
    for mode in MODES:
        ours, theirs = folder / mode, reference / mode
        for row, expected in zip(rows(ours), rows(theirs), strict=True):
            assert list(row.items()) == list(expected.items())
        assert files(ours / "rollouts") == files(theirs / "rollouts")
        steps, evaluations = range(1, STEPS + 1), range(0, STEPS + 1, 2)
        written = [*(f"eval_{step:06d}.jsonl" for step in evaluations), *(f"step_{step:06d}.jsonl" for step in steps)]
        assert list(files(ours / "rollouts")) == written
        last = f"checkpoints/step_{STEPS:06d}/model.safetensors"
        assert (ours / last).read_bytes() == (theirs / last).read_bytes()
        assert not list(ours.rglob(".*.tmp"))


def named(fault):
    return f"{fault[0].__name__}_{fault[1]}"


FAULTS = [(in_rollout, 5), (in_evaluation, 30), (before_row, 4)]
SLOW = [(in_rollout, 1), (in_backward, 5), (in_checkpoint, 2), (after_rename, 4), (in_row, 5)]
"""``test_killed_again_and_again`` has these kinds, too."""


@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(fault, marks=pytest.mark.slow) for fault in SLOW)], ids=named
)
def test_killed_then_started_again(run_both, uninterrupted, tmp_path, fault):
    assert run_both(tmp_path, *fault) == [-signal.SIGKILL] * 2
    assert run_both(tmp_path) == [0, 0]
    assert_same(tmp_path, uninterrupted)


def test_killed_again_and_again(run_both, uninterrupted, tmp_path):
    for fault in [(in_checkpoint, 1), (in_row, 3), (in_backward, 3), (after_rename, 6)]:
        assert run_both(tmp_path, *fault) == [-signal.SIGKILL] * 2
    assert run_both(tmp_path) == [0, 0]
    assert_same(tmp_path, uninterrupted)
    for mode in MODES:  # what was done twice is kept aside
        aside = [json.loads(line)["step"] for line in _discarded(tmp_path / mode) if line.endswith("}")]
        assert aside and set(aside) <= {1, 2, 3, 4}  # rows go on while a checkpoint is written


def _discarded(folder):
    return [line for p in sorted(folder.glob("discarded/*/metrics.jsonl")) for line in p.read_text().splitlines()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_the_user(run_both, uninterrupted, tmp_path, number):
    """The step is finished and saved, whatever ``train.checkpoint_every`` says."""
    assert run_both(tmp_path, stopped, number, 3) == [STOPPED] * 2
    for mode in MODES:
        assert [row["step"] for row in rows(tmp_path / mode)] == [0, 1, 2, 3]
        assert list(RunFolder(tmp_path / mode).saved()) == [2, 3]
    assert run_both(tmp_path) == [0, 0]
    assert_same(tmp_path, uninterrupted)
    assert not (tmp_path / "one" / "discarded").exists()


def test_a_second_ctrl_c_ends_at_once(run_both, uninterrupted, tmp_path):
    assert run_both(tmp_path, twice_interrupted, 5) == [1, 1]
    for mode in MODES:
        assert [row["step"] for row in rows(tmp_path / mode)] == [0, 1, 2, 3, 4]
    assert run_both(tmp_path) == [0, 0]
    assert_same(tmp_path, uninterrupted)


def twice_interrupted(step):
    def act():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    when_sampling(act, step)
