"""The embedded engine: samples from the trainer's own transformers model, in its process, on its parameters.

Requests of many rollouts share a running batch. A step is one forward over a flat row of every slot's new
tokens: one per sampling rollout, a prompt or a tool response per joining one. Keys and
values stay in the rollout's slot between its turns: each token is fed once per rollout.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from igpo_fast.engines import noise
from igpo_fast.engines.base import Generation, Request, check_lengths, let_others_run
from igpo_fast.engines.stops import StopStrings
from igpo_fast.model import hidden_states, lm_head

MASK_ELEMENTS = 1 << 26  # most elements of a block's attention mask; larger blocks are split


class _Job(NamedTuple):
    request: Request
    future: asyncio.Future


@dataclass
class Stats:
    """Tokens fed to the model since the engine was made."""

    forwards: int = 0
    tokens_prefilled: int = 0
    """Tokens fed at the start of turns: prompts, tool responses, the last token of the turn before."""
    tokens_decoded: int = 0
    """Sampled tokens, fed one at a time."""


class _Block:
    """Slots with about as many new tokens, padded to one [P, n] attention call.

    Padding repeats a slot's last row, so every query sees at least one key.
    """

    def __init__(self, slots: np.ndarray, first: np.ndarray, start: np.ndarray, new: np.ndarray, device):
        """int64 [P] each: slots, ascending; their first rows in the flat row; tokens cached; tokens to feed."""
        n = int(new.max())
        self.length = int((start + new).max())
        self.causal = not start.any()
        self.cover: slice | torch.Tensor = torch.from_numpy(slots).to(device)
        span = int(slots[-1] - slots[0]) + 1
        # Reading some idle slots costs less than gathering the keys and values of the busy ones.
        if span <= (2 if n == 1 else 1) * len(slots):
            self.cover = slice(int(slots[0]), int(slots[-1]) + 1)
            dense = np.zeros((3, span), np.int64)
            dense[:, slots - slots[0]] = first, start, new
            first, start, new = dense
        step = np.minimum(np.arange(n), np.maximum(new - 1, 0)[:, None])
        real = np.arange(n) < new[:, None]
        self.shape = step.shape
        rows = first[:, None] + step
        self.rows = torch.from_numpy(rows.ravel()).to(device)
        self.positions = torch.from_numpy(start[:, None] + step).to(device)
        self.real = torch.from_numpy(np.flatnonzero(real)).to(device)
        self.real_rows = torch.from_numpy(rows[real]).to(device)
        self.masks: dict[tuple, torch.Tensor] = {}

    def mask(self, window: int | None, repeats: int) -> torch.Tensor:
        """Mask of the keys that a query sees: bool [P, 1, repeats * n, length]; [P, 1, 1, length] if n is 1."""
        if (window, repeats) not in self.masks:
            key = torch.arange(self.length, device=self.positions.device)
            query = self.positions[:, None, :, None]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            self.masks[window, repeats] = seen if seen.shape[2] == 1 else seen.repeat(1, 1, repeats, 1)
        return self.masks[window, repeats]

    def attend(self, q, keys, values, scale: float, softcap: float, window: int | None) -> torch.Tensor:
        """q [S, Hq, D] of the flat row against keys [slots, Hkv, capacity, D] -> [real rows, Hq, Dv]."""
        (P, n), Hq = self.shape, q.shape[1]
        q = q[self.rows].view(P, n, Hq, -1).transpose(1, 2)
        k, v = (self._read(cache) for cache in (keys, values))
        Hkv = k.shape[1]
        if self.causal and window is None and not softcap:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=Hq != Hkv)
        else:
            # The queries that share a key head stand side by side: no copies of keys and values.
            q = q.reshape(P, Hkv, -1, q.shape[-1])
            mask = self.mask(window, Hq // Hkv)
            if softcap:
                scores = softcap * torch.tanh(q.float() @ k.float().mT * (scale / softcap))
                o = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype) @ v
            else:
                o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
            o = o.reshape(P, Hq, n, -1)
        return o.transpose(1, 2).flatten(0, 1)[self.real]

    def _read(self, cache: torch.Tensor) -> torch.Tensor:
        cache = cache[:, :, : self.length]
        return cache[self.cover] if isinstance(self.cover, slice) else cache.index_select(0, self.cover)


class _Cache:
    """Keys and values of all slots, a pair of [slots, Hkv, capacity, D] per layer, grown by doubling."""

    def __init__(self, max_slots: int, max_tokens: int):
        self.limits = (max_slots, max_tokens)
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def reserve(self, layer: int, slots: int, tokens: int, k: torch.Tensor, v: torch.Tensor):
        """The layer's keys and values, with room for ``slots`` and ``tokens``."""
        old = self.layers.get(layer)
        have = (old[0].shape[0], old[0].shape[2]) if old else (0, 0)
        if not old or have[0] < slots or have[1] < tokens:
            size = [
                now if now >= need else min(limit, max(need, 2 * now, least))
                for now, need, limit, least in zip(have, (slots, tokens), self.limits, (1, 64), strict=True)
            ]
            # Zeros, not empty: masked entries are multiplied by 0, which a NaN would survive.
            grown = tuple(x.new_zeros(size[0], x.shape[1], size[1], x.shape[2]) for x in (k, v))
            for new, before in zip(grown, old or (), strict=False):
                new[: have[0], :, : have[1]] = before
            self.layers[layer] = grown
        return self.layers[layer]


