"""Search: BM25 in process, a server that speaks Search-R1's protocol, or nothing."""

from __future__ import annotations

import asyncio
import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from functools import lru_cache
from itertools import islice

import bm25s
import httpx

from igpo_fast.config import Config
from igpo_fast.data.bm25 import best, indexed_words
from igpo_fast.data.load import Data
from igpo_fast.data.passages import title_and_text
from igpo_fast.endpoint import Endpoint, Failed
from igpo_fast.errors import ToolError, masked
from igpo_fast.rollouts.tools.base import Tool, causes, text_function
from igpo_fast.types import SEARCH, Action, Passage, Question, ToolResult

EXAMPLE = "http://127.0.0.1:8000/retrieve"

SEARCH_TOOL = text_function(
    SEARCH, "Search a collection of passages; returns the best ones.", "query", "What to look for."
)
FOUND = ("calls", "passages", "empty")
"""Counters of every search: calls, passages found, calls that found none."""
COUNTS = (
    *FOUND, "failures", "retries", "timeouts", "unreachable", "rate_limited", "server_errors", "refused", "malformed",
    "too_large",
)  # fmt: skip
"""Counters of a search that can fail: also calls that failed for good, retries, and the causes of failed attempts."""


class Search(Tool):
    """A search: a query in, passages out. Calling it searches and counts; a subclass defines ``search``."""

    schemas = (SEARCH_TOOL,)
    counted = FOUND
    where = "data.corpus"
    """The setting that names the source of passages, for messages."""

    async def call(self, opened: Question, action: Action) -> ToolResult:
        return await self(action.arguments["query"], opened.corpus)

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """Search ``corpus`` (``Question.corpus``) for ``query``.

        Raises:
            ToolError: the search failed for good, and ``search.on_failure`` is ``stop``.
        """
        self.counts["calls"] += 1
        try:
            result = await self.search(query, corpus)
        except ToolError:
            self.counts["failures"] += 1
            raise
        if result.failure:
            self.counts["failures"] += 1
        else:
            self.counts["passages"] += len(result.passages)
            self.counts["empty"] += not result.passages
        return result

    @abstractmethod
    async def search(self, query: str, corpus: str) -> ToolResult:
        """Find the passages; ``__call__`` counts them."""

    def warning(self, counts: Mapping[str, int]) -> str:
        """About searches that failed, or found nothing.

        Raises:
            ToolError: every search failed.
        """
        calls, failures = counts["calls"], counts["failures"]
        if failures and failures == calls:
            raise ToolError(
                f"every search failed ({calls:,} calls; {causes(counts)}); see that the server at {self.where} answers"
            )
        warnings = []
        if failures:
            warnings.append(
                f"{failures:,} of {calls:,} searches failed for good ({causes(counts)}); the policy was shown "
                "search.failure_text instead of passages"
            )
        if calls and counts["empty"] == calls - failures:
            warnings.append(
                f"none of {calls - failures:,} searches found a passage; see that {self.where} has the passages that "
                "these questions need"
            )
        return "; ".join(warnings)


