"""The run folder: what a run writes, so that a process killed at any instant can go on.

    config.yaml                 the resolved configuration
    metrics.jsonl               one object a step
    rollouts/step_000007.jsonl  one object a rollout
    checkpoints/step_000020/    weights that ``from_pretrained`` loads, tokenizer, state.pt, manifest.json
    discarded/1/                what a killed session wrote after its last checkpoint

``step`` is the 1-based number of the finished step; row 0 may hold an evaluation before training. The
rollouts and the row of step k are written before the checkpoint of step k: what it builds on is on disk.
Files appear under their names whole (files.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

import torch

from igpo_fast.config import Config, load
from igpo_fast.errors import InputError
from igpo_fast.files import atomic, sync, temporary_of

# Keys that a later session of a run may change: they alter neither what is trained on nor what is computed.
# Not eval.questions, which can decide what is held out of the training questions.
SESSION_KEYS = {
    "run.dir", "run.cache", "run.tracker", "model.device", "train.checkpoint_every", "train.keep_checkpoints",
    "train.threads", "eval.every", "search.url", "search.timeout", "search.retries", "search.backoff",
    "search.concurrency", "search.max_response_mb", "search.on_failure", "rollout.server", "rollout.server_timeout",
    "rollout.gpu_memory", "rollout.mismatch_warn", "rollout.mismatch_stop",
}  # fmt: skip


class RunFolder:
    """A run's files. ``RunFolder(path)`` only reads; ``open_run`` locks and checks, ``begin`` may write."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.discarded = self.path / "discarded"
        self._stored = self.path / "config.yaml"
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Let another process train here."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @cached_property
    def config(self) -> Config:
        """The stored configuration; InputError if there is none or it cannot be read."""
        return load(self._stored)

    def begin(self) -> None:
        """The first write of a session: its configuration; clears what a killed session left half written."""
        content = self.config.dump().encode()
        if not self._stored.exists() or self._stored.read_bytes() != content:
            with atomic(self._stored) as file:
                file.write(content)
        for folder in (self.rollouts, self.checkpoints):
            folder.mkdir(exist_ok=True)
        for pattern in (".*.tmp", "*/.*.tmp", "discarded/*/.*.tmp"):
            for leftover in list(self.path.glob(pattern)):
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        self.metrics.touch()
        sync(self.path)

    def saved(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint, oldest first."""
        return _numbered(self.checkpoints, "")

    def read_metrics(self) -> list[dict]:
        """The rows so far; a last line that is still being written is left out."""
        lines = self.metrics.read_bytes().split(b"\n")[:-1] if self.metrics.exists() else []
        return [json.loads(line) for line in lines]

    def append_metrics(self, row: Mapping) -> None:
        """Add one row, on disk when this returns. NaN and infinities are written as null."""
        line = json.dumps(_plain(row), allow_nan=False) + "\n"
        with open(self.metrics, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def write_rollouts(self, step: int, records: Iterable[Mapping], kind: str = "step") -> Path:
        """Write rollouts/KIND_STEP.jsonl, replacing the file if there is one; ``kind`` is step or eval."""
        path = self.rollouts / f"{kind}_{step:06d}.jsonl"
        with atomic(path) as file:
            for record in records:
                file.write(json.dumps(_plain(record), allow_nan=False, ensure_ascii=False).encode() + b"\n")
        return path


def open_run(path: str | Path, config: Config) -> RunFolder:
    """Make a run folder, or take one to go on, and lock it until ``close``. ``RunFolder.begin`` writes in it:
    bad input that is found before leaves no trace.

    Keys in ``SESSION_KEYS`` may differ from the stored configuration, and ``train.steps`` where the learning
    rate does not depend on it; config.yaml then takes the new values.
    Raises:
        InputError: the folder holds something else, was begun with other values, or is in use.
    """
    run = RunFolder(path)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        found = {entry.name for entry in run.path.iterdir()} - {".lock", temporary_of(run._stored).name}
    except OSError as error:
        raise InputError(f"{path}: cannot be a run folder ({error.strerror}); give another run.dir=") from None
    if found and run._stored.name not in found:
        raise InputError(f"{path}: not empty and not a run folder; give another run.dir=")
    _lock(run)
    try:
        if run._stored.exists():
            _check_same(run, config)
    except BaseException:
        run.close()
        raise
    run.config = config
    return run


def save_checkpoint(run: RunFolder, step: int, lm, tokenizer, optimizer, scheduler, extra: Mapping) -> Path:
    """Save the state after ``step``, then drop all but the newest ``train.keep_checkpoints``.

    Args:
        lm, tokenizer: anything with ``save_pretrained(folder)``; weights keep their dtype.
        optimizer, scheduler: ``state_dict()`` is saved.
        extra: numbers, strings, tensors and plain containers of them.
    Returns:
        the checkpoint's folder; one that is already there holds the same state and is left as it is.
    Raises:
        pickle.UnpicklingError: ``extra`` or the scheduler's state holds other objects.
    """
    folder = run.checkpoints / f"step_{step:06d}"
    if folder.exists():
        return folder
    rest = {"scheduler": scheduler.state_dict(), "extra": dict(extra), "rng": _rng_state()}
    _check_loadable(rest)
    temporary = temporary_of(folder)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    lm.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    torch.save({"optimizer": optimizer.state_dict(), **rest}, temporary / "state.pt")
    paths = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    files = {
        path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": _sha256(path)} for path in paths
    }
    (temporary / "manifest.json").write_text(json.dumps({"step": step, "files": files}, indent=1))
    for path in temporary.rglob("*"):
        sync(path)
    sync(temporary)
    os.replace(temporary, folder)
    sync(run.checkpoints)
    for old in list(run.saved().values())[: -run.config.train.keep_checkpoints]:
        # Renamed first: a kill during the deletion must not leave a folder that looks like a checkpoint.
        os.replace(old, temporary_of(old))
        shutil.rmtree(temporary_of(old))
    return folder


def load_checkpoint(run: RunFolder, lm, optimizer, scheduler) -> tuple[int, dict] | None:
    """Restore the newest checkpoint, bit for bit: weights, optimiser, scheduler and torch's generators.

    Args:
        lm: of the class that was saved (its ``from_pretrained`` reads the weights); loaded in place, so that
            ties and the optimiser's references hold.
    Returns:
        (step, extra), or None if there is no checkpoint.
    Raises:
        InputError: the newest checkpoint is damaged. An older one is never taken silently.
    """
    saved = run.saved()
    if not saved:
        return None
    *older, step = saved
    folder = saved[step]
    remedy = f"delete {folder} to go on from {f'step {older[-1]}' if older else 'the start'}"
    _verify(folder, step, remedy)
    lm.load_state_dict(type(lm).from_pretrained(folder, dtype=lm.dtype).state_dict())
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    torch.set_rng_state(state["rng"]["cpu"])
    for device, rng in zip(range(torch.cuda.device_count()), state["rng"]["cuda"], strict=False):
        torch.cuda.set_rng_state(rng, device)
    return step, state["extra"]


def rewind(run: RunFolder, step: int) -> Path | None:
    """Move what was written after ``step`` into ``discarded/N/``: metrics rows, a torn last line, rollouts.

    Returns:
        that folder, or None if there was nothing to move.
    Raises:
        InputError: a line before the last of metrics.jsonl is not a row.
    """
    content = run.metrics.read_bytes()
    lines = [line for line in content.split(b"\n") if line.strip()]
    steps = [_step_of(line) for line in lines]
    if None in steps[:-1]:
        raise InputError(f"{run.metrics}:{steps.index(None) + 1}: not a metrics row; delete or repair the line")
    kept = [line for line, s in zip(lines, steps, strict=True) if s is not None and s <= step]
    late = [line for line, s in zip(lines, steps, strict=True) if s is None or s > step]
    # The evaluation of step k is written before its row: whoever goes on after step k may make it again.
    rollouts = [
        path for kind in ("step", "eval") for s, path in _numbered(run.rollouts, r"\.jsonl", kind).items() if s > step
    ]
    folder = None
    if late or rollouts:
        earlier = [int(p.name) for p in run.discarded.glob("*") if p.name.isdecimal()]
        folder = run.discarded / str(max(earlier, default=0) + 1)
        (folder / "rollouts").mkdir(parents=True)
        with atomic(folder / "metrics.jsonl") as file:
            file.write(_joined(late))
    if _joined(kept) != content:
        with atomic(run.metrics) as file:
            file.write(_joined(kept))
    for path in rollouts:
        os.replace(path, folder / "rollouts" / path.name)
    return folder


def _lock(run: RunFolder) -> None:
    run._lock = open(run.path / ".lock", "a+")  # noqa: SIM115 (held until close)
    try:
        fcntl.flock(run._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        run.close()
        raise InputError(f"{run.path}: another process trains here; wait for it, or give another run.dir=") from None


def _check_same(run: RunFolder, config: Config) -> None:
    """InputError if the stored configuration differs in keys that a session may not change."""
    free = SESSION_KEYS | ({"train.steps"} if config.train.lr_schedule == "constant" else set())
    before, now = (
        {f"{section}.{key}": value for section, keys in c.model_dump().items() for key, value in keys.items()}
        for c in (run.config, config)
    )
    for key, value in now.items():
        if value != before[key] and key not in free:
            raise InputError(
                f"{run.path}: {key} was {before[key]!r} when this run began and is now {value!r}; "
                "keep it, or give another run.dir="
            )


def _verify(folder: Path, step: int, remedy: str) -> None:
    manifest = folder / "manifest.json"
    try:
        content = json.loads(manifest.read_bytes())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
        intact = content["step"] == step and "state.pt" in files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise InputError(f"{manifest}: missing or damaged; {remedy}")
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing from the checkpoint; {remedy}")
        if path.stat().st_size != size or _sha256(path) != digest:
            raise InputError(f"{path}: damaged (not what manifest.json says was written); {remedy}")


def _rng_state() -> dict:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _check_loadable(state: dict) -> None:
    """What ``weights_only`` would refuse at the resume must fail while the run is alive."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _numbered(folder: Path, suffix: str, kind: str = "step") -> dict[int, Path]:
    """Step -> ``folder/KIND_NNN + suffix`` (a regular expression), in order."""
    matches = [(re.fullmatch(rf"{kind}_(\d+){suffix}", path.name), path) for path in folder.glob(f"{kind}_*")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _step_of(line: bytes) -> float | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, (int, float)) else None


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _plain(value):
    """As JSON knows it: arrays and tensors as lists, numbers that are not finite as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
