"""BM25 (Lucene's variant): how passages become words, and how a query ranks them."""

from __future__ import annotations

import bm25s
import numpy as np

from igpo_fast.types import Passage
from igpo_fast.words import search_words

Hits = list[tuple[int, float]]
"""A query's passages by number, with scores, best first."""


def indexed_words(passage: Passage) -> list[str]:
    """Words of a passage for BM25, with the title twice: passages about something rank before those that mention it."""
    return search_words(f"{passage.title} {passage.title} {passage.text}")


def best(index: bm25s.BM25, query: str, k: int) -> Hits:
    """The ``k`` best passages that share a word with ``query``; equal scores keep the passages' order."""
    ids = index.get_tokens_ids(search_words(query))
    if not ids:
        return []
    scores = index.get_scores_from_ids(ids)
    # The k-th best score first: sorting only scores that reach it keeps large collections quick.
    k = min(k, len(scores))
    threshold = np.partition(scores, -k)[-k]
    reach = np.flatnonzero((scores >= threshold) & (scores > 0))
    first = reach[np.argsort(-scores[reach], kind="stable")][:k]
    return list(zip(first.tolist(), scores[first].tolist(), strict=True))
