"""Turns in the model's own chat template and tool-call format."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from igpo_fast.rollouts.dialect.base import Dialect
from igpo_fast.rollouts.dialect.encoding import unquote
from igpo_fast.rollouts.dialect.parsing import (
    ANSWERS,
    CALLS,
    CLOSE,
    NOTHING,
    OPEN,
    Action,
    Reader,
    first_action,
    json_call,
    tagged,
    well_formed,
)
from igpo_fast.rollouts.dialect.tags import ANSWERED, REASONED
from igpo_fast.types import ANSWER, SEARCH, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.rollouts.tools.base import ToolResult

SEARCH_TOOL = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search a collection of passages; returns the best ones.",
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "description": "What to look for."}},
            "required": ["query"],
        },
    },
}
CHAT_SYSTEM = (
    "Answer the user's question. Call the search tool, one query at a time and as often as you need, to find "
    "what you do not know. When you know the answer, write it as briefly as possible between <answer> and "
    "</answer>."
)
CHAT_HINT = (
    "No action was found. To search, write exactly\n{}\nand nothing after it; or write your answer between <answer> "
    "and </answer>."
)
"""The response to an invalid turn; ``{}`` is a call as this model's template writes it."""
CHAT_CUT = "Your turn was too long and was cut. "
"""Precedes the hint after a turn that was cut."""
HERMES_CALL = '<tool_call>\n{"name": "search", "arguments": {"query": "QUERY"}}\n</tool_call>'
"""Format of a call if the template writes none (which only ``score`` accepts)."""
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
"""Tokens that end a turn in the formats of Qwen and Llama. A Llama that calls a tool may end with ``<|eom_id|>``
although its template writes ``<|eot_id|>``."""
TODAY = date(2024, 7, 26)
"""Date for templates that ask for one: prompts must not change overnight, or runs would not be reproducible."""


