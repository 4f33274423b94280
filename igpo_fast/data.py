"""Questions and passages, from a made-up world, files, or the datasets hub."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpo_fast.config import Config
from igpo_fast.errors import InputError
from igpo_fast.tools.base import Passage
from igpo_fast.types import Question
from igpo_fast.world import make_worlds

ANSWER_KEYS = ("answers", "golden_answers", "answer", "ground_truth", "solution")
"""Columns that may hold the accepted answers, a text or a list of texts; the first present counts."""
ANSWER_SPLIT = "<|answer_split|>"
"""Joins several accepted answers in verl's ``reward_model.ground_truth``."""


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: tuple[Question, ...]
    eval: tuple[Question, ...]
    """Of worlds at least ``eval.questions``; of files all of ``data.eval``, or the end of ``data.train``."""
    collections: Mapping[str, Sequence[Passage]]
    """What ``Question.corpus`` names: one for each world; from files one without a name, or none."""


def load_data(config: Config) -> Data:
    """Read or make up the questions and passages of a run.

    Raises:
        InputError: bad input, naming file and line; too few questions.
    """
    return _from_world(config) if config.data.source == "world" else _from_files(config)


def _from_world(config: Config) -> Data:
    train = make_worlds(config.world, "train")
    wanted = config.eval.questions
    evaluation = make_worlds(config.world, "eval", questions=-(-wanted // config.world.eval_worlds))
    # Shuffled, so that any first part of them covers all worlds.
    shuffled = [question for world in evaluation for question in world.questions]
    random.Random(config.world.seed).shuffle(shuffled)
    if len(shuffled) < wanted:
        raise InputError(
            f"eval.questions: {wanted} wanted, the worlds have {len(shuffled)}; raise world.eval_worlds or "
            "world.persons, or lower eval.questions"
        )
    return Data(
        train=tuple(question for world in train for question in world.questions),
        eval=tuple(shuffled),
        collections={world.name: world.passages for world in [*train, *evaluation]},
    )


def _from_files(config: Config) -> Data:
    train = load_questions(config.data.train)
    if config.data.eval is not None:
        evaluation = load_questions(config.data.eval)
    else:
        held_out = min(config.eval.questions, len(train) // 2)
        if not held_out:
            raise InputError(f"{config.data.train}: one question cannot be split; give data.eval=FILE")
        train, evaluation = train[:-held_out], train[-held_out:]
    collections = {} if config.data.corpus is None else {"": load_corpus(config.data.corpus)}
    return Data(train, evaluation, collections)


def load_questions(source: str | Path) -> tuple[Question, ...]:
    """Questions with their accepted answers, in the order of the source.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, or a datasets-hub name or folder and split: ``name:split``.
            Rows have ``question`` (or ``prompt``: a text, or a chat whose last user message counts) and one
            of ``ANSWER_KEYS`` or verl's ``reward_model.ground_truth``; optional ``id``, ``hops``, ``steps``.
    Raises:
        InputError: missing or malformed file, no rows, a row without question or answers, an id given twice.
    """
    questions: dict[str, Question] = {}
    for where, row in _rows(source):
        number = where.rpartition(" ")[2]
        question = _question(row, where, default_id=f"{Path(str(source)).stem}-{number}")
        if question.id in questions:
            raise InputError(f"{where}: id {question.id!r} occurs twice; make ids unique")
        questions[question.id] = question
    if not questions:
        raise InputError(f"{source}: no questions; give at least one row")
    return tuple(questions.values())


def load_corpus(path: str | Path) -> tuple[Passage, ...]:
    """Passages, in the order of the file.

    Args:
        path: JSON lines with ``id``, ``text`` and optional ``title``, or Search-R1's ``id`` and ``contents``
            (``title\\ntext``).
    Raises:
        InputError: missing or malformed file, no lines, a line without id or text, an id that occurs twice.
    """
    passages: dict[str, Passage] = {}
    for where, row in _json_lines(Path(path)):
        try:
            passage = passage_of(row)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from None
        if passage.id in passages:
            raise InputError(f"{where}: id {passage.id!r} occurs twice; make ids unique")
        passages[passage.id] = passage
    if not passages:
        raise InputError(f"{path}: no passages; give at least one line")
    return tuple(passages.values())


def passage_of(row: Mapping[str, Any]) -> Passage:
    """A passage from ``id``, ``title``, ``text`` or from Search-R1's ``id``, ``contents``.

    Raises:
        ValueError: no id or no text.
    """
    if "contents" in row and "text" not in row:
        title, _, text = str(row["contents"] or "").partition("\n")
        if not text.strip():
            title, text = "", title
        title = title.strip().strip('"')
    else:
        title, text = str(row.get("title") or ""), str(row.get("text") or "")
    if row.get("id") in (None, ""):
        raise ValueError('passage without "id"; give each its own')
    if not text.strip():
        raise ValueError('passage without text; fill "text" or "contents", or remove it')
    return Passage(str(row["id"]), title.strip(), text.strip())


def question_order(n_questions: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of the questions of a step: a slice of the epoch's permutation.

    It depends on its arguments alone, so a resumed run needs to know only its step. An epoch is as many whole steps
    as the questions fill; which few are left out differs from epoch to epoch.

    Args:
        step: 0-based.
    Returns:
        ``per_step`` different indices in 0 .. n_questions-1.
    Raises:
        InputError: fewer questions than a step takes.
    """
    if n_questions < per_step:
        raise InputError(
            f"train.questions={per_step}: the data set has {n_questions} training questions; lower it or give more"
        )
    epoch, at = divmod(step, n_questions // per_step)
    order = random.Random(f"{seed}/{epoch}").sample(range(n_questions), n_questions)
    return order[at * per_step : (at + 1) * per_step]


def _rows(source: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of a source, with where it stands (ending in a space and its number, from 1)."""
    path = Path(source)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    name, colon, split = str(source).rpartition(":")
    if colon:
        return _hub_rows(name, split)
    raise InputError(f"{source}: not a .jsonl or .parquet file, nor a datasets-hub name with :split; give one of these")


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give an existing file") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8 text; give JSON lines") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        yield where, json_object(line, where)


def json_object(line: str, where: str) -> dict[str, Any]:
    """A line of JSON lines.

    Raises:
        InputError: not an object, or not JSON, naming ``where``.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); write one object a line") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}, not a JSON object; write one object a line")
    return row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror or error}); give an existing file") from None
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not parquet ({str(error).splitlines()[0]})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{path} row {number}", row


def _hub_rows(name: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name}:{split}: cannot load it ({reason}); give an existing name and split") from None
    for number, row in enumerate(rows, start=1):
        yield f"{name}:{split} row {number}", row


def _question(row: Mapping[str, Any], where: str, default_id: str) -> Question:
    text = _prompt_text(row.get("question") or row.get("prompt"))
    if not text:
        raise InputError(f'{where}: no question; fill "question" or "prompt"')
    answers = tuple(dict.fromkeys(answer for answer in map(str.strip, _answers(row)) if answer))
    if not answers:
        raise InputError(f'{where}: question without answers; fill "answers" or remove it')
    id, hops, steps = row.get("id"), row.get("hops"), row.get("steps") or []
    if not isinstance(hops, int | None):
        raise InputError(f"{where}: hops {hops!r} is not a whole number; correct or remove it")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"{where}: steps is not a list of objects; correct or remove it")
    return Question(default_id if id in (None, "") else str(id), text, answers, hops, tuple(steps))


def _prompt_text(value: Any) -> str:
    """A text, or the last user message of a chat."""
    if isinstance(value, list):
        chat = [message for message in value if isinstance(message, dict)]
        value = next((m.get("content") for m in reversed(chat) if m.get("role") == "user"), None)
    return value.strip() if isinstance(value, str) else ""


def _answers(row: Mapping[str, Any]) -> Iterable[str]:
    """The accepted answers as texts, blank ones included."""
    value = next((row[key] for key in ANSWER_KEYS if row.get(key) is not None), None)
    if value is None and isinstance(row.get("reward_model"), dict):
        value = row["reward_model"].get("ground_truth")
    if isinstance(value, dict):
        value = value.get("target")
    if isinstance(value, str):
        return value.split(ANSWER_SPLIT)
    values = value if isinstance(value, list) else [value]
    return [str(answer) for answer in values if answer is not None]
