"""Trajectories from files, as ``score`` and the warm start take them: messages, or this package's own rollouts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from igpo_fast.data.rows import json_lines
from igpo_fast.errors import InputError
from igpo_fast.types import INVALID, Action, Question, Rollout, Turn

PROMPT_ROLES = ("system", "user")
RESPONSE_ROLES = ("tool", "user", "environment")


@dataclass(frozen=True)
class Message:
    """A message, checked."""

    number: int
    """Number of the message in its line, from 1."""
    role: str
    content: str
    """Text; empty only next to calls or a thought, or if it was given so."""
    calls: tuple[dict, ...] = ()
    """``{"name", "arguments"}`` of each tool call; the arguments are an object, even if they were given as JSON
    text."""
    thought: str = ""
    """The given ``reasoning_content``."""


@dataclass(frozen=True)
class Record:
    """A line of the input."""

    where: str
    """File and line, for errors."""
    row: Mapping[str, Any]
    """The line as it was read, ShareGPT's with ``messages``."""
    question: Question
    prompt: tuple[Message, ...] = ()
    """The messages before the first turn; empty takes the dialect's prompt."""
    turns: tuple[tuple[Message, ...], ...] = ()
    """Each turn's message and the responses to it: T of them, T >= 1."""
    rollout: Rollout | None = None
    """A rollout with its sampled tokens, in place of messages."""


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, one at a time.

    Raises:
        InputError: a file that cannot be read, a line that is not a trajectory.
    """
    try:
        with open(path, "rb") as lines:
            for row in json_lines(lines, path):
                yield read_row(row.values, row.where)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); give an existing file") from None


def read_row(row: Mapping[str, Any], where: str, *, scored: bool = True) -> Record:
    """A row, checked.

    Args:
        scored: whether it needs a question and answers. Else it may have messages alone, and its answers are not read.
    Raises:
        InputError: no trajectory, naming what is wrong.
    """
    messages = row.get("messages")
    if messages is None and row.get("conversations") is not None:
        row = _from_sharegpt(row, where)
        messages = row["messages"]
    if messages is None and {"input", "output"} <= row.keys():
        raise InputError(
            f'{where}: a dump of verl, which does not tell turns apart; fill "question", "answers" and "messages"'
        )
    question = _question(row, where) if scored else Question(where, str(row.get("question") or ""), ())
    if messages is None and {"prompt_ids", "turns"} <= row.keys():
        return Record(where, row, question, rollout=_rollout(row, question, where))
    if not _is_list_of(dict, messages):
        raise InputError(f'{where}: "messages" is no list of messages; fill it with objects that have role and content')
    checked = [_message(message, number, where) for number, message in enumerate(messages, start=1)]
    prompt, turns = _split(checked, where)
    if not prompt and not question.question.strip():
        raise InputError(f'{where}: no message before the first turn; begin with the user\'s, or fill "question"')
    return Record(where, row, question, prompt, turns)


def _question(row: Mapping[str, Any], where: str) -> Question:
    text, answers = row.get("question"), row.get("answers")
    if not isinstance(text, str) or not text.strip():
        raise InputError(f'{where}: no question; fill "question" with a text')
    if not answers or not _is_list_of(str, answers) or not all(map(str.strip, answers)):
        raise InputError(f'{where}: no answers; fill "answers" with a list of texts, none of them blank')
    return Question(where, text, tuple(answers))


SPEAKERS = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "function_call": "assistant", "tool": "tool", "observation": "tool", "function": "tool",
}  # fmt: skip
"""Roles by the names that ShareGPT's rows have for them."""


