"""Tree attention on a GPU: flash attention over the blocks that a plan's mask leaves.

Forward: one program per query tile and key head. Backward: gradients of queries by query tile, of keys and values by
key block, each in a kernel of its own, so that every sum has a fixed order: results repeat bitwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import numpy as np
import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from igpo_kernels.autograd import first_order
from igpo_kernels.cache import on_device
from igpo_kernels.plan import Branch, RolloutTokens, Tree, TreePlan, pack
from igpo_kernels.recompute import once
from igpo_kernels.tree_attention import LARGEST_GROUP, LARGEST_HEAD, rows_of_all
from igpo_kernels.tree_attention import triton_kernels as kernels
from igpo_kernels.tree_attention.blocks import block_lists
from igpo_kernels.triton_variants import DTYPE_NAMES, DTYPES, Config, Tunable, Variant, arch_of, config_for, configs

TMA_BYTES = 16
"""Alignment in bytes of addresses and strides that descriptors need."""
ALIGNED = TMA_BYTES // 4
"""Rows of numbers per token, of 4 bytes each, lie a multiple of this many numbers apart."""


def tree_attention(q, k, v, plan, scale, softcap, window, rows=None):
    if q.dtype not in DTYPE_NAMES:
        raise ValueError(
            f"tree_attention: the triton backend takes {', '.join(map(str, DTYPE_NAMES))}; got {q.dtype}; convert the "
            "tensors or pass backend='torch'"
        )
    heads_a_group = q.shape[1] // k.shape[1]
    if q.shape[2] > LARGEST_HEAD or heads_a_group > LARGEST_GROUP:
        raise ValueError(
            f"tree_attention: the triton backend takes heads of up to {LARGEST_HEAD} numbers, up to {LARGEST_GROUP} "
            f"query heads per key head; got {q.shape[2]} and {heads_a_group}; pass backend='torch'"
        )
    attend = lambda q: _TreeAttention.apply(q, k, v, plan, scale, softcap, window, rows)  # noqa: E731
    return attend(q) if rows is None else rows_of_all(attend, q, plan, rows)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softcap, window, rows):
        q, k, v = map(addressable, (q, k, v))
        ctx.launch = Launch(q, k, plan, scale, softcap, window, rows)
        out, log_mass = once(lambda: _forward(q, k, v, ctx.launch))
        ctx.save_for_backward(q, k, v, out, log_mass)
        return out

    @staticmethod
    @first_order("tree_attention")
    def backward(ctx, d_out):
        q, k, v, out, log_mass = ctx.saved_tensors
        launch = ctx.launch
        d_out = addressable(d_out)
        delta = statistic(q)
        d_q = launch.queries(q)
        d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
        config = launch.config("deltas")
        kernels.attention_deltas[(triton.cdiv(delta.numel(), config["BLOCK_M"]),)](
            out, d_out, delta, *strides(d_out), q.shape[0], q.shape[1],
            HEAD_DIM=q.shape[2], BLOCK_D=block_of(q.shape[2]), **config.launch(),
        )  # fmt: skip
        config = launch.config("backward_q")
        tma, sources = launch.sources(config["TMA"], config["BLOCK_N"], k, v)
        grid, mask, lists = launch.visits(config, tma)
        kernels.attention_backward_q[grid](
            q, *sources, d_out, log_mass, delta, d_q, *mask, *lists, *strides(q, k, v, d_out), *launch.sizes,
            **launch.options(config, tma),
        )  # fmt: skip
        config = launch.config("backward_kv")
        tma, (q_source, d_out_source) = launch.sources(config["TMA"], config["BLOCK_M"], q, d_out)
        statistics = (numbers(tma, config["BLOCK_M"], x) for x in (log_mass, delta))
        grid, mask, lists = launch.visits(config, by_key=True)
        kernels.attention_backward_kv[grid](
            q_source, k, v, d_out_source, *statistics, d_k, d_v, *mask, *lists, *strides(q, k, v, d_out),
            *launch.sizes, **launch.options(config, tma),
        )  # fmt: skip
        return d_q, d_k, d_v, *[None] * 5


def _forward(q, k, v, launch: Launch) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the log-sum-exp in base 2."""
    out = launch.queries(q)
    log_mass = statistic(q)
    if launch.rows is not None:  # the backward of keys reads it of all queries
        log_mass.zero_()
    config = launch.config("forward")
    tma, sources = launch.sources(config["TMA"], config["BLOCK_N"], k, v)
    grid, mask, lists = launch.visits(config, tma)
    kernels.attention_forward[grid](
        q, *sources, out, log_mass, *mask, *lists, *strides(q, k, v), *launch.sizes, **launch.options(config, tma)
    )
    return out, log_mass


