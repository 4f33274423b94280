"""The interface of dialects, which write and parse turns for one tokenizer.

Token in, token out: sampled tokens are never re-tokenised. A dialect tokenises the other pieces
(prompt, responses, answer branches), each on its own, so that the pieces laid end to end ARE the sequence.

Text of others (questions, passages, answers) stays text: ``encoding.Encoder`` reads no control token in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect.encoding import Encoder, unquote
from igpo_fast.rollouts.dialect.parsing import ANSWERS, CLOSE, OPEN, Actions, Schema
from igpo_fast.types import Question
from igpo_kernels import Branch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.types import Passage, ToolResult


class Dialect(ABC):
    """A format of turns, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers (answers are found by character offsets).
        functions: the functions that a turn may call, as ``Tool.schemas`` has them.
        max_passage_tokens: longest passage; longer ones are cut.
        max_result_tokens: longest result of a tool that finds no passages; longer ones are cut.
        max_answer_tokens: longest answer; longer ones are cut for scoring.
        max_answers: number of accepted answers that get a branch, from the first.
        wrapper: text around a forced answer, which replaces ``{}``; None takes the dialect's own.
    Raises:
        InputError: the tokenizer gives no character offsets, the wrapper has no place for the answer.
    """

    stop_ids: tuple[int, ...]
    """A turn ends with any of these tokens, and includes it."""
    stop_strings: tuple[str, ...] = ()
    """A turn ends with the token that completes any of these."""
    tags: tuple[str, ...] = (OPEN, CLOSE, *ANSWERS)
    """Text that the dialect writes between texts of others, and that must not count as such inside them."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        functions: Sequence[Schema],
        *,
        max_passage_tokens: int,
        max_answer_tokens: int,
        max_answers: int,
        max_result_tokens: int = 512,
        wrapper: str | None = None,
    ):
        self.tokenizer = tokenizer
        self.functions = {function["function"]["name"]: function for function in functions}
        if not tokenizer.is_fast:
            raise self._refusal("gives no character offsets", "use a tokenizer that has a tokenizer.json")
        if wrapper is not None and wrapper.count("{}") != 1:
            raise InputError(f"algorithm.wrapper={wrapper!r}: write {{}} once, where the answer goes")
        self._own_wrapper = wrapper
        self._encoder = Encoder(tokenizer, self.tags)
        self.max_passage_tokens = max_passage_tokens
        self.max_result_tokens = max_result_tokens
        self.max_answer_tokens = max_answer_tokens
        self.max_answers = max_answers

    def _refusal(self, fault: str, remedy: str) -> InputError:
        return InputError(f"tokenizer {self.tokenizer.name_or_path!r}: {fault}; {remedy}")

    def check(self) -> None:  # noqa: B027 (not every dialect has something to refuse)
        """Refuse a tokenizer whose rollouts would not have the format that its model was trained on.

        Raises:
            InputError: names the difference.
        """

    @abstractmethod
    def prompt(self, question: Question) -> np.ndarray:
        """The tokens before the policy's first turn: int32 [p]."""

    @abstractmethod
    def parse(self, text: str) -> Actions:
        """The first well-formed action of a turn: its calls, or its answer; empty where there is none. Raises nothing,
        whatever the text; ``parsing.first_actions`` says what counts.
        """

    def call(self, ids: np.ndarray, actions: Actions) -> int:
        """The place of the first token of a turn's actions, which go on to the end of the turn: the shortest end of
        ``ids`` that reads as the same. 0 for a turn without any."""
        if not actions:
            return 0
        first, behind = 0, len(ids)  # all ids read so, no ids do not
        while behind - first > 1:
            middle = (first + behind) // 2
            if self.parse(self.decode(ids[middle:])) == actions:
                first = middle
            else:
                behind = middle
        return first

    @abstractmethod
    def response(
        self, actions: Actions, results: Sequence[ToolResult], *, ended: bool = True
    ) -> tuple[np.ndarray, str]:
        """The response to a turn's calls, or to a turn without any (a hint), up to and including the tokens that open
        the next turn.

        Args:
            results: one per call.
            ended: whether the turn ended by itself, not by length; a chat closes a turn that did not.
        Returns:
            The tokens, int32 [m], and their text.
        """

    @abstractmethod
    def write(self, actions: Actions) -> str:
        """A turn as the policy would write it, with its ending, for ``encode``; ``parse`` reads it back. Arguments
        that spell control tokens are quoted."""

    @abstractmethod
    def _wrapper(self) -> tuple[str, str]:
        """Text before and after a forced answer at the start of a turn, unless the user chose it."""

    def quote(self, text: str, *, tags: bool = True) -> str:
        """Quote text of others before it is joined with the dialect's own and encoded (``Encoder.quote``)."""
        return self._encoder.quote(text, tags=tags)

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one piece, without added ones, quoted parts as text: int32 [n]."""
        return self._encoder.ids(text)

    def decode(self, ids: np.ndarray) -> str:
        """The text of sampled tokens, special ones spelled out."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def branches(self, question: Question) -> tuple[Branch, ...]:
        """A branch per accepted answer: the wrapper with the answer, of which the answer is scored.

        The wrapped text is tokenised once and the answer's tokens are found by character offsets; one that
        straddles the answer's border counts.

        Raises:
            InputError: an answer that tokenises to nothing.
        """
        answers = question.answers[: self.max_answers]
        return tuple(self._branch(question, answer.strip()) for answer in answers)

    def _branch(self, question: Question, answer: str) -> Branch:
        own = self._own_wrapper
        before, after = self._wrapper() if own is None else own.split("{}")
        ids, offsets = self._encoder.with_offsets(before + self.quote(answer) + after)
        first, last = len(before), len(before) + len(answer)
        scored = np.flatnonzero((offsets[:, 0] < last) & (offsets[:, 1] > first))
        if not scored.size:
            raise InputError(
                f"question {question.id}: its answer {answer!r} tokenises to nothing; remove it, or choose a "
                "tokenizer that covers it"
            )
        start = int(scored[0])
        stop = min(int(scored[-1]) + 1, start + self.max_answer_tokens)
        return Branch(ids=ids[:stop], start=start, stop=stop)

    def _shown(self, result: ToolResult) -> str:
        """What the policy sees of a result, cut; empty if nothing was found."""
        passages = (self._passage(passage) for passage in result.passages)
        return result.failure or "\n\n".join(passages) or self._cut(result.text, self.max_result_tokens)

    def _passage(self, passage: Passage) -> str:
        """A passage as text of at most ``max_passage_tokens`` tokens."""
        text = "\n".join(part for part in (passage.title, passage.text) if part)
        if "visit" in self.functions:
            text = f"[{passage.id}] {text}"
        return self._cut(text, self.max_passage_tokens)

    def _cut(self, text: str, most: int) -> str:
        """A text's first ``most`` tokens, cut between characters."""
        text = self.quote(text)
        _, offsets = self._encoder.with_offsets(text)
        text = unquote(text)
        return text if len(offsets) <= most else text[: offsets[most, 0]].rstrip()
