"""How families of models write tool calls in their chat templates, and how these are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from igpo_fast.rollouts.dialect.parsing import CALLS, NOTHING, Actions, Reader, Schema, called, json_at

Functions = Mapping[str, Schema]
"""The functions that may be called, by name."""


@dataclass(frozen=True)
class CallFormat:
    """A format of tool calls."""

    name: str
    marks: tuple[str, ...]
    """Texts that stand in every call of this format."""
    tags: Mapping[str, Callable[[Functions, str, int], tuple[Actions, int]]]
    """Readers of calls, by their opening tag."""
    opening: Callable[[Functions, str, int], tuple[Actions, int]] | None = None
    """Reads calls without a tag at the start of a turn."""

    def readers(self, functions: Functions) -> tuple[dict[str, Reader], Reader | None]:
        """Readers for the functions of a run: by opening tag, and at the start."""
        opening = self.opening and partial(self.opening, functions)
        return {tag: partial(read, functions) for tag, read in self.tags.items()}, opening


def _json_call(functions: Functions, text: str, at: int) -> tuple[Actions, int]:
    """Read ``{"name", "arguments" or "parameters"}``: the call and its end, or ``NOTHING`` and ``at`` without JSON."""
    call, stop = json_at(text, at)
    if not isinstance(call, dict):
        return NOTHING, stop
    name = call.get("name")
    schema = functions.get(name) if isinstance(name, str) else None
    return called(schema, call.get("arguments", call.get("parameters"))), stop


def _hermes_call(functions: Functions, text: str, at: int) -> tuple[Actions, int]:
    """Read a call up to ``</tool_call>``, which may also stand in its JSON; nothing else follows the JSON."""
    action, stop = _json_call(functions, text, at)
    closing = text.find(CALLS[1], stop)
    if closing < 0 or text.find(CALLS[0], stop, closing) >= 0:
        return NOTHING, at
    return NOTHING if text[stop:closing].strip() else action, closing + len(CALLS[1])


_PYTHON_TAG = re.compile(r"\s*(?:<\|python_tag\|>\s*)?")
_PYTHON_CALL = re.compile(r'\s*<\|python_tag\|>\s*(\w+)\.call\((\w+)="(.*?)"\)', re.DOTALL)


def _llama_call(functions: Functions, text: str, at: int) -> tuple[Actions, int]:
    """Read one of Llama's calls; end-of-turn tokens may follow."""
    if call := _PYTHON_CALL.match(text, at):
        return called(functions.get(call[1]), {call[2]: call[3]}), call.end()
    return _json_call(functions, text, _PYTHON_TAG.match(text, at).end())


HERMES = CallFormat("hermes", CALLS, {CALLS[0]: _hermes_call})
"""JSON in ``<tool_call>``: Qwen2.5, Qwen3."""
LLAMA = CallFormat("llama", (), {}, _llama_call)
"""Bare JSON that begins the turn, also after ``<|python_tag|>``, and ``<|python_tag|>search.call(query="...")``: Llama
3.1 and 3.2."""
FORMATS = (HERMES, LLAMA)
"""In the order in which they are tried."""


def format_of(call: str) -> CallFormat:
    """The format of a call as a template writes it."""
    return next(made for made in FORMATS if all(mark in call for mark in made.marks))
