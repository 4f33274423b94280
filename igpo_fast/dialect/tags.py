"""Turns in the style of Search-R1: one continuous text, actions and results in tags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from igpo_fast.dialect.base import Dialect
from igpo_fast.types import ANSWER, INVALID, SEARCH, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.tools.base import ToolResult


@dataclass(frozen=True)
class Wording:
    """The words of the tags dialect."""

    system: str
    """Instructions before the question."""
    question: str
    """The question, in place of ``{}``."""
    hint: str
    """The response to an invalid turn."""
    before: str
    """Before a forced answer: ends the reasoning."""
    after: str


FULL = Wording(
    system=(
        "Answer the question, using search to find what you do not know. Reason inside <think> and </think>, "
        "then take one action. To search, write <search>your query</search>: the best passages come back "
        "between <information> and </information>. Search as often as you need. When you know the answer, "
        "write it as briefly as possible: <answer>your answer</answer>.\n\n"
    ),
    question="Question: {}\n",
    hint="\nNo action was found. Write <search>your query</search> or <answer>your answer</answer>.\n",
    before="<think>\nNow there's enough information to answer.\n</think>\n<answer>\n",
    after="\n</answer>",
)
BARE = Wording(system="", question="{}", hint="<information> </information>", before="<answer> ", after=" </answer>")


class TagsDialect(Dialect):
    """One continuous text in the style of Search-R1: ``<search>query</search>``, ``<answer>answer</answer>``,
    and the passages found inside ``<information>``.

    A turn ends with a closing tag or the end-of-text token. The tags are stop ids where each is one token,
    else stop strings.

    Args:
        system: instructions before the question; None takes the wording's own, "" has none.
        wording: None takes ``FULL``, or ``BARE`` where the tokenizer does not know all words of ``FULL`` (the
            made-up world's knows tags and names only).
    """

    _ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        wording: Wording | None = None,
        **budgets: int,
    ):
        super().__init__(tokenizer, **budgets)
        self.wording = wording or (FULL if self._knows(FULL) else BARE)
        self._system = self.wording.system if system is None else f"{system}\n\n" if system else ""
        closing = [self.encode(tag).tolist() for tag in ("</search>", "</answer>")]
        single = all(len(ids) == 1 for ids in closing)
        self.stop_strings = () if single else ("</search>", "</answer>")
        eos = tokenizer.eos_token_id
        self.stop_ids = (*(ids[0] for ids in closing if single), *([] if eos is None else [eos]))
        # Models that were trained with a start token need it; a chat template brings it, plain text does not.
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []

    def _knows(self, wording: Wording) -> bool:
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self.encode(wording.system + wording.hint + wording.before)

    def prompt(self, question: Question) -> np.ndarray:
        text = self._system + self.wording.question.replace("{}", question.question)
        return np.concatenate([np.asarray(self._start, dtype=np.int32), self.encode(text)])

    def parse(self, text: str) -> tuple[str, str]:
        match = self._ACTION.search(text)
        argument = match[2].strip() if match else ""
        if not argument:
            return INVALID, ""
        return (SEARCH if match[1] == "search" else ANSWER), argument

    def response(self, action: str, result: ToolResult | None, *, ended: bool = True) -> tuple[np.ndarray, str]:
        if action == SEARCH:
            passages = result.failure or "\n\n".join(self._cut(passage) for passage in result.passages)
            text = f"\n<information>\n{passages}\n</information>\n"
        else:
            text = self.wording.hint
        return self.encode(text), text

    def write(self, action: str, argument: str) -> str:
        before, after = self._wrapper() if action == ANSWER else ("<search> ", " </search>")
        return before + argument + after

    def _wrapper(self) -> tuple[str, str]:
        return self.wording.before, self.wording.after
