"""vLLM in this process: one engine, which gets the trainer's weights in place."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedModel

from igpo_fast.engines.base import Generation, Request, check_lengths, let_others_run
from igpo_fast.engines.stops import StopStrings
from igpo_fast.engines.vllm import check_version, prepare, settings, weights
from igpo_fast.engines.vllm.requests import generation, sampling_parameters
from igpo_fast.errors import EngineError, RunError, reason_of

PREFILL_TOKENS = 8192
"""Most tokens per step; without chunked prefill, a longer prompt has a step of its own."""
START = 600
"""Seconds that the engines of several ranks wait for each other while they are made."""

_live = None
"""The ``LLMEngine`` of this process. vLLM's process groups are global: ending one engine destroys the groups of the
next."""


@dataclass
class _Job:
    request: Request
    future: asyncio.Future
    ids: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)


class VllmEngine:
    """An ``Engine`` on vLLM's, stepped by a task in the running event loop.

    The engine itself is made by the first ``load_weights``. Its weights are random until then, and never read from
    disk: a sleeping engine's weights are discarded, and the next ``load_weights`` wakes it.
    """

    remote = keeps_rollouts = False

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        decode: Callable[[Sequence[int]], str],
        dtype: torch.dtype | None = None,
        max_slots: int = 256,
        max_tokens: int = 512,
        gpu_memory: float = 0.5,
        bucket_bytes: int = weights.BUCKET_BYTES,
        ranks: int = 1,
        workers: int = 1,
    ):
        """
        Args:
            lm: the trainer's model, whose configuration vLLM uses.
            decode: token ids to text, for stop strings.
            dtype: dtype of the engine; None is the trainer's.
            max_slots: rollouts that sample at a time; further ones wait.
            max_tokens: longest rollout, prompt and responses included.
            gpu_memory: share of the GPU for weights and cache.
            bucket_bytes: bytes of weights handed over at a time.
            ranks: processes of the run, which all make their engines at the same time.
            workers: processes over which vLLM splits each weight (tensor parallel); 1 is this process itself.
        Raises:
            InputError: this vLLM has no weight-transfer API.
        """
        prepare()
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, so that tensors are shared, not copied
        import vllm

        check_version()
        self.version = 0
        how = "by reference"
        if workers > 1:
            self._folder = TemporaryDirectory(prefix="igpo-weights-")
            os.environ[weights.FOLDER] = self._folder.name  # in the workers' environment, too
            os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # a fork would copy the trainer's threads
            how = f"to {workers} workers by file"
        self.name = f"vllm {vllm.__version__} (weights {how})"
        self.max_tokens = max_tokens
        self._lm, self._stops, self._max_slots, self._gpu_memory = lm, StopStrings(decode), max_slots, gpu_memory
        self._dtype, self._bucket_bytes = dtype or lm.dtype, bucket_bytes
        self._ranks, self._workers = ranks, workers
        self._llm = None
        self._asleep = False
        self._jobs: dict[str, _Job] = {}
        self._pump: asyncio.Task | None = None

    async def generate(self, request: Request) -> Generation:
        """Sample one turn (``Engine.generate``).

        Raises:
            ValueError: the request is empty, too long, or its key's second at a time.
            RuntimeError: no weights have been loaded since the start, or since ``sleep``.
            DivergedError: the model's logits are not finite.
        """
        check_lengths(request, self.max_tokens)
        if self._llm is None or self._asleep or self._llm is not _live:
            raise RuntimeError("generate: no weights, or another engine has replaced this one; call load_weights first")
        name = _name(request.key)
        if name in self._jobs:
            raise ValueError(f"request {request.key}: its last request is still running")
        self._add(name, request)
        job = self._jobs[name] = _Job(request, asyncio.get_running_loop().create_future())
        if self._pump is None or self._pump.done():
            self._pump = asyncio.get_running_loop().create_task(self._run())
        try:
            finished = await job.future
        except asyncio.CancelledError:
            self.release(request.key)
            raise
        return generation(request, job.ids, job.logp, finished)

    def release(self, key: tuple[int, ...]) -> None:
        """Cancel the request of a rollout that ended or was given up. Its cached tokens stay until others need the
        room."""
        if job := self._jobs.pop(_name(key), None):
            job.future.cancel()
            self._llm.abort_request([_name(key)])

    def sleep(self) -> None:
        """Free the memory of weights and cache until the next ``load_weights``, if the platform can."""
        if self._llm is not None and self._llm.vllm_config.model_config.enable_sleep_mode and not self._asleep:
            self._llm.sleep(level=2)
            self._asleep = True

    def counts(self) -> dict[str, float]:
        """Return nothing, because failures here are raised."""
        return {}

    def load_weights(self, pairs: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take the trainer's weights, drop the prefix cache, raise ``version``.

        Raises:
            RuntimeError: requests are pending, or the prefix cache cannot be dropped.
            InputError: the model's weights cannot be compared, or afterwards differ from the trainer's.
        """
        if self._jobs:
            raise RuntimeError("load_weights: requests are pending; await them first")
        if self._llm is None or self._llm is not _live:
            self._start()
        walk = weights.Walk(pairs, self._dtype, self._bucket_bytes)
        if self._asleep:
            self._llm.wake_up(["weights"])
        self._send(walk)
        if self._asleep:
            self._llm.wake_up(["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("load_weights: vLLM did not drop the prefix cache of the old weights")
        found = self._llm.collective_rpc("igpo_fingerprints")
        weights.compare(weights.whole(found), walk.fingerprints, "rollout.engine=vllm")
        self.version += 1

    def _send(self, buckets: Iterable[weights.Bucket]) -> None:
        call = self._llm.collective_rpc
        call("start_weight_update")
        for bucket in buckets:
            call("update_weights", kwargs={"update_info": self._handed_over(bucket)})
        call("finish_weight_update")

    def _handed_over(self, bucket: weights.Bucket) -> dict:
        """A bucket as ``transfer.Bucket`` takes it: by reference in this process, else in a file."""
        if self._workers == 1:
            return {"tensors": bucket}
        file = Path(self._folder.name, "bucket")
        file.write_bytes(weights.encode(bucket))
        return {"file": str(file)}

    def _start(self) -> None:
        """Make vLLM's engine; it replaces an earlier one of this process."""
        global _live
        from vllm import EngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.llm_engine import LLMEngine

        on_cpu = current_platform.is_cpu()
        options = settings(_name_of(self._dtype), on_cpu=on_cpu)
        if self._ranks > 1:  # vLLM then makes groups of one rank inside the run's own, on the GPU of LOCAL_RANK
            options |= {"distributed_executor_backend": "external_launcher", "cpu_distributed_timeout_seconds": START}
        if on_cpu:  # without chunked prefill
            options["max_num_batched_tokens"] = max(PREFILL_TOKENS, self.max_tokens)
        else:
            options |= {"gpu_memory_utilization": self._gpu_memory, "max_num_batched_tokens": PREFILL_TOKENS}
        with TemporaryDirectory(prefix="igpo-vllm-") as folder:
            config = copy.deepcopy(self._lm.config)
            config.architectures = [type(self._lm).__name__]
            config.save_pretrained(folder)
            arguments = EngineArgs(
                model=folder,
                skip_tokenizer_init=True,  # token ids in, token ids out
                max_model_len=self.max_tokens,
                max_num_seqs=self._max_slots,
                enable_sleep_mode=current_platform.is_sleep_mode_available(),
                disable_log_stats=True,
                tensor_parallel_size=self._workers,
                **options,
            )
            if _live is not None:
                _live.engine_core.shutdown()
            with _vllms_own_errors():
                self._llm = _live = LLMEngine.from_engine_args(arguments)
        about, *_ = self._llm.collective_rpc("igpo_about")
        weights.check_layout(about, "rollout.engine=vllm")

    def _add(self, name: str, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Tokens come one by one only if stop strings decide where the turn ends.
        kind = RequestOutputKind.DELTA if request.stop_strings else RequestOutputKind.FINAL_ONLY
        parameters = SamplingParams(**sampling_parameters(request), output_kind=kind)
        self._llm.add_request(name, {"prompt_token_ids": request.ids.tolist()}, parameters)

    async def _run(self) -> None:
        try:
            await let_others_run()
            while self._jobs:
                with _vllms_own_errors():
                    outputs = self._llm.step()
                ended = [self._take(output) for output in outputs if output.request_id in self._jobs]
                await (let_others_run() if any(ended) else asyncio.sleep(0))
        except BaseException as error:
            for name, job in self._jobs.items():
                if isinstance(error, Exception) and not job.future.done():
                    job.future.set_exception(error)
                self._llm.abort_request([name])
            self._jobs.clear()
            if not isinstance(error, Exception):
                raise

    def _take(self, output) -> bool:
        """Add new tokens of a request; returns whether they end its turn."""
        name, (new,) = output.request_id, output.outputs
        job = self._jobs[name]
        completed = False
        for token, logp in zip(new.token_ids, new.logprobs, strict=True):
            job.ids.append(token)
            job.logp.append(logp[token].logprob)
            if completed := self._stops.completed(job.request.stop_strings, job.ids):
                break
        if not (completed or output.finished):
            return False
        if not output.finished:
            self._llm.abort_request([name])
        del self._jobs[name]
        if not job.future.done():
            job.future.set_result(completed or new.finish_reason == "stop")
        return True


@contextmanager
def _vllms_own_errors() -> Iterator[None]:
    """What vLLM raises, which may be anything, becomes an EngineError; memory's errors have a remedy of their own."""
    try:
        yield
    except (RunError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EngineError(
            f"rollout.engine=vllm: vLLM failed ({reason_of(error)}); see whether it runs this model here, or take "
            "rollout.engine=torch"
        ) from error


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _name(key: tuple[int, ...]) -> str:
    return "_".join(map(str, key))
