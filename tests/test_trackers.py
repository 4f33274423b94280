"""run/trackers.py: each tracker really, across two sessions, where its package is installed; and what happens when one
fails."""

import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from igpo_fast import config
from igpo_fast.errors import InputError
from igpo_fast.run import trackers
from igpo_fast.run.trackers import TRACKERS, Trackers
from igpo_fast.train import train
from tests.tiny import STEPS, Recorder, rows, settings

SETTINGS = {"run": {"dir": "x"}, "train": {"steps": 4}}


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def refuse(text):
    raise AssertionError(text)


def test_tensorboard_gets_the_numbers_and_a_resume_hides_what_it_repeats(tmp_path):
    with Trackers(["tensorboard"], tmp_path, 0, SETTINGS, refuse) as opened:
        for step in (1, 2, 3):
            opened.log({"step": step, "reward/f1": step / 4, "loss/kl": None, "loss/policy": math.nan})
    with Trackers(["tensorboard"], tmp_path, 1, SETTINGS, refuse) as opened:
        opened.log({"step": 2, "reward/f1": 0.75})
    assert scalars(tmp_path) == {"reward/f1": [(1, 0.25), (2, 0.75)]}


def test_without_trackers_nothing_is_written(tmp_path):
    with Trackers([], tmp_path, 0, SETTINGS, refuse) as opened:
        opened.log({"step": 1, "reward/f1": 0.5})
    assert list(tmp_path.iterdir()) == []


# --- trackers of other packages, in processes of their own ---

CODE = """
import json, sys
from pathlib import Path
from igpo_fast.run.trackers import Trackers
name, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
said = []
with Trackers([name], folder, first - 1, {"run": {"dir": "x"}, "train": {"steps": 4}}, said.append) as opened:
    for step in range(first, last + 1):
        opened.log({"step": step, "reward/f1": step / 4, "loss/kl": None})
        BETWEEN
print("SAID", json.dumps(said))
"""


def session(name, folder, first, last, between="", **environment):
    """Steps ``first`` to ``last`` of a run, in a process; its warnings."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO", "MLFLOW"))}
    code = CODE.replace("BETWEEN", between)
    command = [sys.executable, "-W", "ignore", "-c", code, name, str(folder), str(first), str(last)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(re.search(r"SAID (.*)", done.stdout)[1])


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    return folder


def test_wandb_stays_offline_and_keeps_its_run(run):
    pytest.importorskip("wandb")
    assert session("wandb", run, 1, 2) + session("wandb", run, 3, 4) == []
    identity = (run / "tracker_id").read_text()
    sessions = sorted((run / "wandb").glob("offline-run-*"))
    assert len(sessions) == 2 and all(folder.name.endswith(f"-{identity}") for folder in sessions)
    stored = [(folder / f"run-{identity}.wandb").read_bytes() for folder in sessions]
    assert all(b"reward/f1" in part and b"loss/kl" not in part for part in stored)
    assert all(b"igpo-fast" in part and b"a run" in part for part in stored)


def test_wandbs_own_variables_count(run):
    pytest.importorskip("wandb")
    assert session("wandb", run, 1, 1, WANDB_MODE="disabled") == []
    assert not list(run.glob("wandb/offline-run-*"))


KILL = """
        if step == first:
            import os, signal, subprocess
            shown = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
            for line in shown.splitlines():
                pid, parent, *_ = line.split()
                if "wandb-core" in line and parent == str(os.getpid()):
                    os.kill(int(pid), signal.SIGKILL)
                    said.append("killed")
