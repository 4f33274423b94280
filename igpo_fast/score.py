"""Information gain of each turn of given trajectories: JSON lines in, JSON lines out.

A line is ``{"question", "answers", "messages": [{"role", "content"}, ...]}``, or one of a run's own rollouts file; the
output adds ``values`` (v_0 .. v_{T-1}) and ``info_gain`` (of turns 1 .. T-1; the last turn gives the answer and
has none), and with a baseline other than the value before, ``baselines`` (b_1 .. b_{T-1}). Null is what a turn has not.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

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
from igpo_fast.rollouts.dialect import make_dialect, tags_of
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.trajectories import Record, read_records
from igpo_fast.transcripts import NOTHING, check_known, check_sampled, make_writer, unknown_id
from igpo_fast.types import SEARCH, Answers, Baseline, Basis, Rollout, ToolResult, Turn, search_for
from igpo_fast.update.gains import information_gain, values_of
from igpo_fast.update.packs import means_of
from igpo_fast.update.policy import Policy
from igpo_fast.update.scoring import MASKED, NONE_LENT, Lent, Scoring, Values
from igpo_kernels import ANSWER, FORK, Branch, Fork, LossSettings, RolloutTokens, Tree, pack, tree_size

BUDGETS = dict(max_passage_tokens=128, max_answer_tokens=64, max_answers=4)
"""Limits of the dialects; passages are part of the messages and are not cut here."""
LENT, LENT_PER_QUESTION = 1024, 64
"""Most responses that ``baseline=random`` draws from, and most of one question."""


@dataclass(frozen=True)
class Trajectory:
    """A record as tokens, and what is scored beside them."""

    record: Record
    rollout: Rollout
    """Its tokens, of messages only those that are read; its question's id is the same for equal questions."""
    branches: tuple[Branch, ...]
    forks: Sequence[Fork] = ()

    @property
    def boundaries(self) -> np.ndarray:
        """Lengths of prefix_0 .. prefix_{T-1}: int64 [T]."""
        return self.rollout.boundaries

    @property
    def ids(self) -> np.ndarray:
        """The longest prefix: int32 [L]."""
        return self.rollout.ids[: self.boundaries[-1]]

    def tokens(self, index: int) -> RolloutTokens:
        """Its part of a tree, with nothing to train."""
        ids = self.rollout.ids
        return RolloutTokens(index, ids, np.full(len(ids), -1), self.boundaries, self.forks)

    @cached_property
    def packed_tokens(self) -> int:
        """Packed tokens of a tree of its own; a tree shared with others adds no more than that."""
        return tree_size(Tree([self.tokens(0)], self.branches))[0]


class Scored(NamedTuple):
    """What is known of a record."""

    record: Record
    values: np.ndarray
    """v_t: float64 [T]; NaN where undefined, and with ``masked`` v_0."""
    gains: np.ndarray
    """float64 [T-1]; NaN where the turn has no baseline."""
    baselines: np.ndarray | None
    """b_t of turns 1 .. T-1: float64 [T-1], NaN where there is none; None is the value before."""


