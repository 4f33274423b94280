"""What a dialect is: how a turn is written and parsed, for one tokenizer.

Token in, token out: what the policy sampled is never tokenised again. A dialect tokenises the other pieces
(prompt, responses, answer branches), each on its own, so that the pieces laid end to end ARE the sequence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import numpy as np

from igpo_fast.errors import InputError
from igpo_fast.types import Question
from igpo_kernels import Branch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from igpo_fast.tools.base import Passage, ToolResult


class Dialect(ABC):
    """One way to write turns, for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers (answers are found by character offsets).
        max_passage_tokens: longer passages are cut.
        max_answer_tokens: longer answers are cut, for scoring.
        max_answers: accepted answers that get a branch, the first ones.
    Raises:
        InputError: the tokenizer gives no character offsets.
    """

    stop_ids: tuple[int, ...]
    """A turn ends with any of these tokens, which belongs to it."""
    stop_strings: tuple[str, ...] = ()
    """A turn ends with the token that completes any of these."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_passage_tokens: int,
        max_answer_tokens: int,
        max_answers: int,
    ):
        self.tokenizer = tokenizer
        if not tokenizer.is_fast:
            raise self._refusal("gives no character offsets", "use a tokenizer that has a tokenizer.json")
        self.max_passage_tokens = max_passage_tokens
        self.max_answer_tokens = max_answer_tokens
        self.max_answers = max_answers

    def _refusal(self, fault: str, remedy: str) -> InputError:
        return InputError(f"tokenizer {self.tokenizer.name_or_path!r}: {fault}; {remedy}")

    def check(self) -> None:  # noqa: B027 (not every dialect has something to refuse)
        """Refuse a tokenizer with which rollouts would not have the form that its model was trained on.

        Raises:
            InputError: naming what differs.
        """

    @abstractmethod
    def prompt(self, question: Question) -> np.ndarray:
        """Everything before the policy's first turn: int32 [p]."""

    @abstractmethod
    def parse(self, text: str) -> tuple[str, str]:
        """The first complete action of a turn: (SEARCH, query), (ANSWER, answer), or (INVALID, "") where
        there is none or its argument is blank.
        """

    @abstractmethod
    def response(self, action: str, result: ToolResult | None, *, ended: bool = True) -> tuple[np.ndarray, str]:
        """What follows a turn that searched (the passages, or the failure) or was invalid (a hint; ``result`` is
        None), up to and including the tokens that open the next turn.

        Args:
            ended: whether the turn ended by itself, not by length: a chat closes the one that did not.
        Returns:
            The tokens, int32 [m], and the text they were made of.
        """

    @abstractmethod
    def write(self, action: str, argument: str) -> str:
        """A turn as the policy would write it, its ending included: what ``parse`` reads back."""

    @abstractmethod
    def _wrapper(self) -> tuple[str, str]:
        """What stands before and after an answer that is forced at the start of a turn."""

    def encode(self, text: str) -> np.ndarray:
        """The tokens of one piece, none added: int32 [n]."""
        return np.asarray(self.tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of sampled tokens, special ones spelled out."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def branches(self, question: Question) -> tuple[Branch, ...]:
        """The accepted answers, forced: wrapper and answer, a branch each, of which the answer is scored.

        The wrapped text is tokenised once and the answer's tokens are found by character offsets; one that
        straddles the answer's border counts.

        Raises:
            InputError: an answer that tokenises to nothing.
        """
        answers = question.answers[: self.max_answers]
        return tuple(self._branch(question, answer.strip()) for answer in answers)

    def _branch(self, question: Question, answer: str) -> Branch:
        before, after = self._wrapper()
        ids, offsets = self._encode_with_offsets(before + answer + after)
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

    def _encode_with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [n], and the characters each stands for, int64 [n, 2]."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded.input_ids, dtype=np.int32)
        return ids, np.asarray(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2)

    def _cut(self, passage: Passage) -> str:
        """A passage as text of at most ``max_passage_tokens`` tokens, cut between characters."""
        text = "\n".join(part for part in (passage.title, passage.text) if part)
        _, offsets = self._encode_with_offsets(text)
        if len(offsets) <= self.max_passage_tokens:
            return text
        return text[: offsets[self.max_passage_tokens, 0]].rstrip()
