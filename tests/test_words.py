"""Words for search, in scripts with and without spaces."""

import asyncio
import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_fast.rollouts.tools.search import Bm25Search
from igpo_fast.search_server.index import Bm25, open_index
from igpo_fast.types import Passage
from igpo_fast.words import _SPECIAL, _WESTERN, search_words
from tests.test_data import write_lines


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The U.S.A., 1,000 times_2", ["the", "u", "s", "a", "1", "000", "times_2"]),
        ("e\u0301té", ["été"]),
        ("東京都", ["東", "京", "都", "東京", "京都"]),
        ("iPhone手机", ["iphone", "手", "机", "手机"]),
        ("コーヒー", ["コ", "ー", "ヒ", "ー", "コー", "ーヒ", "ヒー"]),
        ("北京,上海", ["北", "京", "北京", "上", "海", "上海"]),  # no pair across punctuation
        ("道", ["道"]),
        ("ที่นี่", ["ที่", "นี่", "ที่นี่"]),  # vowel signs stay with their letter
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("한국의 수도", ["한국의", "수도"]),
        ("Кто написал", ["кто", "написал"]),
        ("\U00020000\U00020001", ["\U00020000", "\U00020001", "\U00020000\U00020001"]),
        ("?!", []),
    ],
)
def test_search_words(text, words):
    assert search_words(text) == words


# Not U+0130: its lower case has an accent apart.
@settings(derandomize=True)
@given(st.text(st.characters(max_codepoint=0x2FF, exclude_characters="\u0130")))
def test_western_texts_are_runs_of_letters_and_digits(text):
    assert search_words(text) == re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


def test_the_quick_test_misses_nothing():
    assert not [c for c in map(chr, range(0x110000)) if _WESTERN.fullmatch(c) and _SPECIAL.search(c)]


PASSAGES = [
    Passage("0", "北京", "北京是中华人民共和国的首都。"),
    Passage("1", "上海", "上海是中国最大的城市。"),
    Passage("2", "東京", "東京は日本の首都です。"),
    Passage("3", "Cafe\u0301", "Un cafe\u0301 a\u0300 Paris."),
]


@pytest.mark.parametrize(
    ("query", "first"),
    [
        ("中国最大的城市是哪个?", "1"),
        ("日本の首都はどこですか", "2"),
        ("中华人民共和国首都", "0"),
        ("un café", "3"),
        ("京", "2"),
    ],
)
def test_bm25_finds_in_chinese_japanese_and_either_unicode_form(tmp_path, query, first):
    in_process = Bm25Search({"": PASSAGES}, 4)
    found = [passage.id for passage in asyncio.run(in_process(query)).passages]
    if query != "京":  # in two titles
        assert found[0] == first
    assert first in found
    corpus = write_lines(tmp_path / "c.jsonl", *({"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES))
    index = open_index(corpus, Bm25(), tmp_path / "index")
    assert [index.documents.passage(n).id for n, _ in index.search([query], 4)[0]] == found
