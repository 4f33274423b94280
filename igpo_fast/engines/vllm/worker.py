"""An extension of vLLM's worker (``worker_extension_cls``): fingerprints of the weights in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from igpo_fast.engines.fingerprint import block_sum, combine, fingerprint
from igpo_fast.engines.vllm import TRANSFER, sync_method

if sync_method() == TRANSFER:
    from igpo_fast.engines.vllm import transfer  # noqa: F401  registers its backend

UNIT_ROWS = 256
"""Unit vectors that are multiplied with a repacked matrix at a time."""


class WorkerExtension:
    """Mixed into the worker's class; called through ``collective_rpc``."""

    def igpo_about(self) -> dict:
        """Settings that a trainer relies on, whether a weight update is open, and why the weights cannot be compared,
        if they cannot. (An old vLLM has no weight transfer.)"""
        model, transfer = self.vllm_config.model_config, getattr(self.vllm_config, "weight_transfer_config", None)
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": model.logprobs_mode,
            "max_tokens": model.max_model_len,
            "transfer": transfer and transfer.backend,
            "updating": getattr(self, "_weight_update_active", False),
            "unreadable": self._unreadable(),
        }

    def igpo_fingerprints(self) -> dict[str, int]:
        """``fingerprint`` of every parameter, by its name in the checkpoint.

        Packed projections are split. A matrix that the CPU backend has repacked is read through the same product as in
        inference: unit vectors times the matrix give its columns, exactly.
        """
        with torch.inference_mode():
            return dict(_parameters(self.get_model(), self.vllm_config.model_config.dtype))

    def _unreadable(self) -> str:
        if self.vllm_config.parallel_config.world_size > 1:
            return "it is split over several workers; start it with tensor and pipeline parallel size 1"
        return next((f"{kind} layers store them in a layout of their own" for kind in _strange(self.get_model())), "")


def _strange(model: torch.nn.Module) -> Iterator[str]:
    """Types of layers that ``_parameters`` cannot split, like experts, which vLLM stores as two tensors."""
    for path, module in model.named_modules():
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            names, sizes = _packed(model, path, module)
            if len(names) != len(sizes):
                yield type(module).__name__
        elif hasattr(module, "quant_method") and next(module.parameters(recurse=False), None) is not None:
            yield type(module).__name__


def _parameters(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, int]]:
    for path, module in model.named_modules():
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            yield from _matrices(*_packed(model, path, module), module, dtype)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", fingerprint(parameter.to(dtype))


def _packed(model: torch.nn.Module, path: str, module: torch.nn.Module) -> tuple[list[str], list[int]]:
    """Names and rows of the checkpoint's matrices that are packed in the module's."""
    leaf = path.rpartition(".")[2]
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    names = [path.removesuffix(leaf) + part for part in parts]
    sizes = _sizes(module)
    return names, sizes if len(names) > 1 else [sum(sizes)]  # Phi-3's checkpoints are packed themselves


def _sizes(module: torch.nn.Module) -> list[int]:
    """Rows of each matrix that is packed in the module's; a padded vocabulary counts without its padding."""
    if isinstance(module, VocabParallelEmbedding):
        return [module.org_vocab_size]
    if isinstance(module, QKVParallelLinear):
        heads = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        return [n * module.head_size for n in heads[:2]] + [heads[2] * getattr(module, "v_head_size", module.head_size)]
    if isinstance(module, MergedColumnParallelLinear):
        return list(module.output_sizes)
    return [module.output_size]


def _matrices(
    names: list[str], sizes: list[int], module: torch.nn.Module, dtype: torch.dtype
) -> Iterator[tuple[str, int]]:
    product = _repacked_product(module, dtype)
    bias = getattr(module, "bias", None)
    begin = 0
    for name, size in zip(names, sizes, strict=True):
        rows = slice(begin, begin + size)
        if product is None:
            yield f"{name}.weight", fingerprint(module.weight[rows].to(dtype))
        else:
            yield f"{name}.weight", combine(block_sum(columns[rows], 0, first) for first, columns in product())
        if isinstance(bias, torch.Tensor):
            yield f"{name}.bias", fingerprint(bias[rows].to(dtype))
        begin += size


def _repacked_product(module: torch.nn.Module, dtype: torch.dtype) -> Callable | None:
    """A generator of (first column, columns [rows, n]) for a matrix that inference reads from a repacked copy."""
    if not hasattr(module, "cpu_linear") or (
        isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ):
        return None  # an embedding is read from the plain parameter
    width = module.embedding_dim if isinstance(module, VocabParallelEmbedding) else module.input_size

    def columns() -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(0, width, UNIT_ROWS):
            count = min(UNIT_ROWS, width - first)
            units = torch.zeros(count, width, dtype=dtype)
            units[:, first : first + count].fill_diagonal_(1)
            yield first, module.quant_method.apply(module, units, None).mT

    return columns
