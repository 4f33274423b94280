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


def finite(number: float | None) -> float | None:
    """``number``, or None where it is missing or not finite: what JSON and rows have in place of it."""
    return number if number is not None and math.isfinite(number) else None


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
