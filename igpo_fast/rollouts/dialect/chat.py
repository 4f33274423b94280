"""Turns in the model's own chat template and tool-call format."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from igpo_fast.errors import InputError
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
    kinds_of,
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
ALONE_SYSTEM = "Answer the user's question. Write your answer as briefly as possible between <answer> and </answer>."
"""Without tools."""
ALONE_HINT = "No answer was found. Write your answer between <answer> and </answer>."
CHAT_HINT = (
    "No action was found. To {}, write exactly\n{}\nand nothing after it; or write your answer between <answer> "
    "and </answer>."
)
"""The response to an invalid turn: what a call does, and the call as this model's template writes it."""
NOTHING_FOUND = "Nothing was found."
CHAT_CUT = "Your turn was too long and was cut. "
"""Precedes the hint after a turn that was cut."""
END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|call|>", "<|return|>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""Tokens that end a turn in the formats of Qwen, Llama, gpt-oss and DeepSeek. A Llama that calls a tool may end with
``<|eom_id|>`` although its template writes ``<|eot_id|>``."""
NEXT_ROLES = ("<|user|>", "<|observation|>")
"""Tokens that begin the next message, with which GLM's turns end: its template has no others."""
TODAY = date(2024, 7, 26)
"""Date for templates that ask for one: prompts must not change overnight, or runs would not be reproducible."""


