"""Questions with their accepted answers, from the columns that verl, TRL and the usual data sets use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from igpo_fast.data.fields import BadField, objects, said, text, texts, whole_number
from igpo_fast.data.passages import own_passages
from igpo_fast.data.rows import Row, rows_of
from igpo_fast.errors import InputError
from igpo_fast.types import Passage, Question

QUESTION_KEYS = ("question", "Question")
"""Columns that may hold the question (Bamboogle's is upper case); the first present one counts."""
ANSWER_KEYS = ("answers", "golden_answers", "answer", "Answer", "ground_truth", "solution", "possible_answers")
"""Columns that may hold the accepted answers, a text or a list of texts; the first present one counts. SQuAD's
``answers`` has ``text``, TriviaQA's ``answer`` ``value`` and ``aliases``; PopQA's ``possible_answers`` is JSON."""
ID_KEYS = ("id", "_id", "question_id")
"""Columns that may hold the id (2WikiMultiHopQA's, TriviaQA's); the first present one counts."""
ANSWER_SPLIT = "<|answer_split|>"
"""Joins several accepted answers in verl's ``reward_model.ground_truth``."""

SEARCH_R1_PROMPT = re.compile(r".*<search>.*<answer>.*Question:(.+)", re.DOTALL)


def load_questions(
    source: str | Path, dataset: str = "", *, otherwise: str = "", passages: dict[str, Passage] | None = None
) -> tuple[Question, ...]:
    """Questions with their accepted answers, in the order of the source.

    Args:
        source: as ``rows.rows_of`` takes it. Rows have one of ``QUESTION_KEYS`` (or verl's ``extra_info.question``,
            or ``prompt``: a text, or a chat whose last user message counts) and one of ``ANSWER_KEYS`` (with MuSiQue's
            ``answer_aliases``) or verl's ``reward_model.ground_truth``, or KILT's ``input`` and ``output``; optional
            one of ``ID_KEYS`` or verl's ``extra_info.index``, ``hops``, ``steps``, or MuSiQue's
            ``question_decomposition``, or HotpotQA's and 2WikiMultiHopQA's ``supporting_facts``, whose titles are
            counted as hops.
        dataset: ``Question.dataset``, in place of verl's ``data_source``. Ids begin with it.
        otherwise: ``Question.dataset`` of rows that name none, if ``dataset`` does not either.
        passages: is filled with the rows' own paragraphs, by id.
    Raises:
        InputError: missing or malformed file, no rows, a row without question or answers (or paragraphs, if wanted), a
            field of the wrong kind, an id given twice.
    """
    questions: dict[str, Question] = {}
    for row in map(_of_kilt, rows_of(source)):
        try:
            question = _question(row, dataset, otherwise, questions)
            if passages is not None:
                passages.update((passage.id, passage) for passage in own_passages(row.values))
        except BadField as error:
            raise InputError(f"{row.where}: {error}") from None
        if question.id in questions:
            raise InputError(f"{row.where}: id {question.id!r} occurs twice; make ids unique")
        questions[question.id] = question
    if not questions:
        raise InputError(f"{source}: no questions; give at least one row")
    return tuple(questions.values())


def _of_kilt(row: Row) -> Row:
    """The row with KILT's columns renamed: ``input`` to the question, the answers in ``output`` to a list."""
    asked, outputs = row.values.get("input"), row.values.get("output")
    if not isinstance(asked, str) or not isinstance(outputs, list) or _first(row.values, QUESTION_KEYS):
        return row
    answers = [output.get("answer") for output in outputs if isinstance(output, dict)]
    return row._replace(values={"question": asked, "answers": answers, "id": row.values.get("id")})


def _question(row: Row, dataset: str, otherwise: str, taken: Mapping[str, Question]) -> Question:
    values = row.values
    question = _question_text(values)
    if not question:
        raise BadField('no question; fill "question" or "prompt"')
    answers = tuple(dict.fromkeys(answer for answer in map(str.strip, _answers(values)) if answer))
    if not answers:
        raise BadField('question without answers; fill "answers" or remove it')
    hops, steps = _support(values)
    source = text(values.get("data_source"), "data_source")
    name = dataset or source or otherwise

    def full(id: str) -> str:
        return "/".join(dict.fromkeys(part for part in (dataset or ("" if source else otherwise), source, id) if part))

    id = full(_given_id(values) or _verl_id(values) or row.name)
    if id in taken and not _given_id(values):  # an index that restarts in every part of a file
        id = full(row.name)
    return Question(id, question, answers, hops, steps, dataset=name)


def _given_id(row: Mapping[str, Any]) -> str:
    """The first of several columns that is filled."""
    return next((found for key in ID_KEYS if (found := text(row.get(key), key))), "")


def _verl_id(row: Mapping[str, Any]) -> str:
    """Verl's split and index, which stay the same if rows are shuffled or left out."""
    info = _inside(row, "extra_info")
    index = text(info.get("index"), "extra_info.index")
    return "-".join(filter(None, (text(info.get("split"), "extra_info.split"), index))) if index else ""


def _first(row: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    """The first of several columns that is filled."""
    return next((key for key in keys if row.get(key) is not None), None)


def _inside(row: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A column that holds an object; empty if there is none."""
    return row[key] if isinstance(row.get(key), dict) else {}


def _question_text(row: Mapping[str, Any]) -> str:
    """A text, or the last user message of a chat; from Search-R1's prompts only the question, because the dialect has
    its own instructions."""
    key = _first(row, QUESTION_KEYS)
    asked = _inside(row, "extra_info").get("question")
    if key:
        value, field = row[key], key
    else:
        value, field = (asked, "extra_info.question") if asked else (row.get("prompt"), "prompt")
    if isinstance(value, list):
        chat = [message for message in value if isinstance(message, dict)]
        value = next((m.get("content") for m in reversed(chat) if m.get("role") == "user"), None)
    if not isinstance(value, str):
        return ""
    question = said(value, field)
    instructed = SEARCH_R1_PROMPT.fullmatch(question)
    return (instructed[1] if instructed else question).strip()


def _answers(row: Mapping[str, Any]) -> list[str]:
    """The accepted answers, blank ones included."""
    field = _first(row, ANSWER_KEYS)
    if field is None:
        found = accepted_answers(_inside(row, "reward_model").get("ground_truth"), "reward_model.ground_truth")
    else:
        found = accepted_answers(row[field], field)
    return [*found, *texts(row.get("answer_aliases"), "answer_aliases")]


def accepted_answers(value: Any, field: str) -> list[str]:
    """The accepted answers in a value that data sets hold: a text, verl's joined texts, a list, an object with
    ``target``, ``text`` or ``value``; blank ones included.

    Raises:
        BadField: anything else.
    """
    if field == "possible_answers" and isinstance(value, str):
        value = _json_list(value, field)
    if isinstance(value, str):
        several = value.split(ANSWER_SPLIT)
        return texts(several if len(several) > 1 else value, field)
    if not isinstance(value, dict):
        return texts(value, field)
    for key in ("target", "text"):  # the keys of Search-R1 and SQuAD
        if key in value:
            return texts(value[key], f"{field}.{key}")
    if "value" not in value:
        raise BadField(f"{field}: an object without target, text or value; write a text or a list of texts")
    return [*texts(value["value"], f"{field}.value"), *texts(value.get("aliases"), f"{field}.aliases")]


def _json_list(written: str, field: str) -> list:
    try:
        found = json.loads(written)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise BadField(f"{field} is not a JSON list; correct it")
    return found


def _support(row: Mapping[str, Any]) -> tuple[int | None, tuple[dict, ...]]:
    """Hops and steps, as given; else steps from a decomposition, and hops as their number or that of supporting
    titles."""
    row = {**_inside(row, "metadata"), **row}  # FlashRAG keeps a data set's own columns in metadata
    if row.get("hops") is not None or row.get("steps"):
        return whole_number(row.get("hops"), "hops"), _steps(row.get("steps"))
    if row.get("question_decomposition"):
        steps = _steps(row["question_decomposition"])
        return len(steps), steps
    facts = row.get("supporting_facts")
    # The hub's HotpotQA has columns, the original [title, sentence] pairs; others have a text, which tells nothing.
    titles = facts.get("title") if isinstance(facts, dict) else facts if isinstance(facts, list) else None
    if isinstance(facts, list):
        titles = [fact[0] for fact in facts if isinstance(fact, list) and fact]
    return len(set(texts(titles, "supporting_facts"))) or None, ()


def _steps(value: Any) -> tuple[dict, ...]:
    """Steps with question, answer and passage id as texts, and all else unchanged."""
    known = ("question", "answer", "passage_id")
    return tuple(
        step | {key: text(step[key], f"steps.{key}") for key in known if step.get(key) is not None}
        for step in objects(value, "steps")
    )
