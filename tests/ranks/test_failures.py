"""A rank that dies, fails, or falls silent ends the run in one line, and the same command goes on; signals stop all
ranks as they stop one process. Most go on in one process, which starts sooner."""

from __future__ import annotations

import signal

import pytest

from tests.ranks.launch import start
from tests.ranks.runs import arguments, command, same, train
from tests.tiny import rows

pytest.importorskip("deepspeed")
EVERY = "train.checkpoint_every=1"


def faulty(folder, cache, rank, fault, step, *more):
    words = [str(rank), fault, str(step), *arguments(folder, cache, *more), "--nproc", "2"]
    return command(*words, module="tests.ranks.faulty")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("rank, fault", [(1, "stop"), slow(0, "stop"), slow(1, "lock_update"), slow(0, "stop_update")])
def test_a_rank_that_falls_silent_ends_the_run_with_its_number(tmp_path, cache, alone, rank, fault):
    """The other one samples on, or waits for it in an exchange, for ever. Rank 0 takes the store with it."""
    folder = tmp_path / "run"
    done = faulty(folder, cache, rank, fault, 3, EVERY)
    assert done.returncode == 2, done.stderr
    assert f"error: rank {rank}: no sign of life for 5 s (stopped, or stuck outside Python)" in done.stderr
    assert rank == 0 or f"the end of {folder}/logs/rank_1.log: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["step"] for row in rows(folder)] == [0, 1, 2]
    train(folder, cache, EVERY)
    same(folder, alone())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_run_with_its_number(tmp_path, cache, alone, rank):
    folder = tmp_path / "run"
    done = faulty(folder, cache, rank, "kill_update", 3, EVERY)
    assert done.returncode == 2 and "internal" not in done.stderr and "Traceback" not in done.stderr
    assert f"error: rank {rank} ended with SIGKILL" in done.stderr
    if rank:
        assert "error: rank 0: another rank has died; its log says why" in done.stderr
        assert f"; the end of {folder}/logs/rank_1.log: " in done.stderr
    train(folder, cache, EVERY)
    same(folder, alone())


@pytest.mark.slow
def test_an_error_of_one_rank_while_sampling_is_one_line_and_costs_no_finished_step(tmp_path, cache, alone):
    folder, every = tmp_path / "run", "train.checkpoint_every=6"
    done = faulty(folder, cache, 1, "error", 4, every)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: rank 1: planted" and "Traceback" not in done.stderr
    assert "error: planted" in (folder / "logs/rank_1.log").read_text()
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3] and (folder / "checkpoints/step_000003").is_dir()
    train(folder, cache, every)
    same(folder, alone())


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_one_rank_in_an_update_is_one_line_of_its_own(tmp_path, cache, alone, rank):
    """The others are in a collective, which breaks off; they say what broke it."""
    folder = tmp_path / "run"
    done = faulty(folder, cache, rank, "bug_update", 4, EVERY)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    if rank:
        assert done.returncode == 2 and errors == ["error: rank 1: RuntimeError: planted"], done.stderr
    else:
        assert done.returncode == 1 and len(errors) == 1, done.stderr
        assert errors[0].startswith("error: internal: RuntimeError: planted")
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3]
    train(folder, cache, EVERY)
    same(folder, alone())


SIGNALS = [slow(1, "term"), slow(0, "int"), (0, "launcher_term"), slow(1, "launcher_int")]


@pytest.mark.parametrize("rank, fault", SIGNALS)
def test_a_signal_ends_the_step_and_saves_it(tmp_path, cache, alone, rank, fault):
    """To one rank, or to the launcher."""
    folder = tmp_path / "run"
    done = faulty(folder, cache, rank, fault, 3, "train.checkpoint_every=6")
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("interrupted: stopped after step 3, which ")
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3] and (folder / "checkpoints/step_000003").is_dir()
    train(folder, cache, "train.checkpoint_every=6")
    same(folder, alone())
    assert not (folder / "discarded").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_cannot_write_its_part_of_a_checkpoint_ends_the_run(tmp_path, cache, rank):
    done = faulty(tmp_path / "run", cache, rank, "disk", 0, "train.checkpoint_every=3")
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: rank 1: " if rank else "error: ") and "No space left on device" in last, done.stderr
    assert [row["step"] for row in rows(tmp_path / "run")][:4] == [0, 1, 2, 3]
    assert not list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.slow
def test_ranks_whose_launcher_is_killed_save_their_step_and_end(tmp_path, cache, alone):
    folder = tmp_path / "run"
    more = ("train.checkpoint_every=100", "train.steps=1000")
    done = faulty(folder, cache, 1, "launcher_kill", 2, *more)  # ends when the ranks have closed what they print to
    assert done.returncode == -signal.SIGKILL
    assert "interrupted: stopped after step" in done.stderr
    last = [row["step"] for row in rows(folder)][-1]
    assert (folder / f"checkpoints/step_{last:06d}").is_dir()


@pytest.mark.slow
def test_ranks_without_a_launcher_end_by_themselves(tmp_path, cache):
    """As on several hosts: who is left in a collective fails at once."""
    folder = tmp_path / "run"
    started = start(["-m", "tests.ranks.faulty", "1", "kill_update", "3", *arguments(folder, cache, EVERY)], 2)
    printed = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [2, -signal.SIGKILL], printed
    assert "error: rank 0: another rank has died; its log says why" in printed[0]
