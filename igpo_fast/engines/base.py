"""The interface of rollout engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Training allows only the temperature: under the others, sampled log-probabilities would be of
    another distribution than the trainer's."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps all."""
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class Request:
    """Continue one rollout by one turn."""

    key: tuple[int, ...]
    """(seed, step, question, rollout): together with the token's index it seeds the sampling noise, and it names the
    rollout whose keys and values the engine keeps between turns."""
    ids: np.ndarray
    """The whole rollout so far: int32 [L]. It extends the tokens that the same key sent and got before."""
    max_tokens: int
    """Most tokens to sample."""
    stop_ids: tuple[int, ...]
    """Sampling ends with any of these tokens; the token is kept."""
    stop_strings: tuple[str, ...]
    """Sampling ends with the token that completes any of these in the text sampled this turn; the token is kept."""
    sampling: Sampling


@dataclass(frozen=True)
class Generation:
    """The tokens of one turn."""

    ids: np.ndarray
    """int32 [n], 1 <= n <= max_tokens."""
    logp: np.ndarray
    """log pi(token | everything before) at the sampling temperature, in nats: float32 [n]."""
    finished: bool
    """Whether it ended with a stop token or string, not by length."""


class Engine(Protocol):
    """Samples turns of many rollouts at a time; each request finishes on its own."""

    name: str
    version: int
    """Version of the weights that the engine samples from; ``load_weights`` raises it."""
    remote: bool
    """Whether it samples on devices of its own, even while the trainer works."""
    keeps_rollouts: bool
    """Whether a rollout keeps its slot between its turns."""

    async def generate(self, request: Request) -> Generation:
        """Sample one turn. The draws depend on the key and the weights alone.

        Other requests in the batch can change rounding, on CPUs and GPUs, and nothing else: sums depend on the batch's
        shape. So where answers of tools arrive at varying times (``search.url``), two runs differ in the last digits of
        ``logp``, and of losses that use it (``algorithm.importance``). A token differs only where two candidates tie to
        within rounding.
        """
        ...

    def release(self, key: tuple[int, ...]) -> None:
        """Drop the cache of a rollout that has ended."""
        ...

    def sleep(self) -> None:
        """Free memory where possible: no request follows before the next ``load_weights``."""
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the trainer's weights, drop every cache, raise ``version``.

        Args:
            weights: every weight by its name, tied ones under each of their names, in the trainer's dtype and on its
                device. A weight may be taken back once the next one is asked for, so an engine that keeps one holds it.
                An iterator is walked over once, in step with other ranks (ZeRO-3). Any other iterable may be walked
                over again, with the same numbers, until the next call.
        """
        ...

    def counts(self) -> dict[str, float]:
        """Failures that were retried since the last call, by metric; empty if nothing can fail."""
        ...


class Again:
    """An iterable that calls ``make`` for each walk over it."""

    def __init__(self, make: Callable[[], Iterator[tuple[str, torch.Tensor]]]):
        self._make = make

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._make()


def check_lengths(request: Request, max_tokens: int) -> None:
    """Raises ValueError for a request that is empty, or longer than ``max_tokens`` with what it may sample."""
    where, length = f"request {request.key}", len(request.ids)
    if not length or request.max_tokens < 1:
        raise ValueError(f"{where}: needs a token to continue and max_tokens >= 1")
    if length + request.max_tokens > max_tokens:
        wanted = f"{length} tokens and {request.max_tokens} to sample"
        raise ValueError(f"{where}: {wanted} exceed the engine's max_tokens={max_tokens}")


async def let_others_run() -> None:
    """Let other tasks do what they can without waiting, so that their next turns join the engine's next step."""
    for _ in range(4):
        await asyncio.sleep(0)
