"""Words of a text, for search and for scores. Scripts that write no spaces between words count by character."""

from __future__ import annotations

from itertools import pairwise
from unicodedata import normalize

import regex

_NO_SPACES = r"[\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}--\p{M}]"
_CHARACTER = regex.compile(rf"{_NO_SPACES}\p{{M}}*", regex.VERSION1)
_WORD = regex.compile(r"[\p{L}\p{N}\p{M}_]+")
_PIECE = regex.compile(rf"(?:{_NO_SPACES}\p{{M}}*)+|(?:(?!{_NO_SPACES}).)+", regex.VERSION1 | regex.DOTALL)


def nfc(text: str) -> str:
    """Unicode's composed form: "é" is one character, however it was typed."""
    return normalize("NFC", text)


def spaced(text: str) -> str:
    """Each character of a script without spaces becomes a word of its own."""
    return _CHARACTER.sub(r" \g<0> ", text)


def search_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits: no stop words, no stemming.

    In scripts without spaces the characters and the pairs of neighbours, as Lucene's CJK analyser has them.

    >>> search_words("In 東京都")
    ['in', '東', '京', '都', '東京', '京都']
    """
    words = _WORD.findall(nfc(text).lower())
    if text.isascii() or not _CHARACTER.search(text):
        return words
    return [word for run in words for piece in _PIECE.findall(run) for word in _grams(piece)]


def _grams(piece: str) -> list[str]:
    characters = _CHARACTER.findall(piece)
    return [*characters, *map("".join, pairwise(characters))] if characters else [piece]
