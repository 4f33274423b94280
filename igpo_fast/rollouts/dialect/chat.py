"""Turns in the model's own chat template and tool-call format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from igpo_fast.rollouts.dialect.base import Dialect
from igpo_fast.rollouts.dialect.calls import format_of
from igpo_fast.rollouts.dialect.encoding import unquote
from igpo_fast.rollouts.dialect.parsing import (
    ANSWERS,
    CALLS,
    CLOSE,
    ECHO,
    OPEN,
    Actions,
    Reader,
    Schema,
    answered,
    first_actions,
    map_texts,
    parameters_of,
    tagged,
)
from igpo_fast.rollouts.dialect.tags import ANSWERED, REASONED
from igpo_fast.types import ANSWER, SEARCH, Action, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.types import ToolResult

CHAT_SYSTEM = (
    "Answer the user's question. Call the search tool, one query at a time and as often as you need, to find "
    "what you do not know. When you know the answer, write it as briefly as possible between <answer> and "
    "</answer>."
)
TOOLS_SYSTEM = (
    "Answer the user's question. Call the tools as often as you need, to find what you do not know. When you know the "
    "answer, write it as briefly as possible between <answer> and </answer>."
)
"""In place of ``CHAT_SYSTEM`` for other tools than search alone."""
CHAT_HINT = (
    "No action was found. To {}, write exactly\n{}\nand nothing after it; or write your answer between <answer> "
    "and </answer>."
)
"""The response to an invalid turn: what a call does, and the call as this model's template writes it."""
NOTHING_FOUND = "Nothing was found."
CHAT_CUT = "Your turn was too long and was cut. "
"""Precedes the hint after a turn that was cut."""
END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
"""Tokens that end a turn in the formats of Qwen and Llama. A Llama that calls a tool may end with ``<|eom_id|>``
although its template writes ``<|eot_id|>``."""
TODAY = date(2024, 7, 26)
"""Date for templates that ask for one: prompts must not change overnight, or runs would not be reproducible."""


