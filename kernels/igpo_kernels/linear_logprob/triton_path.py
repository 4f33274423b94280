"""linear_logprob on a GPU: Triton kernels around the tensor cores, no logits in memory in the forward.

Forward: one persistent kernel computes logits tile by tile and keeps three numbers per row and tile; a second combines
them; the labels' logits are dot products of their own. Backward: per chunk of the vocabulary, one kernel recomputes
the logits and writes their gradient in the inputs' dtype, two cuBLAS products consume it. No atomics: results repeat
bitwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from igpo_kernels.autograd import first_order
from igpo_kernels.linear_logprob import triton_kernels as kernels
from igpo_kernels.pairs import Cells
from igpo_kernels.products import product
from igpo_kernels.triton_variants import DTYPE_NAMES, DTYPES, Config, Tunable, Variant, arch_of, config_for, configs
from igpo_kernels.workspace import workspace_bytes

SMALL_ROWS = 64
"""Most rows of shape class ``small``: the weight is read once and the op is bound by memory."""
INTERPRETER_PROGRAMS = 3
LEAST_WIDTH = 4096
"""Vocabulary entries that a chunk of the backward should have: cuBLAS reads and writes dx once per chunk."""
ALIGNMENT = 16
"""Row alignment for which kernels are compiled: start address in bytes, length in elements."""
PAIR_BYTES = 160
"""Bytes per pair of indices and statistics, its row's and cell's included."""


def linear_logprob(hidden, weight, pairs, bias, temperature, softcap, entropy, logsumexp, shard):
    if hidden.dtype not in DTYPE_NAMES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_logprob: the triton backend takes hidden and weight of one dtype, "
            f"{', '.join(DTYPE_NAMES.values())}; got {hidden.dtype} and {weight.dtype}; "
            "convert them or pass backend='torch'"
        )
    cells = pairs.grouped(Cells, shard.vocab)
    return _LinearLogprob.apply(hidden, weight, bias, cells, temperature, softcap, entropy, logsumexp, shard)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, cells, temperature, softcap, entropy, logsumexp, shard):
        read = cells
        if shard.group is not None:  # others' labels stay outside 0 .. len(weight) - 1, where no gradient is written
            cells = replace(cells, label=cells.label - shard.first)
            read = replace(cells, label=cells.label.clamp(0, len(weight) - 1))
        n_rows = len(cells.distinct)
        head = Head.of(hidden, weight, bias, temperature, softcap, n_rows)
        new = lambda n: torch.empty(n, dtype=torch.float32, device=hidden.device)  # noqa: E731
        logit, top, log_mass = new(len(cells.row)), new(n_rows), new(n_rows)
        row_entropy = new(n_rows) if entropy else None
        tiles = triton.cdiv(len(weight), head.forward["BLOCK_VOCAB"])
        row_bytes = 4 * tiles * (3 if entropy else 2) + packed_bytes(hidden, n_rows)
        height = min(even(budget_of(cells) // row_bytes), max(1, n_rows))
        packed = buffer_of(hidden, height) if packed_bytes(hidden, n_rows) else None
        buffers = [new(tiles * height) for _ in range(3 if entropy else 2)]
        for first in range(0, n_rows, height):
            part = slice(first, min(first + height, n_rows))
            x = rows_of(hidden, cells.distinct, part, packed)
            statistics = [buffer[: tiles * len(x)].view(tiles, len(x)) for buffer in buffers]
            statistics += () if entropy else (None,)
            head.tile_statistics(x, *statistics)
            head.combine(*statistics, top, log_mass, row_entropy, part)
            head.cell_logits(x, read, logit, first)
        if shard.group is not None:
            logit = logit.masked_fill(read.label != cells.label, 0)
        logit, top, log_mass, row_entropy = shard.whole(logit, top, log_mass, row_entropy)
        # Products of tiles and of labels round differently: 1e-6 above zero is zero.
        cell_logp = (logit - cells.spread(top, cells.row) - cells.spread(log_mass, cells.row)).clamp_(max=0)
        ctx.save_for_backward(hidden, weight, bias, logit, top, log_mass, row_entropy)
        ctx.cells, ctx.temperature, ctx.softcap = cells, temperature, softcap
        ctx.set_materialize_grads(False)
        return (
            cells.spread(cell_logp, cells.of_pair),
            row_entropy[cells.row_of_pair] if entropy else None,
            cells.spread(top + log_mass, cells.row_of_pair) if logsumexp else None,
        )

    @staticmethod
    @first_order("linear_logprob")
    def backward(ctx, d_logp, d_entropy, d_logsumexp):
        hidden, weight, bias, logit, top, log_mass, row_entropy = ctx.saved_tensors
        cells = ctx.cells
        if d_logp is None and d_entropy is None and d_logsumexp is None:
            return (None,) * 9
        d_logp = torch.zeros_like(cells.of_pair, dtype=torch.float32) if d_logp is None else d_logp
        d_logp = cells.ordered(d_logp)
        row_d_logp, cell_d_logp = cells.sums_by_row(d_logp), cells.sums_by_cell(d_logp)
        if d_logsumexp is not None:  # its gradient is p, that of logp onehot - p
            row_d_logp = row_d_logp - cells.sums_by_row(cells.ordered(d_logsumexp))
        row_d_entropy = None if d_entropy is None else cells.sums_by_row(cells.ordered(d_entropy))
        row_entropy = None if d_entropy is None else row_entropy
        n_rows, (vocab, size) = len(cells.distinct), weight.shape
        head = Head.of(hidden, weight, bias, ctx.temperature, ctx.softcap, n_rows)
        height, width = head.backward_chunks(hidden, n_rows, vocab, budget_of(cells))
        one_block = height >= n_rows
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        new = functools.partial(torch.zeros, device=hidden.device)
        d_hidden = new(hidden.shape, dtype=hidden.dtype) if needs_hidden else None
        d_bias = new(vocab, dtype=torch.float32) if needs_bias else None
        d_weight = None
        if needs_weight:  # the first block of rows, if there is one, writes all of it
            make = torch.empty if n_rows else torch.zeros
            dtype = weight.dtype if one_block else torch.float32
            d_weight = make(weight.shape, dtype=dtype, device=weight.device)
        stride = triton.cdiv(width, head.backward["BLOCK_VOCAB"]) * head.backward["BLOCK_VOCAB"]
        packed = buffer_of(hidden, height) if packed_bytes(hidden, n_rows) else None
        dx_buffer = torch.empty((height, size), dtype=torch.float32, device=hidden.device)
        dz_buffer = torch.empty((height, stride), dtype=hidden.dtype, device=hidden.device)
        for first in range(0, n_rows, height):
            part = slice(first, min(first + height, n_rows))
            x = rows_of(hidden, cells.distinct, part, packed)
            dx, dz_rows = dx_buffer[: len(x)], dz_buffer[: len(x)]
            row_values = [
                None if value is None else value[part]
                for value in (top, log_mass, row_entropy, row_d_logp, row_d_entropy)
            ]
            for start in range(0, vocab, width):
                c = slice(start, min(start + width, vocab))
                head.tile_gradients(x, c, dz_rows, row_values)
                head.cell_gradients(dz_rows, cells, logit, cell_d_logp, row_values, first, c)
                dz = dz_rows[:, : c.stop - c.start]
                if d_hidden is not None:
                    product(dz, head.weight[c, :size], dx, accumulate=start > 0)
                if d_weight is not None:
                    product(dz.T, x[:, :size], d_weight[c], accumulate=first > 0)
                if d_bias is not None:
                    d_bias[c] += dz.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden[cells.distinct[part]] = dx.to(hidden.dtype)
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, *[None] * 6


def budget_of(cells: Cells) -> int:
    """Bytes of the workspace for blocks; at least half of it, however many pairs there are."""
    workspace = workspace_bytes(cells.order.device)
    return max(workspace // 2, workspace - PAIR_BYTES * len(cells.order))


def aligned(matrix: torch.Tensor) -> bool:
    """Whether kernels may read the matrix in place: they ship compiled for aligned rows only."""
    sizes = matrix.data_ptr(), matrix.stride(0), matrix.shape[1]
    return matrix.stride(1) == 1 and all(size % ALIGNMENT == 0 for size in sizes)


def aligned_size(matrix: torch.Tensor) -> int:
    return triton.cdiv(matrix.shape[1], ALIGNMENT) * ALIGNMENT


def buffer_of(matrix: torch.Tensor, rows: int) -> torch.Tensor:
    """Aligned zeros for ``rows`` rows of the matrix; the padding columns add nothing to a product."""
    return matrix.new_zeros(rows, aligned_size(matrix))


def packed_bytes(hidden: torch.Tensor, n_rows: int) -> int:
    """Bytes per row that ``rows_of`` copies: 0 where the distinct rows are all of ``hidden``, in order and aligned."""
    return 0 if n_rows == len(hidden) and aligned(hidden) else aligned_size(hidden) * hidden.element_size()


def rows_of(hidden, distinct: torch.Tensor, part: slice, packed: torch.Tensor | None) -> torch.Tensor:
    """The distinct rows of a block, in ``packed`` unless it is None."""
    if packed is None:
        return hidden[part]
    x = packed[: part.stop - part.start]
    torch.index_select(hidden, 0, distinct[part], out=x[:, : hidden.shape[1]])
    return x


@dataclass(frozen=True)
class Head:
    """The LM head and how its kernels are launched."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    inverse_temperature: float
    softcap: float
    forward: Config
    backward: Config
    combining: Config
    scoring: Config
    scattering: Config
    programs: int

    @classmethod
    def of(cls, hidden, weight, bias, temperature, softcap, n_rows) -> Head:
        arch, dtype = arch_of(hidden.device), DTYPE_NAMES[hidden.dtype]
        # With both a bias and soft-capping (no known model has both) large tiles would spill registers.
        size = "small" if n_rows <= SMALL_ROWS or (bias is not None and softcap) else "large"
        weight, bias = weight.detach(), None if bias is None else bias.detach().contiguous()
        if not aligned(weight):
            copy = buffer_of(weight, len(weight))
            copy[:, : weight.shape[1]] = weight
            weight = copy
        return cls(
            weight,
            bias.clone() if bias is not None and bias.data_ptr() % ALIGNMENT else bias,
            1 / temperature,
            float(softcap),
            config_for("linear_logprob_forward", arch, size, dtype),
            config_for("linear_logprob_backward", arch, size, dtype),
            config_for("linear_logprob_combine", arch, "any", "fp32"),
            config_for("linear_logprob_cells", arch, "any", dtype),
            config_for("linear_logprob_cell_gradients", arch, "any", dtype),
            programs_of(hidden.device),
        )

    @property
    def scaling(self) -> tuple[float, float]:
        return self.inverse_temperature, self.softcap

    def backward_chunks(self, hidden: torch.Tensor, n_rows: int, vocab: int, budget: int) -> tuple[int, int]:
        """Rows and vocabulary entries of a block: half the bytes for x and its gradient, the rest for dz."""
        block, element = self.backward["BLOCK_VOCAB"], hidden.element_size()
        gradient_bytes = 4 if element == 4 else 4 + element  # float32, and the dtype that it is cast to
        row_bytes = packed_bytes(hidden, n_rows) + hidden.shape[1] * gradient_bytes
        height = min(even(budget // 2 // max(row_bytes, LEAST_WIDTH * element)), max(1, n_rows))
        most = max(1, (budget - height * row_bytes) // (height * element * block))
        chunks = triton.cdiv(triton.cdiv(vocab, block), most)
        return height, triton.cdiv(triton.cdiv(vocab, chunks), block) * block

    def tile_statistics(self, x, top, mass, moment):
        config, tiled = self.tiled(self.forward, x, self.weight)
        kernels.tile_statistics[self.grid(config, len(x), len(self.weight))](
            *tiled, self.bias, top, mass, moment, x.stride(0), self.weight.stride(0),
            len(x), len(self.weight), x.shape[1], *self.scaling, CAPPED=self.softcap > 0, **config,
        )  # fmt: skip

    def combine(self, tile_top, tile_mass, tile_moment, top, log_mass, entropy, part: slice):
        n_tiles, n_rows = tile_top.shape
        kernels.combine_tiles[(triton.cdiv(n_rows, self.combining["BLOCK_ROWS"]),)](
            tile_top, tile_mass, tile_moment, top[part], log_mass[part], None if entropy is None else entropy[part],
            n_rows, n_tiles, **self.combining.launch(),
        )  # fmt: skip

    def cell_logits(self, x, cells: Cells, logit, first_row: int):
        kernels.cell_logits[(triton.cdiv(len(cells.row), self.scoring["BLOCK_CELLS"]),)](
            x, self.weight, self.bias, cells.row, cells.label, logit, x.stride(0), self.weight.stride(0),
            first_row, len(x), len(cells.row), x.shape[1], *self.scaling, CAPPED=self.softcap > 0,
            **self.scoring.launch(),
        )  # fmt: skip

    def tile_gradients(self, x, c: slice, dz, row_values):
        weight, bias = self.weight[c], None if self.bias is None else self.bias[c]
        config, tiled = self.tiled(self.backward, x, weight)
        target = dz
        if config["TMA"]:
            target = TensorDescriptor.from_tensor(dz, [config["BLOCK_ROWS"], config["BLOCK_VOCAB"] // 2])
        kernels.tile_gradients[self.grid(config, len(x), len(weight))](
            *tiled, bias, target, *row_values, x.stride(0), weight.stride(0), dz.stride(0),
            len(x), len(weight), x.shape[1], *self.scaling, CAPPED=self.softcap > 0, **config,
        )  # fmt: skip

    def cell_gradients(self, dz, cells: Cells, logit, cell_d_logp, row_values, first_row: int, c: slice):
        kernels.cell_gradients[(triton.cdiv(len(cells.row), self.scattering["BLOCK_CELLS"]),)](
            dz, cells.row, cells.label, logit, cell_d_logp, *row_values, dz.stride(0),
            first_row, len(dz), c.start, c.stop - c.start, len(cells.row), *self.scaling, CAPPED=self.softcap > 0,
            **self.scattering.launch(),
        )  # fmt: skip

    def grid(self, config: dict, n_rows: int, vocab: int) -> tuple[int]:
        tiles = triton.cdiv(n_rows, config["BLOCK_ROWS"]) * triton.cdiv(vocab, config["BLOCK_VOCAB"])
        return (min(tiles, self.programs),)

    def tiled(self, config: Config, x: torch.Tensor, weight: torch.Tensor) -> tuple[dict, list]:
        """Launch options, and x and weight, as descriptors with TMA."""
        launch = config.launch()
        if not launch["TMA"]:
            return launch, [x, weight]
        blocks = config["BLOCK_ROWS"], config["BLOCK_VOCAB"]
        return launch, [
            TensorDescriptor.from_tensor(m, [block, config["BLOCK_HIDDEN"]])
            for m, block in zip((x, weight), blocks, strict=True)
        ]


def even(height: int) -> int:
    """Round ``height`` so that row blocks start at multiples of 16: their pointers stay aligned, kernels compile
    once."""
    return max(16, height - height % 16)


def programs_of(device: torch.device) -> int:
    if device.type == "cpu":
        return INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


# Which optional arguments a variant has; the rest are compiled out.
ENTROPY = ("moment_ptr", "entropy_ptr", "d_entropy_ptr", "tile_moment_ptr")
FEATURES = {
    "plain": (),
    "entropy": ENTROPY,
    "capped": (*ENTROPY, "CAPPED"),
    "biased": (*ENTROPY, "bias_ptr"),
    "full": (*ENTROPY, "bias_ptr", "CAPPED"),
}
OPTIONAL = {*ENTROPY, "bias_ptr"}
KERNELS = {
    "linear_logprob_forward": kernels.tile_statistics,
    "linear_logprob_backward": kernels.tile_gradients,
    "linear_logprob_combine": kernels.combine_tiles,
    "linear_logprob_cells": kernels.cell_logits,
    "linear_logprob_cell_gradients": kernels.cell_gradients,
}
"""Kernel by table of configurations."""


def variants() -> Iterator[Variant]:
    """Every shipped configuration, with the sets of options that trainers use."""
    for table, fn in KERNELS.items():
        for arch, size, dtype, config in configs(table):
            seen = []
            for features, given in FEATURES.items():
                signature, constexprs = typed(fn, config, dtype, given)
                if constexprs in seen or (size, features) == ("large", "full"):
                    continue  # a kernel without these arguments, and combinations that Head.of never launches
                seen.append(constexprs)
                yield Variant(
                    "linear_logprob", table, arch, dtype, f"{size}/{features}", fn, signature, constexprs,
                    config.num_warps, config.num_stages, has_dot="TMA" in config.constants,
                )  # fmt: skip


def typed(fn, config: Config, dtype: str, given: tuple[str, ...]) -> tuple[dict, dict]:
    """Signature and constexprs of a kernel, for a model whose hidden size is a multiple of 16."""
    signature, constexprs = {}, dict(config.constants)
    tiles = {"x": "BLOCK_ROWS", "weight": "BLOCK_VOCAB", "dz": "BLOCK_ROWS"}
    for name in fn.arg_names:
        if name == "CAPPED":
            constexprs[name] = name in given
        elif name in OPTIONAL and name not in given:
            constexprs[name] = None
        elif name in tiles and config["TMA"]:
            columns = config["BLOCK_VOCAB"] // 2 if name == "dz" else config["BLOCK_HIDDEN"]
            signature[name] = f"tensordesc<{dtype}[{config[tiles[name]]},{columns}]>"
        elif name in tiles or name in ("x_ptr", "weight_ptr", "dz_ptr", "bias_ptr"):
            signature[name] = f"*{dtype}:16"
        elif name in ("row_ptr", "label_ptr"):
            signature[name] = "*i64:16"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32:16"
        elif name.endswith("stride") or name == "n_hidden":
            signature[name] = "i32:16"
        elif name not in constexprs:
            signature[name] = "i32" if name in kernels.LENGTHS else "fp32"
    return signature, constexprs


TUNED_ROWS = {"small": 64, "large": 4096}
TUNED_HIDDEN, TUNED_VOCAB = 4096, 65_536
"""Vocabulary entries that the tuner times: a chunk, a multiple of every tile."""


def tunables() -> Iterator[Tunable]:
    """The two kernels around the tensor cores, by size class and dtype; the rest take a hundredth of the time."""
    for size in TUNED_ROWS:
        for dtype in DTYPES:
            half = dtype != "fp32"  # float32 tiles are multiplied without tensor cores
            space = {
                "BLOCK_ROWS": [64, 128, 256] if half else [32, 64, 128],
                "BLOCK_VOCAB": [64, 128, 256] if half else [32, 64, 128],
                "BLOCK_HIDDEN": [32, 64, 128] if half else [8, 16, 32],
                "num_warps": [4, 8],
                "num_stages": [2, 3, 4, 5],
                "GROUP_ROWS": [4, 8, 16, 32],
                "FLATTEN": [0, 1],
                "TMA": [0, 1],
            }
            for kernel, workload in (("forward", _forward_workload), ("backward", _backward_workload)):
                make = functools.partial(workload, size=size, dtype=DTYPES[dtype])
                yield Tunable(f"linear_logprob_{kernel}", size, dtype, space, make)


def _tuned_head(device: torch.device, size: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Hidden states and a weight whose logits are about 1."""
    scale = TUNED_HIDDEN**-0.25
    return [torch.randn(n, TUNED_HIDDEN, device=device, dtype=dtype) * scale for n in (TUNED_ROWS[size], TUNED_VOCAB)]


def _forward_workload(device: torch.device, size: str, dtype: torch.dtype):
    x, weight = _tuned_head(device, size, dtype)

    def run():
        head = Head.of(x, weight, None, 1.0, 0.0, len(x))
        tiles = triton.cdiv(len(weight), head.forward["BLOCK_VOCAB"])
        tile_top, tile_mass = torch.empty((2, tiles, len(x)), device=device)
        head.tile_statistics(x, tile_top, tile_mass, None)
        top, log_mass = torch.empty((2, len(x)), device=device)
        head.combine(tile_top, tile_mass, None, top, log_mass, None, slice(0, len(x)))
        return top + log_mass  # whatever the tiles, this is the same

    return run


def _backward_workload(device: torch.device, size: str, dtype: torch.dtype):
    x, weight = _tuned_head(device, size, dtype)
    dz = torch.empty((len(x), len(weight)), device=device, dtype=dtype)
    top, d_logp = torch.randn((2, len(x)), device=device)
    log_mass = math.log(len(weight)) - top

    def run():
        head = Head.of(x, weight, None, 1.0, 0.0, len(x))
        head.tile_gradients(x, slice(0, len(weight)), dz, (top, log_mass, None, d_logp, None))
        return dz

    return run
