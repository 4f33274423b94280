"""Search: BM25 in process, a server that speaks Search-R1's protocol, or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import islice

import bm25s
import httpx

from igpo_fast.config import Config
from igpo_fast.data import Data
from igpo_fast.errors import ToolError
from igpo_fast.passages import title_and_text
from igpo_fast.tools.base import Passage, Tool, ToolResult
from igpo_fast.tools.index import best, indexed_words

LONGEST_WAIT = 30.0
"""Seconds; longer back-offs, also those a server asks for, are cut to it."""


class Bm25Search:
    """BM25 (Lucene's variant) over passages held in memory.

    Words are those of ``words.search_words``. Titles count twice: a
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
        index, passages = self._index(corpus), self._collections[corpus]
        return ToolResult(tuple(passages[number] for number, _ in best(index, query, self._top_k)))

    def _index(self, corpus: str) -> bm25s.BM25:
        if corpus not in self._indices:
            if not self._collections.get(corpus):
                raise ToolError(f"search: no passages in collection {corpus!r}; give data.corpus=FILE or search.url")
            index = bm25s.BM25()
            texts = [indexed_words(passage) for passage in self._collections[corpus]]
            index.index(texts, show_progress=False, create_empty_token=False)
            self._indices[corpus] = index
        return self._indices[corpus]


class HttpSearch:
    """A server that speaks Search-R1's retrieval protocol.

    ``POST {"queries": [q], "topk": k, "return_scores": true}`` brings
    ``{"result": [[{"document": {"id", "contents"}, "score"}, ...]]}``, contents being ``title\\ntext``. A server may
    leave ids out (Search-R1's own for web search do), for which digests of the contents stand, and the scores, with
    each document itself for a hit. Blank passages are skipped.

    A timeout, a server that is not reached, 408, 429 and 5xx are tried again; an answer that is too large or not of the
    protocol would be so again, and is not. ``counts`` holds a Counter of ``tools.base.COUNTS``.

    Args:
        url: of the retrieval endpoint.
        top_k: most passages a search returns.
        timeout: seconds an attempt may take.
        retries: further attempts.
        backoff: seconds before the first of them, doubled before each later one; a server's Retry-After may make it
            longer. Up to half as much is added, by query: those that failed together do not come back together.
        concurrency: most requests at a time; other searches wait their turn. Who backs off makes room.
        max_bytes: larger answers are refused unread.
        failure_text: what the policy reads when all attempts failed; None raises ToolError.
    """

    def __init__(
        self,
        url: str,
        top_k: int,
        *,
        timeout: float = 30.0,
        retries: int = 5,
        backoff: float = 0.5,
        concurrency: int = 64,
        max_bytes: int = 4_000_000,
        failure_text: str | None = None,
    ):
        self._url = url
        self._top_k = top_k
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._concurrency = concurrency
        self._max_bytes = max_bytes
        self._failure_text = failure_text
        self._ssl = httpx.create_ssl_context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clients: asyncio.LifoQueue[httpx.AsyncClient | None] | None = None
        self.counts: Counter[str] = Counter()

    def check(self) -> None:
        """Search once.

        Raises:
            ToolError: no usable answer after all attempts.
        """

        async def search() -> None:
            async with aclosing(self):
                await self._search("Is the search server there?")

        asyncio.run(search())
        self.counts.clear()

    async def aclose(self) -> None:
        """Close the connections, which belong to the running event loop. A search opens new ones."""
        clients, self._clients, self._loop = self._clients, None, None
        while clients and not clients.empty():
            if client := clients.get_nowait():
                await client.aclose()

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """The server's passages for ``query``; it has one collection, so ``corpus`` is ignored.

        Raises:
            ToolError: no usable answer after all attempts, and there is no ``failure_text``.
        """
        self.counts["calls"] += 1
        try:
            return ToolResult(await self._search(query))
        except ToolError:
            self.counts["failures"] += 1
            if self._failure_text is None:
                raise
            return ToolResult((), failure=self._failure_text)

    async def _search(self, query: str) -> tuple[Passage, ...]:
        for attempt in range(self._retries + 1):
            try:
                return await self._attempt(query)
            except _Failed as failed:
                self.counts[failed.count] += 1
                if not failed.again or attempt == self._retries:
                    tried = "" if not failed.again else f" after {attempt + 1} attempts"
                    raise ToolError(f"search.url={self._url}: {failed}{tried}; {failed.remedy}") from None
                wait = max(self._backoff * 2**attempt, failed.wait) * (1 + _fraction(query) / 2)
            self.counts["retries"] += 1
            await asyncio.sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, query: str) -> tuple[Passage, ...]:
        # Connections and queues belong to an event loop, and each step of a run may have its own.
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # A client for each request at a time, made when first needed, the last used one first: one client's pool
            # goes through all its connections for every request (4 ms of CPU against 1 at 32).
            self._clients = asyncio.LifoQueue()
            for _ in range(self._concurrency):
                self._clients.put_nowait(None)
            self._loop = loop
        client = await self._clients.get() or httpx.AsyncClient(timeout=None, verify=self._ssl)
        try:
            async with asyncio.timeout(self._timeout):
                return self._read(await self._fetch(client, query))
        except TimeoutError:
            raise _Failed("timeouts", f"no answer within {self._timeout:g} s") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            remedy = "give a URL like http://127.0.0.1:8000/retrieve"
            raise _Failed("refused", f"no answer ({error})", again=False, remedy=remedy) from None
        except httpx.HTTPError as error:
            raise _Failed("unreachable", f"no answer ({str(error) or type(error).__name__})") from None
        finally:
            self._clients.put_nowait(client)

    async def _fetch(self, client: httpx.AsyncClient, query: str) -> bytes:
        body = {"queries": [_encodable(query)], "topk": self._top_k, "return_scores": True}
        # Not compressed: the limit is on what would be held here.
        request = client.stream("POST", self._url, json=body, headers={"Accept-Encoding": "identity"})
        async with request as response:
            status = response.status_code
            if status == 429:
                raise _Failed("rate_limited", "no answer (status 429)", wait=_retry_after(response))
            if status >= 500 or status == 408:
                raise _Failed("server_errors", f"no answer (status {status})", wait=_retry_after(response))
            if not response.is_success:
                raise _Failed("refused", f"no answer (status {status})", again=False)
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > self._max_bytes:
                    raise _Failed(
                        "too_large", f"its answer exceeds {self._max_bytes:,} bytes", again=False,
                        remedy="lower search.top_k, or raise search.max_response_mb",
                    )  # fmt: skip
        return bytes(content)

    def _read(self, content: bytes) -> tuple[Passage, ...]:
        try:
            (hits,) = json.loads(content)["result"]
            return tuple(islice(filter(None, map(_passage, hits)), self._top_k))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise _Failed(
                "malformed", f"its answer is not Search-R1's ({type(error).__name__}: {error})", again=False,
                remedy='expected {"result": [[{"document": {"id", "contents"}, "score"}]]}',
            ) from None  # fmt: skip


