"""``vllm serve`` replicas, on this or other hosts: token ids in and out over HTTP.

A rollout's turns go to one replica, whose prefix cache holds them. A request that fails is retried, on another replica
if there is one. A replica that also fails a health check is skipped until the next weight sync. If it was the last one
the batch waits, and a replica that comes back gets the weights again, if they may be walked over again
(``Engine.load_weights``). A request's key and the weights decide what is drawn, so another replica samples the same
tokens, except where rounding decides (sums depend on what else is in the batch). An answer is used if it is complete
and sampled with the trainer's last weights.
"""

from __future__ import annotations

import asyncio
import socket
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import httpx
import torch

from igpo_fast.engines.base import Generation, Request, check_lengths
from igpo_fast.engines.stops import StopStrings
from igpo_fast.engines.vllm import KEY, weights
from igpo_fast.engines.vllm.broadcast import Broadcast, open_store
from igpo_fast.engines.vllm.requests import generation, sampling_parameters
from igpo_fast.errors import EngineError, InputError, reason_of
from igpo_fast.net import direct, fault

T = TypeVar("T")
ATTEMPTS = 5
"""Most attempts per request."""
CONNECT_WITHIN = 10.0
"""Connect timeout in seconds, also of the health check: a dead host does not refuse, it is silent."""
IDLE = 2.0
"""Seconds that a connection is kept without a request; vLLM closes its end after 5."""
NO_ANSWER, ABORTED, BROKEN, STALE = "", "engine/aborted_answers", "engine/broken_answers", "engine/stale_answers"
"""Why an answer was not used, by the name of its counter: none came (not counted), aborted, malformed, sampled with old
weights."""
COUNTS = ("engine/replicas_lost", "engine/replicas_recovered", "engine/requests_repeated", ABORTED, BROKEN, STALE)
LAUNCH = "start replicas with: python -m igpo_fast.engines.vllm.serve MODEL --port PORT"


@dataclass
class Replica:
    """The state of one server, as far as it is known."""

    url: str
    up: bool = False
    """Whether it answered its last request."""
    weights: str | None = None
    """The version of the weights that it is known to hold, bit for bit; None if it holds others or only a part."""
    running: int = 0
    """Requests in flight."""
    link: Broadcast | None = None
    """The group in which its workers get weights, if they are broadcast."""
    link_name: str = ""
    loads: int = 0
    """Number of weight syncs; an answer to an older request says nothing about the state after the last one."""


