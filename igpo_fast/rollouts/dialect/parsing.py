"""Finds the actions in a turn's text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from igpo_fast.types import ANSWER, Action, answer_with

Actions = tuple[Action, ...]
Schema = Mapping[str, Any]
"""A function's description, as ``Tool.schemas`` has it."""
Reader = Callable[[str, int], tuple[Actions, int]]
"""(text, start of the arguments) -> the actions there, ``NOTHING`` if they are not well-formed, and the place from
which to read on."""

NOTHING: Actions = ()
ECHO = "your "
"""Our own instructions show ``your query`` where a query goes; a policy that repeats that does not act."""
OPEN, CLOSE = "<think>", "</think>"
ANSWERS, CALLS = ("<answer>", "</answer>"), ("<tool_call>", "</tool_call>")
"""Opening and closing tag of an action."""


def first_actions(
    text: str,
    readers: Mapping[str, Reader],
    *,
    in_thought: bool = False,
    opening: Reader | None = None,
    parallel: bool = False,
    thought: tuple[str, str] = (OPEN, CLOSE),
) -> Actions:
    """The first well-formed action outside thoughts, and with ``parallel`` the calls that follow a first one;
    ``NOTHING`` if there is none.

    Text is read from left to right, and tags inside an action do not count: ``<think>`` in a query opens no thought. A
    thought ends at the next ``</think>``; an unclosed one holds all the rest. Everything before an unopened
    ``</think>`` is thought. An action is not well-formed if its arguments do not fit, or its text is blank or an echo
    of the instructions; reading then continues behind its opening tag or its end.

    Search-R1's code takes the first pair of tags, even in a thought. Sampling ends at the first closing tag there and
    here, so a turn with one inside a thought is answered with the hint.

    Args:
        readers: readers of actions, by opening tag.
        in_thought: whether the text begins inside a thought.
        opening: reads actions without a tag at the start of the text.
        thought: opening and closing of a thought.
    """
    opens, closes = thought
    marks = re.compile("|".join(map(re.escape, (*thought, *readers))))
    text = opens + text if in_thought else text
    found, at, begins = NOTHING, 0, True

    def with_more(actions: Actions) -> Actions:
        called = [action for action in actions if action.tool != ANSWER]
        if not found:
            return actions
        return (*found, *called) if parallel and found[0].tool != ANSWER else found

    while True:
        if begins and opening:
            actions, at = opening(text, at)
            found = with_more(actions)
        mark = marks.search(text, at)
        if not mark:
            return found
        at, begins = mark.end(), mark[0] in thought
        if mark[0] == opens:
            stop = text.find(closes, at)
            at = len(text) if stop < 0 else stop + len(closes)
        elif mark[0] == closes:
            found = NOTHING
        else:
            actions, at = readers[mark[0]](text, at)
            found = with_more(actions)


def tagged(read: Callable[[str], Actions], closing: str, tags: tuple[str, ...]) -> Reader:
    """A reader of what stands before its closing tag, without any of ``tags`` in it."""

    def reader(text: str, at: int) -> tuple[Actions, int]:
        stop = text.find(closing, at)
        if stop < 0 or any(text.find(tag, at, stop) >= 0 for tag in tags):
            return NOTHING, at
        return read(text[at:stop]), stop + len(closing)

    return reader


def answered(text: str) -> Actions:
    """The final answer; ``NOTHING`` if it is blank or an echo."""
    text = text.strip()
    return NOTHING if text in ("", "and", ECHO + "answer") else (answer_with(text),)


def parameters_of(schema: Schema) -> Mapping[str, Schema]:
    """The parameters of a function, by name."""
    return schema["function"].get("parameters", {}).get("properties", {})


def only_text(schema: Schema) -> str:
    """The name of a function's only parameter if that is a text, else ""."""
    parameters = parameters_of(schema)
    name = next(iter(parameters), "")
    return name if len(parameters) == 1 and parameters[name].get("type") == "string" else ""


