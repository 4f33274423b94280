"""The run folder: a run's files, from which a run killed at any instant resumes.

    config.yaml                 the resolved configuration
    begun.yaml, contents.json   configuration and digests of the data when the run began, which must not change
    metrics.jsonl               one object per step
    rollouts/step_000007.jsonl  one object per rollout; eval_000030.jsonl: what the policy said on held-out questions
    checkpoints/step_000020/    weights that ``from_pretrained`` loads, learner-*.pt, tokenizer, state.pt, manifest.json
    discarded/1/                rows and rollouts that a killed session wrote after its last checkpoint

``step`` is the 1-based number of the finished step; row 0 may hold an evaluation before training. The
rollouts and the row of step k are written before the checkpoint of step k, so everything that it builds on is on disk.
Files are written atomically (files.py).
"""

from __future__ import annotations

import io
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import torch

from igpo_fast.config import Config, load, session_keys, values_of
from igpo_fast.contents import contents, sources
from igpo_fast.errors import InputError, RunError
from igpo_fast.files import (
    append,
    atomic,
    atomic_folder,
    check_manifest,
    lock,
    remove,
    storage,
    sync,
    temporary_of,
    write_manifest,
)  # fmt: skip
from igpo_fast.jsonl import finite, json_bytes, json_line, json_rows, json_value
from igpo_fast.ranks import Ranks
from igpo_fast.run.records import rollout_of
from igpo_fast.types import Credit, Rollout