class ChatDialect(Dialect):
    """The model's own chat template and tool calls; the final answer is text in ``<answer>``.

    Sampled turns are never rendered again: a response is the text that the template writes after an assistant
    message. So the reasoning that templates drop from earlier turns stays in the sequence.

    Calls are read in the format that the template itself writes (dialect/calls.py); several in one turn count.

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
    _PLACEHOLDER = "the-query-of-the-policy"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        functions: Sequence[Schema],
        *,
        system: str | None = None,
        thinking: bool | None = None,
        **budgets: int,
    ):
        super().__init__(tokenizer, functions, **budgets)
        if not tokenizer.chat_template:
            raise self._refusal("has no chat template", "use rollout.dialect=tags")
        self.tools = list(functions)
        self._template = tokenizer.get_chat_template(tools=self.tools)
        if thinking is not None and "enable_thinking" not in self._template:
            raise self._refusal("its chat template has no enable_thinking", "leave rollout.thinking empty")
        self.options = {} if thinking is None else {"enable_thinking": thinking}
        if system is None:
            system = CHAT_SYSTEM if list(self.functions) == [SEARCH] else TOOLS_SYSTEM
        self.system = system
        self._system = [{"role": "system", "content": system}] if system else []
        self._tail = self._after_assistant()
        end = int(self.encode(self._tail)[0])
        self._end = self.decode(np.asarray([end]))
        known = self.tokenizer.get_added_vocab()
        others = [tokenizer.eos_token_id, *(known.get(token) for token in END_TOKENS)]
        self.stop_ids = tuple(dict.fromkeys(id for id in (end, *others) if id is not None))
        self._thought = self._opening_thought()
        self._thinks = bool(self._thought) and "</think>" not in self._thought  # a turn begins inside a thought
        self._example = self._placeholders()
        self._writes_calls = self._shows_example()
        self._call = self._written((self._example,))
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
        shown = self._render("")
        for function in self.tools:
            described = function["function"]["description"]
            if described not in shown and json.dumps(described, ensure_ascii=False)[1:-1] not in shown:
                return "its chat template does not show the tools it is given"
        example, call = self._example, self._call
        if not self._writes_calls:
            return "its chat template writes no tool calls"
        if self.parse(self.write((example,))) != (example,):
            return f"its chat template writes tool calls as {call!r}, which is not read here"
        found = {"role": "tool", "name": example.tool, "content": "A title\nA text."}
        said, hint = {"role": "assistant", "content": "So it is."}, self._hint(ended=True)
        own = self._render("Who is it?", self._calling((example,)), found, said, hint)
        pieces = [
            self._render("Who is it?"), call + self._end, self._after_turn([found], ended=True),
            said["content"] + self._end, self._after_turn([hint], ended=True),
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
                tools=self.tools,
                add_generation_prompt=opens_turn,
                tokenize=False,
                strftime_now=TODAY.strftime,
                **self.options,
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

    def _placeholders(self) -> Action:
        """A call of the first function that takes a text, or of the first, with placeholders for texts."""
        texts = (name for name, function in self.functions.items() if "string" in str(parameters_of(function)))
        name = next(texts, next(iter(self.functions)))
        function = self.functions[name]
        values = {"string": self._PLACEHOLDER, "integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
        parameters = parameters_of(function)
        arguments = {key: values.get(of.get("type"), self._PLACEHOLDER) for key, of in parameters.items()}
        return Action(name, arguments)

    def _shows_example(self) -> bool:
        """Whether the template writes the example's name and arguments."""
        written = self._rendered((self._example,))
        texts = [value for value in self._example.arguments.values() if isinstance(value, str)]
        return all(text in written for text in (self._example.tool, *texts))

    def _functions(self, actions: Actions) -> list[dict[str, Any]]:
        """Calls as templates take them, their texts quoted."""
        return [{"name": a.tool, "arguments": map_texts(dict(a.arguments), self.quote)} for a in actions]

    def _calling(self, actions: Actions) -> dict[str, Any]:
        """A message of the assistant that calls functions."""
        calls = [{"type": "function", "function": function} for function in self._functions(actions)]
        return {"role": "assistant", "content": "", "tool_calls": calls}

    def _written(self, actions: Actions) -> str:
        """A turn that calls functions as the template writes it, without its end; if the template writes no calls
        (which only ``score`` accepts), in the format of Hermes."""
        if self._writes_calls:
            return self._rendered(actions)
        calls = (json.dumps(function, ensure_ascii=False) for function in self._functions(actions))
        return "\n".join(f"{CALLS[0]}\n{call}\n{CALLS[1]}" for call in calls)

    def _rendered(self, actions: Actions) -> str:
        prefix = self._render("").removesuffix(self._thought)
        # Templates may treat the last turn differently.
        results = [{"role": "tool", "name": action.tool, "content": ""} for action in actions]
        turn = self._render("", self._calling(actions), *results).removeprefix(prefix)
        return turn.partition(self._end)[0]

    def _actions(self) -> tuple[dict[str, Reader], Reader | None]:
        """Readers of actions in this model's format: by their tags, and at the beginning."""
        readers, opening = format_of(self._call).readers(self.functions)
        return readers | {ANSWERS[0]: tagged(answered, ANSWERS[1], (ANSWERS[0], CALLS[0]))}, opening

    def prompt(self, question: Question) -> np.ndarray:
        return self.encode(self._render(self.quote(question.question)))

    def parse(self, text: str) -> Actions:
        return first_actions(text, self._readers, in_thought=self._thinks, opening=self._opening, parallel=True)

    def response(
        self, actions: Actions, results: Sequence[ToolResult], *, ended: bool = True
    ) -> tuple[np.ndarray, str]:
        if actions:
            messages = [
                {"role": "tool", "name": action.tool, "content": self.quote(self._shown(result) or NOTHING_FOUND)}
                for action, result in zip(actions, results, strict=True)
            ]
        else:
            messages = [self._hint(ended)]
        text = self._after_turn(messages, ended)
        return self.encode(text), unquote(text)

    def _hint(self, ended: bool) -> dict[str, str]:
        tool, arguments = self._example.tool, self._example.arguments
        call = self._call.replace(self._PLACEHOLDER, ECHO + next(iter(arguments), ""))
        verb = "search" if tool == SEARCH else f"call {tool}"
        return {"role": "user", "content": ("" if ended else CHAT_CUT) + CHAT_HINT.format(verb, call)}

    def _after_turn(self, messages: Sequence[Mapping[str, Any]], ended: bool) -> str:
        """The text that the template writes for ``messages`` between an assistant message and the next."""
        rendered = self._render("", {"role": "assistant", "content": self._TURN}, *messages)
        text = rendered.partition(self._TURN)[2]
        return text.partition(self._end)[2] if ended else text

    def write(self, actions: Actions) -> str:
        if actions[0].tool == ANSWER:
            before, after = self._wrapper()
            return before + self.quote(actions[0].text) + after
        return (f"{CLOSE}\n\n" if self._thinks else "") + self._written(actions) + self._end

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
