"""``vllm serve`` replicas, on this or other hosts: token ids in and out over HTTP.

A rollout's turns go to one replica, whose prefix cache knows them. A replica that fails is left out until the next
weight sync, and its requests are made again elsewhere: a turn's draws follow from its key and the weights, so they are
the same there. Every answer names the weights it was sampled with; others than the trainer's last are not taken.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import httpx
import torch

from igpo_fast.engines.base import EngineError, Generation, Request
from igpo_fast.engines.stops import StopStrings
from igpo_fast.engines.vllm import weights
from igpo_fast.engines.vllm.requests import check, generation, sampling_parameters
from igpo_fast.errors import InputError

ATTEMPTS = 5
"""Most times a request is made."""
RESETS = 100
"""Most times a replica is asked to drop its prefix cache."""
CONNECT_WITHIN = 10.0
"""Seconds; a host that is gone answers no more at all."""
COUNTS = ("engine/replicas_lost", "engine/replicas_recovered", "engine/requests_repeated", "engine/stale_answers")
LAUNCH = "start replicas by: python -m igpo_fast.engines.vllm.serve MODEL --port PORT"


@dataclass
class Replica:
    url: str
    weights: str | None = None
    """The weights it is known to have; None: it is down, or what it has is not known."""
    running: int = 0
    loads: int = 0
    """How often it was given weights: an answer to a request from before says nothing about it."""


class VllmServers:
    """An ``Engine`` on replicas that ``igpo_fast.engines.vllm.serve`` started.

    Args:
        urls: of the replicas, like ``http://host:8000``.
        decode: token ids to text, for stop strings.
        dtype: the trainer's; replicas must have it, too.
        max_tokens: longest rollout.
        concurrency: most requests at a time.
        timeout: seconds that a turn may take, and that a batch without any replica waits for one to come back.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        decode: Callable[[Sequence[int]], str],
        dtype: torch.dtype,
        max_tokens: int,
        concurrency: int = 256,
        timeout: float = 300,
    ):
        self.version = 0
        self.name = f"vllm ({len(urls)} server{'s' if len(urls) > 1 else ''})"
        self._replicas = [Replica(url.rstrip("/")) for url in urls]
        self._stops = StopStrings(decode)
        self._dtype = str(dtype).removeprefix("torch.")
        self._max_tokens, self._concurrency, self._timeout = max_tokens, concurrency, timeout
        self._session = uuid.uuid4().hex  # another session's weights of the same number are not ours
        self._sent: weights.Weights = []
        self._home: dict[tuple[int, ...], Replica] = {}
        self._pending = 0
        self._counts = dict.fromkeys(COUNTS, 0)
        self._loop: asyncio.AbstractEventLoop | None = None

    async def generate(self, request: Request) -> Generation:
        """One turn (``Engine.generate``).

        Raises:
            ValueError: the request is empty or too long.
            EngineError: no replica answers within the timeout.
            InputError: one refuses the request, or has other weights after a sync.
            FloatingPointError: the model's logits are not finite.
        """
        check(request, self._max_tokens)
        client = self._client()
        body = {"token_ids": request.ids.tolist(), "sampling_params": sampling_parameters(request)}
        if request.stop_strings:
            text = {"stop": list(request.stop_strings), "detokenize": True, "skip_special_tokens": False}
            body["sampling_params"] |= text
        self._pending += 1
        try:
            for _ in range(ATTEMPTS):
                replica = await self._replica(request.key)
                answer = await self._ask(client, replica, body)
                if answer is None:
                    self._counts["engine/requests_repeated"] += 1
                    continue
                ids, logp = answer["token_ids"], [token["logprob"] for token in answer["logprobs"]["content"]]
                end = self._stops.end(request.stop_strings, ids)
                if end is None and isinstance(answer["stop_reason"], str):
                    # The server's tokenizer reads them otherwise: the same draws again, without its judgement.
                    body["sampling_params"] = sampling_parameters(request)
                    continue
                finished = end is not None or answer["finish_reason"] == "stop"
                return generation(request, ids[:end], logp[:end], finished)
        finally:
            self._pending -= 1
        raise EngineError(f"rollout.server: a request failed {ATTEMPTS} times, last at {replica.url}; see its log")

    def release(self, key: tuple[int, ...]) -> None:
        """The rollout is over. (A cancelled request's connection is closed, upon which the server drops it.)"""
        self._home.pop(key, None)

    def sleep(self) -> None:
        """Nothing: the replicas' memory is their own."""

    def counts(self) -> dict[str, float]:
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send the trainer's weights to every replica that answers, drop their caches, raise ``version``.

        Raises:
            RuntimeError: requests are pending.
            EngineError: no replica answers.
            InputError: one computes with other weights afterwards, or with settings that do not fit.
        """
        if self._pending:
            raise RuntimeError("load_weights: requests are pending; await them first")
        self._sent = weights.complete(pairs)
        self._fingerprints = weights.fingerprints(self._sent)
        self.version += 1
        self._home.clear()
        asyncio.run(self._revive())

    # --- requests ---

    def _client(self) -> httpx.AsyncClient:
        """One for each event loop, which ends with it."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            limits = httpx.Limits(max_connections=self._concurrency, max_keepalive_connections=self._concurrency)
            self._http = httpx.AsyncClient(timeout=self._patience(), limits=limits)
            self._reviving = asyncio.Lock()
            self._loop = loop
        return self._http

    def _patience(self) -> httpx.Timeout:
        return httpx.Timeout(self._timeout, connect=min(self._timeout, CONNECT_WITHIN), pool=None)

    async def _replica(self, key: tuple[int, ...]) -> Replica:
        """The rollout's own, else the least busy one with the current weights; waits for one if there is none."""
        async with self._reviving:
            if not self._ready():
                await self._revive()
        home = self._home.get(key)
        if home is None or home.weights != self._tag:
            home = self._home[key] = min(self._ready(), key=lambda replica: replica.running)
        return home

    async def _ask(self, client: httpx.AsyncClient, replica: Replica, body: dict) -> dict | None:
        """The answer, or None if there is none to be had from this replica."""
        replica.running += 1
        loads = replica.loads
        try:
            response = await client.post(f"{replica.url}/inference/v1/generate", json=body)
            if response.status_code < 500:
                answer = _json(response)["choices"][0]
                if all(span["version"] == self._tag for span in answer["weight_versions"]):
                    return answer
                self._counts["engine/stale_answers"] += 1
        except httpx.TransportError:
            pass
        finally:
            replica.running -= 1
        if replica.loads == loads:
            self._lose(replica)
        return None

    def _lose(self, replica: Replica) -> None:
        self._counts["engine/replicas_lost"] += replica.weights is not None
        replica.weights = None

    # --- weights ---

    @property
    def _tag(self) -> str:
        return f"{self._session}-{self.version}"

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.weights == self._tag]

    async def _revive(self) -> None:
        """Give every replica that answers the current weights; try again until one has them or time is out."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        async with httpx.AsyncClient(timeout=self._patience()) as client:
            while True:
                failures = await asyncio.gather(*(self._load(client, replica) for replica in self._replicas))
                if self._ready():
                    return
                if asyncio.get_running_loop().time() > deadline:
                    break
                await asyncio.sleep(min(1.0, self._timeout / 10))
        raise EngineError(
            f"rollout.server: no replica answers ({failures[0]}); {LAUNCH}, then start the run again: it goes on from "
            "its last checkpoint"
        )

    async def _load(self, client: httpx.AsyncClient, replica: Replica) -> str:
        """Send the weights and see that they have arrived; returns what failed, if the replica did not answer."""
        lost_before = replica.weights is None and replica.loads > 0

        async def call(path: str, **body):
            return _json(await client.post(f"{replica.url}/{path}", json=body))

        try:
            (about,) = (await call("collective_rpc", method="igpo_about"))["results"]
            self._check(replica, about)
            await call("abort_requests")
            await call("start_weight_update" if not about["updating"] else "finish_weight_update")
            if about["updating"]:  # a session that was killed left it so
                await call("start_weight_update")
            for bucket in weights.buckets(self._sent):
                await call("update_weights", update_info=weights.as_json(bucket))
            await call("finish_weight_update", weight_version=self._tag)
            for _ in range(RESETS):
                if (await call("reset_prefix_cache"))["success"]:
                    break
                await asyncio.sleep(0.05)  # aborted requests still hold blocks
            else:
                raise httpx.RemoteProtocolError("its prefix cache cannot be dropped")
            (found,) = (await call("collective_rpc", method="igpo_fingerprints"))["results"]
        except (httpx.TransportError, httpx.HTTPStatusError) as error:
            self._lose(replica)
            return f"{replica.url}: {' '.join(str(error).split()) or type(error).__name__}"
        weights.compare(found, self._fingerprints, replica.url)
        replica.weights = self._tag
        replica.loads += 1
        self._counts["engine/replicas_recovered"] += lost_before
        return ""

    def _check(self, replica: Replica, about: dict) -> None:
        wanted = {"dtype": self._dtype, "logprobs_mode": "processed_logprobs", "transfer": weights.BACKEND}
        for name, value in wanted.items():
            if about[name] != value:
                raise InputError(f"{replica.url}: its {name} is {about[name]}, {value} is needed; {LAUNCH}")
        if about["max_tokens"] < self._max_tokens:
            raise InputError(
                f"{replica.url}: its --max-model-len is {about['max_tokens']}, rollout.max_tokens={self._max_tokens}; "
                "start it with as much"
            )


def _json(response: httpx.Response) -> dict:
    """The answer. Raises httpx.HTTPStatusError for a server's fault, InputError where the request is refused."""
    if response.status_code >= 500:
        response.raise_for_status()
    if response.status_code >= 400:
        text = " ".join(response.text.split())[:300]
        raise InputError(f"{response.url}: refused (status {response.status_code}: {text}); {LAUNCH}")
    return response.json() if response.content else {}
