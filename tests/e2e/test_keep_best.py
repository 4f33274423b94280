"""train.keep_best: an evaluation better than every checkpoint's saves its step, and that checkpoint stays."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from igpo_fast import cli
from igpo_fast.errors import EngineError, InputError
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.train import Trainer, train
from igpo_fast.types import Evaluation
from tests.tiny import Recorder, settings

F1 = [0.9, 0.2, 0.5, 0.4, 0.5, 0.6, 0.1]
"""After step 0, 1, ...; step 0 has no checkpoint."""
OPTIONS = ("eval.every=1", "train.checkpoint_every=100", "train.keep_checkpoints=1")


@pytest.fixture
def planned(monkeypatch):
    """Evaluations give ``F1``; returns the checkpoints that were there at each."""
    real, seen = Trainer.evaluate, []

    def evaluate(trainer):
        found = real(trainer)
        seen.append(list(RunFolder(trainer.config.run.dir).saved()))
        return Evaluation(found.metrics | {"eval/f1": F1[trainer.learner._number]}, found.rollouts)

    monkeypatch.setattr(Trainer, "evaluate", evaluate)
    return seen


def test_the_best_so_far_is_kept(planned, cache, tmp_path):
    train(settings(tmp_path, cache, *OPTIONS, "train.keep_best=eval/f1"), Recorder())
    assert planned == [[], [], [1], [2], [2], [2], [5]]
    assert list(RunFolder(tmp_path).saved()) == [5, 6]
    for command in (["eval", str(tmp_path), "--json"], ["export", str(tmp_path), str(tmp_path / "out")]):
        done = CliRunner().invoke(cli.app, [*command, "--checkpoint", "best"])
        assert done.exit_code == 0 and "step_000005" in done.output, done.output
    done = CliRunner().invoke(cli.app, ["eval", str(tmp_path), "--json"])
    assert json.loads(done.output.splitlines()[-1])["model"].endswith("step_000006")


def test_it_survives_a_session(monkeypatch, planned, cache, tmp_path):
    """Switched on in the second session: what the first one saved competes, a better one that was not kept does not."""
    with monkeypatch.context() as patch:
        rollouts = Trainer.rollouts

        def failing(trainer, questions, step, metrics):
            if step == 4:
                raise EngineError("planted")
            return rollouts(trainer, questions, step, metrics)

        patch.setattr(Trainer, "rollouts", failing)
        with pytest.raises(EngineError):
            train(settings(tmp_path, cache, *OPTIONS), Recorder())
    assert list(RunFolder(tmp_path).saved()) == [3]
    train(settings(tmp_path, cache, *OPTIONS, "train.keep_best=eval/f1"), Recorder())
    assert planned[-3:] == [[3], [4], [5]]
    assert list(RunFolder(tmp_path).saved()) == [5, 6]


def test_a_number_that_no_evaluation_has_is_refused_before_training(cache, tmp_path):
    with pytest.raises(InputError, match=r"^train.keep_best=eval/f2: .* no such number; give one of eval/f1, "):
        train(settings(tmp_path, cache, "train.keep_best=eval/f2"), Recorder())
    assert RunFolder(tmp_path).read_metrics() == []