class TorchEngine:
    """An ``Engine`` on a transformers causal LM, whose parameters it shares.

    Parameters may be trained in place between generations; call ``load_weights`` afterwards to drop the caches of
    the old ones. Draws do not depend on other requests, except for rounding in matmuls of other shapes.
    """

    name, remote, keeps_rollouts = "torch", False, True

    def __init__(
        self,
        lm: torch.nn.Module,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        max_slots: int = 256,
        max_tokens: int = 512,
        prefill_tokens: int = 16384,
    ):
        """
        Args:
            lm: a causal LM that ``igpo_fast.model`` runs, on its device.
            decode: token ids to text; needed for stop strings only.
            max_slots: rollouts whose keys and values are held at a time; further ones wait.
            max_tokens: longest rollout, prompt and responses included.
            prefill_tokens: most tokens that join per step; a longer request joins alone.
        """
        self.version = 0
        self.stats = Stats()
        self.max_slots, self.max_tokens, self.prefill_tokens = max_slots, max_tokens, prefill_tokens
        self.lm, self._stops = lm, decode and StopStrings(decode)
        self._device = next(lm.parameters()).device
        self._waiting: dict[tuple[int, ...], _Job] = {}  # in order of arrival
        self._running: dict[int, _Job] = {}  # by slot
        self._pump: asyncio.Task | None = None
        # Per slot: the rollout's known tokens, how many of them are cached, where its turn began and must end.
        self._tokens = np.zeros((max_slots, max_tokens), np.int32)
        self._logp = np.zeros((max_slots, max_tokens), np.float32)
        self._known, self._cached, self._began, self._limit = np.zeros((4, max_slots), np.int64)
        self._temperature = np.zeros(max_slots, np.float32)
        self._restricted = np.zeros(max_slots, bool)
        self._stream = np.zeros(max_slots, np.uint64)
        self._drop_caches()

    async def generate(self, request: Request) -> Generation:
        """One turn (``Engine.generate``).

        Raises:
            ValueError: the request is empty, exceeds ``max_tokens`` with the tokens that it may sample, is its key's
                second at a time, or does not extend the tokens that its key sent and got before.
            DivergedError: the model's logits are not finite.
        """
        self._check(request)
        future = asyncio.get_running_loop().create_future()
        self._waiting[request.key] = _Job(request, future)
        self._wake()
        try:
            return await future
        except asyncio.CancelledError:
            self.release(request.key)
            raise

    def release(self, key: tuple[int, ...]) -> None:
        """Free the slot of a rollout that ended or was given up, and cancel its request. Unknown keys are ignored."""
        slot = self._slot.pop(key, None)
        job = self._waiting.pop(key, None) or self._running.pop(slot, None)
        if job is not None:
            job.future.cancel()
        if slot is not None:
            heapq.heappush(self._free, slot)
            self._wake()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]] = ()) -> None:
        """Drop every cache and raise ``version``; copy tensors that are not the model's own into it.

        Raises:
            RuntimeError: requests are pending.
            ValueError: a name that the model does not have.
        """
        if self._waiting or self._running:
            raise RuntimeError("load_weights: requests are pending; await them first")
        parameters = self.lm.state_dict()
        for name, tensor in weights:
            if name not in parameters:
                raise ValueError(f"load_weights: the model has no parameter {name!r}")
            if parameters[name].data_ptr() != tensor.data_ptr():
                parameters[name].copy_(tensor)
        self._drop_caches()
        self.version += 1

    def sleep(self) -> None:
        """Drop every cache."""
        self._drop_caches()

    def counts(self) -> dict[str, float]:
        return {}

    def _drop_caches(self) -> None:
        self._cache = _Cache(self.max_slots, self.max_tokens)
        self._head_weight: torch.Tensor | None = None  # the LM head in float32: a copy of half-precision weights
        self._slot: dict[tuple[int, ...], int] = {}
        self._free = list(range(self.max_slots))  # a heap: taking low slots first keeps the busy ones together

    def _check(self, request: Request) -> None:
        check_lengths(request, self.max_tokens)
        where = f"request {request.key}"
        if request.stop_strings and self._stops is None:
            raise ValueError(f"{where}: stop strings need an engine with decode")
        slot = self._slot.get(request.key)
        if request.key in self._waiting or slot in self._running:
            raise ValueError(f"{where}: its last request is still running")
        known = 0 if slot is None else self._known[slot]
        if not np.array_equal(request.ids[:known], self._tokens[slot or 0, :known]):
            raise ValueError(f"{where}: does not extend its {known} tokens so far, token for token")

    def _wake(self) -> None:
        """Start the pump in the running event loop. It ends when there is nothing left to do."""
        if self._waiting and (self._pump is None or self._pump.done()):
            loop = next(iter(self._waiting.values())).future.get_loop()
            self._pump = loop.create_task(self._run())
            # A Ctrl-C inside the task ends the loop, which raises it itself; asyncio would log it a second time.
            self._pump.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _run(self) -> None:
        training = self.lm.training
        self.lm.eval()
        try:
            await let_others_run()
            while self._admit():
                finished = self._step()
                for slot, generation in finished:
                    future = self._running.pop(slot).future
                    if not future.done():  # cancelled while the step ran
                        future.set_result(generation)
                await (let_others_run() if finished else asyncio.sleep(0))
        except BaseException as error:
            self._fail(error)
            if not isinstance(error, Exception):
                raise
        finally:
            self.lm.train(training)

    def _fail(self, error: BaseException) -> None:
        """End every request with the error, and drop the caches of running ones, which may be incomplete."""
        for job in [*self._running.values(), *self._waiting.values()]:
            if isinstance(error, Exception) and not job.future.done():
                job.future.set_exception(error)
            self.release(job.request.key)

    def _admit(self) -> bool:
        """Move waiting requests to slots, in order of arrival. Returns whether there is anything to step."""
        room = self.prefill_tokens
        for key, job in list(self._waiting.items()):
            slot = self._slot.get(key)
            if slot is None and not self._free:
                continue  # a later request may hold a slot
            new = len(job.request.ids) - (0 if slot is None else self._cached[slot])
            if new > room and room < self.prefill_tokens:
                break
            room -= new
            self._start(job)
        return bool(self._running)

    def _start(self, job: _Job) -> None:
        request, sampling = job.request, job.request.sampling
        key, length = request.key, len(request.ids)
        if key not in self._slot:
            self._slot[key] = heapq.heappop(self._free)
            self._cached[self._slot[key]] = 0
        slot = self._slot[key]
        self._tokens[slot, :length] = request.ids
        self._known[slot] = self._began[slot] = length
        self._limit[slot] = length + request.max_tokens
        self._stream[slot] = noise.stream(key)
        self._temperature[slot] = sampling.temperature
        self._restricted[slot] = (sampling.top_p, sampling.top_k, sampling.repetition_penalty) != (1, 0, 1)
        self._running[slot] = self._waiting.pop(key)

    @torch.no_grad()
    def _step(self) -> list[tuple[int, Generation]]:
        """Feed all new tokens of all running slots and sample one token each; returns the slots whose turn ended."""
        slots = np.array(sorted(self._running))
        start, known = self._cached[slots], self._known[slots]
        new = known - start
        first = np.cumsum(new) - new
        slot_S = np.repeat(slots, new)
        position_S = np.arange(len(slot_S)) - np.repeat(first - start, new)
        ids_S = self._tokens[slot_S, position_S].astype(np.int64)
        attend = self._attend(slots, first, start, new, self._put(slot_S), self._put(position_S))
        hidden_SH = hidden_states(self.lm, self._put(ids_S), self._put(position_S), attend)
        token_B, logp_B = self._sample(slots, hidden_SH[self._put(first + new - 1)])

        self._cached[slots] = known
        self._tokens[slots, known] = token_B
        self._logp[slots, known] = logp_B
        self._known[slots] = known + 1
        decoded = int((known > self._began[slots]).sum())
        self.stats.forwards += 1
        self.stats.tokens_decoded += decoded
        self.stats.tokens_prefilled += len(ids_S) - decoded
        return self._finish(slots, token_B)

    def _attend(self, slots, first, start, new, slot_S, position_S):
        """Attention of one step: writes new keys and values to their slots, and reads each slot's own."""
        blocks = []
        size = np.ceil(np.log2(new))  # slots with n/2 < new <= n tokens share a block
        for members in (np.flatnonzero(size == s) for s in np.unique(size)):
            width = int(new[members].max() * (start + new)[members].max())
            slots_per_block = max(1, MASK_ELEMENTS // width)
            for part in (members[i : i + slots_per_block] for i in range(0, len(members), slots_per_block)):
                blocks.append(_Block(slots[part], first[part], start[part], new[part], self._device))
        tokens = int((start + new).max())

        def attend(layer: int, q, k, v, *, scale: float, softcap: float, window: int | None):
            keys, values = self._cache.reserve(layer, int(slots[-1]) + 1, tokens, k, v)
            keys[slot_S, :, position_S] = k
            values[slot_S, :, position_S] = v
            out = q.new_empty(*q.shape[:2], v.shape[-1])
            for block in blocks:
                out[block.real_rows] = block.attend(q, keys, values, scale, softcap, window)
            return out

        return attend

    def _sample(self, slots: np.ndarray, hidden_BH: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The next token of each slot from its last hidden state, and its log-probability."""
        logits_BV = self._logits(hidden_BH)
        for row in np.flatnonzero(self._restricted[slots]):
            slot = slots[row]
            seen = self._put(self._tokens[slot, : self._known[slot]].astype(np.int64))
            sampling = self._running[slot].request.sampling
            logits_BV[row] = noise.restrict(logits_BV[row], sampling, seen)
        uniform_B = noise.uniform(self._stream[slots], self._known[slots])
        draws = noise.draw(logits_BV, self._put(self._temperature[slots]), self._put(uniform_B))
        token_B, logp_B = (x.cpu().numpy() for x in draws)
        noise.require_finite(logp_B)
        return token_B, logp_B

    def _logits(self, hidden_BH: torch.Tensor) -> torch.Tensor:
        """Logits float32 [B, V], equal to the trainer's: products of a half-precision LM head are also summed and kept
        in float32."""
        head = lm_head(self.lm)
        if hidden_BH.is_cuda and head.weight.dtype != torch.float32:
            logits_BV = torch.mm(hidden_BH, head.weight.T, out_dtype=torch.float32)
        else:
            if self._head_weight is None:
                self._head_weight = head.weight.float()
            logits_BV = hidden_BH.float() @ self._head_weight.T
        if head.bias is not None:
            logits_BV += head.bias
        return head.softcap * torch.tanh(logits_BV / head.softcap) if head.softcap else logits_BV

    def _finish(self, slots: np.ndarray, token_B: np.ndarray) -> list[tuple[int, Generation]]:
        finished = []
        full_B = self._known[slots] == self._limit[slots]
        for slot, token, full in zip(slots.tolist(), token_B.tolist(), full_B.tolist(), strict=True):
            request = self._running[slot].request
            turn = slice(self._began[slot], self._known[slot])
            stopped = token in request.stop_ids or (
                bool(request.stop_strings) and self._stops.completed(request.stop_strings, self._tokens[slot, turn])
            )
            if stopped or full:
                parts = self._tokens[slot, turn].copy(), self._logp[slot, turn].copy()
                finished.append((slot, Generation(*parts, stopped)))
        return finished

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)
