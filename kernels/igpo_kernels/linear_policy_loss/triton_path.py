"""linear_policy_loss on a GPU, by chunks of distinct rows: cuBLAS, one Triton kernel, cuBLAS twice.

Logits of a chunk in float32 (see the README), the row kernel turns them into d_logits in their own memory, two products
give dhidden and dweight: 6 * U * H * V FLOPs. No atomics: results repeat bitwise if cuBLAS's do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from igpo_kernels.autograd import first_order
from igpo_kernels.linear_logprob.triton_path import programs_of
from igpo_kernels.linear_policy_loss.triton_kernels import row_loss_kernel
from igpo_kernels.pairs import GivenPairs, Rows
from igpo_kernels.policy_loss.gradients import hand_out
from igpo_kernels.policy_loss.reference import METRICS
from igpo_kernels.policy_loss.settings import SURROGATES, LossSettings
from igpo_kernels.policy_loss.triton_kernels import SUMS
from igpo_kernels.policy_loss.triton_path import bounds, finish, importance_bounds, scale_, surrogate_arguments
from igpo_kernels.products import product
from igpo_kernels.triton_variants import DTYPE_NAMES, DTYPES, Tunable, Variant, arch_of, config_for, configs
from igpo_kernels.workspace import workspace_bytes

ALIGN = 16
"""Alignment of rows of logits, in elements."""
TILE_ROWS, TILE_COLUMNS = 128, 256
"""Of a product, per multiprocessor and wave: what cuBLAS takes for large ones."""
FLOPS_PER_BYTE = 180
"""Of dense half precision, per byte of memory bandwidth: about 165 on an A100, 185 on an H200, 220 on a B200."""
PAIR_BYTES = 72
"""Bytes of workspace per pair beside the logits: its place, row and offset 24, its row's partial sums 36, slope 4, and
8."""


def linear_policy_loss(hidden, weight, bias, pairs, pair_inputs, settings, temperature, softcap):
    if hidden.dtype not in DTYPE_NAMES or weight.dtype != hidden.dtype:
        raise ValueError(
            f"linear_policy_loss: the triton backend takes hidden and weight of one dtype, "
            f"{', '.join(DTYPE_NAMES.values())}; got {hidden.dtype} and {weight.dtype}; "
            "convert them or pass backend='torch'"
        )
    rows = pairs.grouped(Rows, len(weight))
    loss, logp, sums = _LinearPolicyLoss.apply(hidden, weight, bias, rows, pair_inputs, settings, temperature, softcap)
    return loss, {**dict(zip(METRICS, sums.unbind(), strict=True)), "logp": logp}


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, pair_inputs, settings, temperature, softcap):
        arch, dtype = arch_of(hidden.device), hidden.dtype
        config = config_for("linear_policy_loss", arch, "any", DTYPE_NAMES[dtype])
        inputs = {name: None if x is None else x.detach().contiguous() for name, x in pair_inputs.items()}
        bias = None if bias is None else bias.detach().contiguous()
        labels, (vocab, size), count = rows.labels.contiguous(), weight.shape, len(rows.distinct)
        new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=hidden.device)  # noqa: E731
        logp, d_logp, partials = new(len(labels)), new(len(labels)), new(SUMS.value, count)
        height = chunk_rows(count, len(labels), vocab, hidden, programs_of(hidden.device))
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        d_weight = None
        if needs_weight:  # the first chunk, if there is one, writes all of it; several add up
            make = torch.empty_like if count else torch.zeros_like
            d_weight = make(weight, dtype=torch.float32 if count > height else dtype)
        differentiate = any(ctx.needs_input_grad)
        scale = range_of_half(inputs, settings) if dtype == torch.float16 else None
        logits = new(height, -(-vocab // ALIGN) * ALIGN)
        states = torch.empty((height, size), dtype=dtype, device=hidden.device)
        d_states = None if d_hidden is None else new(height, size)
        floor, cap = importance_bounds(settings) if settings.importance == "token" else (None, None)
        for first in range(0, count, height):
            at = rows.distinct[first : first + height]
            x = torch.index_select(hidden, 0, at, out=states[: len(at)])
            z = logits[: len(at)]
            d_z = z.view(dtype)[:, :vocab]
            product(x, weight.T, z[:, :vocab])
            row_loss_kernel[(len(at),)](
                z, d_z if differentiate else None, bias, labels, rows.order, rows.offsets,
                inputs["old_logp"], inputs["advantages"], inputs["weights"], inputs["clip_scale"],
                inputs["engine_logp"], inputs["ref_logp"], scale, logp, d_logp, partials, first, count, vocab,
                z.stride(0), d_z.stride(0),
                float(1 / temperature), float(softcap), *bounds(settings), settings.dual_clip, float(settings.kl),
                float(settings.entropy), CAPPED=softcap > 0, importance_floor=floor, importance_cap=cap,
                MASKED=settings.importance_mode == "mask", **surrogate_arguments(settings),
                UNBIASED_KL=settings.unbiased_kl, **config.launch(),
            )  # fmt: skip
            if d_weight is not None:
                product(d_z.T, x, d_weight, accumulate=first > 0)
            if d_bias is not None:
                d_bias += d_z.sum(0, dtype=torch.float32)
            if d_hidden is not None:
                d_hidden.index_copy_(0, at, x.copy_(product(d_z, weight, d_states[: len(at)])))
        loss, sums = finish(partials, arch)
        ctx.gradients = [
            None if g is None else g.to(x.dtype)
            for g, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        ]  # fmt: skip
        ctx.scale = scale
        ctx.mark_non_differentiable(logp, sums)
        return loss, logp, sums

    @staticmethod
    @first_order("linear_policy_loss")
    def backward(ctx, d_loss, *_):
        gradients = hand_out(ctx, "linear_policy_loss")
        factor = d_loss if ctx.scale is None else d_loss / ctx.scale
        return *(None if g is None else scale_(g, factor) for g in gradients), *[None] * 5


def chunk_rows(count: int, pairs: int, vocab: int, hidden: torch.Tensor, processors: int) -> int:
    """Rows per chunk, so that their logits, hidden states and gradients fit the workspace: all, or what costs
    least (`cost`) among multiples of TILE_ROWS and equal chunks.

    Half of the workspace is left for them, however many pairs there are.
    """
    row_bytes = 4 * (-(-vocab // ALIGN) * ALIGN) + hidden.shape[1] * (hidden.element_size() + 4)
    workspace = workspace_bytes(hidden.device)
    most = max(1, max(workspace // 2, workspace - PAIR_BYTES * pairs - 4 * vocab) // row_bytes)
    if count <= most:
        return max(1, count)
    equal = -(-count // -(-count // most))
    heights = [*range(TILE_ROWS, most + 1, TILE_ROWS), equal]
    return min(heights, key=lambda height: cost(height, count, hidden.shape[1], processors))


def cost(height: int, count: int, size: int, processors: int) -> int:
    """What ``count`` rows in chunks of ``height`` cost by the README's model, beyond what no height changes.

    In FLOPs per vocabulary entry: those of the whole waves of tiles of dhidden's product, and as many as would take the
    time of reading and writing the weight's gradient.
    """
    more, rest = divmod(count - 1, height)  # chunks after the first, and rows of the last, less one
    waves = lambda rows: -(-(-(-rows // TILE_ROWS) * -(-size // TILE_COLUMNS)) // processors)  # noqa: E731
    all_waves = more * waves(height) + waves(rest + 1)
    return all_waves * processors * 2 * TILE_ROWS * TILE_COLUMNS + more * 8 * size * FLOPS_PER_BYTE


def range_of_half(inputs: dict, settings) -> torch.Tensor:
    """A power of two that lifts the largest slope to about 2^6, so that float16 d_logits do not underflow.

    The upstream scalar, where a loss scaler would act, comes only after they are rounded. 2^10 of headroom are left
    for ratios and for rows with several pairs.
    """
    advantages = inputs["advantages"].float().abs() + settings.kl + settings.entropy
    if settings.importance == "token":
        advantages *= settings.importance_cap
    weights = inputs["weights"].float().abs()
    slopes = torch.where(weights != 0, weights * advantages, 0.0)
    _, exponent = torch.frexp(slopes.max() if len(slopes) else slopes.sum())
    return torch.ldexp(torch.ones_like(slopes.sum()), 6 - exponent)


# Which optional arguments a shipped variant has; the rest are compiled out.
FEATURES = {
    "ratio-one": ("d_logits_ptr",),
    "ratio": ("d_logits_ptr", "old_ptr"),
    "scaled": ("d_logits_ptr", "old_ptr", "clip_scale_ptr"),
    "full": ("d_logits_ptr", "bias_ptr", "old_ptr", "engine_ptr", "ref_ptr", "dual_clip", "importance_cap"),
    # Masked weights, and a vocabulary that 16 does not divide.
    "ragged": ("d_logits_ptr", "old_ptr", "engine_ptr", "importance_cap"),
    "banded": ("d_logits_ptr", "old_ptr", "engine_ptr", "importance_floor", "importance_cap"),
    "cispo": ("d_logits_ptr", "old_ptr"),
    "sapo": ("d_logits_ptr", "old_ptr", "rate_pos", "rate_neg"),
    "unbiased-kl": ("d_logits_ptr", "old_ptr", "ref_ptr"),
    "values": ("old_ptr",),
}
OPTIONAL = {name for names in FEATURES.values() for name in names} | {"scale_ptr", "shape_pos", "shape_neg"}
INTEGERS = {
    "label_ptr": "*i64:16", "order_ptr": "*i64:16", "offset_ptr": "*i64:16", "first": "i32", "columns": "i32",
    "n_vocab": "i32:16", "logits_stride": "i32:16", "d_logits_stride": "i32:16",
}  # fmt: skip


def variants() -> Iterator[Variant]:
    """Every shipped configuration, with the sets of optional inputs that trainers use."""
    for arch, shape_class, dtype, config in configs("linear_policy_loss"):
        for features, given in FEATURES.items():
            constexprs = {
                "CAPPED": features == "full", "MASKED": features in ("ragged", "banded"),
                "SURROGATE": features if features in SURROGATES else "clip", "UNBIASED_KL": features == "unbiased-kl",
                **config.constants,
            }  # fmt: skip
            signature = {}
            for name in row_loss_kernel.arg_names:
                if name in OPTIONAL and name not in given and not (name == "scale_ptr" and dtype == "fp16"):
                    constexprs[name] = None
                elif name not in constexprs:
                    half = f"*{dtype}:16" if name in ("d_logits_ptr", "bias_ptr") else "*fp32:16"
                    signature[name] = INTEGERS.get(name, half if name.endswith("_ptr") else "fp32")
            if features == "ragged":
                signature["n_vocab"] = "i32"
            yield Variant(
                "linear_policy_loss", "linear_policy_loss", arch, dtype, f"{shape_class}/{features}", row_loss_kernel,
                signature, constexprs, config.num_warps, config.num_stages,
            )  # fmt: skip


def tunables() -> Iterator[Tunable]:
    """The row kernel under one chunk of logits of a vocabulary of 151,936."""
    space = {"num_warps": [4, 8, 16, 32], "num_stages": [1], "BLOCK": [1024, 2048, 4096, 8192], "PAIRS": [16]}
    for dtype in DTYPES:
        yield Tunable("linear_policy_loss", "any", dtype, space, lambda device, dtype=dtype: _workload(device, dtype))


def _workload(device: torch.device, dtype: str):
    # A small hidden size, so that the products, which no configuration changes, take little of the time.
    n, hidden, vocab = 1536, 64, 151_936
    x, weight = (torch.randn(rows, hidden, device=device, dtype=DTYPES[dtype]) for rows in (n, vocab))
    pairs = GivenPairs(torch.randint(0, vocab, (n,), device=device), None)
    one = torch.ones(n, device=device)
    inputs = dict(advantages=one, weights=one, old_logp=None, clip_scale=None, engine_logp=None, ref_logp=None)
    x.requires_grad_()

    def run():
        loss = linear_policy_loss(x, weight, None, pairs, inputs, LossSettings(), 1.0, 0.0)[0]
        return loss.detach(), *torch.autograd.grad(loss, x)

    return run