class RunFolder:
    """A run's files. ``RunFolder(path)`` only reads; ``open_run`` locks and checks, ``begin`` may write."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.rollouts = self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.discarded = self.path / "discarded"
        self._stored = self.path / "config.yaml"
        self._begun = self.path / "begun.yaml"
        self._contents = self.path / "contents.json"
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
        """The stored configuration; InputError if it is missing or cannot be read."""
        return load(self._stored)

    def begin(self) -> None:
        """Write the session's configuration, its first write, and remove files that a killed session left half written.

        Raises:
            StorageError: the operating system refuses.
        """
        with storage(self.path):
            content = self.config.dump().encode()
            _write(self._stored, content)
            if not self._begun.exists():
                _write(self._begun, content)
            if not self._contents.exists():
                _write(self._contents, json_bytes(contents(self.config), indent=True))
        for folder in (self.rollouts, self.checkpoints):
            with storage(folder):
                folder.mkdir(exist_ok=True)
        with storage(self.path):
            for leftover in self._leftovers():
                remove(leftover)
        with storage(self.metrics):
            self.metrics.touch()
            sync(self.path)

    def _leftovers(self) -> list[Path]:
        """Temporaries of a killed session: only names that this module gives, and not through links, whose targets
        belong to others."""
        at_top = [temporary_of(path) for path in (self._stored, self._begun, self._contents, self.metrics)]
        moved = [temporary_of(folder / "metrics.jsonl") for folder in _real(self.discarded)]
        named = [*_real(self.rollouts), *_real(self.checkpoints)]
        return at_top + moved + [path for path in named if re.fullmatch(r"\.(step|eval)_\d+(\.jsonl)?\.tmp", path.name)]

    def checkpoint(self, step: int) -> Path:
        """The folder of a step's checkpoint, which need not be there."""
        return self.checkpoints / f"step_{step:06d}"

    def saved(self) -> dict[int, Path]:
        """Step -> folder of every checkpoint, oldest first."""
        return _numbered(self.checkpoints, "")

    def best(self) -> Path | None:
        """The folder of the checkpoint with the largest ``train.keep_best`` in its row, the first of equal ones; None
        if none was evaluated, or the key is empty."""
        key, saved = self.config.train.keep_best, self.saved()
        values = {row["step"]: finite(row.get(key)) for row in self.read_metrics()} if key else {}
        evaluated = [step for step in saved if values.get(step) is not None]
        return saved[max(evaluated, key=values.__getitem__)] if evaluated else None

    def newest(self) -> Path | None:
        """The folder of the newest checkpoint, with every byte verified; None if there is none.

        Raises:
            InputError: it is damaged. An older one is never taken silently.
        """
        saved = self.saved()
        if not saved:
            return None
        *older, step = saved
        folder = saved[step]
        return _verified(folder, f"delete {folder} to go on from {f'step {older[-1]}' if older else 'the start'}")

    def chosen(self, which: str) -> Path:
        """The folder of the checkpoint that a user means, with every byte verified.

        Args:
            which: ``newest``, ``best`` (by ``train.keep_best``), or a step.
        Raises:
            InputError: there is none, or it is damaged.
        """
        saved = self.saved()
        if not saved:
            raise InputError(f"{self.checkpoints}: no checkpoint yet; train for longer")
        if which == "newest":
            return self.newest()
        folder = self.best() if which == "best" else saved.get(int(which) if which.isdecimal() else None)
        if folder is None:
            missing = "no evaluated checkpoint; train with train.keep_best=eval/f1" if which == "best" else "not there"
            steps = ", ".join(map(str, saved))
            raise InputError(f"--checkpoint {which}: {missing}; {self.checkpoints} has newest and steps {steps}")
        return _verified(folder, "restore it, or name another checkpoint")

    def read_metrics(self) -> list[dict]:
        """The rows so far, without a last line that is still being written.

        Raises:
            InputError: a line is no row, an object with an integer ``step`` above that of the row before.
        """
        return json_rows(_content(self.metrics), self.metrics, "step", ascending=True)

    def append_metrics(self, row: Mapping) -> None:
        """Append one row; it is on disk when this returns. NaN and infinities are written as null."""
        append(self.metrics, json_line(dict(row)))

    def write_rollouts(self, step: int, records: Iterable[Mapping], kind: str = "step") -> Path:
        """Write rollouts/KIND_STEP.jsonl, replacing the file if there is one; ``kind`` is step or eval."""
        path = self.rollouts / f"{kind}_{step:06d}.jsonl"
        with atomic(path) as file:
            file.writelines(map(json_line, records))
        return path

    def read_rollouts(self, name: str) -> Iterator[tuple[Rollout, Credit | None]]:
        """The rollouts of ``rollouts/NAME.jsonl`` (``step_000007``, ``eval_000030``), each with what it earned: None
        where it was only evaluated.

        Raises:
            InputError: no such file, or a line that is not a rollout's record.
            StorageError: the operating system refuses.
        """
        path = self.rollouts / f"{name}.jsonl"
        if not path.exists():
            raise InputError(f"{path}: not there; give the name of a file in {self.rollouts}, without .jsonl")
        for number, line in enumerate(_content(path).splitlines(), start=1):
            record = json_value(line, where := f"{path}:{number}")
            try:
                yield rollout_of(record)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise InputError(f"{where}: not a rollout's record ({reason}); restore the file") from None

    def written(self, kind: str = "step") -> list[int]:
        """Steps with a file of rollouts, in order; ``kind`` is step or eval."""
        return list(_numbered(self.rollouts, r"\.jsonl", kind))

    def changed_contents(self, config: Config) -> list[str]:
        """What of the run's data, tokenizer and model holds something else than when it began, in words; what
        ``config`` reads from elsewhere is not compared."""
        if not self._contents.exists():
            return []
        begun = json_value(_content(self._contents), self._contents)
        before, now = sources(self.config), sources(config)
        return [
            f"{now[key]} ({key}): holds something else than when {self.path} began"
            for key, digest in contents(config).items()
            if isinstance(begun, dict) and now[key] == before.get(key) and begun.get(key, digest) != digest
        ]

    def missing_rollouts(self, step: int) -> str | None:
        """A note if rollouts of finished steps up to ``step`` are missing; training does not read them."""
        found = self.written()
        gone = [s for s in range(1, step + 1) if s not in found]
        if not gone:
            return None
        names = ", ".join(f"step {s}" for s in gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "")
        return f"{self.rollouts}: the rollouts of {names} are gone; training goes on without them"


def _verified(folder: Path, remedy: str) -> Path:
    """``folder``, a checkpoint, if every byte is as when it was written; else InputError."""
    content = check_manifest(folder, remedy)
    if content.get("step") != int(folder.name.removeprefix("step_")) or "state.pt" not in content["files"]:
        raise InputError(f"{folder / 'manifest.json'}: missing or damaged; {remedy}")
    return folder


