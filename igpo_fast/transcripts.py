"""Messages as the tokens of turns and responses, in tags or as a chat template writes them.

Messages are text, not sampled tokens. They are tokenised message by message (tags) or turn by turn (chat), so tokens
can differ from the sampled ones, mostly at the borders, and values slightly with them. Messages are text of others:
special tokens that they spell are read as text, and in tools' messages so are the template's delimiters.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import TODAY, ChatDialect, Dialect, TagsDialect, unquote
from igpo_fast.rollouts.dialect.parsing import map_texts
from igpo_fast.trajectories import Message, Record
from igpo_fast.types import Rollout

NOTHING = np.zeros(0, dtype=np.int32)


class Written(NamedTuple):
    """A turn's own tokens, and those of its responses, int32 [n] and [m]. Without responses, m = 0 and what opens the
    next turn is the turn's own."""

    ids: np.ndarray
    response_ids: np.ndarray


class Tags:
    """Trajectories as one continuous text: the concatenated contents."""

    def __init__(self, dialect: TagsDialect):
        self.dialect = dialect
        self._end = dialect.tokenizer.eos_token or ""

    def write(self, record: Record, *, apart: bool = False, last: bool = False) -> tuple[np.ndarray, list[Written]]:
        """Tokens of the prompt, and of each turn but the last.

        Args:
            apart: whether it must be told where a turn's responses begin; in tags it always is.
            last: whether the last turn comes, too, without responses.
        """
        for message in (*record.prompt, *(message for turn in record.turns for message in turn)):
            if message.calls or message.thought:
                raise InputError(
                    f"{record.where}: message {message.number} has tool_calls or reasoning_content, which the dialect "
                    "tags cannot write; use the dialect chat, or write them into its content"
                )
        if record.prompt:
            prompt = self._joined(self.dialect.start, record.prompt)
        else:
            prompt = self.dialect.prompt(record.question)
        return prompt, [
            Written(self._encode(said), self._joined(NOTHING, responses)) for said, *responses in _turns(record, last)
        ]

    def _joined(self, before: np.ndarray, messages: Sequence[Message]) -> np.ndarray:
        return np.concatenate([before, *map(self._encode, messages)])

    def _encode(self, message: Message) -> np.ndarray:
        said = message.content
        if message.role != "assistant":
            return self.dialect.encode(self.dialect.quote(said))
        # The policy may write delimiters and end its turn.
        ends = self._end if self._end and said.endswith(self._end) else ""
        return self.dialect.encode(self.dialect.quote(said.removesuffix(ends), tags=False) + ends)


class Chat:
    """Trajectories as the model's own chat template writes them; ``tools`` of a line reach the template.

    A prefix is rendered with the opening of the next turn; a turn is the text that this adds to the prefix before.
    Messages that a template leaves out (as Qwen3's does thoughts before the user's last message) are refused, because
    values would be of other texts.
    """

    def __init__(self, dialect: ChatDialect):
        self.dialect = dialect
        self.tokenizer: PreTrainedTokenizerFast = dialect.tokenizer
        tokenizer = self.tokenizer
        # As ``Dialect.check`` has it; where it is not so, a stop id may be a token of texts.
        tokens = (tokenizer.eos_token_id, *tokenizer.get_added_vocab().values())
        self._ends_turns = self.dialect.stop_ids[0] in tokens

    def write(self, record: Record, *, apart: bool = False, last: bool = False) -> tuple[np.ndarray, list[Written]]:
        """Tokens of the prompt, and of each turn but the last. Each turn is tokenised with its responses, in one piece.

        Args:
            apart: whether it must be told where a turn's responses begin: behind the token that ends a turn of the
                policy's, as in training. Else the turns' own tokens hold the responses.
            last: whether the last turn comes, too, without responses, up to the token that ends it.
        """
        tools = record.row.get("tools")
        if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise InputError(f'{record.where}: "tools" are no list of objects; correct them, or leave them out')
        given, turns = list(record.prompt), _turns(record, last)
        if not given:
            given = [Message(0, "user", record.question.question)]
            if self.dialect.system:
                given.insert(0, Message(0, "system", self.dialect.system))
            tools = self.dialect.tools
        tools = map_texts(tools, self.dialect.quote, self.dialect.quote)
        messages = [self._written(message) for message in given]
        before = self._render(record, messages, tools)
        prompt, made = self.dialect.encode(before), []
        for number, turn in enumerate(turns, start=1):
            text, more = before, number < len(record.turns)
            for message in turn:
                messages.append(self._written(message))
                shorter, text = text, self._render(record, messages, tools, more)
                if text == shorter:
                    raise InputError(
                        f"{record.where}: the chat template writes nothing for a message of role "
                        f"{message.role!r}; use another role, or use the dialect tags"
                    )
            if not text.startswith(before):
                raise InputError(
                    f"{record.where}: the chat template rewrites the text before turn {number} when that "
                    "turn follows, so prefixes do not continue one another; use the dialect tags, or another "
                    "template"
                )
            ids = self.dialect.encode(text[len(before) :])
            end = self._end(record, ids, number) if apart and (len(turn) > 1 or not more) else len(ids)
            made.append(Written(ids[:end], ids[end:] if more else NOTHING))
            before = text
        self._check_complete(record, [*given, *(message for turn in turns for message in turn)], tools)
        return prompt, made

    def _end(self, record: Record, ids: np.ndarray, number: int) -> int:
        """Where a turn ends: behind the first token that ends one, which no message can spell."""
        ends = np.flatnonzero(np.isin(ids, self.dialect.stop_ids))
        if not self._ends_turns or not len(ends):
            raise InputError(
                f"{record.where}: the chat template ends turn {number} with no token of its own, so that nothing tells "
                "where the response begins; use the dialect tags, another --baseline, or a run's own rollouts"
            )
        return int(ends[0]) + 1

    def _written(self, message: Message) -> dict[str, Any]:
        """A message in the template's form."""
        own = message.role != "tool"  # only tools may not write the template's delimiters
        return _for_template(message, lambda text: self.dialect.quote(text, tags=not own), self.dialect.quote)

    def _check_complete(self, record: Record, messages: list[Message], tools: list | None) -> None:
        """Refuse a template that leaves out part of a message: each text between tags is replaced by a mark, and all
        marks must appear in the rendering."""
        marks: dict[str, int] = {}

        def marked(text: str, number: int) -> str:
            pieces = _TAG.split(text)
            for i, piece in enumerate(pieces):
                if piece.strip() and not _TAG.fullmatch(piece):
                    pieces[i] = f"{_MARK}{len(marks)}."
                    marks[pieces[i]] = number
            return "".join(pieces)

        copies = [
            _for_template(m, lambda text, number=m.number: marked(text, number), self.dialect.quote) for m in messages
        ]
        rendered = self._render(record, copies, tools)
        for mark, number in marks.items():
            if mark not in rendered:
                raise InputError(
                    f"{record.where}: the chat template leaves out part of message {number} (its thought, where a "
                    "user's message follows: give results the role tool); or use the dialect tags"
                )

    def _render(self, record: Record, messages: list[dict], tools: list | None, more: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=more, tokenize=False, strftime_now=TODAY.strftime,
                **self.dialect.options,
            )  # fmt: skip
        except REFUSALS as error:
            reason = unquote(" ".join(str(error).split()))
            raise InputError(
                f"{record.where}: the chat template refuses the messages ({reason}); correct them, or use "
                "the dialect tags"
            ) from None