class Launch:
    """Arguments that the kernels of one call share.

    With ``rows`` only the tiles that hold some of those rows are computed; what others would give is 0.
    """

    def __init__(self, q, k, plan: TreePlan, scale: float, softcap: float, window: int | None, rows: str | None):
        n, heads, self.head_dim = q.shape
        self.plan, self.window, self.rows, self.device = plan, window, rows, q.device
        self.kv_heads, self.group = k.shape[1], heads // k.shape[1]
        self.arch, self.dtype = arch_of(q.device), DTYPE_NAMES[q.dtype]
        self.capped = softcap > 0
        unit = math.log2(math.e) * (1.0 if self.capped else scale)
        self.sizes = n, self.kv_heads, self.group, unit, float(scale), float(softcap), window or 0

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Room for a result per query, of q's shape and dtype."""
        make = torch.empty if self.rows is None else torch.zeros
        return make(q.shape, dtype=q.dtype, device=q.device)

    def config(self, part: str) -> Config:
        size = shape_class(self.head_dim, part != "deltas" and self.capped)
        return config_for(f"tree_attention_{part}", self.arch, size, self.dtype)

    def options(self, config: Config, tma: int | None = None) -> dict:
        return {
            **config.launch(), **({} if tma is None else {"TMA": tma}), "HEAD_DIM": self.head_dim,
            "BLOCK_D": block_of(self.head_dim), "CAPPED": self.capped, "WINDOWED": self.window is not None,
        }  # fmt: skip

    def visits(self, config: Config, tma: int = 0, by_key: bool = False) -> tuple:
        """The grid, mask and block lists as the kernels take them: for tiles of queries with all heads of a group, or
        for blocks of keys, which take the heads one by one."""
        queries = config["BLOCK_M"] if by_key else config["BLOCK_M"] // self.group
        only = None if by_key else self.rows
        lists = block_lists(
            self.plan, self.window, queries, config["BLOCK_N"], by_key=by_key, only=only, device=self.device
        )
        end, position = (self._int32(name) for name in ("subtree_end", "position_ids"))
        mask = (end, position)
        if not by_key:  # of keys, which the loop reads, and positions of the tile's queries
            mask = (*(numbers(tma, config["BLOCK_N"], x[None]) for x in mask), position)
        return (len(lists.order) * self.kv_heads,), mask, (lists.order, lists.offset, lists.runs)

    def _int32(self, name: str) -> torch.Tensor:
        make = lambda: on_device(getattr(self.plan, name).astype(np.int32), self.device)  # noqa: E731
        return self.plan.cached((name, torch.int32, str(self.device)), make)

    def sources(self, tma: int, rows: int, *tensors: torch.Tensor) -> tuple[int, list]:
        """Tensors as descriptors of ``rows`` of one head; as pointers if the strides' alignment rules TMA out."""
        aligned = all(
            x.data_ptr() % TMA_BYTES == 0 and all(s * x.element_size() % TMA_BYTES == 0 for s in x.stride()[:2])
            for x in tensors
        )
        if not (tma and aligned):
            return 0, list(tensors)
        return 1, [TensorDescriptor.from_tensor(x, [rows, 1, block_of(self.head_dim)]) for x in tensors]


