"""Checkpoints are written while the run goes on; what goes wrong there ends the run as in its main thread."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from igpo_fast.errors import EngineError, StorageError
from igpo_fast.run import checkpoint
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import Trainer, train
from tests.tiny import STEPS, Recorder, files, rows, settings


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder, cache), Recorder())
    return folder


def manifests(monkeypatch, act):
    """``act(step)`` before a checkpoint's manifest is written."""
    write = checkpoint.write_manifest

    def acting(folder, *, step, **about):
        act(step)
        write(folder, step=step, **about)

    monkeypatch.setattr(checkpoint, "write_manifest", acting)


def sampling(monkeypatch, act):
    """``act(step)`` before the rollouts of a step."""
    rollouts = Trainer.rollouts

    def acting(trainer, questions, step, metrics):
        act(step)
        return rollouts(trainer, questions, step, metrics)

    monkeypatch.setattr(Trainer, "rollouts", acting)


def same(folder, reference):
    assert rows(folder) == rows(reference) and files(folder / "rollouts") == files(reference / "rollouts")
    last = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert (folder / last).read_bytes() == (reference / last).read_bytes()
    assert not list(folder.rglob(".*.tmp"))


def test_the_next_update_happens_while_a_checkpoint_is_written(monkeypatch, undisturbed, cache, tmp_path):
    """The checkpoint holds its own step all the same, and only one is written at a time."""
    moved, waited, writing = threading.Event(), [], []

    def slowly(step):
        assert not writing
        writing.append(step)
        if step == 2:
            waited.append(moved.wait(120))
        writing.remove(step)

    manifests(monkeypatch, slowly)
    sampling(monkeypatch, lambda step: moved.set() if step == 4 else None)
    train(settings(tmp_path, cache, "train.keep_checkpoints=9"), Recorder())
    assert waited == [True]
    same(tmp_path, undisturbed)
    second = tmp_path / "second"
    train(settings(second, cache, "train.steps=2"), Recorder())
    for name in ("model.safetensors", "learner-00000-of-00001.pt"):
        one, other = (folder / "checkpoints/step_000002" / name for folder in (tmp_path, second))
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("bad, kept", [(2, []), (4, [2]), (STEPS, [2, 4])])
def test_a_full_disk_ends_the_run_in_a_line(monkeypatch, undisturbed, cache, tmp_path, bad, kept):
    def full(step):
        if step == bad:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        manifests(patch, full)
        with pytest.raises(
            StorageError, match=rf"step_{bad:06d}: cannot write \(No space left on device\); the disk is"
        ):
            train(settings(tmp_path, cache), Recorder())
    assert list(RunFolder(tmp_path).saved()) == kept and not list(tmp_path.rglob(".*.tmp"))
    train(settings(tmp_path, cache), Recorder())
    same(tmp_path, undisturbed)


def test_an_error_of_the_run_waits_for_the_checkpoint(monkeypatch, undisturbed, cache, tmp_path):
    """The run fails while that of step 2 is written: it is finished, and that of step 3 follows."""
    failed = threading.Event()
    save = checkpoint.Writer.save

    def saving(writer, step, *rest):
        if step == 3:
            failed.set()
        save(writer, step, *rest)

    def outage(step):
        if step == 4:
            raise EngineError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Writer, "save", saving)
        manifests(patch, lambda step: failed.wait(120) if step == 2 else None)
        sampling(patch, outage)
        with pytest.raises(EngineError, match="planted"):
            train(settings(tmp_path, cache), Recorder())
    assert failed.is_set() and list(RunFolder(tmp_path).saved()) == [2, 3]
    train(settings(tmp_path, cache), Recorder())
    same(tmp_path, undisturbed)
