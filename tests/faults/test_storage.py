"""Storage that refuses: one line that names what could not be written and why, nothing half-written, and the same run
goes on once there is room."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from typer.testing import CliRunner

from igpo_fast.cli import app
from igpo_fast.errors import InputError, StorageError
from igpo_fast.files import append, atomic, atomic_folder, check_writable, storage
from igpo_fast.run.checkpoint import open_run, rewind
from tests.test_checkpoint import build, load, save, settings_for, update
from tests.tiny import SETTINGS, WORLD

RECORD = {"text": "x" * 40}


@contextmanager
def file_size_limit(most):
    """Every write that makes a file longer than ``most`` bytes is refused, as by a quota."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def refusing(name, number, at=1):
    """``os.NAME`` fails from its ``at``-th call on."""
    real, calls = getattr(os, name), [0]

    def refuse(*arguments, **options):
        calls[0] += 1
        if calls[0] >= at:
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, refuse)
        yield


def session(folder, last):
    """Train up to step ``last`` from wherever the folder stands, with a checkpoint a step."""
    with open_run(folder, settings_for()) as run:
        learner = build()
        done = load(run, learner)
        run.begin()
        step = done[0] if done else 0
        rewind(run, step)
        while step < last:
            step += 1
            update(learner)
            run.write_rollouts(step, [{"step": step}] * 3)
            run.append_metrics({"step": step, "norm": float(learner.lm.lm_head.weight.norm())})
            save(run, step, learner)


def one_line(error, *parts):
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts), str(error.value)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    session(folder, 3)
    return folder


def assert_same(folder, reference):
    assert not list(folder.rglob(".*.tmp"))
    for part in ("metrics.jsonl", "rollouts/step_000003.jsonl", "checkpoints/step_000003/model.safetensors"):
        assert (folder / part).read_bytes() == (reference / part).read_bytes()


# --- a run ---


@pytest.mark.parametrize("most", [1200, 4000, 9000])
def test_a_run_ends_in_one_line_and_goes_on(tmp_path, undisturbed, most):
    """The configuration, a checkpoint's weights, its state: each is the first that does not fit."""
    folder = tmp_path / "run"
    with file_size_limit(most), pytest.raises(StorageError) as error:
        session(folder, 3)
    one_line(error, str(folder), "cannot write (File too large)", "ulimit -f")
    assert not list(folder.rglob(".*.tmp")) and not list(folder.glob("checkpoints/*"))
    session(folder, 3)
    assert_same(folder, undisturbed)


@pytest.mark.parametrize(
    "name, at", [*(("fsync", at) for at in (1, 6, 7, 8, 12, 20)), *(("replace", at) for at in (1, 2, 3, 4, 5, 10))]
)
def test_refused_anywhere_and_started_again(tmp_path, undisturbed, name, at):
    folder = tmp_path / "run"
    with refusing(name, errno.EIO, at):
        try:
            session(folder, 3)
        except StorageError as error:
            assert "Input/output error" in str(error) and "\n" not in str(error)
        else:
            pytest.fail("nothing was refused")
    session(folder, 3)
    assert_same(folder, undisturbed)


def test_a_run_folder_removed_meanwhile(tmp_path):
    with open_run(tmp_path / "run", settings_for()) as run:
        run.begin()
        learner = build()
        shutil.rmtree(run.path)
        for write in (
            lambda: run.append_metrics({"step": 1}),
            lambda: run.write_rollouts(1, [RECORD]),
            lambda: save(run, 1, learner),
        ):
            with pytest.raises(StorageError) as error:
                write()
            one_line(error, str(run.path), "No such file or directory", "its folder does not exist")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("left", [0, 8192, 24576])
def test_a_full_disk(small_disk, undisturbed, left):
    folder = small_disk / "run"
    session(folder, 1)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other").write_bytes(b"x" * (free - left))
    with pytest.raises(StorageError) as error:
        session(folder, 3)
    one_line(error, str(folder), "(No space left on device); the disk is full: make room, and the same command goes on")
    assert not list(folder.rglob(".*.tmp"))
    (small_disk / "other").unlink()
    session(folder, 3)
    assert_same(folder, undisturbed)


