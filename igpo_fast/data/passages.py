"""Passages: from a corpus file, or from the paragraphs that come with questions."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from igpo_fast.data.fields import BadField, encodable, objects, plain, text
from igpo_fast.data.rows import rows_of
from igpo_fast.errors import InputError
from igpo_fast.types import Passage

_ID_KEYS = ("id", "_id", "wikipedia_id")
"""Columns that may hold a passage's id (BEIR's is ``_id``, KILT's one of the last two); the first filled one counts."""


def load_corpus(source: str | Path) -> tuple[Passage, ...]:
    """Passages, in the order of the source.

    Args:
        source: as ``rows.rows_of`` takes it; rows are as ``passage_of`` takes them.
    Raises:
        InputError: missing or malformed file, no rows, a row without id or text, an id that occurs twice.
    """
    passages: dict[str, Passage] = {}
    for row in rows_of(source):
        try:
            passage = passage_of(row.values)
        except BadField as error:
            raise InputError(f"{row.where}: {error}") from None
        if passage.id in passages:
            raise InputError(f"{row.where}: id {passage.id!r} occurs twice; make ids unique")
        passages[passage.id] = passage
    if not passages:
        raise InputError(f"{source}: no passages; give at least one line")
    return tuple(passages.values())


def passage_of(row: Mapping[str, Any]) -> Passage:
    """A passage from ``id`` (or ``_id``) and what ``title_and_text`` takes.

    Raises:
        BadField: no id, no text, or one of another type.
    """
    id = next((found for key in _ID_KEYS if (found := text(row.get(key), key))), "")
    title, body = title_and_text(row)
    if not id:
        raise BadField('passage without "id"; give each its own')
    if not body:
        raise BadField('passage without text; fill "text" or "contents", or remove it')
    if not encodable(title + body):
        raise BadField("passage with half a character (a lone surrogate); correct it")
    return Passage(id, title, body)


def title_and_text(row: Mapping[str, Any]) -> tuple[str, str]:
    """Title and text of a passage, stripped; empty where there is none.

    Args:
        row: ``title`` and ``text``; Search-R1's ``contents``, whose first line is the title; or KILT's
            ``wikipedia_title`` with the paragraphs in ``text``, the title first among them.
    Raises:
        BadField: one of them is not a text.
    """
    if "contents" in row and "text" not in row:
        title, _, body = plain(row["contents"], "contents").partition("\n")
        if not body.strip():
            title, body = "", title
        title = title.strip().strip('"')
    elif "wikipedia_title" in row:
        title, body = plain(row["wikipedia_title"], "wikipedia_title").strip(), row.get("text")
        written = body.get("paragraph") if isinstance(body, dict) else body  # the hub's name, the file's name
        paragraphs = [paragraph.strip() for paragraph in _plain_texts(written, "text")]
        body = "\n".join(paragraphs[1:] if paragraphs[:1] == [title] else paragraphs)
    else:
        title, body = plain(row.get("title"), "title"), plain(row.get("text"), "text")
    return title.strip(), body.strip()


def own_passages(row: Mapping[str, Any]) -> list[Passage]:
    """The paragraphs in a question's row; their ids are digests, so equal paragraphs have equal ids.

    Args:
        row: MuSiQue's ``paragraphs``; HotpotQA's and 2WikiMultiHopQA's ``context``, as their files and the hub have
            it; SQuAD's ``context``.
    Raises:
        BadField: no paragraphs, or not in these forms.
    """
    row = {**(row["metadata"] if isinstance(row.get("metadata"), dict) else {}), **row}
    if row.get("paragraphs") is not None:
        pairs = ((p.get("title"), p.get("paragraph_text")) for p in objects(row["paragraphs"], "paragraphs"))
        found = [(plain(title, "paragraphs.title"), plain(body, "paragraphs.paragraph_text")) for title, body in pairs]
    elif row.get("context") is not None:
        found = list(_context(row["context"], row.get("title")))
    else:
        found = []
    pairs = [(title.strip(), body.strip()) for title, body in found if body.strip()]
    if not pairs:
        raise BadField('no paragraphs of its own ("paragraphs" or "context"); give data.corpus=FILE')
    if not all(encodable(title + body) for title, body in pairs):
        raise BadField("paragraph with half a character (a lone surrogate); correct it")
    return [Passage(_digest(title, body), title, body) for title, body in pairs]


def _context(context: Any, title: Any) -> Iterator[tuple[str, str]]:
    if isinstance(context, str):  # SQuAD
        if context.lstrip().startswith("["):
            raise BadField("context: a list written as a text; write the list itself, or give data.corpus=FILE")
        yield plain(title, "title"), plain(context, "context")
        return
    if isinstance(context, dict):  # the hub's; FlashRAG calls the sentences content
        columns = context.get("title"), context.get("sentences", context.get("content"))
        if not all(isinstance(column, list) for column in columns) or len(columns[0]) != len(columns[1]):
            raise BadField("context: not a list of titles and a list of sentences of equal length; correct it")
        context = list(zip(*columns, strict=True))
    if not isinstance(context, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in context):
        raise BadField("context: not a list of [title, sentences]; correct it, or give data.corpus=FILE")
    for name, sentences in context:
        stripped = (sentence.strip() for sentence in _plain_texts(sentences, "context.sentences"))
        yield plain(name, "context.title"), " ".join(filter(None, stripped))


def _plain_texts(value: Any, field: str) -> Iterable[str]:
    return [plain(entry, field) for entry in (value if isinstance(value, list) else [value])]


def _digest(*parts: str) -> str:
    """A digest of texts, 16 characters."""
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