class ChatDialect(Dialect):
    """The model's own chat template and tool calls; the final answer is text in ``<answer>``.

    Sampled turns are never rendered again: a response is the text that the template writes after an assistant
    message. So the reasoning that templates drop from earlier turns stays in the sequence.

    Calls are read in the format that the template itself writes (dialect/calls.py); several in one turn count if the
    template can write several.

    Calls and answers may end differently (gpt-oss: ``<|call|>`` and ``<|return|>``; GLM: ``<|observation|>`` and
    ``<|user|>``), and an answer in the history otherwise than a sampled one (gpt-oss: ``<|end|>``). Whatever ended a
    sampled turn stays, and the response goes on behind it.

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
    _PLACEHOLDER = "the-{}-of-the-policy"

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
        self.tools = [map_texts(function, self.quote) for function in functions] or None
        self._template = tokenizer.get_chat_template(tools=self.tools)
        if thinking is not None and "enable_thinking" not in self._template:
            raise self._refusal("its chat template has no enable_thinking", "leave rollout.thinking empty")
        self.options = {} if thinking is None else {"enable_thinking": thinking}
        if system is None:
            alone = TOOLS_SYSTEM if self.functions else ALONE_SYSTEM
            system = CHAT_SYSTEM if list(self.functions) == [SEARCH] else alone
        self.system = system
        self._system = [{"role": "system", "content": system}] if system else []
        self._thought = self._opening_thought()
        self._thinks = bool(self._thought) and CLOSE not in self._thought  # a turn begins inside a thought
        self._before = self._render("").removesuffix(self._thought)  # what stands before the first turn
        self._tail = self._after_assistant()
        self._end = self._first_token(self._tail)
        # In the history, an answer may end otherwise.
        later = self._render("", self._saying(self._TURN), {"role": "user", "content": ""})
        self._closing = self._first_token(later.partition(self._TURN)[2].strip())
        known = tokenizer.get_added_vocab()
        ends = [token for token in (tokenizer.eos_token, *END_TOKENS) if token and token in known]
        roles = [token for token in NEXT_ROLES if token in known]
        self._stop = re.compile("|".join(map(re.escape, (self._end, *ends, *roles))))
        self._example = self._placeholders() if functions else None
        self._text_arguments = False
        self._writes_calls = self._example is None or self._shows_example()
        self._call, self._call_end = self._written((self._example,)) if self._example else ("", self._end)
        spelled = (self._end, self._call_end, *ends)
        self.stop_ids = tuple(dict.fromkeys(int(self.encode(end)[0]) for end in spelled))
        self._format = format_of(self._call)
        self._readers, self._opening = self._actions()
        self._parallel = True
        self._parallel = self._example is not None and self._shows_two()

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
        for function in self.tools or ():
            described = function["function"]["description"].strip()
            if described not in shown and json.dumps(described, ensure_ascii=False)[1:-1] not in shown:
                return "its chat template does not show the tools it is given"
        example, call = self._example, self._call
        if not self._writes_calls:
            return "its chat template writes no tool calls"
        one, hint = (example,) if example else (), self._hint(ended=True)
        said_so = (self._saying("So it is."), self._said("So it is.") + self._closing, [hint])
        if one:
            if self.parse(self.write(one)) != one:
                return f"its chat template writes tool calls as {call!r}, which is not read here"
            found = {"role": "tool", "name": example.tool, "content": "A title\nA text."}
            two = one * (1 + self._parallel)
            called = (self._calling(one), "".join(self._written(one)), [found])
            called_twice = (self._calling(two), "".join(self._written(two)), [found] * len(two))
        # Each turn and its response: twice a call (the second time two, if the template can), no action, a call.
        turns = [called, called_twice, said_so, called] if one else [said_so, said_so]
        whole = [message for said, _, messages in turns for message in (said, *messages)]
        pieces = [self._render("Who is it?")]
        for said, written, messages in turns:
            actions = one * len(said.get("tool_calls", ()))
            after = self._after_turn(actions, messages, ended=True)
            if self._thinks and not after.endswith(self._thought):
                return f"its chat template opens a thought before the first turn, but not after {messages[0]['role']!r}"
            pieces += [written, after]
        own, laid = (_THOUGHT.sub("", text) for text in (self._render("Who is it?", *whole), "".join(pieces)))
        if own != laid:
            at = _common(own, laid)
            return (
                f"after {own[max(at - 30, 0) : at]!r} its chat template writes {own[at : at + 30]!r}, a rollout would "
                f"have {laid[at : at + 30]!r}"
            )
        for end, text in zip((self._call_end, self._call_end, self._end), pieces[2::2], strict=False):
            after, alone = self.encode(end + text).tolist()[1:], self.encode(text).tolist()
            if after != alone:
                at = _common(after, alone)
                return f"it tokenises {text[:20]!r} differently alone and after {end!r}, from token {at} on"
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
        """The text that the template writes after a final assistant message, or if that is nothing, the next role."""
        turn = self._saying(self._TURN)
        if tail := self._render("", turn, opens_turn=False).partition(self._TURN)[2].strip():
            return tail
        tail = self._render("", turn, {"role": "user", "content": ""}).partition(self._TURN)[2]
        if not tail.startswith(NEXT_ROLES):
            raise self._refusal("its chat template ends no assistant message", "use rollout.dialect=tags")
        return tail

    def _first_token(self, text: str) -> str:
        return self.decode(self.encode(text)[:1])

    def _opening_thought(self) -> str:
        """The ``<think>`` with which the template opens a turn, even if it closes it; empty if it opens none. Also a
        ``</think>`` alone, which tells DeepSeek-V3.1 not to think."""
        opening = self._render("").removeprefix(self._render("", opens_turn=False))
        thought = re.search(f"(?:{OPEN}|{CLOSE}).*", opening, re.DOTALL)
        return thought[0] if thought else ""

    def _placeholders(self) -> Action:
        """A call of the first function that takes a text, or of the first, with placeholders for texts."""
        texts = (name for name, function in self.functions.items() if "string" in str(parameters_of(function)))
        name = next(texts, next(iter(self.functions)))
        values = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}, "null": None}

        def value(key: str, schema: Schema) -> Any:
            kinds = kinds_of(schema)
            return self._PLACEHOLDER.format(key) if not kinds or "string" in kinds else values[kinds[0]]

        return Action(name, {key: value(key, of) for key, of in parameters_of(self.functions[name]).items()})

    def _shows_example(self) -> bool:
        """Whether the template writes the example's name and arguments. Some take arguments as JSON, already a text
        (DeepSeek's)."""
        try:
            written, _ = self._rendered((self._example,))
        except InputError:
            self._text_arguments = True
            written, _ = self._rendered((self._example,))
        texts = [value for value in self._example.arguments.values() if isinstance(value, str)]
        return all(text in written for text in (self._example.tool, *texts))

    def _shows_two(self) -> bool:
        """Whether the template writes two calls in one turn, so that both are read."""
        two = (self._example, self._example)
        try:
            return self.parse(self.write(two)) == two
        except InputError:  # Llama's refuses
            return False

    def _functions(self, actions: Actions) -> list[dict[str, Any]]:
        """Calls as templates take them, their texts quoted."""
        return [{"name": a.tool, "arguments": map_texts(dict(a.arguments), self.quote)} for a in actions]

    def _saying(self, text: str) -> dict[str, Any]:
        """A message of the assistant that calls nothing."""
        return {"role": "assistant", "content": text}

    def _calling(self, actions: Actions) -> dict[str, Any]:
        """A message of the assistant that calls functions."""
        functions = self._functions(actions)
        if self._text_arguments:
            functions = [of | {"arguments": json.dumps(of["arguments"], ensure_ascii=False)} for of in functions]
        return self._saying("") | {"tool_calls": [{"type": "function", "function": of} for of in functions]}

    def _written(self, actions: Actions) -> tuple[str, str]:
        """A turn that calls functions as the template writes it, and its end; if the template writes no calls
        (which only ``score`` accepts), in the format of Hermes."""
        if self._writes_calls:
            return self._rendered(actions)
        calls = (json.dumps(function, ensure_ascii=False) for function in self._functions(actions))
        return "\n".join(f"{CALLS[0]}\n{call}\n{CALLS[1]}" for call in calls), self._end

    def _rendered(self, actions: Actions) -> tuple[str, str]:
        # Templates may treat the last turn differently.
        results = [{"role": "tool", "name": action.tool, "content": ""} for action in actions]
        turn, end, _ = self._split(self._render("", self._calling(actions), *results))
        return turn, end

    def _said(self, text: str) -> str:
        """A turn that calls nothing as the template writes it in the history, without its end."""
        turn = self._render("", self._saying(text), {"role": "user", "content": ""}).removeprefix(self._before)
        return turn.partition(self._closing)[0].removeprefix(self._thought)

    def _split(self, rendered: str) -> tuple[str, str, str]:
        """The first turn of a rendered conversation, behind the thought that opened it; the token that ends it; and
        what follows."""
        turn = rendered.removeprefix(self._before).removeprefix(self._thought)
        end = self._stop.search(turn)
        return (turn[: end.start()], end[0], turn[end.end() :]) if end else (turn, self._end, "")

    def _actions(self) -> tuple[dict[str, Reader], Reader | None]:
        """Readers of actions in this model's format: by their tags, and at the beginning."""
        readers, opening = self._format.readers(self.functions)
        return readers | {ANSWERS[0]: tagged(answered, ANSWERS[1], (ANSWERS[0], *self._format.tags))}, opening

    def prompt(self, question: Question) -> np.ndarray:
        return self.encode(self._render(self.quote(question.question)))

    def parse(self, text: str) -> Actions:
        return first_actions(
            text, self._readers, in_thought=self._thinks, opening=self._opening, parallel=self._parallel,
            thought=self._format.thought,
        )  # fmt: skip

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
        text = self._after_turn(actions, messages, ended)
        return self.encode(text), unquote(text)

    def _hint(self, ended: bool) -> dict[str, str]:
        cut = "" if ended else CHAT_CUT
        if not self._example:
            return {"role": "user", "content": cut + ALONE_HINT}
        tool, call = self._example.tool, _THOUGHT.sub("", self._call).strip()
        for key in self._example.arguments:
            call = call.replace(self._PLACEHOLDER.format(key), ECHO + key)
        verb = "search" if tool == SEARCH else f"call {tool}"
        hint = CHAT_HINT.format(verb, self.quote(call, tags=False))
        return {"role": "user", "content": cut + hint}

    def _after_turn(self, actions: Actions, messages: Sequence[Mapping[str, Any]], ended: bool) -> str:
        """The text that the template writes for ``messages`` between a turn and the next."""
        if actions and self._writes_calls:
            calls = tuple(Action(action.tool, {}) for action in actions[: None if self._parallel else 1])
            _, end, text = self._split(self._render("", self._calling(calls), *messages))
            return text if ended else end + text
        text = self._render("", self._saying(self._TURN), *messages).partition(self._TURN)[2]
        return text.partition(self._closing)[2] if ended else text

    def write(self, actions: Actions) -> str:
        if actions[0].tool == ANSWER:
            before, after = self._wrapper()
            return before + self.quote(actions[0].text) + after
        if len(actions) > 1 and not self._parallel:
            raise self._refusal("its chat template writes one call per turn", "write a turn per call")
        text, end = self._written(actions)
        if self._thinks and not text.lstrip().startswith(CLOSE):
            empty = _THOUGHT.match(text)  # the template's own, of a turn that opened none
            text = f"{CLOSE}\n\n{text[empty.end() if empty else 0 :]}"
        return text + end

    def _wrapper(self) -> tuple[str, str]:
        after = ANSWERED + self._end
        if self._format.says:
            opens, closes = self._format.thought
            return opens + REASONED.strip("\n").replace(f"\n{CLOSE}\n", closes + self._format.says) + "\n", after
        if self._thinks:
            return REASONED.removeprefix("\n") if self._thought.endswith("\n") else REASONED, after
        said = self._said(self._TURN)
        lead = said[: len(said) - len(said.lstrip())]  # GLM begins a new line
        return lead + (f"{ANSWERS[0]}\n" if self._thought else OPEN + REASONED), after


_THOUGHT = re.compile(f"(?:(?:{OPEN}|{CLOSE})\\s*)+")
"""The tags of an empty thought, and what separates it from the turn."""


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
