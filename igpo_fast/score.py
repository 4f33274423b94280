"""Information gain of each turn of trajectories from anywhere: JSON lines in, JSON lines out.

A line is ``{"question", "answers", "messages": [{"role", "content"}, ...]}``; it comes back with ``values``
(v_0 .. v_{T-1}) and ``info_gain`` (of turns 1 .. T-1; the last turn gives the answer and needs none).

Text comes in, not the tokens that were sampled. It is tokenised message by message (tags) or turn by turn
(chat), so tokens, at the borders above all, can differ from those sampled, and values by a little with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from igpo_fast.config import Config
from igpo_fast.data import Data, json_object
from igpo_fast.dialect import CHAT_SYSTEM, SEARCH_TOOL, Dialect, TagsDialect, make_dialect
from igpo_fast.errors import InputError
from igpo_fast.files import atomic
from igpo_fast.model import device_of, load
from igpo_fast.rewards import Answers, Basis, information_gain, values_of
from igpo_fast.scoring import Policy, answer_means
from igpo_fast.tokenizer import load_tokenizer
from igpo_fast.types import Question
from igpo_kernels import Branch, LossSettings, RolloutTokens, Tree, pack

PROMPT_ROLES = ("system", "user")
RESPONSE_ROLES = ("tool", "user", "environment")
BUDGETS = dict(max_passage_tokens=128, max_answer_tokens=64, max_answers=4)
"""Of the dialects; passages are not cut here, they are part of the messages."""


@dataclass(frozen=True)
class Record:
    """A line of the input."""

    where: str
    """File and line, for errors."""
    row: dict[str, Any]
    """As it was read."""
    question: Question
    prompt: tuple[dict, ...]
    """The messages before the first turn; empty takes the dialect's prompt."""
    turns: tuple[tuple[dict, ...], ...]
    """Each turn's message and the responses to it: T of them, T >= 1."""


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
        """How many tokens it packs to, at most."""
        return len(self.ids) + len(self.boundaries) * sum(branch.stop for branch in self.branches)


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, one at a time.

    Raises:
        InputError: a file that cannot be read, a line that is not a trajectory.
    """
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _record(line, f"{path} line {number}")
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give an existing file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give JSON lines") from None


def _record(line: str, where: str) -> Record:
    row = json_object(line, where)
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}: a text with half a character (a lone surrogate); correct it") from None
    text, answers, messages = (row.get(key) for key in ("question", "answers", "messages"))
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: no question; fill "question" with a text')
    if not answers or not _is_list_of(str, answers) or not all(map(str.strip, answers)):
        raise InputError(f'{where}: no answers; fill "answers" with a list of texts, none of them blank')
    if not _is_list_of(dict, messages):
        raise InputError(f'{where}: no messages; fill "messages" with objects that have role and content')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message.get("content"), str):
            raise InputError(f'{where}: message {number} has no text; fill "content"')
    prompt, turns = _split(messages, where)
    return Record(where, row, Question(where, text, tuple(answers)), prompt, turns)


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


def _split(messages: list[dict], where: str) -> tuple[tuple[dict, ...], tuple[tuple[dict, ...], ...]]:
    """The prompt, and each turn with its responses."""
    roles = [message.get("role") for message in messages]
    if "assistant" not in roles:
        raise InputError(f"{where}: no message of the assistant; a trajectory has at least one turn")
    first = roles.index("assistant")
    for number, role in enumerate(roles):
        place, known = ("after", RESPONSE_ROLES) if number > first else ("before", PROMPT_ROLES)
        if role != "assistant" and role not in known:
            raise InputError(
                f"{where}: message {number + 1} has role {role!r}; {place} the first assistant message it "
                f"can be {' or '.join(known)}"
            )
    starts = [i for i, role in enumerate(roles) if role == "assistant"]
    turns = (tuple(messages[a:b]) for a, b in zip(starts, [*starts[1:], len(roles)], strict=True))
    return tuple(messages[:first]), tuple(turns)


class Tags:
    """Trajectories as one continuous text: contents are laid end to end as they are given."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.dialect: Dialect = make_dialect("tags", tokenizer, **BUDGETS)
        # Writes a given text as a prompt, with the start token of models that have one, and nothing else.
        bare = replace(self.dialect.wording, system="", question="{}")
        self._verbatim = TagsDialect(tokenizer, wording=bare, **BUDGETS)

    def pieces(self, record: Record) -> list[list[np.ndarray]]:
        """Tokens of the prompt, then of each scored turn with its responses, in pieces."""
        encode = self.dialect.encode
        if record.prompt:
            first, *rest = (message["content"] for message in record.prompt)
            prompt = [self._verbatim.prompt(replace(record.question, question=first)), *map(encode, rest)]
        else:
            prompt = [self.dialect.prompt(record.question)]
        return [prompt, *([encode(message["content"]) for message in turn] for turn in record.turns[:-1])]