class Reservoir:
    """Responses that turns of other questions may be given: of all that are offered, at most ``LENT``, and
    ``LENT_PER_QUESTION`` of a question, so that every question finds another's.

    The seed chooses: by a hash of question and response, so that each counts once, whatever the order of lines.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._kept: dict[bytes, tuple[str, np.ndarray]] = {}

    def offer(self, rollout: Rollout) -> None:
        """Offer what its searches found."""
        owner = rollout.question.id
        for turn in rollout.turns[:-1]:
            if turn.found:
                content = f"{self._seed} {owner} ".encode() + turn.response_ids.tobytes()
                self._kept[blake2b(content, digest_size=16).digest()] = owner, turn.response_ids
        if len(self._kept) > 2 * LENT:
            self._kept = self._chosen()

    def _chosen(self) -> dict[bytes, tuple[str, np.ndarray]]:
        chosen, counts = {}, Counter()
        for key in sorted(self._kept):
            owner, _ = self._kept[key]
            counts[owner] += 1
            if counts[owner] <= LENT_PER_QUESTION and len(chosen) < LENT:
                chosen[key] = self._kept[key]
        return chosen

    def lent(self) -> Lent:
        chosen = self._chosen().values()
        return Lent(np.array([owner for owner, _ in chosen]), [ids for _, ids in chosen])


class Scorer:
    """Values of trajectories under a policy, in packs of at most ``token_budget`` tokens.

    Args:
        lm: made by ``igpo_fast.model``.
        dialect: ``tags`` or ``chat``.
        temperature: divides the logits.
        basis, answers: as in ``gains.values_of``.
        wrapper: what a forced answer stands in; None takes the dialect's own.
        baseline: what a turn's value is compared with (``Scoring``): the value ``previous`` to it; the mean value after
            ``samples`` ``random`` responses of other questions (``lend`` first); with ``masked`` values are those of
            the next turn's tokens, and it is that after a search that found nothing; or nothing (``none``).
        seed: of the draws of ``random``, together with a record's number.
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
        baseline: Baseline = "previous",
        samples: int = 3,
        seed: int = 0,
    ):
        if not 0 < temperature < math.inf:
            raise InputError(f"--temperature {temperature}: give a positive number")
        self.policy = Policy(lm, temperature, LossSettings())
        # A made-up world's tokenizer knows the tags of its own tools alone; others' calls are words to it.
        unknown = tokenizer.unk_token_id
        knows = unknown is None or unknown not in tokenizer(tags_of(SEARCH)[1], add_special_tokens=False).input_ids
        functions = (SEARCH_TOOL,) if dialect == "chat" or knows else ()
        self.writer = make_writer(make_dialect(dialect, tokenizer, functions, wrapper=wrapper, **BUDGETS))
        self._unknown = unknown_id(tokenizer)
        self.basis, self.answers, self.token_budget, self.baseline = basis, answers, token_budget, baseline
        written, count = self.writer.dialect, 0 if baseline == "masked" else 1 if answers == "first" else None
        self.scoring = Scoring(
            lambda question: () if count == 0 else written.branches(question)[:count],
            baseline=baseline,
            samples=samples,
            masked_response=written.response((search_for(""),), (ToolResult(),))[0] if baseline == "masked" else None,
            seed=seed,
        )
        self._lent = NONE_LENT

    def lend(self, records: Iterable[Record]) -> None:
        """Fill what ``random`` draws from, in one pass over all records.

        Raises:
            InputError: all ask the same question; what ``tokenise`` raises.
        """
        reservoir, questions = Reservoir(self.scoring.seed), set()
        for record in records:
            rollout = self._rollout(record)
            reservoir.offer(rollout)
            questions = {*questions, rollout.question.id} if len(questions) < 2 else questions
        if len(questions) < 2:
            raise InputError(
                "--baseline random takes responses from other questions, and all trajectories ask the same one; give "
                "some of another, or choose another baseline"
            )
        self._lent = reservoir.lent()

    def tokenise(self, record: Record, number: int = 0) -> Trajectory:
        """A record as tokens.

        Args:
            number: the record's own, which seeds the draws of ``random``.
        Raises:
            InputError: a turn or an answer without tokens, a template that cannot write it, more tokens
                than a pack holds.
        """
        branches = tuple(self.scoring.branches_of(record.question))
        for branch in branches:
            check_known(branch.ids, self._unknown, f"{record.where}: an answer")
        rollout = self._rollout(record)
        forks = self.scoring.forks_of(rollout, self._lent, [self.scoring.seed, number])
        trajectory = Trajectory(record, rollout, branches, forks)
        if trajectory.packed_tokens > self.token_budget:
            fewer = ", lower --baseline-samples" if self.baseline == "random" else ""
            raise InputError(
                f"{record.where}: {trajectory.packed_tokens} tokens with all that is scored, over --token-budget "
                f"{self.token_budget}; raise it{fewer}, or leave the line out"
            )
        return trajectory

    def _rollout(self, record: Record) -> Rollout:
        """A record's tokens; its question's id tells equal questions by their text."""
        if record.rollout:
            rollout = check_sampled(record, self.writer.dialect, self.policy.lm.get_input_embeddings().num_embeddings)
        else:
            rollout = self._written(record)
        if self.baseline == "masked":
            for number, turn in enumerate(rollout.turns[1:], start=2):
                if not len(turn.ids):
                    raise InputError(f"{record.where}: turn {number} has no tokens; give it a text")
        name = blake2b(record.question.question.encode(), digest_size=16).hexdigest()
        return replace(rollout, question=replace(record.question, id=name))

    def _written(self, record: Record) -> Rollout:
        """Tokens of the messages."""
        masked = self.baseline == "masked"
        prompt, turns = self.writer.write(record, apart=masked or self.baseline == "random", last=masked)
        for number, part in enumerate([prompt, *map(np.concatenate, turns)]):
            what = f"{record.where}: {f'turn {number}' if number else 'the prompt'}"
            if not len(part):
                raise InputError(f"{what} has no tokens; give it a text")
            check_known(part, self._unknown, what)
        made = [
            # What messages respond to a turn is taken for what a search found.
            Turn(ids, np.zeros(len(ids), np.float32), "", (search_for(""),) * bool(len(response)), response,
                 found=bool(len(response)))
            for ids, response in turns
        ]  # fmt: skip
        if not masked:
            made.append(Turn(NOTHING, NOTHING, "", (), NOTHING))  # the last turn, which is not read
        return Rollout(record.question, 0, prompt, tuple(made))

    def score(self, records: Iterable[Record]) -> Iterator[Scored]:
        """What is known of each record, in order; one pass per pack.

        Raises:
            ValueError: ``random`` without ``lend`` before.
        """
        if self.baseline == "random" and self._lent is NONE_LENT:
            raise ValueError("Scorer.score: baseline random draws from what was lent; call lend before")
        trajectories = (self.tokenise(record, number) for number, record in enumerate(records))
        for batch in self.packs(trajectories):
            yield from map(self._scored, batch, self.values(batch))

    def _scored(self, trajectory: Trajectory, found: Values) -> Scored:
        earning = None
        if self.baseline in ("random", "masked"):
            compared = {fork.turn for fork in trajectory.forks if self.baseline == "random" or fork.answer == MASKED}
            earning = np.array([t in compared for t in range(1, len(found.values))], dtype=bool)
        gains, _ = information_gain(found.values, earning, found.baselines)
        return Scored(trajectory.record, found.values, gains, found.baselines)

    def packs(self, trajectories: Iterable[Trajectory]) -> Iterator[list[Trajectory]]:
        """What fits a pack, in order; a trajectory that exceeds ``token_budget`` has one of its own."""
        batch, size = [], 0
        for trajectory in trajectories:
            if batch and size + trajectory.packed_tokens > self.token_budget:
                yield batch
                batch, size = [], 0
            batch.append(trajectory)
            size += trajectory.packed_tokens
        if batch:
            yield batch

    def values(self, batch: Sequence[Trajectory]) -> list[Values]:
        """Values of each trajectory, from one pass; neighbours with the same answers share a tree."""
        trees = []
        scored = [(i, t) for i, t in enumerate(batch) if t.branches or t.forks]
        for _, members in groupby(scored, lambda member: member[1].record.question.answers):
            members = list(members)
            trees.append(Tree([t.tokens(i) for i, t in members], members[0][1].branches))
        answers = forks = {}
        if trees:
            plan = pack(trees)
            logp = self.policy(plan).scored_logp
            answers, forks = (means_of(plan, logp, kind) for kind in (ANSWER, FORK))
        value_of = partial(values_of, basis=self.basis, answers=self.answers)
        return [
            self.scoring.values(len(t.rollout.turns), answers.get(i), forks.get(i), value_of)
            for i, t in enumerate(batch)
        ]


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
    trajectories is in memory at a time, and with ``baseline=random`` the responses that are lent.

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
        scorer = make_scorer()
        if scorer.baseline == "random":
            scorer.lend(read_records(source))
        for done, (record, *numbers) in enumerate(scorer.score(read_records(source)), start=1):
            row = {name: value for name, value in record.row.items() if name != "baselines"}
            for name, found in zip(("values", "info_gain", "baselines"), numbers, strict=True):
                if found is not None:
                    row[name] = [finite(number) for number in found.tolist()]
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            if progress:
                progress(done, total)
    return total
