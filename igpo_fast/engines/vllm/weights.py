"""Sends the trainer's weights to vLLM: names, buckets, and the check that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import safetensors.torch
import torch

from igpo_fast.engines.fingerprint import fingerprint
from igpo_fast.errors import InputError

BACKEND = "igpo"
"""Name of our backend in vLLM's weight transfer."""
EXTENSION = "igpo_fast.engines.vllm.worker.WorkerExtension"
FOLDER = "IGPO_WEIGHTS_FOLDER"
"""A replica's environment variable that names the folder to which its buckets are written."""
BUCKET_BYTES = 64 << 20
TORCH = "use rollout.engine=torch"

Weights = Sequence[tuple[str, torch.Tensor]]


def buckets(weights: Weights, dtype: torch.dtype, limit: int = BUCKET_BYTES) -> Iterator[Weights]:
    """Neighbouring tensors in the engine's dtype, of at most ``limit`` bytes together; a larger one alone, because
    vLLM's loaders take whole tensors."""
    bucket, size = [], 0
    for name, tensor in weights:
        tensor = tensor.detach().to(dtype)
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def encode(bucket: Weights) -> bytes:
    """A bucket as safetensors. Tied tensors are written twice, because safetensors cannot share them."""
    return safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in bucket})


def fingerprints(weights: Weights, dtype: torch.dtype) -> dict[str, int]:
    """Fingerprints of the trainer's weights in the engine's dtype; each storage is read once."""
    known: dict[tuple, int] = {}
    found = {}
    for name, tensor in weights:
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if place not in known:
            known[place] = fingerprint(tensor.to(dtype))
        found[name] = known[place]
    return found


def check_layout(about: Mapping, where: str) -> None:
    """Raises InputError if ``worker.igpo_about`` reports weights that cannot be compared."""
    if about.get("unreadable"):
        raise InputError(f"{where}: its weights cannot be compared with the trainer's ({about['unreadable']}); {TORCH}")


def compare(engine: Mapping[str, int], trainer: Mapping[str, int], where: str) -> None:
    """Raises InputError, naming the first tensor, if the engine's weights are not the trainer's."""
    absent = sorted(engine.keys() ^ trainer.keys())
    differing = [name for name in trainer if name in engine and engine[name] != trainer[name]]
    if not absent and not differing:
        return
    name = (differing or absent)[0]
    what = f"{name} is not the trainer's"
    if not differing:
        has, lacks = ("engine", "trainer") if name in engine else ("trainer", "engine")
        what = f"the {has} has {name}, the {lacks} does not"
    raise InputError(
        f"{where}: after the weight sync {what} ({len(differing) + len(absent)} of {len(trainer)} tensors); "
        f"rollouts would come from stale weights, so the run stops: start it again, or {TORCH}"
    )


def complete(weights: Iterable[tuple[str, torch.Tensor]]) -> Weights:
    """The weights as a list, with the LM head of a model that ties it to its embeddings, because vLLM keeps a copy."""
    weights = list(weights)
    names = {name for name, _ in weights}
    embedding = [tensor for name, tensor in weights if name.endswith("embed_tokens.weight")]
    if "lm_head.weight" not in names and len(embedding) == 1:
        weights.append(("lm_head.weight", embedding[0]))
    return weights