class VllmServers:
    """An ``Engine`` on replicas that ``igpo_fast.engines.vllm.serve`` started.

    Args:
        urls: addresses of the replicas, like ``http://host:8000``.
        decode: token ids to text, for stop strings.
        dtype: dtype of the replicas, in which the trainer's weights are sent.
        max_tokens: longest rollout.
        concurrency: most requests at a time.
        timeout: seconds that a turn may take, and that a batch waits if no replica answers.
        bucket_bytes: bytes of weights per request.
        backend: ``nccl`` or ``gloo`` broadcasts weights from ``device``; "" sends them over HTTP.
        device: device of broadcast weights.
        key: the key that replicas were started with (``IGPO_REPLICA_KEY``); "" if they have none.
    Raises:
        InputError: a URL to which no request can be sent.
    """

    remote, keeps_rollouts = True, False

    def __init__(
        self,
        urls: Sequence[str],
        *,
        decode: Callable[[Sequence[int]], str],
        dtype: torch.dtype,
        max_tokens: int,
        concurrency: int = 256,
        timeout: float = 300,
        bucket_bytes: int = weights.BUCKET_BYTES,
        backend: str = "",
        device: torch.device | str = "cpu",
        key: str = "",
    ):
        for url in urls:
            if why := fault(url):
                raise InputError(f"rollout.server={url}: {why}; give URLs like http://127.0.0.1:8000")
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"{KEY}: a key has printable ASCII characters only; choose another")
        self.version = 0
        how = f"by {backend} broadcast" if backend else "over HTTP"
        self.name = f"vllm ({len(urls)} server{'s' if len(urls) > 1 else ''}, weights {how})"
        self._backend, self._device = backend, device
        self._replicas = [Replica(url.rstrip("/")) for url in urls]
        self._stops = StopStrings(decode)
        self._dtype, self._bucket_bytes = dtype, bucket_bytes
        self._max_tokens, self._concurrency, self._timeout = max_tokens, concurrency, timeout
        self._session = uuid.uuid4().hex  # another session's weights of the same version are not ours
        self._pairs: weights.Weights | None = None
        self._home: dict[tuple[int, ...], Replica] = {}
        self._pending = 0
        self._counts = dict.fromkeys(COUNTS, 0)
        self._tls = httpx.create_ssl_context()  # made once, because making it takes longer than a request
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._http: httpx.AsyncClient

    async def generate(self, request: Request) -> Generation:
        """Sample one turn (``Engine.generate``).

        Raises:
            ValueError: the request is empty or too long.
            EngineError: no replica answers within the timeout.
            InputError: a replica refuses the request, or has other weights after a sync.
            DivergedError: the model's logits are not finite.
        """
        check_lengths(request, self._max_tokens)
        client = await self._client()
        body = {"token_ids": request.ids.tolist(), "sampling_params": sampling_parameters(request)}
        if request.stop_strings:
            text = {"stop": list(request.stop_strings), "detokenize": True, "skip_special_tokens": False}
            body["sampling_params"] |= text
        self._pending += 1
        try:
            failed = None
            for _ in range(ATTEMPTS):
                replica = await self._replica(request.key, failed)
                answer = await self._ask(client, replica, body)
                if not isinstance(answer, Answer):
                    self._counts["engine/requests_repeated"] += 1
                    failed = None if answer == ABORTED else replica
                    continue
                end = self._stops.end(request.stop_strings, answer.ids)
                if end is None and isinstance(answer.stop_reason, str):
                    # The server's tokenizer decodes some tokens differently: draw the same again, without its stop
                    # strings.
                    body["sampling_params"] = sampling_parameters(request)
                    continue
                finished = end is not None or answer.finish_reason == "stop"
                return generation(request, answer.ids[:end], answer.logp[:end], finished)
        finally:
            self._pending -= 1
        raise EngineError(f"rollout.server: a request failed {ATTEMPTS} times, the last at {replica.url}; see its log")

    def release(self, key: tuple[int, ...]) -> None:
        """Forget the rollout's replica. (A cancelled request's connection closes, and the server drops it.)"""
        self._home.pop(key, None)

    def sleep(self) -> None:
        """Do nothing: the replicas' memory is their own."""

    def counts(self) -> dict[str, float]:
        """``COUNTS`` since the last call."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send the trainer's weights to every replica that answers, drop their caches, raise ``version``.

        Weights that may be walked over again are kept, for replicas that come back before the next sync.

        Raises:
            RuntimeError: requests are pending.
            EngineError: no replica answers.
            InputError: a replica has other weights afterwards, or settings that do not fit.
        """
        if self._pending:
            raise RuntimeError("load_weights: requests are pending; await them first")
        self._pairs = pairs
        self.version += 1
        self._home.clear()
        asyncio.run(self._revive())

    async def _client(self) -> httpx.AsyncClient:
        """The HTTP client of the running event loop; it is closed with the loop."""
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._reviving = loop, asyncio.Lock()
            self._probing = {replica.url: asyncio.Lock() for replica in self._replicas}
            self._open = self._opened()  # an event loop closes its asynchronous generators when it ends
            self._http = await anext(self._open)
        return self._http

    async def _opened(self) -> AsyncIterator[httpx.AsyncClient]:
        async with self._new_client(self._timeout) as client:
            yield client

    def _new_client(self, timeout: float) -> httpx.AsyncClient:
        most = self._concurrency
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most, keepalive_expiry=IDLE)
        patience = httpx.Timeout(timeout, connect=min(timeout, CONNECT_WITHIN), pool=None)
        mounts = direct(*(replica.url for replica in self._replicas))
        return httpx.AsyncClient(
            timeout=patience, limits=limits, verify=self._tls, mounts=mounts, headers=self._headers
        )

    async def _replica(self, key: tuple[int, ...], failed: Replica | None) -> Replica:
        """The rollout's own replica, or the least busy one with the current weights, avoiding the one that failed if
        there is another. Waits if there is none."""
        async with self._reviving:
            if not self._ready():
                await self._revive()
        home, ready = self._home.get(key), self._ready()
        if home not in ready or home is failed:
            others = [replica for replica in ready if replica is not failed]
            home = self._home[key] = min(others or ready, key=lambda replica: replica.running)
        return home

    async def _ask(self, client: httpx.AsyncClient, replica: Replica, body: dict) -> Answer | str:
        """The turn, or why there is none; a replica that then also fails its health check is marked lost."""
        replica.running += 1
        loads = replica.loads
        try:
            answer = _read(_json(await client.post(f"{replica.url}/inference/v1/generate", json=body)), self._tag)
        except httpx.DecodingError:
            answer = BROKEN
        except httpx.HTTPError:
            answer = NO_ANSWER
        finally:
            replica.running -= 1
        if isinstance(answer, Answer):
            return answer
        if answer != NO_ANSWER:
            self._counts[answer] += 1
        if answer != ABORTED:
            async with self._probing[replica.url]:
                if replica.up and replica.loads == loads and not await self._has_weights(replica):
                    self._lose(replica)
        return answer

    async def _has_weights(self, replica: Replica) -> bool:
        """Health check: whether the replica answers on a new connection and has the current weights."""
        async with self._new_client(min(self._timeout, CONNECT_WITHIN)) as client:
            try:
                return _json(await client.get(f"{replica.url}/weight_info")).get("weight_version") == self._tag
            except httpx.HTTPError:
                return False

    def _lose(self, replica: Replica) -> None:
        self._counts["engine/replicas_lost"] += replica.up
        replica.up, replica.link = False, None

    @property
    def _tag(self) -> str:
        return f"{self._session}-{self.version}"

    def _ready(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.up and replica.weights == self._tag]

    async def _revive(self) -> None:
        """Send the current weights to every replica that answers; retry until one has them, none can get them, or
        time is out."""
        deadline = asyncio.get_running_loop().time() + self._timeout
        async with self._new_client(self._timeout) as client:
            while True:
                failures = await self._load(client)
                if self._ready():
                    return
                possible = self._pairs is not None or any(r.weights == self._tag for r in self._replicas)
                if not possible or asyncio.get_running_loop().time() > deadline:
                    break
                await asyncio.sleep(min(1.0, self._timeout / 10))
        raise EngineError(
            f"rollout.server: no replica answers ({failures[0]}); {LAUNCH}, then start the run again: it resumes from "
            "its last checkpoint"
        )

    async def _load(self, client: httpx.AsyncClient) -> list[str]:
        """Send the weights, each bucket to all replicas before the next is encoded, and verify them; returns the
        failures."""
        failures = []

        async def succeeded(replicas: list[Replica], step: Callable[[Replica], Awaitable[bool]]) -> list[Replica]:
            """The replicas for which ``step`` returns true; replicas at which it fails are marked lost."""

            async def attempt(replica: Replica) -> bool:
                try:
                    return await step(replica)
                except httpx.HTTPError as error:
                    self._lose(replica)
                    failures.append(f"{replica.url}: {' '.join(str(error).split()) or type(error).__name__}")
                    return False

            done = await asyncio.gather(*map(attempt, replicas))
            return [replica for replica, yes in zip(replicas, done, strict=True) if yes]

        behind = await succeeded(self._replicas, partial(self._begin, client))
        walk = weights.Walk(self._take() if behind else (), self._dtype, self._bucket_bytes)
        for bucket in walk:
            if not behind:
                break
            behind = await succeeded(behind, self._update_from(client, bucket))
        await succeeded(behind, partial(self._finish, client, walk.fingerprints))
        return failures

    def _take(self) -> weights.Weights:
        """The weights, for a walk; an iterator's are gone then."""
        pairs = self._pairs
        if isinstance(pairs, Iterator):
            self._pairs = None
        return pairs

    async def _begin(self, client: httpx.AsyncClient, replica: Replica) -> bool:
        """Begin an update; False if the replica already has the weights."""
        about, *others = await _call_workers(client, replica, "igpo_about")
        self._check(replica, about)
        if replica.weights == self._tag and not about.get("updating") and await self._has_weights(replica):
            self._found(replica)
            return False
        replica.weights = None
        if self._pairs is None:
            raise httpx.RemoteProtocolError("it has lost its weights, which ranks under ZeRO-3 only send at a sync")
        if self._backend and (replica.link is None or about.get("link") != replica.link_name):
            await self._meet(client, replica, 1 + len(others))
        await _call(client, replica, "pause")  # running requests are aborted, new ones wait
        if about.get("updating"):  # a killed session left the update open
            await _call(client, replica, "finish_weight_update")
        await _call(client, replica, "start_weight_update")
        return True

    def _update_from(self, client: httpx.AsyncClient, bucket: weights.Bucket) -> Callable[[Replica], Awaitable[bool]]:
        """What gives a replica this bucket, which is encoded once for all."""
        if self._backend:
            return partial(self._broadcast, client, bucket)
        return partial(self._update, client, weights.encode(bucket))

    async def _update(self, client: httpx.AsyncClient, content: bytes, replica: Replica) -> bool:
        headers = {"Content-Type": "application/octet-stream"}  # ``serve.WeightsInFile``
        _json(await client.post(f"{replica.url}/update_weights", content=content, headers=headers))
        return True

    async def _meet(self, client: httpx.AsyncClient, replica: Replica, workers: int) -> None:
        """Make the group in which the replica's workers get weights."""
        try:
            own = _own_address(replica.url)
        except OSError as error:
            raise httpx.ConnectError(str(error)) from error
        store, replica.link_name = open_store(), uuid.uuid4().hex
        info = {
            "name": replica.link_name, "host": own, "port": store.port, "backend": self._backend,
            "timeout": self._timeout,
        }  # fmt: skip
        meet = partial(Broadcast, store, 0, 1 + workers, self._backend, self._timeout)
        replica.link = await _both(_call(client, replica, "init_weight_transfer_engine", init_info=info), meet)

    async def _broadcast(self, client: httpx.AsyncClient, bucket: weights.Bucket, replica: Replica) -> bool:
        tensors = [tensor.to(self._device).contiguous() for _, tensor in bucket]
        shapes = [(name, list(tensor.shape)) for name, tensor in bucket]
        update = _call(client, replica, "update_weights", update_info={"shapes": shapes})
        await _both(update, partial(replica.link.send, tensors))
        return True

    async def _finish(self, client: httpx.AsyncClient, fingerprints: dict[str, int], replica: Replica) -> bool:
        """End the update, drop the cache, compare weights, resume; raises InputError if other weights arrived."""
        await _call(client, replica, "finish_weight_update", weight_version=self._tag)
        if not (await _call(client, replica, "reset_prefix_cache")).get("success"):
            raise httpx.RemoteProtocolError("its prefix cache cannot be dropped")
        found = await _call_workers(client, replica, "igpo_fingerprints")
        weights.compare(weights.whole(found), fingerprints, replica.url)
        await _call(client, replica, "resume")
        replica.weights = self._tag
        self._found(replica)
        replica.loads += 1
        return True

    def _found(self, replica: Replica) -> None:
        self._counts["engine/replicas_recovered"] += not replica.up and replica.loads > 0
        replica.up = True

    def _check(self, replica: Replica, about: dict) -> None:
        dtype = str(self._dtype).removeprefix("torch.")
        if about.get("transfer") != weights.BACKEND:  # started in another way, or an older vLLM
            raise InputError(f"{replica.url}: this server has no igpo weight transfer; {LAUNCH}")
        for name, wanted, remedy in (
            ("logprobs_mode", "processed_logprobs", "start it with --logprobs-mode=processed_logprobs"),
            ("dtype", dtype, f"start it with --dtype={dtype}, or set rollout.dtype={about.get('dtype')}"),
        ):
            if about.get(name) != wanted:
                raise InputError(f"{replica.url}: its {name} is {about.get(name)} and must be {wanted}; {remedy}")
        wanted, longest = self._max_tokens, about.get("max_tokens", 0)
        if longest < wanted:
            raise InputError(
                f"{replica.url}: its --max-model-len is {longest}, less than rollout.max_tokens={wanted}; start it "
                f"with --max-model-len={wanted}"
            )
        weights.check_layout(about, replica.url)


