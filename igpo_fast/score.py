"""Information gain of each turn of given trajectories: JSON lines in, JSON lines out.

A line is ``{"question", "answers", "messages": [{"role", "content"}, ...]}``, or one of a run's own rollouts file; the
output adds ``values`` (v_0 .. v_{T-1}) and ``info_gain`` (of turns 1 .. T-1; the last turn gives the answer and
has none).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from igpo_fast.config import Config
from igpo_fast.data.load import Data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.errors import InputError
from igpo_fast.files import atomic
from igpo_fast.jsonl import finite
from igpo_fast.model import device_of, load
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.trajectories import Record, read_records
from igpo_fast.transcripts import WRITERS
from igpo_fast.types import Answers, Basis
from igpo_fast.update.gains import information_gain, values_of
from igpo_fast.update.packs import means_of
from igpo_fast.update.policy import Policy
from igpo_kernels import ANSWER, Branch, LossSettings, RolloutTokens, Tree, pack


@dataclass(frozen=True)
class Trajectory:
    """A record as tokens, up to the last prefix that is scored."""

    record: Record
    ids: np.ndarray
    """int32 [L]"""
    boundaries: np.ndarray
    """Lengths of prefix_0 .. prefix_{T-1}: int64 [T]."""
    branches: tuple[Branch, ...]

    @property
    def packed_tokens(self) -> int:
        """Most packed tokens that it takes."""
        return len(self.ids) + len(self.boundaries) * sum(branch.stop for branch in self.branches)


class Scorer:
    """Values of trajectories under a policy, in packs of at most ``token_budget`` tokens.

    Args:
        lm: made by ``igpo_fast.model``.
        dialect: ``tags`` or ``chat``.
        temperature: divides the logits.
        basis, answers: as in ``gains.values_of``.
        wrapper: what a forced answer stands in; None takes the dialect's own.
    Raises:
        InputError: the tokenizer cannot serve the dialect, or the temperature is not a positive number.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        dialect: str = "tags",
        temperature: float = 1.0,
        basis: Basis = "log_prob",
        answers: Answers = "first",
        token_budget: int = 16384,
        wrapper: str | None = None,
    ):
        if not 0 < temperature < math.inf:
            raise InputError(f"--temperature {temperature}: give a positive number")
        self.policy = Policy(lm, temperature, LossSettings())
        self.writer = WRITERS[dialect](tokenizer, wrapper)
        self._unknown = _unknown_id(tokenizer)
        self.basis, self.answers, self.token_budget = basis, answers, token_budget

    def tokenise(self, record: Record) -> Trajectory:
        """A record as tokens.

        Raises:
            InputError: a turn or an answer without tokens, a template that cannot write it, more tokens
                than a pack holds.
        """
        branches = self.writer.dialect.branches(record.question)[: 1 if self.answers == "first" else None]
        for branch in branches:
            self._check_known(branch.ids, f"{record.where}: an answer")
        ids, boundaries = self._sampled(record) if record.rollout else self._written(record)
        trajectory = Trajectory(record, ids, boundaries, branches)
        if trajectory.packed_tokens > self.token_budget:
            raise InputError(
                f"{record.where}: {trajectory.packed_tokens} tokens with its answers, over --token-budget "
                f"{self.token_budget}; raise it, or leave the line out"
            )
        return trajectory

    def _written(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of the messages, and the prefixes' lengths."""
        parts = [np.concatenate(pieces) for pieces in self.writer.pieces(record)]
        for number, part in enumerate(parts):
            what = f"{record.where}: {f'turn {number}' if number else 'the prompt'}"
            if not len(part):
                raise InputError(f"{what} has no tokens; give it a text")
            self._check_known(part, what)
        return np.concatenate(parts), np.cumsum([len(part) for part in parts])

    def _sampled(self, record: Record) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a rollout, unchanged, and the prefixes' lengths."""
        rollout, decode = record.rollout, self.writer.dialect.decode
        size = self.policy.lm.get_input_embeddings().num_embeddings
        same = rollout.ids.max() < size and all(decode(turn.ids) == turn.text for turn in rollout.turns)
        if not same:
            raise InputError(
                f"{record.where}: its ids do not decode to its texts with the model's tokenizer; give --model the "
                "run's own model"
            )
        boundaries = rollout.boundaries
        if not len(rollout.prompt_ids) or (np.diff(boundaries) == 0).any():
            raise InputError(f"{record.where}: a prompt or a turn without tokens; give the file as it was written")
        return rollout.ids[: boundaries[-1]], boundaries

    def _check_known(self, ids: np.ndarray, what: str) -> None:
        if self._unknown is not None and (ids == self._unknown).any():
            raise InputError(
                f"{what} has words that the model's tokenizer does not know; choose a model that knows them, or leave "
                "the line out"
            )

    def score(self, records: Iterable[Record]) -> Iterator[tuple[Record, np.ndarray, np.ndarray]]:
        """Each record with its values, float64 [T], and gains, float64 [T-1], in order; one pass per pack."""
        for batch in self._batches(map(self.tokenise, records)):
            values = self._values(batch)
            for i, trajectory in enumerate(batch):
                yield trajectory.record, values[i], information_gain(values[i])[0]

    def _batches(self, trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
        batch, size = [], 0
        for trajectory in trajectories:
            if batch and size + trajectory.packed_tokens > self.token_budget:
                yield batch
                batch, size = [], 0
            batch.append(trajectory)
            size += trajectory.packed_tokens
        if batch:
            yield batch

    def _values(self, batch: list[Trajectory]) -> dict[int, np.ndarray]:
        """Values of each trajectory, by its index; neighbours with the same answers share a tree."""
        untrained = lambda ids: np.full(len(ids), -1)  # noqa: E731
        trees = []
        for _, members in groupby(enumerate(batch), lambda member: member[1].record.question.answers):
            members = list(members)
            rollouts = [RolloutTokens(i, t.ids, untrained(t.ids), t.boundaries) for i, t in members]
            trees.append(Tree(rollouts, members[0][1].branches))
        plan = pack(trees)
        means = means_of(plan, self.policy(plan).scored_logp, ANSWER)
        return {i: values_of(mean, self.basis, self.answers) for i, mean in means.items()}


def _unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token of unknown words; None if there is none, or it also has another meaning (as GPT-2's)."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def load_scorer(path: str, *, device: str = "auto", dtype: str = "float32", **options) -> Scorer:
    """A Scorer (made with ``options``) for a Hugging Face model directory or name, or a run's newest checkpoint; the
    model is probed.

    Raises:
        InputError: no usable model or tokenizer there.
    """
    if Path(path, "checkpoints").is_dir():
        saved = RunFolder(path).saved()
        if not saved:
            raise InputError(f"--model {path}: a run without a checkpoint yet; give a model, or train for longer")
        path = str(saved[max(saved)])
    tokenizer = load_tokenizer(Config(model={"path": path}), Data((), (), {}))
    device = device_of(device)
    return Scorer(load(path, dtype=getattr(torch, dtype), device=device), tokenizer, **options)


def score_file(
    source: Path,
    target: Path,
    make_scorer: Callable[[], Scorer],
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Score the trajectories of ``source`` into ``target``.

    The whole input is checked before a model is loaded, and ``target`` appears when it is complete. Only one pack of
    trajectories is in memory at a time.

    Args:
        make_scorer: called after the check.
        progress: called with (done, total) after each trajectory.
    Returns:
        Number of scored trajectories.
    Raises:
        InputError: bad input, naming file and line; ``target`` exists and ``overwrite`` is not set, or another process
            is writing it.
        StorageError: the operating system refuses to write it; if possible, raised before a model is loaded.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise InputError(f"{target}: is the input; give another --output")
    if target.exists() and not (overwrite and target.is_file()):
        raise InputError(f"{target}: exists; give another --output, or --overwrite the file")
    if not target.parent.is_dir():
        raise InputError(f"{target}: cannot write there (no such folder); give another --output")
    total = sum(1 for _ in read_records(source))
    if not total:
        raise InputError(f"{source}: no trajectories; give at least one line")
    with atomic(target) as out:
        scored = make_scorer().score(read_records(source))
        for done, (record, values, gains) in enumerate(scored, start=1):
            row = record.row | {"values": [finite(value) for value in values.tolist()], "info_gain": gains.tolist()}
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            if progress:
                progress(done, total)
    return total
