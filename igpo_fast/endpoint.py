"""An HTTP endpoint that takes JSON: time limits, retries with back-off, bounded answers and connections."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx

from igpo_fast.net import direct, fault, without_credentials

T = TypeVar("T")
LONGEST_WAIT = 30.0
"""Longest back-off in seconds, even if a server asks for more."""


class Endpoint:
    """A URL to which JSON is posted.

    Timeouts, lost connections, 408, 429 and 5xx are retried. Answers that are too large or malformed are not, because
    they would be the same again. A server on this machine is reached directly, whatever HTTP_PROXY says.

    Args:
        url: address, with ``user:password@`` before the host if it needs them.
        example: a right address, and ``what`` the kind of server, for messages.
        remedy: advice about an answer that is no success.
        smaller: advice about an answer that is too large.
        timeout: seconds per attempt; waiting for a free connection does not count.
        retries: most attempts after the first.
        backoff: seconds before the first retry, doubled before each later one, plus a jitter of up to 50 % that is
            derived from a text: requests that failed together do not come back together. A server's Retry-After may
            make it longer.
        concurrency: most concurrent requests; others wait. One in back-off does not count.
        max_bytes: largest answer; larger ones are refused unread.
        counts: is counted up: retries, and failed attempts by their causes (rollouts/tools/base.CAUSES).
        headers: of every request.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        example: str,
        what: str,
        remedy: Callable[[httpx.Response], str],
        smaller: str,
        timeout: float,
        retries: int,
        backoff: float,
        concurrency: int,
        max_bytes: int,
        counts: Counter[str],
        headers: Mapping[str, str] | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self._fault = fault(url)
        self.url, self._credentials = (url, None) if self._fault else without_credentials(url)
        self._example, self._what, self._remedy, self._smaller = example, what, remedy, smaller
        self._timeout, self._retries, self._backoff = timeout, retries, backoff
        self._concurrency, self._max_bytes, self._counts = concurrency, max_bytes, counts
        # Not compressed: the limit of bytes is on the memory used here.
        self._headers = {"Accept-Encoding": "identity", **(headers or {})}
        self._transport, self._mounts = transport, direct(url)
        self._ssl = httpx.create_ssl_context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._clients: asyncio.LifoQueue[httpx.AsyncClient | None] | None = None

    async def aclose(self) -> None:
        """Close connections of the running event loop before it ends. A later request opens new ones."""
        clients, self._clients, self._loop = self._clients, None, None
        while clients and not clients.empty():
            if client := clients.get_nowait():
                await client.aclose()

    async def post(self, body: Mapping, read: Callable[[bytes], T], jitter: str = "") -> T:
        """POST ``body`` as JSON until it is answered.

        Args:
            read: makes the result of an answer's bytes; raises ``Failed`` if it cannot.
            jitter: a text that the waits depend on.
        Raises:
            Failed: all attempts failed, or one failed for good.
        """
        for attempt in range(self._retries + 1):
            try:
                return await self._attempt(body, read)
            except Failed as failed:
                self._counts[failed.count] += 1
                if not failed.again or attempt == self._retries:
                    tried = "" if not failed.again else f" after {attempt + 1} attempts"
                    remedy = failed.remedy or f"is the {self._what} running there?"
                    raise Failed(failed.count, f"{failed}{tried}", again=False, remedy=remedy) from None
                doubled = self._backoff * 2 ** min(attempt, 64)  # larger exponents would overflow
                wait = max(doubled, failed.wait) * (1 + _fraction(jitter) / 2)
            self._counts["retries"] += 1
            await asyncio.sleep(min(wait, LONGEST_WAIT))
        raise AssertionError("the last attempt returns or raises")

    async def _attempt(self, body: Mapping, read: Callable[[bytes], T]) -> T:
        if self._fault:
            raise Failed("refused", self._fault, again=False, remedy=f"give a URL like {self._example}")
        # Connections and queues belong to an event loop, and each step of a run may have its own.
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            # One client per concurrent request, made when first needed, the last used one first: one client's pool
            # goes through all its connections for every request (4 ms of CPU against 1 at 32).
            self._clients = asyncio.LifoQueue()
            for _ in range(self._concurrency):
                self._clients.put_nowait(None)
            self._loop = loop
        client = await self._clients.get() or httpx.AsyncClient(
            timeout=None, verify=self._ssl, auth=self._credentials, mounts=self._mounts, transport=self._transport
        )
        try:
            async with asyncio.timeout(self._timeout) as deadline:
                content = await self._fetch(client, body)
            if deadline.expired():  # the cancelled attempt went on regardless
                raise TimeoutError
            return read(content)
        except TimeoutError:
            raise Failed("timeouts", f"no answer within {self._timeout:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Failed("unreachable", f"no answer ({reason})") from None
        finally:
            self._clients.put_nowait(client)

    async def _fetch(self, client: httpx.AsyncClient, body: Mapping) -> bytes:
        request = client.stream("POST", self.url, json=body, headers=self._headers)
        async with request as response:
            status = response.status_code
            if status == 429:
                raise Failed("rate_limited", "no answer (status 429)", wait=_retry_after(response))
            if status >= 500 or status == 408:
                raise Failed("server_errors", f"no answer (status {status})", wait=_retry_after(response))
            if not response.is_success:
                raise Failed("refused", f"a POST gave status {status}", again=False, remedy=self._remedy(response))
            content = bytearray()
            async for chunk in response.aiter_raw():
                content += chunk
                if len(content) > self._max_bytes:
                    raise Failed(
                        "too_large", f"its answer exceeds {self._max_bytes:,} bytes", again=False,
                        remedy=self._smaller,
                    )  # fmt: skip
        return bytes(content)


class Failed(Exception):
    """An attempt, or all of them, failed.

    Args:
        count: the one of ``rollouts/tools/base.CAUSES`` that is incremented.
        again: whether a retry may succeed.
        wait: seconds that the server asks to wait before a retry.
        remedy: what to do; empty is to see that the server runs.
    """

    def __init__(self, count: str, reason: str, *, again: bool = True, wait: float = 0.0, remedy: str = ""):
        super().__init__(reason)
        self.count, self.again, self.wait, self.remedy = count, again, wait, remedy


def _fraction(text: str) -> float:
    """A number 0 <= x < 1 that depends on the text alone."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest()) / 2**64


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks to wait, given as a number or as a date; 0 if it asks for none."""
    value = response.headers.get("Retry-After", "")
    try:
        seconds = (
            float(value) if value.isdecimal() else (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return 0.0
    return max(seconds, 0.0)
