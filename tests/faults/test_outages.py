"""Whatever is raised anywhere in a step: finished steps are kept, and going on repeats the undisturbed run."""

from __future__ import annotations

import shutil

import pytest
import torch

from igpo_fast import sft
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import DivergedError, EngineError, InputError, RunError, StorageError
from igpo_fast.run.checkpoint import RunFolder, Writer
from igpo_fast.train import train
from igpo_fast.update.learner import Learner
from igpo_fast.update.update import Updater
from tests.tiny import STEPS, Recorder, files, rows, settings

OPTIONS = ("train.checkpoint_every=100",)
GONE = EngineError("rollout.server: no replica answers")


@pytest.fixture(scope="module")
def undisturbed(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(settings(folder, cache, *OPTIONS), Recorder())
    return folder


def session(monkeypatch, folder, cache, where=None, version=None, error=GONE):
    """Train to the end, or to an outage at this version of the engine's weights: 1 at the start, k + 1 after step k."""
    load_weights, generate = TorchEngine.load_weights, TorchEngine.generate

    def failing_load(engine, pairs):
        if (where, version) == ("sync", engine.version):
            raise error
        load_weights(engine, pairs)

    async def failing_generate(engine, request):
        if (where, version) == ("evaluation" if request.key[1] == -1 else "rollouts", engine.version):
            raise error
        return await generate(engine, request)

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "load_weights", failing_load)
        patch.setattr(TorchEngine, "generate", failing_generate)
        train(settings(folder, cache, *OPTIONS), Recorder())


def same(folder, reference):
    assert [list(row.items()) for row in rows(folder)] == [list(row.items()) for row in rows(reference)]
    assert files(folder / "rollouts") == files(reference / "rollouts")
    assert not (folder / "discarded").exists()
    last = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert (folder / last).read_bytes() == (reference / last).read_bytes()


@pytest.mark.parametrize(
    ("where", "version", "kept"),
    [("rollouts", 3, 2), ("sync", 3, 3), ("sync", 4, 4), ("evaluation", 5, 4), ("evaluation", STEPS + 1, STEPS)],
)
def test_finished_steps_are_kept(monkeypatch, undisturbed, cache, tmp_path, where, version, kept):
    with pytest.raises(EngineError, match="no replica answers"):
        session(monkeypatch, tmp_path, cache, where, version)
    assert list(RunFolder(tmp_path).saved()) == [kept]
    assert len(list((tmp_path / "rollouts").glob("step_*"))) == kept
    session(monkeypatch, tmp_path, cache)
    same(tmp_path, undisturbed)


def test_an_outage_that_lasts(monkeypatch, undisturbed, cache, tmp_path):
    """In the evaluation of step 4, then at the start of the next session twice; the row is written once."""
    for where, version in (("evaluation", 5), ("sync", 0), ("evaluation", 1)):
        with pytest.raises(EngineError):
            session(monkeypatch, tmp_path, cache, where, version)
        assert list(RunFolder(tmp_path).saved()) == [4]
        assert [row["step"] for row in rows(tmp_path)] == [0, 1, 2, 3]
    session(monkeypatch, tmp_path, cache)
    same(tmp_path, undisturbed)


def test_a_request_that_is_refused(monkeypatch, undisturbed, cache, tmp_path):
    """What is not an outage ends the run in a line, too, and costs no finished step."""
    with pytest.raises(InputError, match="status 422"):
        session(monkeypatch, tmp_path, cache, "rollouts", 4, InputError("http://host:8000: refused (status 422)"))
    assert list(RunFolder(tmp_path).saved()) == [3]
    session(monkeypatch, tmp_path, cache)
    same(tmp_path, undisturbed)