def statistic(q: torch.Tensor) -> torch.Tensor:
    """Room for a float32 number per head and token [Hq, N], in rows ALIGNED numbers apart."""
    n, heads, _ = q.shape
    apart = triton.cdiv(n, ALIGNED) * ALIGNED
    return torch.empty((heads, apart), dtype=torch.float32, device=q.device)[:, :n]


def numbers(tma: int, tokens: int, x: torch.Tensor):
    """Numbers per token [rows, N] as a descriptor of ``tokens`` of one row, or as a pointer."""
    if not tma:
        return x
    rows, n = x.shape
    apart = triton.cdiv(n, ALIGNED) * ALIGNED  # of a single row too, where nothing lies that far
    return TensorDescriptor(x, [rows, n], [apart, 1], [1, tokens])


def addressable(x: torch.Tensor) -> torch.Tensor:
    """``x`` [N, heads, D], copied if descriptors and kernels cannot read it: heads that are not contiguous, or tokens
    or heads that share memory (an expanded gradient)."""
    return x if x.stride(2) == 1 and all(x.stride()) else x.clone(memory_format=torch.contiguous_format)


def strides(*tensors: torch.Tensor) -> list[int]:
    """Token and head strides of each [N, heads, D]."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def block_of(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def shape_class(head_dim: int, capped: bool = False) -> str:
    """The configurations' class: soft-capping takes registers in the loop over full blocks, so smaller blocks."""
    return f"d{min(size for size in HEAD_DIMS if size >= head_dim)}{'-capped' if capped else ''}"


HEAD_DIMS = (64, 128, 256)
"""Largest head of each shape class."""
USED = {
    "bf16": {
        "plain": (64, 96, 128, 192, 256), "capped": (128, 256), "windowed": (64, 96, 128, 256),
        "capped_windowed": (64, 128, 256),
    },
    "fp16": {"plain": (64, 96, 128, 192, 256), "windowed": (64, 96, 128, 256), "capped_windowed": HEAD_DIMS},
    "fp32": {"plain": HEAD_DIMS, "capped_windowed": HEAD_DIMS},
}  # fmt: skip
"""Head sizes of models in use, which are compiled ahead of time, by dtype and features. No model with soft-capping is
trained in fp16, which its scores overflow: of each class one head size is."""
KERNELS = {
    "forward": kernels.attention_forward,
    "deltas": kernels.attention_deltas,
    "backward_q": kernels.attention_backward_q,
    "backward_kv": kernels.attention_backward_kv,
}
LISTS = ("subtree_end", "position", "order", "offset", "run")
NUMBERS = {"subtree_end": "i32", "position": "i32", "mass": "fp32", "deltas": "fp32"}
"""Numbers per token: descriptors with TMA, else pointers."""

SOURCES = ("q", "k", "v", "d_out")
"""Descriptors with TMA, else pointers."""


def variants() -> Iterator[Variant]:
    """Every shipped configuration, for the features and head sizes in use."""
    for part, fn in KERNELS.items():
        kernel = f"tree_attention_{part}"
        for arch, size, dtype, config in configs(kernel):
            for features, head_dims in USED[dtype].items():
                if part == "deltas" and features != "plain":
                    continue
                for head_dim in head_dims:
                    if shape_class(head_dim, "capped" in features) == size:
                        signature, constexprs = typed(fn, config, dtype, head_dim, features)
                        yield Variant(
                            "tree_attention", kernel, arch, dtype, f"{size}/{head_dim}/{features}", fn, signature,
                            constexprs, config.num_warps, config.num_stages, has_dot=part != "deltas",
                            may_spill=head_dim > 128, work=work(part, config),
                        )  # fmt: skip