# --- each writer ---


def test_half_a_row_does_not_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append(path, b'{"step":1}\n')
    with file_size_limit(30), pytest.raises(StorageError) as error:
        append(path, b'{"step":2,"text":"' + b"x" * 100 + b'"}\n')
    one_line(error, str(path))
    assert path.read_bytes() == b'{"step":1}\n'


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_without_room(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(
        StorageError, match=r"metrics\.jsonl: cannot write \(No space left on device\); the disk is full"
    ):
        append(tmp_path / "metrics.jsonl", b"x")


@pytest.mark.parametrize(
    "error, wanted",
    [
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), "the disk is full"),
        (Exception("Disk quota exceeded (os error 122)"), "the disk quota is used up"),
        (PermissionError(errno.EACCES, "Permission denied"), "give this user the permission"),
        (OSError(errno.EROFS, "Read-only file system"), "make the file system writable"),
        (OSError(errno.EIO, "Input/output error"), "check the disk; once it works, the same command goes on"),
    ],
)
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, error, wanted):
    """As the libraries put it that write a checkpoint's files."""
    target = tmp_path / "folder"
    with pytest.raises(StorageError) as found, atomic_folder(target) as temporary:
        (temporary / "half").write_text("x")
        raise error
    one_line(found, f"{target}: cannot write (", wanted)
    assert list(tmp_path.iterdir()) == []


def test_torch_save_names_the_refusal_that_it_hides(tmp_path):
    def write():
        with storage(tmp_path), open(tmp_path / "state.pt", "wb") as file:
            torch.save({"a": torch.zeros(5000)}, file)

    with file_size_limit(2000), pytest.raises(StorageError, match="File too large"):
        write()


def test_what_is_no_refusal_stays_what_it_is(tmp_path):
    for error in (
        RuntimeError("CUDA error"),
        InputError("bad row (os error 2)"),
        KeyError("x"),
        OSError("not a config"),
    ):
        with pytest.raises(type(error)) as found, storage(tmp_path):
            raise error
        assert found.value is error


def test_two_processes_do_not_write_one_file(tmp_path):
    target = tmp_path / "out.jsonl"
    with atomic(target) as first:
        first.write(b"first")
        with pytest.raises(InputError, match=r"out\.jsonl: another process is writing it"), atomic(target) as second:
            second.write(b"second")
    assert target.read_bytes() == b"first" and list(tmp_path.iterdir()) == [target]


def test_a_file_that_a_killed_process_left_half_written_is_begun_anew(tmp_path):
    (tmp_path / ".out.tmp").write_bytes(b"half of something longer")
    with atomic(tmp_path / "out") as file:
        file.write(b"whole")
    assert (tmp_path / "out").read_bytes() == b"whole"


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    (tmp_path / ".out.tmp").symlink_to(tmp_path / "thesis.tex")
    with pytest.raises(StorageError), atomic(tmp_path / "out") as file:
        file.write(b"y")
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="move it"):
        check_writable(tmp_path / "file")


# --- the command ---


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [*SETTINGS, *WORLD, "run.dir=run", "run.cache=cache", "sft.clean_steps=0", "train.steps=1"]
    (tmp_path / "cache").write_text("x")
    warm = CliRunner().invoke(app, ["train", *options, "sft.clean_steps=1"])
    assert (warm.exit_code, warm.stdout) == (2, "") and warm.stderr.splitlines()[-1].startswith("error: cache: cannot")
    with file_size_limit(40000):
        ended = CliRunner().invoke(app, ["train", *options])
    assert ended.exit_code == 2, ended.output
    line = ended.stderr.splitlines()[-1]
    assert line.startswith("error: run/checkpoints/step_000001: cannot write (File too large);")
    assert CliRunner().invoke(app, ["train", *options]).exit_code == 0
    assert [json.loads(row)["step"] for row in Path("run/metrics.jsonl").read_text().splitlines()] == [0, 1]