def _from_sharegpt(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with ``conversations`` ({from, value}, and beside it perhaps ``system`` and ``tools``) as one with
    ``messages``."""
    entries = row["conversations"]
    if not _is_list_of(dict, entries):
        raise InputError(f'{where}: "conversations" is no list; fill it with objects that have from and value')
    system = row.get("system")
    messages = [{"role": "system", "content": system}] if system else []
    for number, entry in enumerate(entries, start=1):
        if entry.get("from") not in SPEAKERS:
            known = ", ".join(SPEAKERS)
            raise InputError(f"{where}: conversations entry {number} is from {entry.get('from')!r}; known are {known}")
        role, value = SPEAKERS[entry["from"]], entry.get("value")
        if entry["from"] == "function_call":
            calls = _json(value, f"{where}: conversations entry {number}")
            messages.append({"role": role, "content": "", "tool_calls": calls if isinstance(calls, list) else [calls]})
        else:
            messages.append({"role": role, "content": value})
    tools = row.get("tools")
    tools = _json(tools, f'{where}: "tools"') if isinstance(tools, str) and tools.strip() else tools
    return {**row, "messages": messages, "tools": tools or None}


def _json(text: Any, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise InputError(f"{where} is not JSON; correct it") from None


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, kind) for entry in value)


THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Names under which servers give a turn's thoughts."""
UNREAD = ("audio", "refusal", "images")
"""Parts of a message that are no text of the policy's."""


def _message(message: dict, number: int, where: str) -> Message:
    role, content, calls = (message.get(key) for key in ("role", "content", "tool_calls"))
    thought = next((message[key] for key in THOUGHTS if message.get(key)), None)
    where = f"{where}: message {number}"
    if unread := [key for key in UNREAD if message.get(key)]:
        raise InputError(f'{where} has "{unread[0]}", which cannot be scored; leave the line out')
    if _is_list_of(dict, content) and all(isinstance(part.get("text"), str) for part in content):
        content = "".join(part["text"] for part in content)  # OpenAI's text parts
    if content is None and (calls or thought):
        content = ""
    if not isinstance(content, str):
        raise InputError(f'{where} has no text; fill "content"')
    if not isinstance(thought or "", str):
        raise InputError(f'{where} has a "reasoning_content" that is no text; correct it')
    if (calls or thought) and role != "assistant":
        raise InputError(
            f'{where} of role {role!r} has "tool_calls" or "reasoning_content"; only the assistant has them'
        )
    if message.get("function_call"):
        raise InputError(f'{where} has a "function_call"; write it as "tool_calls"')
    if calls and not isinstance(calls, list):
        raise InputError(f'{where} has "tool_calls" that are no list; correct them')
    return Message(number, role, content, tuple(_call(call, where) for call in calls or ()), thought or "")


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    name, arguments = (function.get(k) if isinstance(function, dict) else None for k in ("name", "arguments"))
    if isinstance(arguments, str):  # OpenAI's form
        try:
            arguments = json.loads(arguments)
            json.dumps(arguments, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise InputError(
            f'{where} has a tool call without a function\'s "name" and "arguments" (an object, or its JSON); correct it'
        )
    return {"name": name, "arguments": arguments}


def _split(messages: list[Message], where: str) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], ...]]:
    """The prompt, and each turn with its responses."""
    roles = [message.role for message in messages]
    if "assistant" not in roles:
        raise InputError(f"{where}: no message of the assistant; a trajectory has at least one turn")
    first = roles.index("assistant")
    for number, role in enumerate(roles):
        place, known = ("after", RESPONSE_ROLES) if number > first else ("before", PROMPT_ROLES)
        if role != "assistant" and role not in known:
            raise InputError(
                f"{where}: message {number + 1} has role {role!r}; {place} the first assistant message it "
                f"can be {' or '.join(known)}"
            )
    starts = [i for i, role in enumerate(roles) if role == "assistant"]
    turns = (tuple(messages[a:b]) for a, b in zip(starts, [*starts[1:], len(roles)], strict=True))
    return tuple(messages[:first]), tuple(turns)


def _rollout(row: dict[str, Any], question: Question, where: str) -> Rollout:
    """A line of rollouts/step_*.jsonl."""
    turns = row["turns"]
    if not turns or not _is_list_of(dict, turns) or not all(isinstance(turn.get("text"), str) for turn in turns):
        raise InputError(f'{where}: "turns" are not those of a rollouts file; give the file as it was written')
    made = []
    for number, turn in enumerate(turns, start=1):
        ids, response_ids = (_ids(turn.get(key), f"{where}: turn {number}, {key}") for key in ("ids", "response_ids"))
        action = turn.get("action")
        # What it called with does not matter here.
        actions = (Action(action, {}),) if isinstance(action, str) and action != INVALID else ()
        passages = tuple(map(str, turn["passages"])) if isinstance(turn.get("passages"), list) else ()
        found, logp = bool(turn.get("found", passages)), np.zeros(len(ids), np.float32)
        made.append(Turn(ids, logp, turn["text"], actions, response_ids, passages=passages, found=found))
    prompt_ids = _ids(row["prompt_ids"], f"{where}: prompt_ids")
    return Rollout(question, 0, prompt_ids, tuple(made))


def _ids(value: Any, where: str) -> np.ndarray:
    if not _is_list_of(int, value) or not all(0 <= id < 2**31 for id in value):
        raise InputError(f"{where}: no list of token ids; give the rollouts file as it was written")
    return np.asarray(value, dtype=np.int32)
