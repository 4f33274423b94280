"""How a turn is written and parsed.

Token in, token out: what the policy sampled is never tokenised again. A dialect tokenises the other pieces
(prompt, responses, answer branches), each on its own, so that the pieces laid end to end ARE the sequence.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from igpo_fast.errors import InputError
from igpo_fast.types import ANSWER, INVALID, SEARCH, Question
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
        """What follows a turn that searched (the passages) or was invalid (a hint; ``result`` is None), up to
        and including the tokens that open the next turn.

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
            passages = "\n\n".join(self._cut(passage) for passage in result.passages)
            text = f"\n<information>\n{passages}\n</information>\n"
        else:
            text = self.wording.hint
        return self.encode(text), text

    def write(self, action: str, argument: str) -> str:
        before, after = self._wrapper() if action == ANSWER else ("<search> ", " </search>")
        return before + argument + after

    def _wrapper(self) -> tuple[str, str]:
        return self.wording.before, self.wording.after


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
CHAT_HINT = "No action was found. Call the search tool, or write your answer between <answer> and </answer>."


class ChatDialect(Dialect):
    """The model's own chat template and tool calls; the final answer is text in ``<answer>``.

    Sampled turns are never rendered again: a response is what the template writes after some assistant
    message. So the reasoning that templates drop from earlier turns stays in the sequence.

    Args:
        system: the system message; None takes ``CHAT_SYSTEM``, "" sends none.
    Raises:
        InputError: the chat template is missing, refuses the conversation, or ends no assistant message.
    """

    _ACTION = re.compile(
        r"<tool_call>(?P<tagged>.*?)</tool_call>"
        r"|\A\s*(?:<\|python_tag\|>)?\s*(?P<bare>\{.*)"
        r"|<answer>(?P<answer>.*?)</answer>",
        re.DOTALL,
    )
    _TURN = "the-turn-of-the-policy"  # stands for the sampled turn; nothing a template would write itself

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str | None = None, **budgets: int):
        super().__init__(tokenizer, **budgets)
        if not tokenizer.chat_template:
            raise self._refusal("has no chat template", "use rollout.dialect=tags")
        system = CHAT_SYSTEM if system is None else system
        self._system = [{"role": "system", "content": system}] if system else []
        turn = self._render("", {"role": "assistant", "content": self._TURN}, opens_turn=False)
        tail = turn.partition(self._TURN)[2].strip()
        if not tail:
            raise self._refusal("its chat template ends no assistant message", "use rollout.dialect=tags")
        end = int(self.encode(tail)[0])
        self._end = self.decode(np.asarray([end]))
        eos = tokenizer.eos_token_id
        self.stop_ids = (end,) if eos in (None, end) else (end, eos)
        self._before = self._reasoning() + "<answer>\n"

    def _render(self, question: str, *messages: dict[str, Any], opens_turn: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [*self._system, {"role": "user", "content": question}, *messages],
                tools=[SEARCH_TOOL],
                add_generation_prompt=opens_turn,
                tokenize=False,
            )
        except TemplateError as error:
            raise self._refusal(
                f"its chat template refuses the conversation ({error})",
                "try rollout.system='' or rollout.dialect=tags",
            ) from error

    def _reasoning(self) -> str:
        """What ends the reasoning before a forced answer; nothing for a template that knows none."""
        thought = "Now there's enough information to answer.\n</think>\n\n"
        if self._render("").rstrip().endswith("<think>"):
            return thought
        reasons = "<think>" in self.tokenizer.get_chat_template(tools=[SEARCH_TOOL])
        return "<think>\n" + thought if reasons else ""

    def prompt(self, question: Question) -> np.ndarray:
        return self.encode(self._render(question.question))

    def parse(self, text: str) -> tuple[str, str]:
        match = self._ACTION.search(text.rpartition("</think>")[2])
        if not match:
            return INVALID, ""
        if match["answer"] is not None:
            action, argument = ANSWER, match["answer"]
        else:
            action, argument = SEARCH, self._query(match["tagged"] or match["bare"] or "")
        return (action, argument.strip()) if argument.strip() else (INVALID, "")

    @staticmethod
    def _query(call: str) -> str:
        """The query of a JSON call to ``search``; empty if it is anything else."""
        try:
            call, _ = json.JSONDecoder().raw_decode(call.strip())  # the end-of-turn token may follow
        except json.JSONDecodeError:
            return ""
        if not isinstance(call, dict) or call.get("name") != "search":
            return ""
        arguments = call.get("arguments", call.get("parameters"))
        query = arguments.get("query") if isinstance(arguments, dict) else None
        return query if isinstance(query, str) else ""

    def response(self, action: str, result: ToolResult | None, *, ended: bool = True) -> tuple[np.ndarray, str]:
        if action == SEARCH:
            content = "\n\n".join(self._cut(passage) for passage in result.passages) or "Nothing was found."
            message = {"role": "tool", "name": "search", "content": content}
        else:
            message = {"role": "user", "content": CHAT_HINT}
        rendered = self._render("", {"role": "assistant", "content": self._TURN}, message)
        text = rendered.partition(self._TURN)[2]
        if ended:
            text = text.partition(self._end)[2]
        return self.encode(text), text

    def write(self, action: str, argument: str) -> str:
        if action == SEARCH:
            call = json.dumps({"name": "search", "arguments": {"query": argument}}, ensure_ascii=False)
            return f"<tool_call>\n{call}\n</tool_call>{self._end}"
        return f"<answer>\n{argument}\n</answer>{self._end}"

    def _wrapper(self) -> tuple[str, str]:
        return self._before, "\n</answer>" + self._end


_DIALECTS = {"tags": TagsDialect, "chat": ChatDialect}


def make_dialect(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    max_passage_tokens: int,
    max_answer_tokens: int,
    max_answers: int,
) -> Dialect:
    """The dialect ``tags`` or ``chat`` for a tokenizer.

    Args:
        system: instructions before the question; None takes the dialect's own, "" has none.
    Raises:
        InputError: the tokenizer cannot serve the dialect.
    """
    return _DIALECTS[name](
        tokenizer,
        system=system,
        max_passage_tokens=max_passage_tokens,
        max_answer_tokens=max_answer_tokens,
        max_answers=max_answers,
    )
