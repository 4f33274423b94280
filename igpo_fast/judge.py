"""A language model that judges rollouts, behind an OpenAI-compatible URL."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Literal

import httpx

from igpo_fast.endpoint import Endpoint, Failed
from igpo_fast.errors import ToolError, masked

EXAMPLE = "http://127.0.0.1:8000/v1"


class Judge:
    """Asks a model by ``POST URL/chat/completions`` (vLLM, SGLang, llama.cpp, OpenAI and others answer it).

    The same messages are asked once, whichever rollouts ask: what was answered is kept as long as the judge. A served
    model may answer the same messages differently next time, so a resumed run need not repeat an undisturbed one.

        judge = Judge("http://127.0.0.1:8000/v1", "Qwen/Qwen2.5-7B-Instruct")

        async def reward(rollout):
            question = rollout.question.question
            reply = await judge(f"{question} Is this right: {rollout.answer}? Reply yes or no.")
            return None if reply is None else float(reply.strip().lower().startswith("yes"))

    Args:
        url: up to and including ``/v1``, with ``user:password@`` before the host if it needs them.
        model: the served model's name.
        key: API key, sent as ``Authorization: Bearer``; empty sends none.
        timeout: seconds per attempt.
        retries: most attempts after the first, with back-off (``Endpoint``).
        backoff: seconds before the first retry.
        concurrency: most concurrent requests.
        on_failure: ``stop`` ends the run, which keeps every finished step; ``skip`` replies None, and a reward function
            that returns it leaves its rollout out of the step.
        options: of every request, like ``max_tokens``; ``temperature`` is 0 unless given.
        transport: replaces the network in tests.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout: float = 60.0,
        retries: int = 5,
        backoff: float = 0.5,
        concurrency: int = 32,
        on_failure: Literal["stop", "skip"] = "stop",
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Any,
    ):
        if on_failure not in ("stop", "skip"):
            raise ValueError(f"on_failure={on_failure!r}: give 'stop' or 'skip'")
        self._url, self._on_failure = url, on_failure
        self._body = {"model": model, "temperature": 0, **options}
        self.counts: Counter[str] = Counter()
        self._endpoint = Endpoint(
            f"{url.rstrip('/')}/chat/completions", example=EXAMPLE, what="judge", remedy=_remedy,
            smaller="lower max_tokens", timeout=timeout, retries=retries, backoff=backoff, concurrency=concurrency,
            max_bytes=4_000_000, counts=self.counts, headers={"Authorization": f"Bearer {key}"} if key else None,
            transport=transport,
        )  # fmt: skip
        self._replies: dict[str, str] = {}
        self._asking: dict[str, asyncio.Task[str]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    async def __call__(self, messages: str | Sequence[Mapping[str, str]]) -> str | None:
        """The reply to ``messages`` (a text is one of the user's); None if there is none and ``on_failure`` is
        ``skip``.

        Raises:
            ToolError: there is none, and ``on_failure`` is ``stop``.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        body = {**self._body, "messages": list(messages)}
        asked = json.dumps(body)
        await self._close_with_the_loop()
        if asked in self._replies:
            return self._replies[asked]
        if asked not in self._asking:
            self._asking[asked] = asyncio.create_task(self._ask(body, asked))
        try:
            return await asyncio.shield(self._asking[asked])  # a rollout that is given up takes it from no other
        except Failed as failed:
            if self._on_failure == "skip":
                return None
            raise ToolError(f"judge {masked(self._url)}: {failed}; {failed.remedy}") from None

    async def _ask(self, body: Mapping, asked: str) -> str:
        self.counts["calls"] += 1
        try:
            self._replies[asked] = await self._endpoint.post(body, _reply, jitter=asked)
        except Failed:
            self.counts["failures"] += 1
            raise
        finally:
            self._asking.pop(asked, None)
        return self._replies[asked]

    async def _close_with_the_loop(self) -> None:
        """Have the running event loop, of which each step has its own, close the connections when it ends: asyncio then
        closes its asynchronous generators."""
        if self._loop is not asyncio.get_running_loop():
            self._loop = asyncio.get_running_loop()
            self._asking.clear()
            self._until_the_end = self._connections()
            await anext(self._until_the_end)

    async def _connections(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await self._endpoint.aclose()


def score_of(reply: str | None, most: float = 1.0) -> float | None:
    """The first number from 0 to ``most`` in a judge's reply, after its thoughts if it wrote any, as a share of
    ``most``; None if there is none.

    >>> score_of("Right but for the year 1999: 7/10", most=10), score_of("I cannot say.")
    (0.7, None)
    """
    said = (reply or "").rpartition("</think>")[2]
    numbers = (float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", said))
    return next((number / most for number in numbers if 0 <= number <= most), None)


def _reply(content: bytes) -> str:
    try:
        reply = json.loads(content)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise Failed(
            "malformed", f"its answer is no chat completion ({type(error).__name__}: {error})", again=False,
            remedy=f"does it speak OpenAI's protocol? Its address is like {EXAMPLE}",
        ) from None  # fmt: skip
    return reply or ""


def _remedy(response: httpx.Response) -> str:
    """Advice about a status that is no success."""
    if response.status_code in (401, 403):
        return "give its key: Judge(key=...)"
    if response.has_redirect_location:
        return f"give the address that it redirects to: {response.headers['Location']}"
    return f"are address and model right? An address is like {EXAMPLE}"
