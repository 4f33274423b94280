"""Turns in the style of Search-R1: one continuous text, actions and results in tags."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from igpo_fast.rollouts.dialect.base import Dialect
from igpo_fast.rollouts.dialect.encoding import unquote
from igpo_fast.rollouts.dialect.parsing import ANSWERS, SEARCHES, first_action, tagged
from igpo_fast.types import ANSWER, SEARCH, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.rollouts.tools.base import ToolResult


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
BARE = Wording(system="", question="{}", hint="<information> </information>", before="<answer> ", after=" </answer>")
"""Wording for tokenizers that do not know the words of ``FULL``: the made-up world's knows tags and names alone."""


class TagsDialect(Dialect):
    """One continuous text in the style of Search-R1: ``<search>query</search>``, ``<answer>answer</answer>``,
    and the passages found inside ``<information>``.

    A turn ends with a closing tag or the end-of-text token. The tags are stop ids where each is one token,
    else stop strings. After a forced answer, only ``</answer>`` closes the turn.

    A passage that spells ``</information>`` or another tag is shown unchanged, as in Search-R1, but never as a token
    that was added for the tag. Only sampled text is parsed, so a passage can mislead the policy, as any text can, but
    not act or end a turn.

    Args:
        system: instructions before the question; None takes the wording's own, "" has none.
        wording: None takes ``FULL`` where the tokenizer knows all its words, else ``BARE``.
    """

    tags = (*Dialect.tags, *SEARCHES, "<information>", "</information>")
    _READERS: ClassVar = {
        SEARCHES[0]: tagged(SEARCH, SEARCHES[1], (*SEARCHES[:1], *ANSWERS)),
        ANSWERS[0]: tagged(ANSWER, ANSWERS[1], (*ANSWERS[:1], *SEARCHES)),
    }

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
        closing = [self.encode(tag).tolist() for tag in (SEARCHES[1], ANSWERS[1])]
        single = all(len(ids) == 1 for ids in closing)
        self.stop_strings = () if single else (SEARCHES[1], ANSWERS[1])
        eos = tokenizer.eos_token_id
        self.stop_ids = (*(ids[0] for ids in closing if single), *([] if eos is None else [eos]))
        # Models that were trained with a start token need it; a chat template adds it, plain text does not.
        bos = tokenizer.bos_token_id
        self._start = [bos] if bos is not None and tokenizer("").input_ids[:1] == [bos] else []

    def _knows(self, wording: Wording) -> bool:
        unknown = self.tokenizer.unk_token_id
        return unknown is None or unknown not in self.encode(f"{wording.system}\n{wording.hint}\n{wording.before}")

    def prompt(self, question: Question) -> np.ndarray:
        text = self._system + self.wording.question.replace("{}", self.quote(question.question))
        return np.concatenate([np.asarray(self._start, dtype=np.int32), self.encode(text)])

    def parse(self, text: str) -> tuple[str, str]:
        return first_action(text, self._READERS)

    def response(self, action: str, result: ToolResult | None, *, ended: bool = True) -> tuple[np.ndarray, str]:
        if action == SEARCH:
            passages = result.failure or "\n\n".join(self._cut(passage) for passage in result.passages)
            text = f"\n<information>\n{self.quote(passages)}\n</information>\n"
        else:
            text = self.wording.hint
        return self.encode(text), unquote(text)

    def write(self, action: str, argument: str) -> str:
        before, after = self._wrapper() if action == ANSWER else ("<search> ", " </search>")
        return before + self.quote(argument) + after

    def _wrapper(self) -> tuple[str, str]:
        return self.wording.before, self.wording.after
