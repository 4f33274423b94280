"""Typed fields of a row from any file: a text, a number, a list of texts, or a refusal that names the field."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from igpo_fast.words import nfc

_LIST_AS_TEXT = re.compile(
    r"""\[\s*\] | \[\s*(['"]).*['"]\s*\] | \[\s*[\[{].*[\]}]\s*\] | \{\s*(['"])\w+\2\s*:.*\}""", re.DOTALL | re.VERBOSE
)
"""Matches a list or an object written as text, in JSON or Python."""


class BadField(ValueError):
    """A field cannot be used; the reader of the row adds its place."""


def kind_of(value: Any) -> str:
    """A value's kind in a few words, short whatever it holds."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}"
    names = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"a {type(value).__name__}")


def plain(value: Any, field: str) -> str:
    """A text in Unicode's composed form; for a number its usual form (1999.0, as tables hold years, is "1999"); for
    null "".

    Raises:
        BadField: anything else.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return nfc(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float) and math.isfinite(value):
        return np.format_float_positional(value, trim="-")
    raise BadField(f"{field}: {kind_of(value)}, not a text or a number; correct it")


def text(value: Any, field: str) -> str:
    """Like ``plain``, but refuses texts that UTF-8 and tokenizers cannot hold.

    Raises:
        BadField: anything else, or half a character.
    """
    found = plain(value, field)
    if not encodable(found):
        raise BadField(f"{field}: a text with half a character (a lone surrogate); correct it")
    return found


def encodable(found: str) -> bool:
    """Whether a text has no lone surrogates: JSON's escapes can write them, UTF-8 cannot."""
    try:
        found.encode()
    except UnicodeEncodeError:
        return False
    return True


def said(value: Any, field: str) -> str:
    """Like ``text``, for questions and answers: refuses a list that was turned into a text.

    Raises:
        BadField: anything else, or a list or object written as a text.
    """
    found = text(value, field)
    if _LIST_AS_TEXT.fullmatch(found.strip()):
        raise BadField(f"{field}: a list or an object written as a text; write the list itself")
    return found


def texts(value: Any, field: str) -> list[str]:
    """A list of texts as ``said`` reads them, without nulls; one text or number gives a list of one, null an empty
    list.

    Raises:
        BadField: anything else.
    """
    if isinstance(value, str) and _is_json_list(value):
        raise BadField(f"{field}: a list or an object written as a text; write the list itself")
    entries = value if isinstance(value, list) else [value]
    return [said(entry, field) for entry in entries if entry is not None]


def _is_json_list(written: str) -> bool:
    try:
        return written.lstrip().startswith("[") and isinstance(json.loads(written), list)
    except (ValueError, RecursionError):
        return False


def whole_number(value: Any, field: str) -> int | None:
    """A whole number of 0 or more, even if it is held as 2.0; None for null.

    Raises:
        BadField: anything else.
    """
    if value is None:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0
    if not number or math.isinf(value) or value != int(value):
        shown = repr(value) if isinstance(value, (str, int, float)) and len(str(value)) < 80 else kind_of(value)
        raise BadField(f"{field} {shown} is not a whole number; correct or remove it")
    return int(value)


def objects(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of objects, also from the object of lists that tables hold; empty for null.

    Raises:
        BadField: anything else.
    """
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) > 1:
            raise BadField(f"{field}: columns of different lengths; correct it")
        return [dict(zip(value, entries, strict=True)) for entries in zip(*value.values(), strict=True)]
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise BadField(f"{field} is not a list of objects; correct or remove it")
    return value
