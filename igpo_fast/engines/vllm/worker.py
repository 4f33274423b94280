"""An extension of vLLM's worker (``worker_extension_cls``): fingerprints of the weights in use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from igpo_fast.engines.fingerprint import block_sum, combine, fingerprint
from igpo_fast.engines.vllm import transfer  # noqa: F401  registers its backend

Block = tuple[int, int, int]
"""First row and column of a part of a matrix (of a vector, as one column), and its ``block_sum``."""
UNIT_ROWS = 256
"""Unit vectors that are multiplied with a repacked matrix at a time."""


class WorkerExtension:
    """Mixed into the worker's class; called through ``collective_rpc``."""

    def igpo_about(self) -> dict:
        """Settings that a trainer relies on, whether a weight update is open, and the type of a layer whose weights
        cannot be compared, if there is one."""
        model, sent_by = self.vllm_config.model_config, self.vllm_config.weight_transfer_config
        return {
            "dtype": str(model.dtype).removeprefix("torch."),
            "logprobs_mode": model.logprobs_mode,
            "max_tokens": model.max_model_len,
            "transfer": sent_by and sent_by.backend,
            "link": getattr(self.weight_transfer_engine, "link", ""),
            "updating": getattr(self, "_weight_update_active", False),
            "unreadable": next(_strange(self.get_model()), ""),
        }

    def igpo_fingerprints(self) -> dict[str, list[Block]]:
        """The blocks of every parameter that this worker holds, by the parameter's name in the checkpoint.

        Packed projections are split. A matrix that the CPU backend has repacked is read through the same product as in
        inference: unit vectors times the matrix give its columns, exactly.
        """
        found: dict[str, list[Block]] = {}
        with torch.inference_mode():
            for name, block in _blocks(self.get_model(), self.vllm_config.model_config.dtype):
                found.setdefault(name, []).append(block)
        return found


def _strange(model: torch.nn.Module) -> Iterator[str]:
    """Types of layers that ``_blocks`` cannot split, like experts, which vLLM stores as two tensors."""
    for path, module in model.named_modules():
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            if len(_names(model, path)) not in (1, len(_parts(module))):
                yield type(module).__name__
        elif hasattr(module, "quant_method") and next(module.parameters(recurse=False), None) is not None:
            yield type(module).__name__


def _blocks(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Block]]:
    for path, module in model.named_modules():
        if isinstance(module, LinearBase | VocabParallelEmbedding):
            yield from _matrices(_names(model, path), module, dtype)
        else:  # whole in every worker
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", (0, 0, fingerprint(parameter.to(dtype)))


def _names(model: torch.nn.Module, path: str) -> list[str]:
    """Names of the checkpoint's matrices that are packed in the module's."""
    leaf = path.rpartition(".")[2]
    parts = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    return [path.removesuffix(leaf) + part for part in parts]


def _parts(module: torch.nn.Module) -> list[tuple[int, int, int]]:
    """(rows, first row held here, rows held here) of each matrix that is packed in the module's, counted without the
    padding of a vocabulary."""
    if isinstance(module, VocabParallelEmbedding):
        held = module.shard_indices
        begin, end = held.org_vocab_start_index, held.org_vocab_end_index
        return [(module.org_vocab_size, begin, end - begin)]
    rank, workers = module.tp_rank, module.tp_size
    if isinstance(module, QKVParallelLinear):
        q = module.num_heads * module.head_size
        parts = [(q * workers, q * rank, q)]
        for size in (module.head_size, getattr(module, "v_head_size", module.head_size)):
            kv = module.num_kv_heads * size  # a head that has fewer copies than workers is held by several
            parts.append((module.total_num_kv_heads * size, kv * (rank // module.num_kv_head_replicas), kv))
        return parts
    sizes = module.output_sizes if isinstance(module, MergedColumnParallelLinear) else [module.output_size]
    if not isinstance(module, ColumnParallelLinear):
        rank, workers = 0, 1  # all rows in every worker
    return [(size, size // workers * rank, size // workers) for size in sizes]


def _matrices(names: list[str], module: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Block]]:
    parts, product = _parts(module), _repacked_product(module, dtype)
    if len(names) == 1:  # Phi-3's checkpoints are packed themselves
        names = names * len(parts)
    column = module.tp_rank * module.input_size_per_partition if isinstance(module, RowParallelLinear) else 0
    bias = getattr(module, "bias", None)
    begin, above = 0, dict.fromkeys(names, 0)
    for name, (size, first, count) in zip(names, parts, strict=True):
        rows, row = slice(begin, begin + count), above[name] + first
        columns = [(0, module.weight[rows].to(dtype))] if product is None else ((i, c[rows]) for i, c in product())
        yield f"{name}.weight", (row, column, combine(block_sum(c, row, column + i) for i, c in columns))
        if isinstance(bias, torch.Tensor):
            yield f"{name}.bias", (row, 0, block_sum(bias[rows, None].to(dtype), row, 0))
        begin += count
        above[name] += size


def _repacked_product(module: torch.nn.Module, dtype: torch.dtype) -> Callable | None:
    """A generator of (first column, columns [rows, n]) for a matrix that inference reads from a repacked copy."""
    if not hasattr(module, "cpu_linear") or (
        isinstance(module, VocabParallelEmbedding) and not isinstance(module, ParallelLMHead)
    ):
        return None  # an embedding is read from the plain parameter
    width = module.input_size_per_partition if isinstance(module, RowParallelLinear) else module.input_size

    def columns() -> Iterator[tuple[int, torch.Tensor]]:
        for first in range(0, width, UNIT_ROWS):
            count = min(UNIT_ROWS, width - first)
            units = torch.zeros(count, width, dtype=dtype)
            units[:, first : first + count].fill_diagonal_(1)
            yield first, module.quant_method.apply(module, units, None).mT

    return columns