@dataclass(frozen=True)
class Answer:
    """A complete turn as a replica sampled it."""

    ids: list[int]
    logp: list[float]
    finish_reason: str
    stop_reason: int | str | None


def _read(answer: dict, tag: str) -> Answer | str:
    """The turn, or why there is none: ABORTED, BROKEN, STALE."""
    try:
        (choice,) = answer["choices"]
        if choice["finish_reason"] == "abort":
            return ABORTED
        turn = Answer(
            [int(id) for id in choice["token_ids"]],
            [float(token["logprob"]) for token in choice["logprobs"]["content"]],
            choice["finish_reason"],
            choice["stop_reason"],
        )
        spans = [(span["start"], span["end"]) for span in choice["weight_versions"]]
        versions = {span["version"] for span in choice["weight_versions"]}
    except (KeyError, TypeError, ValueError):
        return BROKEN
    begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
    whole = turn.ids and len(turn.logp) == len(turn.ids) and turn.finish_reason in ("stop", "length")
    if not whole or [*begins, len(turn.ids)] != [0, *ends]:
        return BROKEN
    return turn if versions == {tag} else STALE


async def _call(client: httpx.AsyncClient, replica: Replica, path: str, **body: Any) -> dict:
    return _json(await client.post(f"{replica.url}/{path}", json=body))


