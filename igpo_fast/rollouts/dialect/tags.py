"""Turns in the style of Search-R1: one continuous text, actions and results in tags."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from igpo_fast.rollouts.dialect.base import Dialect
from igpo_fast.rollouts.dialect.encoding import unquote
from igpo_fast.rollouts.dialect.parsing import (
    ANSWERS,
    ECHO,
    Actions,
    Schema,
    answered,
    called_with,
    first_actions,
    only_text,
    parameters_of,
    tagged,
)
from igpo_fast.types import ANSWER, SEARCH, Action, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.types import ToolResult


@dataclass(frozen=True)
class Wording:
    """The words of the tags dialect."""

    system: str
    """Instructions before the question."""
    question: str
    """Text around the question, which replaces ``{}``."""
    hint: str
    """The response to an invalid turn."""
    before: str
    """Text before a forced answer, which ends the reasoning."""
    after: str


REASONED = "\nNow there's enough information to answer\n</think>\n<answer>\n"
"""The released code's text before a forced answer, word for word; there ``<think>`` has opened the turn."""
ANSWERED = "\n</answer>"
"""The released code's text after a forced answer; the end of the turn follows."""

FULL = Wording(
    system=(
        "Answer the question, using search to find what you do not know. Reason inside <think> and </think>, "
        "then take one action. To search, write <search>your query</search>: the best passages come back "
        "between <information> and </information>. Search as often as you need. When you know the answer, "
        "write it as briefly as possible: <answer>your answer</answer>.\n\n"
    ),
    question="Question: {}\n",
    hint="\nNo action was found. Write <search>your query</search> or <answer>your answer</answer>.\n",
    before="<think>" + REASONED,
    after=ANSWERED,
)


ALONE = replace(
    FULL,
    system=(
        "Answer the question. Reason inside <think> and </think>, then write your answer as briefly as possible: "
        "<answer>your answer</answer>.\n\n"
    ),
    hint="\nNo answer was found. Write <answer>your answer</answer>.\n",
)
"""``FULL`` without functions."""


def full_wording(functions: Mapping[str, Schema], quote: Callable[[str], str]) -> Wording:
    """``FULL``, or the like of it for other functions than search alone, whose descriptions ``quote`` quotes, or for
    none."""
    if list(functions) == [SEARCH]:
        return FULL
    if not functions:
        return ALONE
    calls = {name: _example(function) for name, function in functions.items()}
    listed = "\n".join(f"{call}: {quote(functions[name]['function']['description'])}" for name, call in calls.items())
    system = (
        "Answer the question, using tools for what you do not know. Reason inside <think> and </think>, then take one "
        f"action. To use a tool, write one of\n{listed}\nThe result comes back between <information> and "
        "</information>. Use tools as often as you need. When you know the answer, write it as briefly as possible: "
        "<answer>your answer</answer>.\n\n"
    )
    either = ", ".join(calls.values())
    hint = f"\nNo action was found. Write {either} or <answer>your answer</answer>.\n"
    return replace(FULL, system=system, hint=hint)


def _example(function: Schema) -> str:
    """A call as the instructions show it."""
    name, parameters = function["function"]["name"], parameters_of(function)
    if len(parameters) > 1:
        shown = "{" + ", ".join(f'"{key}": {ECHO}{key}' for key in parameters) + "}"
    else:
        shown = "".join(f"{ECHO}{key}" for key in parameters)
    return f"<{name}>{shown}</{name}>"


BARE = Wording(system="", question="{}", hint="<information> </information>", before="<answer> ", after=" </answer>")
"""Wording for tokenizers that do not know the words of ``FULL``: the made-up world's knows tags and names alone."""


def tags_of(function: str) -> tuple[str, str]:
    """Opening and closing tag of a function's calls."""
    return f"<{function}>", f"</{function}>"


