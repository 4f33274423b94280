"""An outage anywhere in a step: what was trained is kept, and going on repeats the run in which there was none."""

from __future__ import annotations

import pytest

from igpo_fast.checkpoint import RunFolder
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import EngineError, InputError
from igpo_fast.train import train
from tests.tiny import STEPS, Recorder, files, rows, settings

OPTIONS = ("train.checkpoint_every=100",)
GONE = EngineError("rollout.server: no replica answers")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "warm-start"


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
    assert len(files(tmp_path / "rollouts")) == kept
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