def open_run(path: str | Path, config: Config) -> RunFolder:
    """Make a run folder, or open one to resume, and lock it until ``close``. Only ``RunFolder.begin`` writes in it, so
    bad input found earlier leaves no trace.

    Keys that config.py marks ``SESSION`` may differ from the stored configuration, and ``train.steps`` if the
    learning rate does not depend on it; config.yaml then gets the new values.
    Raises:
        InputError: the folder is no run folder, began with other values or other data, or is in use.
    """
    run = RunFolder(path)
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        # Ranks write logs before the first one begins.
        found = {entry.name for entry in run.path.iterdir()} - {".lock", "logs", temporary_of(run._stored).name}
        if found and run._stored.name not in found:
            raise InputError(f"{path}: not empty and not a run folder; give another run.dir=")
        run._lock = open(run.path / ".lock", "a+")  # noqa: SIM115 (held until close)
    except OSError as error:
        raise InputError(f"{path}: cannot be a run folder ({error.strerror}); give another run.dir=") from None
    try:
        with storage(run.path, "lock"):
            if not lock(run._lock):
                raise InputError(f"{path}: another process trains here; wait for it, or give another run.dir=")
        if run._stored.exists():
            _check_same(run, config)
    except BaseException:
        run.close()
        raise
    run.config = config
    return run


class Owner(Protocol):
    """Who owns the weights (update/learner.Learner)."""

    def snapshot(self) -> Callable[[Path], None]:
        """Copy the state. What it returns writes the copy into a folder, in another thread: weights, in a layout that
        ``from_pretrained`` loads, optimiser and schedule."""

    def load(self, folder: Path) -> None:
        """Read them back in place; raises whatever does not fit."""


class Writer:
    """Writes checkpoints while the run goes on: the state is copied at once, its files are written by a thread, one
    checkpoint at a time.

    Of several ranks each writes what ``owner.snapshot`` gives it, and the first the rest, once the others' parts are
    there. Ranks call all methods but ``close`` equally often, in their main threads: threads exchange nothing, the
    first's only looks whether the others have told that they are done.
    """

    def __init__(self, run: RunFolder, ranks: Ranks):
        self._run, self._ranks = run, ranks
        self._thread = ThreadPoolExecutor(1)
        self._part = self._whole = _done()
        self._closed = threading.Event()

    def save(self, step: int, owner: Owner, tokenizer, extra: Mapping) -> None:
        """Wait for the checkpoint before, and begin to write the state after ``step``; an existing checkpoint of that
        step holds the same state and is left unchanged. Then all but the newest ``train.keep_checkpoints`` and the best
        are dropped.

        Args:
            tokenizer: anything with ``save_pretrained(folder)``.
            extra: numbers, strings, tensors and plain containers of them.
        Raises:
            pickle.UnpicklingError: ``extra`` holds other objects.
            RunError, StorageError: what writing the checkpoint before raised.
        """
        self.wait()
        folder, ranks = self._run.checkpoint(step), self._ranks
        if ranks.first_alone(folder.exists):
            return
        rest = {"extra": dict(extra), "rng": _rng_state()}
        held: list[Callable[[Path], None]] = []
        with ExitStack() as stack:

            def begin() -> tuple[Path, list[int] | None]:
                _check_loadable(rest)
                temporary = stack.enter_context(atomic_folder(folder))
                tokenizer.save_pretrained(temporary)  # now: rollouts use it, and it is not made for several threads
                return temporary, _rows_now(self._run)

            temporary, rows = ranks.first_alone(begin)
            ranks.together(lambda: held.append(owner.snapshot()))
            opened = stack.pop_all()

        def part() -> None:
            try:
                with storage(folder):
                    held.pop()(temporary)
            except Exception as error:
                ranks.post(f"{folder.name}/{ranks.number}", f"{type(error).__name__}: {error}")
                raise
            ranks.post(f"{folder.name}/{ranks.number}", "")

        def whole() -> None:
            with opened, storage(folder):
                written.result()
                for rank in range(1, ranks.size):
                    self._wait_for(f"{folder.name}/{rank}")
                with open(temporary / "state.pt", "wb") as file:  # torch.save with a path hides the system's error
                    torch.save(rest, file)
                write_manifest(temporary, step=step, rows=rows)
            _drop_older(self._run)

        self._part = written = self._thread.submit(part)
        self._whole = self._thread.submit(whole) if ranks.first else written

    def _wait_for(self, key: str) -> None:
        while (told := self._ranks.posted(key)) is None:
            if self._closed.wait(0.05):
                raise RunError("the run ended before another rank's part was written")
        if told:
            raise RunError(f"rank {key.rpartition('/')[2]}: {told}")

    @property
    def failed(self) -> bool:
        """Whether this rank could not write."""
        return any(future.done() and future.exception() for future in (self._part, self._whole))

    def wait(self) -> None:
        """Wait until the checkpoint is written.

        Raises:
            RunError, StorageError: it could not be written.
        """
        part, whole, self._part, self._whole = self._part, self._whole, _done(), _done()
        self._ranks.together(part.result)  # a rank that has died is found here
        self._ranks.first_alone(whole.result)

    def close(self) -> None:
        """Let the thread end, which finishes the checkpoint unless another rank's part is missing."""
        self._closed.set()
        self._thread.shutdown()


