"""policy_loss on Triton: one pass over the tokens, whose last program adds the programs' partial sums.

20 bytes per token (logp, old_logp, advantages, weights in; the gradient out), 4 more for each further input. Sums are
in float32 and in a fixed order: results are bitwise equal from run to run. Statistics of turns and rollouts cost a sort
of ``segment`` or ``sequence`` and a launch before it, each. The backward hands the gradient out, and reads it only
where it must be scaled, in place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import triton

from igpo_kernels.autograd import first_order
from igpo_kernels.policy_loss.gradients import hand_out
from igpo_kernels.policy_loss.reference import METRICS, segment_count
from igpo_kernels.policy_loss.settings import SURROGATES, LossSettings
from igpo_kernels.policy_loss.triton_kernels import (
    SUMS,
    policy_loss_finish_kernel,
    policy_loss_gap_kernel,
    policy_loss_kernel,
    policy_loss_scale_kernel,
    policy_loss_segment_kernel,
)
from igpo_kernels.triton_variants import DTYPE_NAMES, DTYPES, Config, Tunable, Variant, arch_of, config_for, configs


def policy_loss(
    logp, *, old_logp, advantages, weights, settings, clip_scale, engine_logp, ref_logp, entropy, segment, sequence
):
    if logp.dtype == torch.float64:
        raise ValueError("policy_loss: the triton backend computes in float32, logp is float64; pass backend='torch'")
    if not torch.is_grad_enabled():  # an autograd.Function is not told
        logp, entropy = logp.detach(), None if entropy is None else entropy.detach()
    given = dict(
        old=old_logp, advantage=advantages, weight=weights, clip_scale=clip_scale, engine=engine_logp, ref=ref_logp,
        segment=segment if settings.needs_segment else None, sequence=sequence if settings.needs_sequence else None,
    )  # fmt: skip
    loss, sums = _PolicyLoss.apply(logp, entropy, given, settings)
    return loss, dict(zip(METRICS, sums.unbind(), strict=True))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, given, settings):
        arch = arch_of(logp.device)
        config = config_for("policy_loss", arch, "any", "fp32")
        given = {name: None if x is None else x.detach().contiguous() for name, x in given.items()}
        logp, entropy = logp.contiguous(), None if entropy is None else entropy.contiguous()
        d_logp = torch.empty_like(logp) if ctx.needs_input_grad[0] else None
        programs = programs_for(len(logp), config)
        partials, sums = (logp.new_empty(shape, dtype=torch.float32) for shape in ((SUMS.value, programs), SUMS.value))
        gap = gaps_of_sequences(logp, given, settings, arch)
        ratio, slope = segment_statistics(logp, given, gap, settings, arch)
        policy_loss_kernel[(programs,)](
            logp, given["old"], given["advantage"], given["weight"], given["clip_scale"], given["engine"], given["ref"],
            entropy, given["segment"], ratio, slope, given["sequence"], gap, d_logp, partials,
            counter_of(logp.device), sums, len(logp),
            *bounds(settings), settings.dual_clip, float(settings.kl), float(settings.entropy),
            *importance_bounds(settings), **importance_flags(settings), **surrogate_arguments(settings),
            UNBIASED_KL=settings.unbiased_kl, BLOCK=config["BLOCK"], COLUMNS=config["COLUMNS"], **config.options(),
        )  # fmt: skip
        loss, sums = loss_and_metrics(sums)
        ctx.save_for_backward(given["weight"] if ctx.needs_input_grad[1] else None)
        ctx.gradients = (d_logp,)
        ctx.bonus, ctx.entropy_dtype = settings.entropy, None if entropy is None else entropy.dtype
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    @first_order("policy_loss")
    def backward(ctx, d_loss, _):
        (d_logp,), (weights,) = hand_out(ctx, "policy_loss"), ctx.saved_tensors
        d_entropy = None if weights is None else (weights * (d_loss * -ctx.bonus)).to(ctx.entropy_dtype)
        return None if d_logp is None else scale_(d_logp, d_loss), d_entropy, None, None


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``gradient *= factor``, a dense tensor by a float32 scalar, rounded once; a factor of 1 costs no pass over
    memory."""
    config = config_for("policy_loss_scale", arch_of(gradient.device), "any", DTYPE_NAMES.get(gradient.dtype, "fp32"))
    n = gradient.numel()
    policy_loss_scale_kernel[(programs_for(n, config),)](gradient, factor, n, BLOCK=config["BLOCK"], **config.options())
    return gradient


def programs_for(n: int, config: Config) -> int:
    return min(config["PROGRAMS"], max(1, triton.cdiv(n, config["BLOCK"])))


def bounds(settings: LossSettings) -> tuple[float, float]:
    return float(1 - settings.clip_low), float(1 + settings.clip_high)


