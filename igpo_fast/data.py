"""Questions and passages, from a made-up world, files, or the datasets hub."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igpo_fast.config import Config
from igpo_fast.errors import InputError
from igpo_fast.tools.base import Passage
from igpo_fast.types import Question
from igpo_fast.world import make_worlds

QUESTION_KEYS = ("question", "Question")
"""Columns that may hold the question (Bamboogle's is upper case); the first present counts."""
ANSWER_KEYS = ("answers", "golden_answers", "answer", "Answer", "ground_truth", "solution", "possible_answers")
"""Columns that may hold the accepted answers, a text or a list of texts; the first present counts. TriviaQA's
``answer`` has ``value`` and ``aliases``, PopQA's ``possible_answers`` is JSON."""
ID_KEYS = ("id", "_id", "question_id")
"""Columns that may hold the id (2WikiMultiHopQA's, TriviaQA's); the first present counts."""
ANSWER_SPLIT = "<|answer_split|>"
"""Joins several accepted answers in verl's ``reward_model.ground_truth``."""


SEARCH_R1_PROMPT = re.compile(r".*<search>.*<answer>.*Question:(.+)", re.DOTALL)
NAMED_SOURCE = re.compile(r"(?:([\w.+-]+)=)?(.*)", re.DOTALL)
"""A source of evaluation questions and the name that may stand before it."""


@dataclass(frozen=True)
class Data:
    """What a run reads."""

    train: tuple[Question, ...]
    eval: tuple[Question, ...]
    """What an evaluation asks: at most ``eval.questions`` of each data set."""
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
        eval=tuple(shuffled[:wanted]),
        collections={world.name: world.passages for world in [*train, *evaluation]},
    )