def _done() -> Future:
    future: Future = Future()
    future.set_result(None)
    return future


def _drop_older(run: RunFolder) -> None:
    """Delete all but the newest ``train.keep_checkpoints`` and the best."""
    older, best = list(run.saved().values())[: -run.config.train.keep_checkpoints], run.best()
    for old in older:
        if old == best:
            continue
        # Renamed first: a kill during the deletion must not leave a folder that looks like a checkpoint.
        with storage(old, "delete"):
            os.replace(old, temporary_of(old))
            remove(temporary_of(old))


def load_checkpoint(folder: Path, owner: Owner) -> tuple[int, dict]:
    """Restore a checkpoint that ``RunFolder.newest`` has verified, bit for bit: weights, optimiser, schedule and
    torch's generators.

    Returns:
        (step, extra)
    Raises:
        InputError: it holds another model's or optimiser's state.
    """
    try:
        with storage(folder, "read"):
            owner.load(folder)
            state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
            torch.set_rng_state(state["rng"]["cpu"])
            for device, rng in zip(range(torch.cuda.device_count()), state["rng"]["cuda"], strict=False):
                torch.cuda.set_rng_state(rng, device)
            return int(folder.name.removeprefix("step_")), dict(state["extra"])
    except (torch.OutOfMemoryError, MemoryError, RunError):
        raise
    except Exception as error:  # unpickling, transformers and the optimiser may raise anything here
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(
            f"{folder}: undamaged, but not a state of this run's model and optimiser ({reason}); go on with the "
            "version of igpo-fast that wrote it, or begin anew with another run.dir="
        ) from error


def rewind(run: RunFolder, step: int) -> Path | None:
    """Move metrics rows, a torn last line and rollouts that were written after ``step`` into ``discarded/N/``.

    Returns:
        The folder, or None if there was nothing to move.
    Raises:
        InputError: a line of metrics.jsonl before the last is not a row, or rows up to ``step`` are missing, repeated
            or out of order.
        StorageError: the operating system refuses.
    """
    content = _content(run.metrics)
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    rows = [(number, _step_of(line), line) for number, line in lines]
    if broken := [number for number, s, _ in rows[:-1] if s is None]:
        raise InputError(f"{run.metrics}:{broken[0]}: not a metrics row; delete or repair the line")
    kept = [(number, s, line) for number, s, line in rows if s is not None and s <= step]
    late = [line for _, s, line in rows if s is None or s > step]
    _check_rows(run, [(number, s) for number, s, _ in kept], step)
    before = b"".join(line + b"\n" for _, _, line in kept)
    # The evaluation of step k is written before its row: a run that resumes after step k may repeat it.
    rollouts = [
        path for kind in ("step", "eval") for s, path in _numbered(run.rollouts, r"\.jsonl", kind).items() if s > step
    ]
    folder = None
    if late or rollouts:
        with storage(run.discarded):
            earlier = [int(p.name) for p in run.discarded.glob("*") if p.name.isdecimal()]
            folder = run.discarded / str(max(earlier, default=0) + 1)
            (folder / "rollouts").mkdir(parents=True)
        with atomic(folder / "metrics.jsonl") as file:
            file.writelines(line + b"\n" for line in late)
    if before != content:
        with atomic(run.metrics) as file:
            file.write(before)
    for path in rollouts:
        with storage(path, "move"):
            os.replace(path, folder / "rollouts" / path.name)
    return folder