def importance_bounds(settings: LossSettings) -> tuple[float | None, float]:
    return float(settings.importance_floor) or None, float(settings.importance_cap)


def importance_flags(settings: LossSettings) -> dict[str, bool]:
    return {"TOKEN_IMPORTANCE": settings.importance == "token", "MASKED": settings.importance_mode == "mask"}


def surrogate_arguments(settings: LossSettings) -> dict[str, float | str | None]:
    """What the kernels need beside the clip range; None what the surrogate has not."""
    shape, rate = (None, None), (None, None)
    if settings.surrogate == "vespo":
        shape = (float(settings.vespo_k_pos), float(settings.vespo_k_neg))
        rate = (float(settings.vespo_lambda_pos), float(settings.vespo_lambda_neg))
    elif settings.surrogate == "sapo":
        rate = (float(settings.sapo_temperature_pos), float(settings.sapo_temperature_neg))
    names = ("shape_pos", "shape_neg", "rate_pos", "rate_neg")
    return {"SURROGATE": settings.surrogate, **dict(zip(names, shape + rate, strict=True))}


def finish(partials: torch.Tensor, arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the metrics [8] from partial sums [9, columns]."""
    sums = partials.new_empty(SUMS.value)
    config = config_for("policy_loss_finish", arch, "any", "fp32")
    policy_loss_finish_kernel[(SUMS.value,)](partials, sums, partials.shape[1], **config.launch())
    return loss_and_metrics(sums)


def loss_and_metrics(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return sums[0].data, sums[1:]  # no view to autograd: the loss may be changed in place


def counter_of(device: torch.device) -> torch.Tensor:
    """An int32 zero for a launch on the current stream; the launch leaves it zero for the next.

    Launches that may run at once have counters of their own: each stream has one, and so has each launch in a CUDA
    graph, which any stream may replay.
    """
    if device.type != "cuda":
        return _counter(device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    return _counter(device, torch.cuda.current_stream(device).cuda_stream)


@functools.cache
def _counter(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


def gaps_of_sequences(logp, given, settings, arch):
    """Summed or mean engine gap of each sequence; None where the settings need none."""
    if given["sequence"] is None or not len(logp):
        return None
    order, offsets = by_segment("sequence", given["sequence"])
    gap = logp.new_empty(len(offsets) - 1, dtype=torch.float32)
    policy_loss_gap_kernel[(len(gap),)](
        logp if given["old"] is None else given["old"], given["weight"], given["engine"], order, offsets, gap,
        MEAN=settings.importance == "geometric", **config_for("policy_loss_gap", arch, "any", "fp32").launch(),
    )  # fmt: skip
    return gap


def segment_statistics(logp, given, gap, settings, arch):
    """Mean log ratio (vespo: the sum) and mean slope of each segment; None where the settings need none."""
    if given["segment"] is None or not len(logp):
        return None, None
    order, offsets = by_segment("segment", given["segment"])
    ratio, slope = (logp.new_empty(len(offsets) - 1, dtype=torch.float32) for _ in range(2))
    ref = given["ref"] if settings.unbiased_kl else None
    if settings.surrogate == "vespo" or (settings.surrogate == "cispo" and ref is None):
        slope = None  # no gradient goes by way of the segment's ratio
    policy_loss_segment_kernel[(len(ratio),)](
        logp, given["old"], given["advantage"], given["weight"], given["clip_scale"], given["engine"], ref,
        given["sequence"], gap, order, offsets, ratio, slope, *bounds(settings), settings.dual_clip,
        float(settings.kl), *importance_bounds(settings), **importance_flags(settings), **surrogate_arguments(settings),
        **config_for("policy_loss_segment", arch, "any", "fp32").launch(),
    )  # fmt: skip
    return ratio, slope


def by_segment(name: str, segment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs [M] in the order of their segments, and the offset of each segment [segments + 1]."""
    in_order, order = segment.sort(stable=True)
    count = segment_count(name, *torch.stack((in_order[0], in_order[-1])).tolist(), len(segment))
    return order, torch.searchsorted(in_order, torch.arange(count + 1, device=segment.device))


# Which optional arguments a shipped variant has; the rest are compiled out.
FEATURES = {
    "ratio-one": (),
    "ratio": ("old_ptr",),
    "scaled": ("old_ptr", "clip_scale_ptr"),
    "full": ("old_ptr", "engine_ptr", "ref_ptr", "entropy_ptr", "dual_clip"),
    "masked": ("old_ptr", "engine_ptr"),
    "banded": ("old_ptr", "engine_ptr", "floor"),
    "sequence": ("old_ptr", "engine_ptr", "entropy_ptr", "sequence_ptr", "gap_ptr"),
    "segment": ("old_ptr", "engine_ptr", "entropy_ptr", "segment_ptr", "ratio_ptr", "slope_ptr"),
    "cispo": ("old_ptr",),
    "sapo": ("old_ptr", "rate_pos", "rate_neg"),
    "vespo": (
        "old_ptr", "engine_ptr", "segment_ptr", "ratio_ptr", "shape_pos", "shape_neg", "rate_pos", "rate_neg",
    ),
    "unbiased-kl": ("old_ptr", "ref_ptr"),
    "segment-kl": ("old_ptr", "ref_ptr", "kl_ref_ptr", "segment_ptr", "ratio_ptr", "slope_ptr"),
    "segment-full": (
        "old_ptr", "engine_ptr", "ref_ptr", "entropy_ptr", "dual_clip", "clip_scale_ptr", "floor", "segment_ptr",
        "ratio_ptr", "slope_ptr", "sequence_ptr", "gap_ptr",
    ),
}  # fmt: skip
OPTIONAL = {name for names in FEATURES.values() for name in names}
INTEGERS = {
    "counter_ptr": "*i32:16", "columns": "i32", "n": "i64", "segment_ptr": "*i64:16", "sequence_ptr": "*i64:16",
    "order_ptr": "*i64:16", "offset_ptr": "*i64:16",
}  # fmt: skip


def variants() -> Iterator[Variant]:
    """Every shipped configuration, with the sets of optional inputs that trainers use."""
    for features in FEATURES:
        yield from _variants("policy_loss", policy_loss_kernel, features)
    for features in ("sequence", "segment-full"):
        yield from _variants("policy_loss_gap", policy_loss_gap_kernel, features)
    for features in ("segment", "segment-full", "segment-kl", "vespo"):
        yield from _variants("policy_loss_segment", policy_loss_segment_kernel, features)
    yield from _variants("policy_loss_finish", policy_loss_finish_kernel, "ratio")
    yield from _variants("policy_loss_scale", policy_loss_scale_kernel, "ratio")


def _variants(kernel: str, fn, features: str) -> Iterator[Variant]:
    for arch, shape_class, dtype, config in configs(kernel):
        flags = {
            "TOKEN_IMPORTANCE": features in ("full", "masked", "banded", "vespo"),
            "MASKED": features in ("masked", "banded", "segment-full"),
            "MEAN": features == "segment-full",
            "SURROGATE": features if features in SURROGATES else "clip",
            "UNBIASED_KL": features in ("unbiased-kl", "segment-kl"),
        }
        constexprs = {k: v for k, v in {**flags, **config.constants}.items() if k in fn.arg_names}
        signature = {}
        for name in fn.arg_names:
            if name in OPTIONAL and name not in FEATURES[features]:
                constexprs[name] = None
            elif name not in constexprs:
                pointee = dtype if name == "gradient_ptr" else "fp32"
                signature[name] = INTEGERS.get(name, f"*{pointee}:16" if name.endswith("_ptr") else "fp32")
        yield Variant(
            "policy_loss", kernel, arch, dtype, f"{shape_class}/{features}", fn, signature, constexprs,
            config.num_warps, config.num_stages,
        )  # fmt: skip


def tunables() -> Iterator[Tunable]:
    """The passes over 16M tokens; the final sum takes microseconds, and sequence statistics the time of a sort."""
    space = {
        "num_warps": [4, 8, 16], "num_stages": [1], "BLOCK": [512, 1024, 2048, 4096], "PROGRAMS": [2, 3, 4, 6, 8],
    }  # fmt: skip
    yield Tunable("policy_loss", "any", "fp32", space | {"COLUMNS": [256]}, _workload, ("PROGRAMS",))
    for dtype in DTYPES:
        scaling = functools.partial(_scaling, dtype=dtype)
        yield Tunable("policy_loss_scale", "any", dtype, space, scaling, ("PROGRAMS",))


def _workload(device: torch.device):
    n = 16 << 20
    logp, old, advantages, weights = (torch.rand(n, device=device) for _ in range(4))
    absent = dict.fromkeys(("clip_scale", "engine_logp", "ref_logp", "entropy", "segment", "sequence"))
    logp.requires_grad_()

    def run():
        given = dict(old_logp=old, advantages=advantages, weights=weights, settings=LossSettings(), **absent)
        loss = policy_loss(logp, **given)[0]
        return loss.detach(), *torch.autograd.grad(loss, logp)

    return run


def _scaling(device: torch.device, dtype: str):
    # Times -1: many calls in place leave neither zeros nor infinities.
    gradient, factor = torch.rand(16 << 20, device=device, dtype=DTYPES[dtype]), torch.full((), -1.0, device=device)
    return lambda: scale_(gradient, factor)
