"""JSON reading and writing: compact UTF-8, with null for numbers that JSON does not have."""

from __future__ import annotations

import math
from typing import Any

import orjson

from igpo_fast.errors import InputError


def json_bytes(value: Any, *, indent: bool = False) -> bytes:
    """``value`` as JSON: arrays and tensors become lists, non-finite numbers null.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    option = orjson.OPT_SERIALIZE_NUMPY | (orjson.OPT_INDENT_2 if indent else 0)
    return orjson.dumps(value, default=_as_list, option=option)


def json_line(value: Any) -> bytes:
    """``value`` as one line of a JSON-lines file."""
    return json_bytes(value) + b"\n"


def json_value(content: bytes | str, where: object) -> Any:
    """The value that ``content`` holds.

    Raises:
        InputError: not JSON (also if nested too deep, or with a number too large or NaN), naming ``where``.
    """
    try:
        return orjson.loads(content)
    except orjson.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg}); restore or correct it") from None


def json_rows(content: bytes, path: object, key: str, *, ascending: bool = False) -> list[dict]:
    """The rows of a JSON-lines file, objects with an integer under ``key``; a last line without its end is still being
    written.

    Args:
        ascending: each row's integer is larger than that of the row before.
    Raises:
        InputError: a line is no such row, naming ``path`` and line.
    """
    rows = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if line.strip():
            rows.append(json_value(line, where := f"{path}:{number}"))
            if not (isinstance(rows[-1], dict) and type(rows[-1].get(key)) is int):
                raise InputError(f"{where}: not an object with an integer {key!r}; delete or repair the line")
            if ascending and len(rows) > 1 and rows[-1][key] <= rows[-2][key]:
                raise InputError(
                    f"{where}: {key} {rows[-1][key]} after {key} {rows[-2][key]}; delete or repair the line"
                )
    return rows


def finite(number: float | None) -> float | None:
    """``number``, or None where it is missing or not finite: what JSON and rows have in place of it."""
    return number if number is not None and math.isfinite(number) else None


def number_of(value: object) -> float | None:
    """``value`` if it is a finite number, else None."""
    return finite(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
