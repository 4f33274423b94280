"""Sends the trainer's weights to vLLM: names, buckets, and the check that they arrived."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import safetensors.torch
import torch

from igpo_fast.engines.fingerprint import combine, fingerprint
from igpo_fast.errors import InputError

BACKEND = "igpo"
"""Name of our backend in vLLM's weight transfer."""
EXTENSION = "igpo_fast.engines.vllm.worker.WorkerExtension"
FOLDER = "IGPO_WEIGHTS_FOLDER"
"""A replica's environment variable that names the folder to which its buckets are written."""
BUCKET_BYTES = 64 << 20
TORCH = "use rollout.engine=torch"

Weights = Iterable[tuple[str, torch.Tensor]]
Bucket = list[tuple[str, torch.Tensor]]


class Walk:
    """One walk over the trainer's weights, in buckets for an engine; no more than a bucket and a tensor is held.

    Args:
        weights: every weight of the engine by its name, so tied ones under each of their names.
        dtype: dtype of the engine.
        limit: bytes per bucket. A larger tensor is a bucket alone, because vLLM's loaders take whole tensors.
    """

    def __init__(self, weights: Weights, dtype: torch.dtype, limit: int = BUCKET_BYTES):
        self._weights, self._dtype, self._limit = weights, dtype, limit
        self.fingerprints: dict[str, int] = {}
        """Fingerprints, in the engine's dtype, of the weights that were walked over."""

    def __iter__(self) -> Iterator[Bucket]:
        """Neighbouring tensors in the engine's dtype. A bucket is emptied when the next one is asked for."""
        bucket, size = [], 0
        for name, tensor in self._weights:
            tensor = tensor.detach().to(self._dtype)
            self.fingerprints[name] = fingerprint(tensor)
            if bucket and size + tensor.nbytes > self._limit:
                yield bucket
                bucket.clear()
                size = 0
            bucket.append((name, tensor))
            size += tensor.nbytes
        if bucket:
            yield bucket


def encode(bucket: Bucket) -> bytes:
    """A bucket as safetensors. Tied tensors are written twice, because safetensors cannot share them."""
    return safetensors.torch.save({name: tensor.cpu().contiguous().clone() for name, tensor in bucket})


def check_layout(about: Mapping, where: str) -> None:
    """Raises InputError if ``worker.igpo_about`` reports weights that cannot be compared."""
    if kind := about.get("unreadable"):
        raise InputError(
            f"{where}: its weights cannot be compared with the trainer's, for the fingerprint of {kind} layers is not "
            f"written yet; {TORCH}"
        )


def whole(workers: Sequence[Mapping[str, Sequence[Sequence[int]]]]) -> dict[str, int]:
    """Fingerprints of an engine's weights from the blocks that its workers hold (``worker.igpo_fingerprints``).

    A block that several workers hold counts once. If their copies differ each counts, and the sum is no weight's.
    """
    blocks: dict[str, set[tuple[int, ...]]] = {}
    for worker in workers:
        for name, held in worker.items():
            blocks.setdefault(name, set()).update(map(tuple, held))
    return {name: combine(total for *_, total in held) for name, held in blocks.items()}


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