class ChatDialect(Dialect):
    """The model's own chat template and tool calls; the final answer is text in ``<answer>``.

    Sampled turns are never rendered again: a response is the text that the template writes after an assistant
    message. So the reasoning that templates drop from earlier turns stays in the sequence.

    Calls are read in the format that the template itself writes: JSON in ``<tool_call>`` (Qwen2.5, Qwen3), or bare
    JSON that begins the turn, also after ``<|python_tag|>``, and ``<|python_tag|>search.call(query="...")``
    (Llama 3.1 and 3.2).

    A forced answer ends a thought, as in the released code: the template's open thought, else one of its own, even if
    the template has no thoughts, because the released code opens every turn with ``<think>``. If the template itself
    closes a thought before the turn (``enable_thinking=false``), the answer stands alone.

    Args:
        system: the system message; None takes ``CHAT_SYSTEM``, "" sends none.
        thinking: ``enable_thinking`` for the template; None keeps its default.
    Raises:
        InputError: the chat template is missing, refuses the conversation, ends no assistant message, or has no
            ``enable_thinking``.
    """

    # Placeholders for a rollout's texts, which no template would write itself.
    _TURN = "the-turn-of-the-policy"
    _QUERY = "the-query-of-the-policy"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        thinking: bool | None = None,
        **budgets: int,
    ):
        super().__init__(tokenizer, **budgets)
        if not tokenizer.chat_template:
            raise self._refusal("has no chat template", "use rollout.dialect=tags")
        self._template = tokenizer.get_chat_template(tools=[SEARCH_TOOL])
        if thinking is not None and "enable_thinking" not in self._template:
            raise self._refusal("its chat template has no enable_thinking", "leave rollout.thinking empty")
        self._options = {} if thinking is None else {"enable_thinking": thinking}
        system = CHAT_SYSTEM if system is None else system
        self._system = [{"role": "system", "content": system}] if system else []
        self._tail = self._after_assistant()
        end = int(self.encode(self._tail)[0])
        self._end = self.decode(np.asarray([end]))
        known = self.tokenizer.get_added_vocab()
        others = [tokenizer.eos_token_id, *(known.get(token) for token in END_TOKENS)]
        self.stop_ids = tuple(dict.fromkeys(id for id in (end, *others) if id is not None))
        self._thought = self._opening_thought()
        self._thinks = bool(self._thought) and "</think>" not in self._thought  # a turn begins inside a thought
        self._call = self._own_call() or HERMES_CALL.replace("QUERY", self._QUERY)
        self._readers, self._opening = self._actions()

    def check(self) -> None:
        """Refuse a template whose own rendering of a conversation without thinking differs from a rollout's
        concatenated prompt, turns and responses.

        A thought that the template opens or closes before each turn is not compared: templates drop it from earlier
        turns, a rollout keeps it.
        """
        if fault := self._fault():
            raise self._refusal(fault, "use rollout.dialect=tags")

    def _fault(self) -> str:
        """Why rollouts would not have the template's format; empty if they would."""
        if self.stop_ids[0] not in (self.tokenizer.eos_token_id, *self.tokenizer.get_added_vocab().values()):
            return f"its chat template ends an assistant message with {self._tail[:20]!r}, which is not one token"
        if SEARCH_TOOL["function"]["description"] not in self._render(""):
            return "its chat template does not show the tools it is given"
        if not self._own_call():
            return "its chat template writes no tool calls"
        if self.parse(self.write(SEARCH, self._QUERY)) != (SEARCH, self._QUERY):
            return f"its chat template writes tool calls as {self._call!r}, which is not read here"
        found = {"role": "tool", "name": "search", "content": "A title\nA text."}
        said, hint = {"role": "assistant", "content": "So it is."}, self._hint(ended=True)
        own = self._render("Who is it?", self._called(), found, said, hint)
        pieces = [
            self._render("Who is it?"), self._call + self._end, self._after_turn(found, ended=True),
            said["content"] + self._end, self._after_turn(hint, ended=True),
        ]  # fmt: skip
        own, *pieces = (text.removesuffix(self._thought) for text in (own, *pieces))
        laid = "".join(pieces)
        if own != laid:
            at = _common(own, laid)
            return (
                f"after {own[max(at - 30, 0) : at]!r} its chat template writes {own[at : at + 30]!r}, a rollout would "
                f"have {laid[at : at + 30]!r}"
            )
        for text in pieces[2::2]:
            after, alone = self.encode(self._end + text).tolist()[1:], self.encode(text).tolist()
            if after != alone:
                at = _common(after, alone)
                return f"it tokenises {text[:20]!r} differently alone and after {self._end!r}, from token {at} on"
        return ""

    def _render(self, question: str, *messages: dict[str, Any], opens_turn: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [*self._system, {"role": "user", "content": question}, *messages],
                tools=[SEARCH_TOOL],
                add_generation_prompt=opens_turn,
                tokenize=False,
                strftime_now=TODAY.strftime,
                **self._options,
            )
        except (TemplateError, TypeError) as error:
            raise self._refusal(
                f"its chat template refuses the conversation ({error})",
                "try rollout.system='' or rollout.dialect=tags",
            ) from error

    def _after_assistant(self) -> str:
        """The text that the template writes after a final assistant message."""
        turn = self._render("", {"role": "assistant", "content": self._TURN}, opens_turn=False)
        tail = turn.partition(self._TURN)[2].strip()
        if not tail:
            raise self._refusal("its chat template ends no assistant message", "use rollout.dialect=tags")
        return tail

    def _opening_thought(self) -> str:
        """The ``<think>`` with which the template opens a turn, even if it closes it; empty if it opens none."""
        opening = self._render("").removeprefix(self._render("", opens_turn=False))
        _, tag, rest = opening.partition("<think>")
        return tag + rest

    def _called(self) -> dict[str, Any]:
        function = {"name": "search", "arguments": {"query": self._QUERY}}
        return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}

    def _own_call(self) -> str:
        """A turn that calls the tool as the template writes it, without its end; empty if it writes none."""
        prefix = self._render("").removesuffix(self._thought)
        found = {"role": "tool", "name": "search", "content": ""}  # templates may treat the last turn differently
        turn = self._render("", self._called(), found).removeprefix(prefix).partition(self._end)[0]
        return turn if json.dumps(self._QUERY) in turn else ""

    def _actions(self) -> tuple[dict[str, Reader], Reader | None]:
        """Readers of actions in this model's format: by their tags, and at the beginning."""
        answer = tagged(ANSWER, ANSWERS[1], (ANSWERS[0], CALLS[0]))
        if CALLS[0] in self._call:
            return {CALLS[0]: _tagged_call, ANSWERS[0]: answer}, None
        return {ANSWERS[0]: answer}, _bare_call

    def prompt(self, question: Question) -> np.ndarray:
        return self.encode(self._render(self.quote(question.question)))

    def parse(self, text: str) -> tuple[str, str]:
        return first_action(text, self._readers, in_thought=self._thinks, opening=self._opening)

    def response(self, action: str, result: ToolResult | None, *, ended: bool = True) -> tuple[np.ndarray, str]:
        if action == SEARCH:
            passages = "\n\n".join(self._cut(passage) for passage in result.passages)
            content = result.failure or passages or "Nothing was found."
            message = {"role": "tool", "name": "search", "content": self.quote(content)}
        else:
            message = self._hint(ended)
        text = self._after_turn(message, ended)
        return self.encode(text), unquote(text)

    def _hint(self, ended: bool) -> dict[str, str]:
        call = self._call.replace(self._QUERY, "your query")
        return {"role": "user", "content": ("" if ended else CHAT_CUT) + CHAT_HINT.format(call)}

    def _after_turn(self, message: dict[str, Any], ended: bool) -> str:
        """The text that the template writes for ``message`` between an assistant message and the next."""
        rendered = self._render("", {"role": "assistant", "content": self._TURN}, message)
        text = rendered.partition(self._TURN)[2]
        return text.partition(self._end)[2] if ended else text

    def write(self, action: str, argument: str) -> str:
        if action == ANSWER:
            before, after = self._wrapper()
            return before + self.quote(argument) + after
        query = json.dumps(self.quote(argument), ensure_ascii=False)
        thought = f"{CLOSE}\n\n" if self._thinks else ""
        return thought + self._call.replace(json.dumps(self._QUERY), query) + self._end

    def _wrapper(self) -> tuple[str, str]:
        if not self._thought:
            before = OPEN + REASONED
        elif self._thinks:
            before = REASONED.removeprefix("\n") if self._thought.endswith("\n") else REASONED
        else:
            before = f"{ANSWERS[0]}\n"
        return before, ANSWERED + self._end


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tagged_call(text: str, at: int) -> tuple[Action, int]:
    """Read a call up to ``</tool_call>``, which may also stand in its JSON; nothing else follows the JSON."""
    action, stop = json_call(text, at)
    closing = text.find(CALLS[1], stop)
    if closing < 0 or text.find(CALLS[0], stop, closing) >= 0:
        return NOTHING, at
    return NOTHING if text[stop:closing].strip() else action, closing + len(CALLS[1])


_PYTHON_TAG = re.compile(r"\s*(?:<\|python_tag\|>\s*)?")
_PYTHON_CALL = re.compile(r'\s*<\|python_tag\|>\s*search\.call\(query="(.*?)"\)', re.DOTALL)


def _bare_call(text: str, at: int) -> tuple[Action, int]:
    """Read one of Llama's calls; end-of-turn tokens may follow."""
    if call := _PYTHON_CALL.match(text, at):
        return well_formed(SEARCH, call[1]), call.end()
    return json_call(text, _PYTHON_TAG.match(text, at).end())
