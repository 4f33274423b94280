"""Search: BM25 in process, a server that speaks Search-R1's protocol, or nothing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import bm25s
import httpx
import numpy as np

from igpo_fast.config import Config
from igpo_fast.data import Data, passage_of
from igpo_fast.errors import InputError
from igpo_fast.tools.base import Passage, Tool, ToolResult

_WORD = re.compile(r"\w+")


class ToolError(InputError):
    """A tool failed for good. Training stops: it must not learn from results that an error left empty."""


class Bm25Search:
    """BM25 (Lucene's variant) over passages held in memory.

    Words are lower-cased runs of letters and digits: no stop words, no stemming. Titles count twice: a
    passage about something comes before those that mention it (of MuSiQue's supporting passages 51 % are
    among the best 5; 47 % with titles counted once, 40 % without titles). Equal scores keep the passages'
    order; passages that share no word with the query are not returned.

    Args:
        collections: name -> passages; each is indexed when it is first searched.
        top_k: most passages a search returns.
        cache_size: recent queries whose results are kept.
    """

    def __init__(self, collections: Mapping[str, Sequence[Passage]], top_k: int, *, cache_size: int = 65536):
        self._collections = collections
        self._top_k = top_k
        self._indices: dict[str, bm25s.BM25] = {}
        self._search_cached = lru_cache(maxsize=cache_size)(self._search)

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """The best passages of a collection.

        Raises:
            ToolError: no such collection.
        """
        return self._search_cached(query, corpus)

    def _search(self, query: str, corpus: str) -> ToolResult:
        index = self._index(corpus)
        ids = index.get_tokens_ids(_words(query))
        if not ids:
            return ToolResult(())
        scores = index.get_scores_from_ids(ids)
        # The k-th best score first: sorting only what reaches it keeps large collections quick.
        k = min(self._top_k, len(scores))
        threshold = np.partition(scores, -k)[-k]
        reach = np.flatnonzero((scores >= threshold) & (scores > 0))
        best = reach[np.argsort(-scores[reach], kind="stable")][:k]
        passages = self._collections[corpus]
        return ToolResult(tuple(passages[i] for i in best))

    def _index(self, corpus: str) -> bm25s.BM25:
        if corpus not in self._indices:
            if not self._collections.get(corpus):
                raise ToolError(f"search: no passages in collection {corpus!r}; give data.corpus=FILE or search.url")
            texts = [f"{passage.title} {passage.title} {passage.text}" for passage in self._collections[corpus]]
            index = bm25s.BM25()
            index.index([_words(text) for text in texts], show_progress=False, create_empty_token=False)
            self._indices[corpus] = index
        return self._indices[corpus]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


class HttpSearch:
    """A server that speaks Search-R1's retrieval protocol.

    ``POST {"queries": [q], "topk": k, "return_scores": true}`` brings
    ``{"result": [[{"document": {"id", "contents"}, "score"}, ...]]}``, contents being ``title\\ntext``.

    Args:
        url: of the retrieval endpoint.
        top_k: most passages a search returns.
        timeout: seconds to wait for a connection, and for the answer.
        retries: further attempts after the server was not reached, or answered 429 or 5xx.
        backoff: seconds before the first of them, doubled before each later one.
        connections: most connections at a time; other searches wait their turn.
    """

    def __init__(
        self,
        url: str,
        top_k: int,
        *,
        timeout: float = 30.0,
        retries: int = 3,
        backoff: float = 0.5,
        connections: int = 64,
    ):
        self._url = url
        self._top_k = top_k
        self._timeout = httpx.Timeout(timeout, pool=None)
        self._retries = retries
        self._backoff = backoff
        self._limits = httpx.Limits(max_connections=connections)
        self._client: httpx.AsyncClient | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """The server's passages for ``query``; it has one collection, so ``corpus`` is ignored.

        Raises:
            ToolError: no usable answer after all attempts.
        """
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(self._backoff * 2 ** (attempt - 1))
            try:
                response = await self._post(query)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                continue
            if response.is_success:
                return self._read(response)
            reason = f"status {response.status_code}"
            if response.status_code != 429 and response.status_code < 500:
                break
        raise ToolError(f"search.url={self._url}: no answer ({reason}); is the search server running there?")

    async def _post(self, query: str) -> httpx.Response:
        # Connections belong to an event loop, and each step of a run may have its own.
        loop = asyncio.get_running_loop()
        if self._client is None or self._loop is not loop:
            self._client = httpx.AsyncClient(timeout=self._timeout, limits=self._limits)
            self._loop = loop
        body = {"queries": [query], "topk": self._top_k, "return_scores": True}
        return await self._client.post(self._url, json=body)

    def _read(self, response: httpx.Response) -> ToolResult:
        try:
            hits: list[dict[str, Any]] = response.json()["result"][0]
            return ToolResult(tuple(passage_of(hit["document"]) for hit in hits[: self._top_k]))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise ToolError(
                f"search.url={self._url}: its answer is not Search-R1's ({type(error).__name__}: {error}); "
                'expected {"result": [[{"document": {"id", "contents"}, "score"}]]}'
            ) from None


class NoSearch:
    """Finds nothing: what a policy knows without search."""

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        return ToolResult(())


def make_search(config: Config, data: Data) -> Tool:
    """The search tool of a run: the server at ``search.url``, else BM25 over the run's collections."""
    if config.search.url:
        return HttpSearch(config.search.url, config.search.top_k)
    return Bm25Search(data.collections, config.search.top_k)
