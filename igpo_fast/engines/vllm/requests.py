"""Conversion of requests for vLLM and of its answers, the same in process and over HTTP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from igpo_fast.engines import noise
from igpo_fast.engines.base import Generation, Request

NOT_FINITE = -9999.0
"""Log-probability that vLLM's server returns in place of NaN; smaller ones stand for NaN, too."""


def seed_of(request: Request) -> int:
    """The seed of a turn's draws, from its rollout's key and the number of tokens before it: 0 .. 2**63 - 1."""
    return int(noise.stream((*request.key, len(request.ids)))) >> 1


def sampling_parameters(request: Request) -> dict:
    """``vllm.SamplingParams`` as keywords, or as JSON, without the stop strings.

    Only the request's own stop tokens end a turn, not those of the model's configuration.
    """
    sampling = request.sampling
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "repetition_penalty": sampling.repetition_penalty,
        "seed": seed_of(request),
        "max_tokens": request.max_tokens,
        "stop_token_ids": [int(id) for id in request.stop_ids],
        "ignore_eos": True,
        "detokenize": False,
        "logprobs": 0,  # only the sampled token's
    }


def generation(request: Request, ids: Sequence[int], logp: Sequence[float], finished: bool) -> Generation:
    """The ``Generation`` of vLLM's answer. Raises DivergedError if a log-probability is not finite."""
    logp = np.asarray(logp, np.float32)
    noise.require_finite(np.where(logp > NOT_FINITE, logp, np.nan))
    return Generation(np.asarray(ids, np.int32), logp, finished)