FAULTS = [
    DivergedError("sampling: the model's logits are not finite"),
    RuntimeError("a fault of somebody else's code"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more lines"),
]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("where", ["sampling", "scoring", "optimiser"])
def test_whatever_raises_costs_no_finished_step(monkeypatch, undisturbed, cache, tmp_path, where, error):
    """In step 4, before and after what changes: the optimiser's step."""
    calls = []

    def at_step_4(owner, name):
        real = getattr(owner, name)

        def failing(*arguments, **more):
            calls.append(name)
            # Once per step: one pack, one update. A lack of memory is met by another attempt, which fails, too.
            if len(calls) == 4 or (len(calls) == 5 and isinstance(error, torch.OutOfMemoryError)):
                raise error
            return real(*arguments, **more)

        return owner, name, failing

    places = {"scoring": (Updater, "_step"), "optimiser": (Learner, "backward")}
    with pytest.raises(Exception) as caught, monkeypatch.context() as patch:
        if where == "sampling":
            session(monkeypatch, tmp_path, cache, "rollouts", 4, error)
        patch.setattr(*at_step_4(*places[where]))
        train(settings(tmp_path, cache, *OPTIONS), Recorder())
    memory = isinstance(error, torch.OutOfMemoryError)
    assert type(caught.value) is (RunError if memory else type(error))
    assert "\n" not in str(caught.value)
    if memory:
        assert "step 4: out of memory" in str(caught.value) and "train.token_budget" in str(caught.value)
    assert list(RunFolder(tmp_path).saved()) == [3]
    session(monkeypatch, tmp_path, cache)
    same(tmp_path, undisturbed)


def test_a_mismatch_that_stops_the_run(monkeypatch, cache, tmp_path):
    """From step 3 the engine is off by 0.3: steps 1 and 2 are kept, and who allows the mismatch goes on from there."""
    sample = TorchEngine._sample

    def shifted(engine, *arguments):
        tokens, logp = sample(engine, *arguments)
        return tokens, logp - 0.3 * (engine.version == 3)

    for passes in ("algorithm.passes=one", "train.updates=2"):
        folder = tmp_path / passes
        with monkeypatch.context() as patch:
            patch.setattr(TorchEngine, "_sample", shifted)
            with pytest.raises(DivergedError, match=r"^step 3: .* by 0.3 on average, more than rollout.mismatch_stop"):
                train(settings(folder, cache, *OPTIONS, passes, "rollout.mismatch_stop=0.2"), Recorder())
        assert list(RunFolder(folder).saved()) == [2]
        assert [row["step"] for row in rows(folder)] == [0, 1, 2]
        assert {f"step_{i:06d}.jsonl" for i in (1, 2)} <= set(files(folder / "rollouts")) - {"step_000003.jsonl"}
        run = train(settings(folder, cache, *OPTIONS, passes), Recorder())
        assert [row["step"] for row in rows(folder)] == list(range(STEPS + 1)) and STEPS in run.saved()


def test_between_two_updates_of_a_step_the_run_goes_back_to_its_last_checkpoint(monkeypatch, cache, tmp_path):
    """Half of step 4's updates is no step: its weights are nobody's, and are not saved."""
    options = ("train.updates=2", "train.checkpoint_every=2")
    step, calls = Learner.step, []

    def failing(learner, *arguments, **more):
        calls.append(learner)
        if len(calls) == 8:
            raise RuntimeError("between two updates")
        return step(learner, *arguments, **more)

    reference = tmp_path / "undisturbed"
    train(settings(reference, cache, *options), Recorder())
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", failing)
        with pytest.raises(RuntimeError, match="between two updates"):
            train(settings(tmp_path / "run", cache, *options), Recorder())
    assert list(RunFolder(tmp_path / "run").saved()) == [2]
    train(settings(tmp_path / "run", cache, *options), Recorder())
    assert rows(tmp_path / "run") == rows(reference)
    last = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert (tmp_path / "run" / last).read_bytes() == (reference / last).read_bytes()


def test_a_refusal_while_saving_is_what_the_user_is_told(monkeypatch, undisturbed, cache, tmp_path):
    """The disk is full when step 3 of the rollouts fails: the refusal ends the run, and carries what it hid."""
    refused = StorageError("checkpoints: cannot write (No space left on device); make room")

    def refusing(*arguments):
        raise refused

    monkeypatch.setattr(Writer, "save", refusing)
    with pytest.raises(StorageError) as caught:
        session(monkeypatch, tmp_path, cache, "rollouts", 3)
    assert caught.value is refused and caught.value.__context__ is GONE
    assert list(RunFolder(tmp_path).saved()) == [] and [row["step"] for row in rows(tmp_path)] == [0, 1, 2]
    monkeypatch.undo()
    train(settings(tmp_path, cache, *OPTIONS), Recorder())
    assert rows(tmp_path) == rows(undisturbed)
    assert sorted(p.name for p in (tmp_path / "discarded/1/rollouts").iterdir()) == [
        "eval_000002.jsonl", "step_000001.jsonl", "step_000002.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)], ids=lambda error: type(error).__name__)
def test_who_ends_the_process_waits_for_no_checkpoint(monkeypatch, cache, tmp_path, error):
    with pytest.raises(type(error)):
        session(monkeypatch, tmp_path, cache, "sync", 3, error)
    assert list(RunFolder(tmp_path).saved()) == []
    assert sorted(p.name for p in (tmp_path / "rollouts").glob("step_*"))[-1] == "step_000003.jsonl"


@pytest.mark.parametrize("kl, trained", [("0", 0), ("0.001", 1)])
def test_a_resume_trains_the_warm_start_again_only_for_a_reference(monkeypatch, cache, tmp_path, kl, trained):
    """The cache is gone when the run goes on: without a KL term its checkpoint is all that is needed."""
    options = (*OPTIONS, f"algorithm.kl={kl}", "sft.clean_steps=3")
    reference, folder = tmp_path / "undisturbed", tmp_path / "run"
    train(settings(reference, tmp_path / "cache", *options, "train.steps=4"), Recorder())
    train(settings(folder, tmp_path / "cache", *options, "train.steps=2"), Recorder())
    shutil.rmtree(tmp_path / "cache")
    calls, real = [], sft.train
    monkeypatch.setattr(sft, "train", lambda *arguments: (calls.append(1), real(*arguments)))
    train(settings(folder, tmp_path / "cache", *options, "train.steps=4"), Recorder())
    assert len(calls) == trained
    assert [row["step"] for row in rows(folder)] == [0, 1, 2, 3, 4]
    last = "checkpoints/step_000004/model.safetensors"
    assert (folder / last).read_bytes() == (reference / last).read_bytes()


def test_a_row_that_cannot_be_written_costs_no_step(monkeypatch, undisturbed, cache, tmp_path):
    """The rollouts of step 3 are on disk, its row is refused: the checkpoint carries it."""
    append = RunFolder.append_metrics

    def refusing(run, row):
        if row["step"] == 3:
            raise StorageError("metrics.jsonl: cannot write (no space)")
        append(run, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", refusing)
        with pytest.raises(StorageError, match="no space"):
            train(settings(tmp_path, cache, *OPTIONS), Recorder())
    assert list(RunFolder(tmp_path).saved()) == [3]
    session(monkeypatch, tmp_path, cache)
    same(tmp_path, undisturbed)