class Bm25Search(Search):
    """BM25 (Lucene's variant) over passages in memory.

    Words come from ``words.search_words``. Titles count twice, so that a passage about something ranks before passages
    that mention it (51 % of MuSiQue's supporting passages are among the best 5; 47 % with titles counted once, 40 %
    without titles). Equal scores keep the passages' order; passages without a word of the query are not returned.

    Args:
        collections: name -> passages; each is indexed when it is first searched.
        top_k: most passages per search.
        cache_size: number of recent queries whose results are kept.
    """

    def __init__(self, collections: Mapping[str, Sequence[Passage]], top_k: int, *, cache_size: int = 65536):
        super().__init__()
        self._collections = collections
        self._top_k = top_k
        self._indices: dict[str, bm25s.BM25] = {}
        self._search_cached = lru_cache(maxsize=cache_size)(self._search)

    async def search(self, query: str, corpus: str) -> ToolResult:
        """The best passages of a collection for ``query``.

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


class HttpSearch(Search):
    """A server that speaks Search-R1's retrieval protocol.

    ``POST {"queries": [q], "topk": k, "return_scores": true}`` returns
    ``{"result": [[{"document": {"id", "contents"}, "score"}, ...]]}``, contents being ``title\\ntext``. A server may
    leave out ids (as Search-R1's own for web search do), which digests of the contents then replace, and scores, in
    which case each hit is the document itself. Blank passages are skipped.

    Timeouts, lost connections, 408, 429 and 5xx are retried. Answers that are too large or malformed are not, because
    they would be the same again. A server on this machine is reached directly, whatever HTTP_PROXY says.

    Args:
        url: address of the retrieval endpoint, with ``user:password@`` before the host if it needs them.
        top_k: most passages per search.
        timeout: seconds per attempt; waiting for a free connection does not count.
        retries: most attempts after the first.
        backoff: seconds before the first retry, doubled before each later one, plus a jitter of up to 50 % that is
            derived from the query: searches that failed together do not come back together. A server's Retry-After
            may make it longer.
        concurrency: most concurrent requests; further searches wait. A search in back-off does not count.
        max_bytes: largest answer; larger ones are refused unread.
        failure_text: text that the policy is shown if all attempts fail; None raises ToolError.
        transport: replaces the network in tests.
    """

    counted = COUNTS
    where = "search.url"

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
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        super().__init__()
        self._name = f"search.url={masked(url)}"
        self._top_k = top_k
        self._failure_text = failure_text
        self.endpoint = Endpoint(
            url, example=EXAMPLE, what="search server", timeout=timeout, retries=retries, backoff=backoff,
            concurrency=concurrency, max_bytes=max_bytes, counts=self.counts, remedy=self._remedy, transport=transport,
            smaller="lower search.top_k, or raise search.max_response_mb",
        )  # fmt: skip

    def check(self, question: Question | None = None) -> None:
        """Search once, as a run does (``Tool.check``)."""
        query = question.question if question else "Is the search server there?"

        async def search() -> None:
            async with aclosing(self):
                await self._search(query)

        asyncio.run(search())
        self.counts.clear()

    async def aclose(self) -> None:
        await self.endpoint.aclose()

    async def search(self, query: str, corpus: str) -> ToolResult:
        """The server's passages for ``query``; it has one collection, so ``corpus`` is ignored."""
        try:
            return ToolResult(await self._search(query))
        except ToolError:
            if self._failure_text is None:
                raise
            return ToolResult(failure=self._failure_text)

    async def _search(self, query: str) -> tuple[Passage, ...]:
        body = {"queries": [_encodable(query)], "topk": self._top_k, "return_scores": True}
        try:
            return await self.endpoint.post(body, self._read, jitter=query)
        except Failed as failed:
            raise ToolError(f"{self._name}: {failed}; {failed.remedy}") from None

    def _remedy(self, response: httpx.Response | None = None) -> str:
        """Advice about an answer outside the protocol; ``response`` is None if its status was 200."""
        status = response.status_code if response else 200
        if status in (401, 403, 407):
            return "give the credentials that it needs: search.url=http://user:password@host/..."
        if response and response.has_redirect_location:
            return f"give the address that it redirects to: {response.headers['Location']}"
        url = self.endpoint.url
        if status in (200, 404, 405) and not httpx.URL(url).path.strip("/"):
            return f"add the path: search.url={url.rstrip('/')}/retrieve"
        if status in (404, 405):
            return f"is its path right? A search server's address is like {EXAMPLE}"
        return 'expected {"result": [[{"document": {"id", "contents"}, "score"}]]}, as Search-R1\'s server answers'

    def _read(self, content: bytes) -> tuple[Passage, ...]:
        try:
            (hits,) = json.loads(content)["result"]
            return tuple(islice(filter(None, map(_passage, hits)), self._top_k))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise Failed(
                "malformed", f"its answer is not Search-R1's ({type(error).__name__}: {error})", again=False,
                remedy=self._remedy(),
            ) from None  # fmt: skip


def _passage(hit: Mapping) -> Passage | None:
    """The passage of a hit; None if it is blank. Raises KeyError if the hit has no text."""
    document = hit.get("document", hit)
    if "contents" not in document and "text" not in document:
        raise KeyError("contents")
    title, text = map(_encodable, title_and_text(document))
    id = document.get("id")
    return Passage(_digest(title, text) if id in (None, "") else _encodable(str(id)), title, text) if text else None


def _digest(*texts: str) -> str:
    """16 hexadecimal characters that depend on the texts alone."""
    return hashlib.blake2b("\n".join(texts).encode(errors="replace"), digest_size=8).hexdigest()


def _encodable(text: str) -> str:
    """``text`` without lone surrogates: JSON's escapes can write them, UTF-8 and tokenizers cannot."""
    return text.encode(errors="replace").decode()


class NoSearch(Search):
    """Finds nothing, to measure a policy without search."""

    async def search(self, query: str, corpus: str) -> ToolResult:
        return ToolResult()


def make_search(config: Config, data: Data) -> Search:
    """The search tool of a run: the server at ``search.url``, else BM25 over the run's collections."""
    search = config.search
    if not search.url:
        return Bm25Search(data.collections, search.top_k)
    return HttpSearch(
        search.url, search.top_k, timeout=search.timeout, retries=search.retries, backoff=search.backoff,
        concurrency=search.concurrency, max_bytes=int(search.max_response_mb * 1e6),
        failure_text=search.failure_text if search.on_failure == "text" else None,
    )  # fmt: skip