class Chat:
    """Trajectories as the model's own chat template writes them; ``tools`` of a line reach the template.

    A prefix is rendered with what opens the next turn; a turn is what that adds to the prefix before.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast):
        self.tokenizer = tokenizer
        self.dialect: Dialect = make_dialect("chat", tokenizer, **BUDGETS)

    def pieces(self, record: Record) -> list[list[np.ndarray]]:
        """Tokens of the prompt, then of each scored turn with its responses, a piece each."""
        messages, tools = list(record.prompt), record.row.get("tools")
        if not messages:
            system = {"role": "system", "content": CHAT_SYSTEM}
            messages, tools = [system, {"role": "user", "content": record.question.question}], [SEARCH_TOOL]
        before = self._render(record, messages, tools)
        pieces = [[self.dialect.encode(before)]]
        for number, turn in enumerate(record.turns[:-1], start=1):
            text = before
            for message in turn:
                # Templates know no environment; what is not a tool's is a user's.
                messages.append(message | {"role": "user"} if message["role"] == "environment" else message)
                shorter, text = text, self._render(record, messages, tools)
                if text == shorter:
                    raise InputError(
                        f"{record.where}: the chat template writes nothing for a message of role "
                        f"{message['role']!r}; use another role, or --dialect tags"
                    )
            if not text.startswith(before):
                raise InputError(
                    f"{record.where}: the chat template rewrites what stands before turn {number} when that "
                    "turn follows, so prefixes do not continue one another; use --dialect tags, or another "
                    "template"
                )
            pieces.append([self.dialect.encode(text[len(before) :])])
            before = text
        return pieces

    def _render(self, record: Record, messages: list[dict], tools: list | None) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
        except TemplateError as error:
            raise InputError(
                f"{record.where}: the chat template refuses the messages ({error}); correct them, or use --dialect tags"
            ) from None


WRITERS = {"tags": Tags, "chat": Chat}


class Scorer:
    """Values of trajectories under a policy, in packs of at most ``token_budget`` tokens.

    Args:
        lm: made by ``igpo_fast.model``.
        dialect: ``tags`` or ``chat``.
        temperature: divides the logits.
        basis, answers: as in ``rewards.values_of``.
    Raises:
        InputError: the tokenizer cannot serve the dialect.
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
    ):
        self.policy = Policy(lm, temperature, LossSettings())
        self.writer = WRITERS[dialect](tokenizer)
        self.basis, self.answers, self.token_budget = basis, answers, token_budget

    def tokenise(self, record: Record) -> Trajectory:
        """A record as tokens.

        Raises:
            InputError: a turn or an answer without tokens, a template that cannot write it, more tokens
                than a pack holds.
        """
        parts = [np.concatenate(pieces) for pieces in self.writer.pieces(record)]
        for number, part in enumerate(parts):
            if not len(part):
                what = f"turn {number}" if number else "the prompt"
                raise InputError(f"{record.where}: {what} has no tokens; give it a text")
        boundaries = np.cumsum([len(part) for part in parts])
        branches = self.writer.dialect.branches(record.question)[: 1 if self.answers == "first" else None]
        trajectory = Trajectory(record, np.concatenate(parts), boundaries, branches)
        if trajectory.packed_tokens > self.token_budget:
            raise InputError(
                f"{record.where}: {trajectory.packed_tokens} tokens with its answers, over --token-budget "
                f"{self.token_budget}; raise it, or leave the line out"
            )
        return trajectory

    def score(self, records: Iterable[Record]) -> Iterator[tuple[Record, np.ndarray, np.ndarray]]:
        """Each record with its values, float64 [T], and gains, float64 [T-1], in order; one pass a pack."""
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
        """Values of each trajectory, by its place; neighbours with the same answers share a tree."""
        untrained = lambda ids: np.full(len(ids), -1)  # noqa: E731
        trees = []
        for _, members in groupby(enumerate(batch), lambda member: member[1].record.question.answers):
            members = list(members)
            rollouts = [RolloutTokens(i, t.ids, untrained(t.ids), t.boundaries) for i, t in members]
            trees.append(Tree(rollouts, members[0][1].branches))
        plan = pack(trees)
        means = answer_means(plan, self.policy(plan).answer_logp)
        return {i: values_of(mean, self.basis, self.answers) for i, mean in means.items()}


def load_scorer(path: str, *, device: str = "auto", dtype: str = "float32", **options) -> Scorer:
    """A Scorer (which takes ``options``) of a Hugging Face model directory or name, probed.

    Raises:
        InputError: no usable model or tokenizer there.
    """
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

    The whole input is checked before a model is loaded, and ``target`` appears when it is complete; in
    between only a pack of trajectories is in memory.

    Args:
        make_scorer: called after the check.
        progress: called with (done, total) after each trajectory.
    Returns:
        How many were scored.
    Raises:
        InputError: bad input, naming file and line; ``target`` exists and ``overwrite`` is not set, or another process
            is writing it.
        StorageError: the operating system refuses to write it; before a model is loaded, where that is known.
    """
    if target.exists() and not (overwrite and target.is_file()):
        raise InputError(f"{target}: exists; give another --output, or --overwrite the file")
    total = sum(1 for _ in read_records(source))
    if not total:
        raise InputError(f"{source}: no trajectories; give at least one line")
    with atomic(target) as out:
        scored = make_scorer().score(read_records(source))
        for done, (record, values, gains) in enumerate(scored, start=1):
            row = record.row | {"values": _numbers(values), "info_gain": gains.tolist()}
            out.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            if progress:
                progress(done, total)
    return total


def _numbers(values: np.ndarray) -> list[float | None]:
    """JSON knows no NaN: null stands for it."""
    return [value if math.isfinite(value) else None for value in values.tolist()]