def _from_files(config: Config) -> Data:
    train = load_questions(config.data.train)
    if config.data.eval is not None:
        evaluation = _evaluation(config.data.eval, config.eval.questions)
    else:
        held_out = min(config.eval.questions, len(train) // 2)
        if not held_out:
            raise InputError(f"{config.data.train}: one question cannot be split; give data.eval=FILE")
        train, evaluation = train[:-held_out], train[-held_out:]
    collections = {} if config.data.corpus is None else {"": load_corpus(config.data.corpus)}
    return Data(train, evaluation, collections)


def _evaluation(given: str | Sequence[str], most: int) -> tuple[Question, ...]:
    """At most ``most`` questions of each data set: of a larger one a random part (many are sorted), always the same."""
    sources = [given] if isinstance(given, str) else given
    sets: dict[str, list[Question]] = {}
    seen: set[str] = set()
    for entry in sources:
        name, source = NAMED_SOURCE.fullmatch(entry).groups()
        if name is None and len(sources) > 1:
            name = Path(source.partition(":")[0]).stem
        for question in load_questions(source, name or ""):
            if question.id in seen:
                raise InputError(
                    f"data.eval: an earlier set has the question {question.id!r} of {entry!r} too; tell them apart by "
                    "writing NAME=SOURCE"
                )
            seen.add(question.id)
            sets.setdefault(question.dataset, []).append(question)
    for questions in sets.values():
        if len(questions) > most:
            random.Random(0).shuffle(questions)
            del questions[most:]
    return tuple(question for questions in sets.values() for question in questions)


def load_questions(source: str | Path, dataset: str = "") -> tuple[Question, ...]:
    """Questions with their accepted answers, in the order of the source.

    Args:
        source: a ``.jsonl`` or ``.parquet`` file, or a datasets-hub name or folder, optional configuration and split:
            ``name:split`` or ``name:configuration:split``. Rows have one of ``QUESTION_KEYS`` (or verl's
            ``extra_info.question``, or ``prompt``: a text, or a chat whose last user message counts) and one of
            ``ANSWER_KEYS`` (with MuSiQue's ``answer_aliases``) or verl's ``reward_model.ground_truth``; optional
            one of ``ID_KEYS``, ``hops``, ``steps``, or MuSiQue's ``question_decomposition``, or HotpotQA's and
            2WikiMultiHopQA's ``supporting_facts``, whose titles are counted as hops.
        dataset: ``Question.dataset``, in place of verl's ``data_source``. Ids begin with it.
    Raises:
        InputError: missing or malformed file, no rows, a row without question or answers, an id given twice.
    """
    questions: dict[str, Question] = {}
    for where, row in _rows(source):
        number = where.rpartition(" ")[2]
        question = _question(row, where, dataset, default_id=f"{Path(str(source)).stem}-{number}")
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
    title, text = title_and_text(row)
    if row.get("id") in (None, ""):
        raise ValueError('passage without "id"; give each its own')
    if not text:
        raise ValueError('passage without text; fill "text" or "contents", or remove it')
    return Passage(str(row["id"]), title, text)


def title_and_text(row: Mapping[str, Any]) -> tuple[str, str]:
    """Those of a passage, stripped; empty where there is none. Of ``contents`` the first line is the title."""
    if "contents" in row and "text" not in row:
        title, _, text = str(row["contents"] or "").partition("\n")
        if not text.strip():
            title, text = "", title
        title = title.strip().strip('"')
    else:
        title, text = str(row.get("title") or ""), str(row.get("text") or "")
    return title.strip(), text.strip()


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
            f"a step asks {per_step} questions (train.questions and rollout.oversample), the data set has "
            f"{n_questions} to train on; lower these, or give more"
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
    name, *rest = str(source).split(":")
    if len(rest) in (1, 2):
        return _hub_rows(str(source), [name, *rest[:-1]], split=rest[-1])
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


def _hub_rows(source: str, name: Sequence[str], split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows of the data set ``name`` and perhaps its configuration."""
    import datasets

    try:
        rows = datasets.load_dataset(*name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: cannot load it ({reason}); give an existing name and split") from None
    for number, row in enumerate(rows, start=1):
        yield f"{source} row {number}", row


def _question(row: Mapping[str, Any], where: str, dataset: str, default_id: str) -> Question:
    text = _prompt_text(_first(row, QUESTION_KEYS) or _inside(row, "extra_info").get("question") or row.get("prompt"))
    if not text:
        raise InputError(f'{where}: no question; fill "question" or "prompt"')
    try:
        found = _answers(row)
    except ValueError:
        raise InputError(f"{where}: possible_answers is not a JSON list; correct it") from None
    answers = tuple(dict.fromkeys(answer for answer in map(str.strip, found) if answer))
    if not answers:
        raise InputError(f'{where}: question without answers; fill "answers" or remove it')
    hops, steps = _support(row)
    if not isinstance(hops, int | None):
        raise InputError(f"{where}: hops {hops!r} is not a whole number; correct or remove it")
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise InputError(f"{where}: steps is not a list of objects; correct or remove it")
    source, id = str(row.get("data_source") or ""), _first(row, ID_KEYS)
    id = default_id if id in (None, "") else str(id)
    id = "/".join(dict.fromkeys(part for part in (dataset, source, id) if part))
    return Question(id, text, answers, hops, tuple(steps), dataset=dataset or source)


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> Any:
    """The first of several columns that is filled."""
    return next((row[key] for key in keys if row.get(key) is not None), None)


def _inside(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A column of objects; empty where there is none."""
    return row[key] if isinstance(row.get(key), dict) else {}


def _support(row: Mapping[str, Any]) -> tuple[Any, Any]:
    """Hops and steps: as given, or steps of a decomposition and the number of these or of supporting titles."""
    row = {**_inside(row, "metadata"), **row}  # FlashRAG keeps a data set's own columns in metadata
    decomposition, facts = row.get("question_decomposition"), row.get("supporting_facts")
    if row.get("hops") is not None or row.get("steps"):
        return row.get("hops"), row.get("steps") or []
    if decomposition:
        return len(decomposition), decomposition
    if isinstance(facts, dict):  # the hub's HotpotQA; the original has [title, sentence] pairs
        facts = [[title] for title in facts.get("title", [])]
    titles = {fact[0] for fact in facts if fact} if isinstance(facts, list) else set()
    return len(titles) or None, []


def _prompt_text(value: Any) -> str:
    """A text, or the last user message of a chat; of Search-R1's prompts the question without the instructions, which
    are the dialect's."""
    if isinstance(value, list):
        chat = [message for message in value if isinstance(message, dict)]
        value = next((m.get("content") for m in reversed(chat) if m.get("role") == "user"), None)
    if not isinstance(value, str):
        return ""
    instructed = SEARCH_R1_PROMPT.fullmatch(value)
    return (instructed[1] if instructed else value).strip()


def _answers(row: Mapping[str, Any]) -> Iterable[str]:
    """The accepted answers as texts, blank ones included.

    Raises:
        ValueError: PopQA's are not JSON.
    """
    value = _first(row, ANSWER_KEYS)
    if value is None:
        value = _inside(row, "reward_model").get("ground_truth")
    elif value is row.get("possible_answers") and isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, dict):
        value = value["target"] if "target" in value else [value.get("value"), *(value.get("aliases") or [])]
    values = value.split(ANSWER_SPLIT) if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [str(answer) for answer in [*values, *(row.get("answer_aliases") or [])] if answer is not None]
