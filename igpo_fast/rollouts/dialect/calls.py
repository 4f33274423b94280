"""How families of models write tool calls in their chat templates, and how these are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from igpo_fast.rollouts.dialect.parsing import (
    CALLS,
    CLOSE,
    NOTHING,
    OPEN,
    Actions,
    Reader,
    Schema,
    called,
    json_at,
    of_text,
    parameters_of,
)

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
    thought: tuple[str, str] = (OPEN, CLOSE)
    """Opening and closing of a thought."""
    says: str = ""
    """What stands between a thought and the text of an answer, if a thought is a message of its own."""

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


@dataclass(frozen=True)
class _Markup:
    """Arguments as texts between tags, which nothing escapes.

    A value ends at the first closing tag that another argument or the end of the call follows, so that it may spell
    any tag by itself (a program with "</tool_call>" in a string).
    """

    head: re.Pattern
    """Up to the first argument; its group is the function's name."""
    key: re.Pattern
    """Up to an argument's value; its group is the argument's name."""
    closing: re.Pattern
    """The closing tag of a value."""
    tail: re.Pattern
    """The rest of the call."""
    frame: str = ""
    """What the format writes around a value."""

    def read(self, functions: Functions, text: str, at: int) -> tuple[Actions, int]:
        """Read a call behind its opening tag, and convert the values to the types of the function's schema."""
        head = self.head.match(text, at)
        schema = functions.get(head[1]) if head else None
        if schema is None:
            return NOTHING, at
        parameters, arguments, stop = parameters_of(schema), {}, head.end()
        while key := self.key.match(text, stop):
            closing = self.closing.search(text, key.end())
            if not closing:
                return NOTHING, at
            value = text[key.end() : closing.start()].removeprefix(self.frame).removesuffix(self.frame)
            arguments[key[1]] = of_text(value, parameters.get(key[1], {}))
            stop = closing.end()
        tail = self.tail.match(text, stop)
        return (called(schema, arguments), tail.end()) if tail else (NOTHING, at)


_CODER = _Markup(
    head=re.compile(r"\s*<function=([^<>\n]+)>"),
    key=re.compile(r"\s*<parameter=([^<>\n]+)>"),
    closing=re.compile(r"</parameter>(?=\s*<parameter=|\s*</function>\s*</tool_call>)"),
    tail=re.compile(r"\s*</function>\s*</tool_call>"),
    frame="\n",
)
_GLM = _Markup(
    head=re.compile(r"\s*([^<>\s]+)"),
    key=re.compile(r"\s*<arg_key>([^<>\n]+)</arg_key>\s*<arg_value>"),
    closing=re.compile(r"</arg_value>(?=\s*<arg_key>|\s*</tool_call>)"),
    tail=re.compile(r"\s*</tool_call>"),
)

_DEEPSEEK_CALL = re.compile(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([^<>\n]+)\n```json\n|([^<>\n]+)<｜tool▁sep｜>)"
)
_DEEPSEEK_END = re.compile(r"\s*(?:```)?\s*<｜tool▁call▁end｜>")


def _deepseek_calls(functions: Functions, text: str, at: int) -> tuple[Actions, int]:
    """Read the calls that follow one another; the first that is not well-formed ends them."""
    actions = NOTHING
    while call := _DEEPSEEK_CALL.match(text, at):
        arguments, stop = json_at(text, call.end())
        end = _DEEPSEEK_END.match(text, stop)
        if not end:
            break
        actions, at = actions + called(functions.get(call[1] or call[2]), arguments), end.end()
    return actions, at


_HARMONY_JSON = r"\s*(?:<\|constrain\|>)?\s*(?:json)?\s*<\|message\|>"


def _harmony_call(header: str, functions: Functions, text: str, at: int) -> tuple[Actions, int]:
    """Read a call behind ``to=functions.``: the rest of its header, and JSON up to the next control token."""
    call = re.compile(r"([^<>\s]+)" + header + _HARMONY_JSON).match(text, at)
    if not call:
        return NOTHING, at
    arguments, stop = json_at(text, call.end())
    rest = text[stop:].lstrip()
    return called(functions.get(call[1]), arguments) if rest[:2] in ("", "<|") else NOTHING, stop


HERMES = CallFormat("hermes", (*CALLS, '"name"'), {CALLS[0]: _hermes_call})
"""JSON in ``<tool_call>``: Qwen2.5, Qwen3."""
CODER = CallFormat("coder", (*CALLS, "<function="), {CALLS[0]: _CODER.read})
"""``<function=NAME>`` with ``<parameter=KEY>`` in ``<tool_call>``: Qwen3-Coder, Qwen3.5, Qwen3.6."""
GLM = CallFormat("glm", CALLS, {CALLS[0]: _GLM.read})
"""A name, then ``<arg_key>`` and ``<arg_value>``, in ``<tool_call>``: GLM-4.5 and later."""
DEEPSEEK = CallFormat("deepseek", ("<｜tool▁call▁begin｜>",), {"<｜tool▁calls▁begin｜>": _deepseek_calls})
"""A name and JSON in ``<｜tool▁call▁begin｜>``: DeepSeek-V3.1; V3 writes ``function`` first, and JSON in a fence."""
HARMONY = CallFormat(
    "harmony",
    ("to=functions.", "<|channel|>commentary"),
    {
        "<|channel|>commentary to=functions.": partial(_harmony_call, ""),
        "to=functions.": partial(_harmony_call, r"<\|channel\|>commentary"),
    },
    thought=("<|channel|>analysis<|message|>", "<|end|>"),
    says="<|start|>assistant<|channel|>final<|message|>",
)
"""JSON in a message of the channel ``commentary`` whose recipient, named on either side of the channel, is the
function: gpt-oss."""
LLAMA = CallFormat("llama", (), {}, _llama_call)
"""Bare JSON that begins the turn, also after ``<|python_tag|>``, and ``<|python_tag|>search.call(query="...")``: Llama
3.1 and 3.2."""
FORMATS = (HARMONY, DEEPSEEK, CODER, HERMES, GLM, LLAMA)
"""In the order in which they are tried."""


def format_of(call: str) -> CallFormat:
    """The format of a call as a template writes it."""
    return next(made for made in FORMATS if all(mark in call for mark in made.marks))