class TagsDialect(Dialect):
    """One continuous text in the style of Search-R1: ``<search>query</search>``, ``<answer>answer</answer>``,
    and the passages found inside ``<information>``. Every function has tags of its name. What stands between them is a
    function's only argument as it is, or JSON: an object of arguments, or an only argument that is no text.

    A turn ends with a closing tag or the end-of-text token. The tags are stop ids where each is one token,
    else stop strings. After a forced answer, only ``</answer>`` closes the turn.

    A passage that spells ``</information>`` or another tag is shown unchanged, as in Search-R1, but never as a token
    that was added for the tag. Only sampled text is parsed, so a passage can mislead the policy, as any text can, but
    not act or end a turn.

    Args:
        system: instructions before the question; None takes the wording's own, "" has none.
        wording: None takes ``full_wording`` where the tokenizer knows all its words, else ``BARE``.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        functions: Sequence[Schema],
        *,
        system: str | None = None,
        wording: Wording | None = None,
        **budgets: int,
    ):
        names = [function["function"]["name"] for function in functions]
        written = [ANSWERS, *map(tags_of, names)]
        self.tags = (*Dialect.tags, *(tag for pair in written[1:] for tag in pair), "<information>", "</information>")
        super().__init__(tokenizer, functions, **budgets)
        reads = [answered, *(partial(called_with, function) for function in functions)]
        self._tags = [tag for pair in written for tag in pair]
        self._readers = {
            opening: tagged(read, closing, tuple(tag for tag in self._tags if tag != closing))
            for read, (opening, closing) in zip(reads, written, strict=True)
        }
        full = full_wording(self.functions, self.quote)
        self.wording = wording or (full if self._knows(full) else BARE)
        self._system = self.wording.system if system is None else f"{system}\n\n" if system else ""
        closing = [tag for _, tag in (*written[1:], ANSWERS)]
        tokens = [self.encode(tag).tolist() for tag in closing]
        for tag, ids in zip(closing, tokens, strict=True):
            if tokenizer.unk_token_id in ids:
                raise self._refusal(f"has no token for {tag}", "use model.tokenizer=bpe, or a model with its own")
        single = all(len(ids) == 1 for ids in tokens)
        self.stop_strings = () if single else tuple(closing)
        eos = tokenizer.eos_token_id
        self.stop_ids = (*(ids[0] for ids in tokens if single), *([] if eos is None else [eos]))
        # Models that were trained with a start token need it; a chat template adds it, plain text does not.
        bos = tokenizer.bos_token_id
        starts = bos is not None and tokenizer("").input_ids[:1] == [bos]
        self.start = np.asarray([bos] if starts else [], dtype=np.int32)
        """What every sequence begins with: int32 [1], or [0]."""

    def _knows(self, wording: Wording) -> bool:
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self.encode(f"{wording.system}\n{wording.hint}\n{wording.before}")

    def prompt(self, question: Question) -> np.ndarray:
        text = self._system + self.wording.question.replace("{}", self.quote(question.question))
        return np.concatenate([self.start, self.encode(text)])

    def parse(self, text: str) -> Actions:
        return first_actions(text, self._readers)

    def response(
        self, actions: Actions, results: Sequence[ToolResult], *, ended: bool = True
    ) -> tuple[np.ndarray, str]:
        if actions:
            shown = "\n\n".join(map(self._shown, results))
            text = f"\n<information>\n{self.quote(shown)}\n</information>\n"
        else:
            text = self.wording.hint
        return self.encode(text), unquote(text)

    def write(self, actions: Actions) -> str:
        return "".join(map(self._write, actions))

    def _write(self, action: Action) -> str:
        if action.tool == ANSWER:
            before, after = self._wrapper()
            return before + self.quote(action.text) + after
        function, arguments = self.functions[action.tool], action.arguments
        if name := only_text(function):
            text = arguments[name]
        elif arguments:
            alone = len(parameters_of(function)) == 1
            text = json.dumps(next(iter(arguments.values())) if alone else arguments, ensure_ascii=False)
            for tag in self._tags:  # JSON can spell them without writing them
                text = text.replace(tag, f"\\u003c{tag[1:]}")
        else:
            text = ""
        return f"<{action.tool}> {self.quote(text)} </{action.tool}>"

    def _wrapper(self) -> tuple[str, str]:
        return self.wording.before, self.wording.after