REFUSALS = (TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""Errors that a template may raise about messages."""
_MARK = secrets.token_hex(8)
"""Text that no line contains."""
_TAG = re.compile(r"(<[^<>]{1,40}>)")


def _turns(record: Record, last: bool) -> Sequence[tuple[Message, ...]]:
    """The messages of each turn but the last, or of that, too, without its responses."""
    return [*record.turns[:-1], *([record.turns[-1][:1]] if last else [])]


def _for_template(message: Message, write: Callable[[str], str], quote: Callable[[str], str]) -> dict[str, Any]:
    """A message as templates take it, its texts written by ``write``, names of arguments by ``quote``."""
    # Templates have no environment role: messages not from a tool count as the user's.
    role = "user" if message.role == "environment" else message.role
    made: dict[str, Any] = {"role": role, "content": write(message.content)}
    if message.thought:
        made["reasoning_content"] = write(message.thought)
    if message.calls:
        made["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": write(call["name"]),
                    "arguments": map_texts(call["arguments"], write, quote),
                },
            }
            for call in message.calls
        ]
    return made


def make_writer(dialect: Dialect) -> Tags | Chat:
    """What writes trajectories as ``dialect`` has them; without a prompt of their own they get the dialect's.

    Raises:
        InputError: a dialect that is made from neither ``tags`` nor ``chat``.
    """
    if isinstance(dialect, TagsDialect):
        return Tags(dialect)
    if isinstance(dialect, ChatDialect):
        return Chat(dialect)
    raise InputError(
        f"rollout.dialect: trajectories from files have no form in {type(dialect).__name__}; use tags, chat, or a "
        "dialect made from one of them"
    )


def check_sampled(record: Record, dialect: Dialect, vocabulary: int) -> Rollout:
    """The record's rollout, whose tokens are used as they are.

    Args:
        vocabulary: how many tokens the model has.
    Raises:
        InputError: its tokens are another tokenizer's, or a prompt or turn has none.
    """
    rollout = record.rollout
    if rollout.ids.max() >= vocabulary or any(dialect.decode(turn.ids) != turn.text for turn in rollout.turns):
        raise InputError(
            f"{record.where}: its ids do not decode to its texts with the model's tokenizer; give the model that "
            "sampled them"
        )
    if not len(rollout.prompt_ids) or (np.diff(rollout.boundaries) == 0).any():
        raise InputError(f"{record.where}: a prompt or a turn without tokens; give the file as it was written")
    return rollout


def unknown_id(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The token of unknown words; None if there is none, or it also has another meaning (as GPT-2's)."""
    others = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return None if tokenizer.unk_token_id in others else tokenizer.unk_token_id


def check_known(ids: np.ndarray, unknown: int | None, what: str) -> None:
    """Refuse tokens of unknown words: all such words would be the same."""
    if unknown is not None and (ids == unknown).any():
        raise InputError(
            f"{what} has words that the model's tokenizer does not know; choose a model that knows them, or leave "
            "the line out"
        )
