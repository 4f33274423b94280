"""The order in which a run writes its files, and the rule that no error costs a finished step.

Order of writes in a step: rollouts, row, checkpoint. So everything that a checkpoint builds on is on disk. Of several
processes the first writes; only a checkpoint has parts of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from igpo_fast.config import Config
from igpo_fast.errors import InputError, RunError
from igpo_fast.jsonl import finite
from igpo_fast.ranks import Ranks
from igpo_fast.run.checkpoint import Owner, RunFolder, Writer, load_checkpoint, open_run, rewind
from igpo_fast.run.display import Display
from igpo_fast.run.interrupt import Interrupted, stop_requested
from igpo_fast.run.launch import log_end, log_of, redirect
from igpo_fast.run.metrics import StepMetrics, ordered
from igpo_fast.run.records import record_of
from igpo_fast.run.signatures import warnings_for
from igpo_fast.run.trackers import Trackers, check_installed
from igpo_fast.types import Batch, Evaluation


class Learner(Owner, Protocol):
    """What a session asks of update/learner.Learner."""

    steps: int


class Session:
    """A run in this process, as a context in which the folder is locked and the display is on.

    Args:
        config: ``run.dir`` names the folder, which is made or resumed.
        ranks: the run's processes.
    """

    def __init__(self, config: Config, display: Display, ranks: Ranks):
        self.config, self.display, self.ranks = config, display, ranks
        self._finished = 0
        """The last step whose rollouts are on disk, and whose update is therefore complete."""

    def __enter__(self) -> Session:
        self._stack = ExitStack()
        try:
            self.folder = RunFolder(self.config.run.dir)
            self.ranks.log_end = partial(log_end, self.folder.path)
            if self.ranks.first:
                self._stack.enter_context(self.display)
            self.checkpoint: str | None = self.ranks.first_alone(self._open)
            """The folder of the newest checkpoint, if there is one."""
            if not self.ranks.first:
                redirect(log_of(self.folder.path, self.ranks.number))
                self._stack.enter_context(self.display)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._stack.close()
        if isinstance(error, Exception) and not self.ranks.knows_all(error):
            told = self.ranks.failure(error)
            if told is not error:
                raise told from error

    def _open(self) -> str | None:
        check_installed(self.config.run.tracker)
        self.folder = self._stack.enter_context(open_run(self.config.run.dir, self.config))
        newest = self.folder.newest()
        return None if newest is None else str(newest)

    def resume(self, learner: Learner, tokenizer: PreTrainedTokenizerBase) -> int:
        """Restore the newest checkpoint and move later rows and rollouts aside.

        Returns:
            The last finished step, 0 at the start.
        """
        self._learner, self._tokenizer = learner, tokenizer
        self._writer = Writer(self.folder, self.ranks)
        self._stack.callback(self._writer.close)
        newest = self.checkpoint and Path(self.checkpoint)
        step, extra = self.ranks.together(lambda: load_checkpoint(newest, learner) if newest else (0, {}))[0]
        self._finished = step
        self._rows, self._best = self.ranks.first_alone(lambda: self._begin(step))
        self._unwritten = extra.get("row", {"step": step})
        return step

    def _begin(self, step: int) -> tuple[list[dict], float | None]:
        """Begin to write after ``step``; returns the rows so far, and ``train.keep_best`` of the best checkpoint."""
        self.folder.begin()
        moved = rewind(self.folder, step)
        if gone := self.folder.missing_rollouts(step):
            self.display.warn(gone)
        if self.checkpoint:
            self.display.note(f"resumed after step {step}")
        if moved:
            self.display.note(f"rows and rollouts that an earlier session wrote after step {step} are now in {moved}")
        settings = self.config.model_dump(mode="json")
        trackers = Trackers(self.config.run.tracker, self.folder.path, step, settings, self.display.warn)
        self._trackers = self._stack.enter_context(trackers)
        rows, best = self.folder.read_metrics(), self.folder.best()
        return rows, next((self._value(row) for row in rows if self.folder.checkpoint(row["step"]) == best), None)

    @property
    def row_is_missing(self) -> bool:
        """Whether the last finished step has no row: at the start, or after its sync or evaluation failed."""
        return not self._rows or self._rows[-1]["step"] < self._finished

    def complete_row(self, metrics: Mapping[str, float]) -> None:
        """Write the missing row: the checkpoint's part of it, and ``metrics``."""
        self._report(ordered(self._unwritten | metrics))

    def steps(self) -> Iterator[int]:
        """The remaining steps; each is followed by a checkpoint if one is due, which is written during the next ones.

        Raises:
            Interrupted: the user asked to stop; a checkpoint holds everything so far.
        """
        last, every = self.config.train.steps, self.config.train.checkpoint_every
        with stop_requested() as stop:
            for step in range(self._finished + 1, last + 1):
                yield step
                told = self.ranks.gather((stop.is_set(), self._writer.failed))
                stopping, failed = map(any, zip(*told, strict=True))
                if failed:
                    self._writer.wait()
                value = self._value(self._rows[-1])
                improved = value is not None and (self._best is None or value > self._best)
                if step % every == 0 or step == last or stopping or improved:
                    self._save(step)
                    self._best = value if improved else self._best
                if stopping or step == last:
                    self._writer.wait()
                if stopping and step < last:
                    raise self.ranks.on_all(
                        Interrupted(f"stopped after step {step}, which {self.folder.checkpoints} holds")
                    )

    @contextmanager
    def step(self, number: int) -> Iterator[StepMetrics]:
        """A step's row, written when the block ends. If the block raises, a checkpoint keeps every finished step.

        Unchanged weights are the weights of the step before. Once its rollouts are written, the step itself is
        finished, and the checkpoint carries its row so far. Between two updates of one step nothing can be kept: the
        run goes back to its last checkpoint; so does a run in which one rank fails while others go on.
        """
        metrics, steps = StepMetrics(number), self._learner.steps
        try:
            yield metrics
            self._report(metrics.row())
        except Exception as error:
            known = self.ranks.knows_all(error)
            if known:
                if self._finished == number:
                    self._save(number, metrics.row())
                elif self._learner.steps == steps and number > 1:
                    self._save(number - 1)
                self._writer.wait()
            if isinstance(error, torch.OutOfMemoryError | MemoryError):
                told = RunError(
                    f"step {number}: out of memory ({_first_line(error)}); lower train.token_budget or "
                    "rollout.concurrency, then resume with the same command"
                )
                raise (self.ranks.on_all(told) if known else told) from error
            raise

    def write_rollouts(self, batch: Batch) -> None:
        """Write a trained batch's rollouts: its step is finished."""
        records = map(record_of, batch.rollouts, batch.credits)
        self.ranks.first_alone(lambda: self.folder.write_rollouts(batch.step, records))
        self._finished = batch.step

    def write_evaluation(self, step: int, evaluation: Evaluation) -> dict[str, float]:
        """Write the rollouts of an evaluation after a step; returns its metrics.

        Raises:
            InputError: ``train.keep_best`` is none of them.
        """
        best = self.config.train.keep_best
        if best and best not in evaluation.metrics:
            raise self.ranks.on_all(InputError(
                f"train.keep_best={best}: the evaluation has no such number; give one of "
                f"{', '.join(evaluation.metrics)}"
            ))  # fmt: skip
        records = map(record_of, evaluation.rollouts)
        self.ranks.first_alone(lambda: self.folder.write_rollouts(step, records, "eval"))
        return evaluation.metrics

    def _value(self, row: Mapping[str, float]) -> float | None:
        """``train.keep_best`` of a row; None if the step was not evaluated, or the key is empty."""
        return finite(row.get(self.config.train.keep_best))

    def _save(self, step: int, row: Mapping[str, float] | None = None) -> None:
        """Begin to write a finished step's checkpoint; ``row`` is its row so far if that cannot be written yet."""
        extra = {} if row is None else {"row": {key: np.asarray(value).item() for key, value in row.items()}}
        self._writer.save(step, self._learner, self._tokenizer, extra)

    def _report(self, row: dict[str, float]) -> None:
        self._rows.append(row)
        self.ranks.first_alone(lambda: self._write_row(row))

    def _write_row(self, row: dict[str, float]) -> None:
        self.folder.append_metrics(row)
        self._trackers.log(row)
        self.display.step(row)
        for warning in warnings_for(self._rows, {"mismatch/logp_abs_diff": self.config.rollout.mismatch_warn}):
            self.display.warn(warning)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)[:200]