async def _call_workers(client: httpx.AsyncClient, replica: Replica, method: str) -> list[dict]:
    """What a worker's method returns in each worker."""
    results = (await _call(client, replica, "collective_rpc", method=method)).get("results")
    if not isinstance(results, list) or not results or not all(isinstance(result, dict) for result in results):
        raise httpx.DecodingError(f"{method}: no result")
    return results


async def _both(call: Awaitable[dict], ours: Callable[[], T]) -> T:
    """What ``ours`` returns, run in a thread beside a call of the replica that waits for it.

    Raises:
        httpx.HTTPError: either failed. The thread may then go on until its timeout.
    """
    try:
        _, result = await asyncio.gather(call, asyncio.to_thread(ours))
    except RuntimeError as error:
        raise httpx.RemoteProtocolError(f"the broadcast of its weights failed ({reason_of(error)})") from error
    return result


def _own_address(url: str) -> str:
    """The address of this machine from which ``url`` is reached."""
    parts = httpx.URL(url)
    port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    with socket.create_connection((parts.host, port), CONNECT_WITHIN) as made:
        return made.getsockname()[0]


def _json(response: httpx.Response) -> dict:
    """The answer's JSON object. Raises httpx.HTTPStatusError for a server's fault, httpx.DecodingError for other
    content, InputError if the request is refused."""
    if response.status_code >= 500:
        response.raise_for_status()
    if response.status_code == 401:
        raise InputError(f"{response.url}: refused without its key; set {KEY} to the key it was started with")
    if response.status_code >= 400:
        text = " ".join(response.text.split())[:300]
        raise InputError(f"{response.url}: request refused (status {response.status_code}: {text}); {LAUNCH}")
    try:
        answer = response.json() if response.content else {}
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise httpx.DecodingError(f"{response.url}: not a JSON object")
    return answer