"""


def test_a_kill_of_wandbs_process_costs_nothing(run):
    pytest.importorskip("wandb")
    killed, *said = session("wandb", run, 1, 4, KILL)
    assert killed == "killed" and len(said) == 1 and "run.tracker=wandb failed (" in said[0]


def test_trackio_stays_on_this_machine_and_keeps_its_run(run):
    pytest.importorskip("trackio")
    assert session("trackio", run, 1, 2) + session("trackio", run, 3, 4) == []
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
        "print(json.dumps({r: S.get_logs('igpo-fast', r) for r in S.get_runs('igpo-fast')}))"
    )
    environment = os.environ | {"TRACKIO_DIR": str(run / "trackio")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    [(name, logs)] = json.loads(done.stdout.splitlines()[-1]).items()
    assert name == f"a run-{(run / 'tracker_id').read_text()}"
    assert [(log["step"], log["reward/f1"]) for log in logs] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert not any("loss/kl" in log for log in logs)


def mlflow_runs(folder):
    mlflow = pytest.importorskip("mlflow")
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("igpo-fast").experiment_id
    return client, client.search_runs([experiment])


def test_mlflow_keeps_its_run_in_a_database_of_the_folder(run):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    assert session("mlflow", run, 1, 2) + session("mlflow", run, 3, 4) == []
    client, [found] = mlflow_runs(run)
    history = client.get_metric_history(found.info.run_id, "reward/f1")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)]
    assert found.data.params == {"run.dir": "x", "train.steps": "4"} and set(found.data.metrics) == {"reward/f1"}
    assert (found.info.run_name, found.info.status) == ("a run", "FINISHED")


def test_mlflows_own_variables_count(run, tmp_path):
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    assert session("mlflow", run, 1, 1, MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/mlflow.db") == []
    assert len(mlflow_runs(tmp_path)[1]) == 1 and not (run / "mlflow.db").exists()


def test_an_mlflow_server_that_is_down_is_left_out(run):
    pytest.importorskip("mlflow")
    [said] = session("mlflow", run, 1, 2, MLFLOW_TRACKING_URI="http://127.0.0.1:9")
    assert said.startswith("run.tracker=mlflow failed (MlflowException: API request to http://127.0.0.1:9")


# --- faults ---


class Faulty:
    """Raises in one of its methods."""

    fails = ""

    def __init__(self, folder, step, settings):
        self.seen = []
        self._fail("open")

    def log(self, step, numbers):
        if step == 2:
            self._fail("log")
        self.seen.append((step, numbers))

    def close(self):
        self._fail("close")

    def _fail(self, where):
        calls[where] += 1
        if where == self.fails:
            raise ConnectionError(f"lost\nin {where}")


calls = Counter()


@pytest.mark.parametrize(("fails", "told"), [("open", (1, 0, 0)), ("log", (1, 1, 0)), ("close", (1, 1, 1))])
def test_a_tracker_that_raises_is_named_once_and_left_out(tmp_path, monkeypatch, fails, told):
    calls.clear()
    monkeypatch.setattr(Faulty, "fails", fails)
    monkeypatch.setitem(TRACKERS, "wandb", Faulty)
    said = []
    with Trackers(["wandb", "tensorboard"], tmp_path, 0, SETTINGS, said.append) as opened:
        for step in (1, 2, 3):
            opened.log({"step": step, "reward/f1": step / 4})
    assert len(said) == 1 and len(said[0].splitlines()) == 1
    assert f"run.tracker=wandb failed (ConnectionError: lost in {fails})" in said[0]
    assert (calls["open"], calls["log"], calls["close"]) == told
    assert scalars(tmp_path) == {"reward/f1": [(1, 0.25), (2, 0.5), (3, 0.75)]}


def test_a_folder_that_cannot_be_written_costs_the_tracker_alone(tmp_path):
    (tmp_path / "tensorboard").write_text("x")
    said = []
    with Trackers(["tensorboard"], tmp_path, 0, SETTINGS, said.append) as opened:
        opened.log({"step": 1, "loss/policy": 0.5})
    assert len(said) == 1 and said[0].startswith("run.tracker=tensorboard failed (FileExistsError: ")


def test_an_interrupt_is_no_failure_of_a_tracker(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Faulty, "log", interrupted)
    monkeypatch.setitem(TRACKERS, "wandb", Faulty)
    with pytest.raises(KeyboardInterrupt), Trackers(["wandb"], tmp_path, 0, SETTINGS, refuse) as opened:
        opened.log({"step": 1})


def test_a_run_goes_on_without_a_tracker_that_fails(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(Faulty, "fails", "log")
    monkeypatch.setitem(TRACKERS, "wandb", Faulty)
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    display = Recorder()
    train(settings(tmp_path / "run", cache, "run.tracker=[tensorboard, wandb]"), display)
    f1 = [(row["step"], pytest.approx(row["eval/f1"])) for row in rows(tmp_path / "run") if "eval/f1" in row]
    assert len(rows(tmp_path / "run")) == STEPS + 1
    assert scalars(tmp_path / "run")["eval/f1"] == f1
    assert len(re.findall(r"run\.tracker=\w+ failed", display.text)) == 1


def test_a_missing_package_is_refused_before_anything_is_made(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "trackio" else name)
    with pytest.raises(InputError, match=r"run\.tracker=trackio: .* pip install 'igpo-fast\[trackers\]'") as error:
        train(settings(tmp_path / "run", cache, "run.tracker=[tensorboard, trackio]"), Recorder())
    assert len(str(error.value).splitlines()) == 1 and not Path(tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("tensorboard", ("tensorboard",)), ("none", ()), ("", ()), ("[]", ()), ("null", ()),
        ("[tensorboard, wandb]", ("tensorboard", "wandb")), ("trackio, mlflow", ("trackio", "mlflow")),
    ],
)  # fmt: skip
def test_how_trackers_are_written(written, expected):
    assert config.load(None, [f"run.tracker={written}"]).run.tracker == expected


@pytest.mark.parametrize("written", ["tensorbord", "[tensorboard, none]", "[[wandb]]", "3"])
def test_other_trackers_are_refused(written):
    with pytest.raises(InputError, match=r"command line: run\.tracker: "):
        config.load(None, [f"run.tracker={written}"])