def _check_rows(run: RunFolder, rows: list[tuple[int, int]], step: int) -> None:
    """InputError unless ``rows`` (line and step of each) are the rows on which the checkpoint of ``step`` builds."""
    for (_, earlier), (number, later) in pairwise(rows):
        if later <= earlier:
            raise InputError(
                f"{run.metrics}:{number}: a row of step {later} after one of step {earlier}; delete the line, or move "
                "it where it belongs"
            )
        if later > earlier + 1:
            raise _rows_missing(run, earlier + 1, later - 1)
    folder = run.saved().get(step)
    match folder and json_value(_content(folder / "manifest.json"), folder / "manifest.json").get("rows"):
        case [int(first), int(last)]:
            if not rows:
                raise _rows_missing(run, first, last)
            if rows[0][1] > first:
                raise _rows_missing(run, first, rows[0][1] - 1)
            if rows[-1][1] < last:
                raise _rows_missing(run, rows[-1][1] + 1, last)


def _rows_missing(run: RunFolder, first: int, last: int) -> InputError:
    older = [step for step in run.saved() if step < first]
    newer = ", ".join(folder.name for step, folder in run.saved().items() if step >= first)
    return InputError(
        f"{run.metrics}: no rows of steps {first} to {last}, which the checkpoint builds on; restore them, or delete "
        f"{newer} in {run.checkpoints} to go on from {f'step {older[-1]}' if older else 'the start'}"
    )


def _rows_now(run: RunFolder) -> list[int] | None:
    """Steps of the first and the last row on disk, for the manifest."""
    lines = _content(run.metrics).splitlines()
    return [_step_of(lines[0]), _step_of(lines[-1])] if lines else None


def _check_same(run: RunFolder, config: Config) -> None:
    """InputError if the run began with other data, or other values of keys that a session may not change."""
    free = session_keys() | ({"train.steps"} if config.train.lr_schedule == "constant" else set())
    now = values_of(config)
    # config.yaml can be edited, and is often the file of the new values.
    for stored in (run.config, load(run._begun) if run._begun.exists() else run.config):
        before = values_of(stored)
        for key, value in now.items():
            if value != before[key] and key not in free:
                raise InputError(
                    f"{run.path}: {key} was {before[key]!r} when this run began and is now {value!r}; "
                    "keep it, or give another run.dir="
                )
    for changed in run.changed_contents(config):
        raise InputError(f"{changed}; restore it, or give another run.dir=")


def _write(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` unless it is there already."""
    if not path.is_file() or path.read_bytes() != content:
        with atomic(path) as file:
            file.write(content)


def _content(path: Path) -> bytes:
    with storage(path, "read"):
        return path.read_bytes() if path.exists() else b""


def _real(folder: Path) -> list[Path]:
    """A folder's entries that are not links; none if it is a link itself or not a folder."""
    if folder.is_symlink() or not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if not path.is_symlink()]


def _rng_state() -> dict:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _check_loadable(state: dict) -> None:
    """Fail now for objects that ``weights_only`` would refuse at the resume."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def _numbered(folder: Path, suffix: str, kind: str = "step") -> dict[int, Path]:
    """Step -> ``folder/KIND_NNN + suffix`` (a regular expression), in order."""
    matches = [(re.fullmatch(rf"{kind}_(\d+){suffix}", path.name), path) for path in folder.glob(f"{kind}_*")]
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _step_of(line: bytes) -> int | None:
    try:
        row = json_value(line, "row")
    except InputError:
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None