def called(schema: Schema | None, arguments: Any) -> Actions:
    """The call of a function; ``NOTHING`` if the arguments do not fit its schema.

    A required argument must be there, and each of its type; a function's only text may be neither blank nor an echo.
    Arguments that the schema does not know are left out. Halves of surrogate pairs, which JSON can write and no text
    file can hold, are replaced.
    """
    if schema is None or not isinstance(arguments, Mapping):
        return NOTHING
    parameters = parameters_of(schema)
    required = schema["function"].get("parameters", {}).get("required", ())
    known = {name: encodable(value) for name, value in arguments.items() if name in parameters}
    if not known.keys() >= set(required) or not all(fits(value, parameters[name]) for name, value in known.items()):
        return NOTHING
    if (name := only_text(schema)) in known:
        known[name] = known[name].strip()
        if known[name] in ("", "and", ECHO + name):
            return NOTHING
    return (Action(schema["function"]["name"], known),)


def called_with(schema: Schema, text: str) -> Actions:
    """The call of a function that ``text`` stands for: its only text as it is, or JSON, of an object of arguments or of
    an only argument that is no text; ``NOTHING`` if it fits neither."""
    if name := only_text(schema):
        return called(schema, {name: text})
    parameters = list(parameters_of(schema))
    value, stop = json_at(text, 0) if text.strip() else ({}, 0)
    if text[stop:].strip():
        return NOTHING
    return called(schema, {parameters[0]: value} if len(parameters) == 1 and text.strip() else value)


_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def kinds_of(schema: Schema) -> tuple[str, ...]:
    """The names of the JSON types that a schema allows; empty if it allows any."""
    if "anyOf" in schema:
        options = [kinds_of(option) for option in schema["anyOf"]]
        return tuple(kind for option in options for kind in option) if all(options) else ()
    kinds = schema.get("type") or ()
    kinds = {kinds} if isinstance(kinds, str) else set(kinds)
    null = {"null"} if kinds and schema.get("nullable") else set()
    return tuple(kinds | null) if kinds <= {*_TYPES, "null"} else ()


def fits(value: Any, schema: Schema) -> bool:
    """Whether a JSON value has a type, and is one of the values, that its schema allows."""
    kinds = kinds_of(schema)
    if "enum" in schema and value not in schema["enum"]:
        return False
    if value is None or not kinds:
        return not kinds or "null" in kinds
    if isinstance(value, bool) and "boolean" not in kinds:
        return False
    return any(isinstance(value, _TYPES.get(kind, ())) for kind in kinds)


def of_text(text: str, schema: Schema) -> Any:
    """The value that a text stands for, by the types that the schema allows: a text stays one where it may, others are
    JSON, or Python's way to write it (``True``, ``None``); ``text`` itself if it is no such value."""
    kinds, word = kinds_of(schema), text.strip()
    if word in ("null", "None") and "null" in kinds:
        return None
    if "string" in kinds:
        return text
    if word in ("True", "False") and "boolean" in kinds:
        return word == "True"
    value, stop = json_at(text, 0)
    return text if text[stop:].strip() or not word else value


def map_texts(value: Any, write: Callable[[str], str], name: Callable[[str], str] | None = None) -> Any:
    """A JSON value, its texts written by ``write``, the names in its objects by ``name`` (by default ``write``)."""
    if isinstance(value, str):
        return write(value)
    if isinstance(value, list):
        return [map_texts(entry, write, name) for entry in value]
    if isinstance(value, Mapping):
        return {(name or write)(key): map_texts(entry, write, name) for key, entry in value.items()}
    return value


def encodable(value: Any) -> Any:
    """A JSON value without halves of surrogate pairs."""
    return map_texts(value, lambda text: text.encode(errors="replace").decode())


def json_at(text: str, at: int) -> tuple[Any, int]:
    """The JSON value at ``at``, spaces before it skipped, and its end; None and ``at`` if there is none."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # numbers of 5,000 digits, lists in lists in lists
        return None, at