def work(part: str, config: Config) -> tuple[float, str]:
    """`Variant.work` of an iteration: cells a thread, in units of those of 64 keys by a tile of 128 rows (backward_kv:
    of 4096 cells) with 256 threads."""
    if part == "deltas":
        return 1, ""
    cells, unit = (4096, "4096 cells") if part == "backward_kv" else (128 * 64, "64 keys")
    return config["BLOCK_M"] * config["BLOCK_N"] / cells * 8 / config.num_warps, unit


def typed(fn, config: Config, dtype: str, head_dim: int, features: str) -> tuple[dict, dict]:
    """Signature and constexprs of a kernel, for contiguous tokens."""
    constexprs = {**config.constants, "HEAD_DIM": head_dim, "BLOCK_D": block_of(head_dim)}
    flags = {"CAPPED": "capped" in features, "WINDOWED": "windowed" in features}
    constexprs |= {name: flag for name, flag in flags.items() if name in fn.arg_names}
    signature = {}
    for name in fn.arg_names:
        if name in constexprs:
            continue
        if name.endswith("_ptr") and name.removesuffix("_ptr") in LISTS:
            signature[name] = "*i32:16"
        elif name in ("mass_ptr", "delta_ptr"):
            signature[name] = "*fp32:16"
        elif name in NUMBERS:
            tokens = config["BLOCK_N" if NUMBERS[name] == "i32" else "BLOCK_M"]
            signature[name] = f"tensordesc<{NUMBERS[name]}[1,{tokens}]>" if config["TMA"] else f"*{NUMBERS[name]}:16"
        elif name in SOURCES and constexprs["TMA"]:
            rows = config["BLOCK_N" if name in ("k", "v") else "BLOCK_M"]
            signature[name] = f"tensordesc<{dtype}[{rows},1,{block_of(head_dim)}]>"
        elif name.endswith("_ptr") or name in SOURCES:
            signature[name] = f"*{dtype}:16"
        elif name.endswith("stride"):
            signature[name] = "i32:16"
        else:
            signature[name] = "fp32" if name in ("unit", "scale", "softcap") else "i32"
    return signature, constexprs


def tunables() -> Iterator[Tunable]:
    """Each kernel on two trees of 16k tokens with 16 branches each, 16 query heads over 4 key heads."""
    blocks = [32, 64, 128]
    space = {"BLOCK_M": blocks, "BLOCK_N": blocks, "num_warps": [4, 8], "num_stages": [1, 2, 3, 4], "TMA": [0, 1]}
    for part in ("forward", "backward_q", "backward_kv"):
        for head_dim in HEAD_DIMS:
            for capped in (False, True):
                for dtype in ("bf16", "fp16"):
                    workload = functools.partial(
                        _workload, part=part, head_dim=head_dim, capped=capped, dtype=DTYPES[dtype]
                    )
                    yield Tunable(f"tree_attention_{part}", shape_class(head_dim, capped), dtype, space, workload)


def _workload(device: torch.device, part: str, head_dim: int, capped: bool, dtype: torch.dtype):
    boundaries = np.arange(1, 17) * 1024
    trunk = np.arange(boundaries[-1])
    trees = [
        Tree([RolloutTokens(i, trunk, np.where(trunk < 1, -1, 0), boundaries)], [Branch(trunk[:24], 16, 24)])
        for i in range(2)
    ]
    plan = pack(trees)
    q, k, v = (torch.randn(plan.n_tokens, heads, head_dim, device=device, dtype=dtype) for heads in (16, 4, 4))
    options = (head_dim**-0.5, 50.0 if capped else 0.0, 4096 if capped else None)
    if part == "forward":
        return lambda: tree_attention(q, k, v, plan, *options)
    out = tree_attention(*(x.requires_grad_() for x in (q, k, v)), plan, *options)
    return lambda: torch.autograd.grad(out, (q, k, v), out, retain_graph=True)
