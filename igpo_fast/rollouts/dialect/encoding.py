"""Tokens of a text that mixes our own text with that of others.

A tokenizer reads ``<|im_end|>`` as the token that ends a turn wherever it stands. Only our
own text and the template's mean it so: if a question, passage or answer that spells it did, a passage could forge
turns.
"""

from __future__ import annotations

import re
from copy import deepcopy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_QUOTED = re.compile("[\udc00-\udcff]+")


def unquote(text: str) -> str:
    """``text`` with every part that ``Encoder.quote`` quoted restored."""
    return _QUOTED.sub(lambda quoted: bytes(ord(c) - 0xDC00 for c in quoted[0]).decode(errors="replace"), text)


class Encoder:
    """Token ids of texts, without added tokens.

    Control tokens are the tokenizer's special ones, and of its other added tokens those like ``<|call|>`` and the
    delimiters that its chat template or the dialect writes (Qwen's ``</tool_response>``). ``quote`` disguises them in a
    text of others: each byte becomes half a surrogate pair, which no text holds and which templates copy unchanged.
    Encoding undoes this and reads the text between two of our own control tokens as transformers'
    ``split_special_tokens`` would. Text that spells no control token is encoded as usual, in one call.

    Args:
        tags: text that the dialect writes besides the template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: tuple[str, ...] = ()):
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        written = "".join((str(tokenizer.chat_template), *tags))
        self._special = {*tokenizer.all_special_ids, *(id for id, token in added.items() if token.special)}
        self._tags = [token.content for token in added.values() if _is_delimiter(token.content, written)]
        self._control = self._special | {id for id, token in added.items() if token.content in self._tags}

    def quote(self, text: str, *, tags: bool = True) -> str:
        """Text of others, for ``ids``: unchanged except for control tokens that it spells and halves of characters.

        Args:
            tags: whether delimiters that are not special are disguised, too; a policy's own text may hold them.
        """
        text = text.encode(errors="replace").decode()
        ids, offsets = self._plain(text)
        parts, at = [], 0
        for start, stop in offsets[_are(ids, self._control if tags else self._special)].tolist():
            parts += [text[at:start], "".join(chr(0xDC00 + byte) for byte in text[start:stop].encode())]
            at = stop
        return "".join((*parts, text[at:]))

    def ids(self, text: str) -> np.ndarray:
        """Tokens: int32 [n]."""
        if _QUOTED.search(text):
            return self.with_offsets(text)[0]
        return np.asarray(self._tokenizer(text, add_special_tokens=False).input_ids, dtype=np.int32)

    def with_offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, int32 [n], and each one's range of characters in the unquoted text, int64 [n, 2]."""
        if not _QUOTED.search(text):
            return self._plain(text)
        whole, theirs = unquote(text), _quoted_characters(text)
        ids, offsets = self._plain(whole)
        at, parts = 0, []
        for index in np.flatnonzero(_are(ids, self._control)):
            start, stop = offsets[index]
            if not theirs[start:stop].any():
                parts += [self._as_text(whole, at, start), (ids[index : index + 1], offsets[index : index + 1])]
                at = stop
        parts.append(self._as_text(whole, at, len(whole)))
        return tuple(np.concatenate(column) for column in zip(*parts, strict=True))

    def _plain(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.asarray(encoded.input_ids, dtype=np.int32)
        return ids, np.asarray(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2)

    def _as_text(self, text: str, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._splitting.encode(text[start:stop], add_special_tokens=False)
        ids = np.asarray(encoded.ids, dtype=np.int32)
        # A vocabulary of words may have the token as a word, too.
        if (unknown := self._tokenizer.unk_token_id) is not None:
            ids = np.where(_are(ids, self._control), np.int32(unknown), ids)
        return ids, np.asarray(encoded.offsets, dtype=np.int64).reshape(-1, 2) + start

    @cached_property
    def _splitting(self) -> Tokenizer:
        """The tokenizer with control tokens read as text."""
        backend = deepcopy(self._tokenizer.backend_tokenizer)
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([AddedToken(tag, normalized=False) for tag in self._tags])
        backend.encode_special_tokens = True
        return backend


def _is_delimiter(token: str, written: str) -> bool:
    """Whether an added token has the form ``<|word|>``, or the form ``<word>`` or ``[word]`` and stands in ``written``.
    Other added tokens (runs of spaces, a domain's words) are ordinary text."""
    if token[:1] not in ("<", "[") or token[-1:] not in (">", "]"):
        return False
    return token[1:2] in ("|", "｜") or token in written


def _are(ids: np.ndarray, some: set[int]) -> np.ndarray:
    """Whether each id is among ``some``: bool [n]."""
    return np.isin(ids, list(some))


def _quoted_characters(text: str) -> np.ndarray:
    """Whether each character of the unquoted text was quoted: bool [its length]."""
    theirs, at = [], 0
    for quoted in _QUOTED.finditer(text):
        theirs += [False] * (quoted.start() - at) + [True] * len(unquote(quoted[0]))
        at = quoted.end()
    return np.array(theirs + [False] * (len(text) - at))