class _Failed(Exception):
    """An attempt failed.

    Args:
        count: which of ``tools.base.COUNTS`` it adds to.
        again: whether another attempt may succeed.
        wait: seconds the server asks for before that.
    """

    def __init__(
        self,
        count: str,
        reason: str,
        *,
        again: bool = True,
        wait: float = 0.0,
        remedy: str = "is the search server running there?",
    ):
        super().__init__(reason)
        self.count, self.again, self.wait, self.remedy = count, again, wait, remedy


def _passage(hit: Mapping) -> Passage | None:
    """A passage of an answer; None if it is blank. Raises KeyError where there is none."""
    document = hit.get("document", hit)
    if "contents" not in document and "text" not in document:
        raise KeyError("contents")
    title, text = map(_encodable, title_and_text(document))
    id = document.get("id")
    return Passage(_digest(title, text) if id in (None, "") else _encodable(str(id)), title, text) if text else None


def _digest(*texts: str) -> str:
    """16 characters that name texts."""
    return hashlib.blake2b("\n".join(texts).encode(errors="replace"), digest_size=8).hexdigest()


def _fraction(text: str) -> float:
    """0 <= x < 1, of the text."""
    return int(_digest(text), 16) / 2**64


def _encodable(text: str) -> str:
    """Without lone surrogates: JSON's escapes can write them, UTF-8 and tokenizers cannot."""
    return text.encode(errors="replace").decode()


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks for, given as such or as a date; 0 where it asks for none."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = (
            float(value) if value.isdecimal() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return 0.0
    return max(seconds, 0.0)


class NoSearch:
    """Finds nothing: what a policy knows without search."""

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        return ToolResult(())


def make_search(config: Config, data: Data) -> Tool:
    """The search tool of a run: the server at ``search.url``, else BM25 over the run's collections."""
    search = config.search
    if not search.url:
        return Bm25Search(data.collections, search.top_k)
    return HttpSearch(
        search.url, search.top_k, timeout=search.timeout, retries=search.retries, backoff=search.backoff,
        concurrency=search.concurrency, max_bytes=int(search.max_response_mb * 1e6),
        failure_text=search.failure_text if search.on_failure == "text" else None,
    )  # fmt: skip
