"""Trackers that get a run's rows beside metrics.jsonl: one class each, behind one protocol.

They keep what they get in the run folder, unless the user's own environment says otherwise. None of them can cost a
step: the first error of one is told in a warning, and that tracker is left out for the rest of the session.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, Protocol

from igpo_fast.errors import InputError, reason_of
from igpo_fast.files import atomic
from igpo_fast.jsonl import finite

PROJECT = "igpo-fast"
"""Name of the project (wandb, trackio) or experiment (mlflow) that runs belong to."""


class Tracker(Protocol):
    """What a tracker owes. It is made with (run folder, last finished step, settings), continues the run of an earlier
    session, and may raise anything."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in ``tensorboard/``; entries of an earlier session after ``step`` are hidden."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for key, number in numbers.items():
            self._writer.add_scalar(key, number, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """Weights & Biases: offline, in ``wandb/``, unless WANDB_MODE is set."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        with _defaults(
            WANDB_MODE="offline", WANDB_PROJECT=PROJECT, WANDB_DIR=str(folder), WANDB_NAME=folder.resolve().name,
            WANDB_RUN_ID=_identity(folder), WANDB_RESUME="allow", WANDB_ERROR_REPORTING="false",
        ):  # fmt: skip
            import wandb

            # It must not take the streams that the display writes to.
            self._run = wandb.init(config=dict(settings), settings=wandb.Settings(silent=True, console="off"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """trackio: on this machine, in ``trackio/``, unless TRACKIO_DIR, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL is set."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        own = folder.resolve() / "trackio"
        with _defaults(TRACKIO_DIR=str(own)) as missing:
            import trackio
            from trackio.utils import TRACKIO_DIR  # read once, at the first import in a process
        if missing and own != Path(TRACKIO_DIR):
            raise RuntimeError(f"this process has used trackio in {TRACKIO_DIR} before; set TRACKIO_DIR for both")
        name = f"{folder.resolve().name}-{_identity(folder)}"  # a run of the same name is the same run
        with redirect_stdout(StringIO()):
            self._run = trackio.init(
                project=PROJECT, name=name, resume="allow", config=dict(settings), embed=False, auto_log_gpu=False,
                auto_log_cpu=False,
            )  # fmt: skip
        self._finish = trackio.finish  # the run's own would be repeated, loudly, at the process's end

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        with redirect_stdout(StringIO()):
            self._finish()


class Mlflow:
    """MLflow: a database in ``mlflow.db``, unless MLFLOW_TRACKING_URI is set."""

    _MOST = 100
    """Parameters that one call takes."""
    _BRIEF: ClassVar = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    """What a server that is down may cost: mlflow itself would try for minutes."""

    def __init__(self, folder: Path, step: int, settings: Mapping[str, Any]):
        with _defaults(
            MLFLOW_TRACKING_URI=f"sqlite:///{folder.resolve()}/mlflow.db", MLFLOW_EXPERIMENT_NAME=PROJECT,
            MLFLOW_DISABLE_TELEMETRY="true", **self._BRIEF,
        ):  # fmt: skip
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            logging.getLogger("alembic").setLevel(logging.WARNING)
            self._client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
            self._metric, self._param = Metric, Param
            named = os.environ["MLFLOW_EXPERIMENT_NAME"]
            found = self._client.get_experiment_by_name(named)
            experiment = found.experiment_id if found else self._client.create_experiment(named)
            self._run = self._continued(experiment, folder, settings)

    def _continued(self, experiment: str, folder: Path, settings: Mapping[str, Any]) -> str:
        """The id of the run of earlier sessions, or a new one's."""
        identity = _identity(folder)
        known = self._client.search_runs([experiment], f"tags.`{PROJECT}.run` = '{identity}'")
        if known:
            self._client.update_run(known[0].info.run_id, status="RUNNING")
            return known[0].info.run_id
        made = self._client.create_run(experiment, run_name=folder.resolve().name, tags={f"{PROJECT}.run": identity})
        params = [self._param(f"{s}.{key}", str(v)) for s, keys in settings.items() for key, v in keys.items()]
        for start in range(0, len(params), self._MOST):
            self._client.log_batch(made.info.run_id, params=params[start : start + self._MOST])
        return made.info.run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(key, number, now, step) for key, number in numbers.items()]
        with _defaults(**self._BRIEF):
            self._client.log_batch(self._run, metrics)

    def close(self) -> None:
        with _defaults(**self._BRIEF):
            self._client.set_terminated(self._run)


TRACKERS: dict[str, Callable[[Path, int, Mapping[str, Any]], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow,
}  # fmt: skip
"""Trackers by the name in ``run.tracker``, which is also that of the package."""


class Trackers:
    """The trackers of a session, as a context that closes them.

    Args:
        names: keys of ``TRACKERS``.
        folder: the run's.
        step: the last finished step.
        settings: the run's configuration, for trackers that show it: section -> key -> value.
        warn: shows a line.
    """

    def __init__(
        self, names: Sequence[str], folder: Path, step: int, settings: Mapping[str, Any], warn: Callable[[str], None]
    ):
        self._warn, self._open = warn, {}
        for name in dict.fromkeys(names):
            with self._spared(name):
                self._open[name] = TRACKERS[name](folder, step, settings)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *exception) -> None:
        for name, tracker in list(self._open.items()):
            with self._spared(name):
                tracker.close()

    def log(self, row: Mapping[str, float]) -> None:
        """Send a row of metrics.jsonl; numbers that are missing or not finite are left out."""
        numbers = {key: float(value) for key, value in row.items() if key != "step" and finite(value) is not None}
        for name, tracker in list(self._open.items()):
            with self._spared(name):
                tracker.log(int(row["step"]), numbers)

    @contextmanager
    def _spared(self, name: str) -> Iterator[None]:
        """Whatever a tracker raises leaves it out: it is other people's code, and its rows are in metrics.jsonl."""
        try:
            yield
        except Exception as error:
            self._open.pop(name, None)
            self._warn(
                f"run.tracker={name} failed ({type(error).__name__}: {reason_of(error)}) and gets nothing more in this "
                "session; metrics.jsonl has every row"
            )


def check_installed(names: Sequence[str]) -> None:
    """Raises InputError if the package of a tracker is missing."""
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"run.tracker={name}: the package {name} is not installed; pip install 'igpo-fast[trackers]', or leave "
                f"{name} out"
            )


def _identity(folder: Path) -> str:
    """The run's name of its own, by which trackers find it again: kept in ``tracker_id``, 8 hexadecimal digits."""
    path = folder / "tracker_id"
    if not path.exists():
        with atomic(path) as file:
            file.write(uuid.uuid4().hex[:8].encode())
    return path.read_text().strip()


@contextmanager
def _defaults(**values: str) -> Iterator[list[str]]:
    """Variables of the environment inside the block, where the user has set none; yields the names of these."""
    missing = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in missing})
    try:
        yield missing
    finally:
        for name in missing:
            os.environ.pop(name, None)
