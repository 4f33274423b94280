"""Reading of settings, sections of plain values, from YAML and overrides, and a line for what is wrong with them."""

from __future__ import annotations

import difflib
import reprlib
import typing
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from igpo_fast import yaml12
from igpo_fast.errors import InputError, masked

Settings = TypeVar("Settings", bound=BaseModel)


def load(schema: type[Settings], file: str | Path | None, overrides: Sequence[str]) -> Settings:
    """``schema``, a model of sections, from a YAML file with ``section.key=value`` overrides laid over it.

    Raises:
        InputError: missing or malformed file, unknown key, wrong type or value.
    """
    values = {} if file is None else _sections(file)
    overridden = set()
    for override in overrides:
        section, key, value = _override(override, schema)
        values.setdefault(section, {})[key] = value
        overridden.add(f"{section}.{key}")
    return validated(schema, values, str(file or "configuration"), overridden)


def validated(
    schema: type[Settings], values: dict[str, dict], source: str, overridden: Set[str] = frozenset()
) -> Settings:
    """``schema`` from sections of values.

    Args:
        source: where they come from, for messages.
        overridden: ``section.key`` of values from the command line.
    Raises:
        InputError: unknown key, wrong type or value.
    """
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise _explain(error, source, overridden, schema) from None


def _sections(file: str | Path) -> dict[str, dict]:
    """The sections that a file gives, each with its keys."""
    try:
        values = yaml12.read(Path(file).read_text(encoding="utf-8-sig")) or {}
    except OSError as error:
        raise InputError(f"{file}: cannot read the configuration ({error.strerror}); give an existing file") from None
    except ValueError as error:
        raise InputError(f"{file}: not valid YAML ({error}); correct the file") from None
    if isinstance(values, dict):
        values = {section: {} if keys is None else keys for section, keys in values.items()}
    if not isinstance(values, dict) or not all(isinstance(keys, dict) for keys in values.values()):
        raise InputError(f"{file}: a configuration is sections of key: value, like 'train: {{steps: 10}}'")
    return values


def _override(override: str, schema: type[BaseModel]) -> tuple[str, str, Any]:
    """Section, key and value of ``section.key=value``."""
    name, equals, value = override.partition("=")
    section, dot, key = name.partition(".")
    shown = _short(masked(override))
    if not equals or not dot:
        hint = f"; a file is given as --config {name}" if Path(name).is_file() else ""
        raise InputError(f"{shown}: overrides are written section.key=value, like train.steps=10{hint}")
    kinds = _kinds(section, key, schema)
    if value.strip() in ("null", "~") and type(None) in kinds:
        return section, key, None
    is_list = value.lstrip().startswith(("[", "{")) and not kinds.isdisjoint((list, tuple, dict))
    try:
        return section, key, yaml12.read_argument(value, is_text=str in kinds and not is_list)
    except ValueError as error:
        raise InputError(f"{shown}: not a YAML value ({error}); quote it") from None


def _kinds(section: str, key: str, schema: type[BaseModel]) -> set[type]:
    """The plain types that a key may have; none for an unknown key."""
    outer = schema.model_fields.get(section)
    field = outer and outer.annotation.model_fields.get(key)
    return _plain_types(field.annotation) if field else set()


def _plain_types(annotation: Any) -> set[type]:
    origin = typing.get_origin(annotation)
    if origin is None or origin in (list, tuple, dict, Literal):
        return {origin or annotation}
    inner = typing.get_args(annotation)[:1] if origin is Annotated else typing.get_args(annotation)
    return set().union(*map(_plain_types, inner))


def _nearest(path: tuple[str, ...], schema: type[BaseModel]) -> str:
    """The known key most like an unknown one, as a remedy."""
    known = {f"{s}.{k}": k for s, f in schema.model_fields.items() for k in f.annotation.model_fields}
    known |= {section: section for section in schema.model_fields}
    wanted = ".".join(path)
    if now := getattr(schema, "renamed", {}).get(wanted):
        return f"it is {now} now"
    elsewhere = [full for full, key in known.items() if key == path[-1] and len(path) > 1]
    near = elsewhere or difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else "see docs/config.md for the known keys"


def _explain(error: ValidationError, file: str, overridden: Set[str], schema: type[BaseModel]) -> InputError:
    first = error.errors()[0]
    path = tuple(str(part) for part in first["loc"])
    name = ".".join(path[:2])
    unknown = first["type"] == "extra_forbidden"
    if unknown or len(path) > 1:  # the error is one key's, and not between keys
        theirs = any(f"{key}.".startswith(f"{name}.") for key in overridden)
        where = "command line" if theirs else file
    else:
        where = f"{file} with overrides" if overridden else file
    if path[:2] == ("tools", "limits") and len(path) > 2:
        name = ".".join(path)
        if unknown:
            return InputError(f"{where}: unknown limit {name}; the limits are calls, seconds and max_characters")
    if unknown:
        return InputError(f"{where}: unknown key {reprlib.repr(name)[1:-1]}; {_nearest(path, schema)}")
    message = first["msg"].removeprefix("Value error, ")
    own = first["type"] == "value_error"  # it says what it got
    if message == "Field required" and len(path) > 2:
        message = "too few numbers"
    got = "" if own or isinstance(first["input"], (dict, BaseModel)) else f", got {_short(first['input'])}"
    prefix = "" if not name or message.startswith(f"{name}.") else f"{name}: "
    return InputError(masked(f"{where}: {prefix}{message}{got}"))


def _short(value: Any) -> str:
    """As Python writes it, long ones cut, on one line."""
    short = reprlib.Repr()
    short.maxlevel = 2
    short.maxstring = short.maxlong = short.maxother = 60
    return " ".join(short.repr(value).split())
