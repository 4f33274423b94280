"""Words of a text, for search and scores. In scripts without spaces each character counts as a word."""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

# Accents and vowel signs, which belong to the letter before them; \w has none of them. Up to U+FFFF only: beyond it,
# re's classes are slow.
_MARKS = "".join(char for char in map(chr, range(0x10000)) if unicodedata.category(char).startswith("M"))
_NO_SPACES = (
    "\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # Han
    "\u3041-\u309f\u30a1-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Hiragana, Katakana
    "\u0e01-\u0e4e\u0e81-\u0ece\u0edc-\u0edf\u1000-\u103f\u1050-\u108f\u1780-\u17d3"  # Thai, Lao, Burmese, Khmer
)
_RARE_HAN = "\U00020000-\U0003ffff"
_WESTERN = re.compile(r"[\x00-\u02ff\u1e00-\u20cf\u2100-\u2bff]*")
"""Matches a text without marks and scripts without spaces: a fast test for corpora of millions of passages."""
_ORDINARY = re.compile(r"\w+")
_SPECIAL = re.compile(f"[{_MARKS}{_NO_SPACES}]|[{_RARE_HAN}]")
_WORD = re.compile(rf"[\w{_MARKS}]+")
_CHARACTER = re.compile(f"(?:[{_NO_SPACES}]|[{_RARE_HAN}])[{_MARKS}]*")
_PIECE = re.compile(f"(?:{_CHARACTER.pattern})+|(?:(?![{_RARE_HAN}])[^{_NO_SPACES}])+")


def nfc(text: str) -> str:
    """``text`` in Unicode's composed form: "é" is one character, however it was typed."""
    return unicodedata.normalize("NFC", text)


def spaced(text: str) -> str:
    """``text`` with spaces around each character of a script without spaces."""
    return _CHARACTER.sub(r" \g<0> ", text)


def search_words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits: no stop words, no stemming.

    In scripts without spaces, words are characters and pairs of neighbours, as in Lucene's CJK analyser.

    >>> search_words("In 東京都")
    ['in', '東', '京', '都', '東京', '京都']
    """
    lowered = nfc(text).lower()
    if _WESTERN.fullmatch(lowered) or not _SPECIAL.search(lowered):
        return _ORDINARY.findall(lowered)
    return [word for run in _WORD.findall(lowered) for piece in _PIECE.findall(run) for word in _grams(piece)]


def _grams(piece: str) -> list[str]:
    characters = _CHARACTER.findall(piece)
    return [*characters, *map("".join, pairwise(characters))] if characters else [piece]
