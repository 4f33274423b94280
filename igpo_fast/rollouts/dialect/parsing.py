"""Finds the action in a turn's text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping

from igpo_fast.types import INVALID, SEARCH

Action = tuple[str, str]
Reader = Callable[[str, int], tuple[Action, int]]
"""(text, start of the argument) -> the action there, or ``NOTHING`` if it is not well-formed, and the place from which
to read on."""

NOTHING: Action = (INVALID, "")
ECHOES = ("and", "your query", "your answer")
"""Texts between tags in our own instructions; a policy that repeats them ("I'll put it in <answer> and </answer>") does
not act."""
OPEN, CLOSE = "<think>", "</think>"
SEARCHES, ANSWERS, CALLS = ("<search>", "</search>"), ("<answer>", "</answer>"), ("<tool_call>", "</tool_call>")
"""Opening and closing tag of an action."""


def first_action(
    text: str, readers: Mapping[str, Reader], *, in_thought: bool = False, opening: Reader | None = None
) -> Action:
    """The first well-formed action outside thoughts; ``NOTHING`` if there is none.

    Text is read from left to right, and tags inside an action do not count: ``<think>`` in a query opens no thought. A
    thought ends at the next ``</think>``; an unclosed one holds all the rest. Everything before an unopened
    ``</think>`` is thought. An action is not well-formed if its argument is blank or an echo of the instructions;
    reading then continues behind its opening tag or its end.

    Search-R1's code takes the first pair of tags, even in a thought. Sampling ends at the first closing tag there and
    here, so a turn with one inside a thought is answered with the hint.

    Args:
        readers: readers of actions, by opening tag.
        in_thought: whether the text begins inside a thought.
        opening: reads an action without a tag at the start of the text.
    """
    marks = re.compile("|".join(map(re.escape, (OPEN, CLOSE, *readers))))
    text = OPEN + text if in_thought else text
    found, at, begins = NOTHING, 0, True
    while True:
        if begins and opening:
            action, at = opening(text, at)
            found = action if found == NOTHING else found
        mark = marks.search(text, at)
        if not mark:
            return found
        at, begins = mark.end(), mark[0] in (OPEN, CLOSE)
        if mark[0] == OPEN:
            stop = text.find(CLOSE, at)
            at = len(text) if stop < 0 else stop + len(CLOSE)
        elif mark[0] == CLOSE:
            found = NOTHING
        else:
            action, at = readers[mark[0]](text, at)
            found = action if found == NOTHING else found


def tagged(action: str, closing: str, tags: tuple[str, ...]) -> Reader:
    """A reader of an argument up to its closing tag, without any of ``tags`` in it."""

    def read(text: str, at: int) -> tuple[Action, int]:
        stop = text.find(closing, at)
        if stop < 0 or any(text.find(tag, at, stop) >= 0 for tag in tags):
            return NOTHING, at
        return well_formed(action, text[at:stop]), stop + len(closing)

    return read


def well_formed(action: str, argument: str) -> Action:
    """The action; ``NOTHING`` if its argument is blank or an echo."""
    argument = argument.strip()
    return (action, argument) if argument and argument not in ECHOES else NOTHING


def json_call(text: str, at: int) -> tuple[Action, int]:
    """Read a call to ``search`` as JSON at ``at``: the action and its end, or ``NOTHING`` and ``at``."""
    start = at + len(text[at:]) - len(text[at:].lstrip())
    try:
        call, stop = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):  # numbers of 5,000 digits, lists in lists in lists
        return NOTHING, at
    if not isinstance(call, dict) or call.get("name") != "search":
        return NOTHING, stop
    arguments = call.get("arguments", call.get("parameters"))
    query = arguments.get("query") if isinstance(arguments, dict) else None
    if not isinstance(query, str):
        return NOTHING, stop
    # JSON can escape half a surrogate pair, which no text file can hold.
    return well_formed(SEARCH, query.encode(errors="replace").decode()), stop
