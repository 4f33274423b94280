"""policy_loss on Triton: one pass over the tokens, then one small sum of the blocks' partial sums.

20 bytes a token (logp, old_logp, advantages, weights in; the gradient out), 4 more for each further input. Sums are
in float32 and in a fixed order: results are bitwise equal from run to run. Sequence statistics cost a sort of
``sequence`` and a launch before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton

from igpo_kernels.policy_loss.settings import LossSettings
from igpo_kernels.policy_loss.triton_kernels import (
    SUMS,
    policy_loss_finish_kernel,
    policy_loss_kernel,
    policy_loss_sequence_kernel,
)
from igpo_kernels.triton_variants import Tunable, Variant, arch_of, config_for, configs

METRICS = ("policy", "tokens", "clipped", "ratio", "ratio_max", "kl", "mismatch", "entropy")


def policy_loss(logp, *, old_logp, advantages, weights, settings, engine_logp, ref_logp, entropy, sequence):
    if logp.dtype == torch.float64:
        raise ValueError("policy_loss: the triton backend computes in float32, logp is float64; pass backend='torch'")
    given = dict(
        old=old_logp, advantage=advantages, weight=weights, engine=engine_logp, ref=ref_logp, sequence=sequence
    )
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
        programs = min(config["PROGRAMS"], max(1, triton.cdiv(len(logp), config["BLOCK"])))
        partials = logp.new_empty((SUMS.value, programs), dtype=torch.float32)
        ratio, gap, slope = sequence_statistics(logp, given, settings, arch)
        by_sequence = given["sequence"] if ratio is not None or gap is not None else None
        policy_loss_kernel[(programs,)](
            logp, given["old"], given["advantage"], given["weight"], given["engine"], given["ref"], entropy,
            by_sequence, ratio, gap, slope, d_logp, partials, len(logp), *bounds(settings), settings.dual_clip,
            float(settings.kl), float(settings.entropy), float(settings.importance_cap),
            TOKEN_IMPORTANCE=settings.importance == "token", MASKED=settings.importance_mode == "mask",
            BLOCK=config["BLOCK"], **config.options(),
        )  # fmt: skip
        loss, sums = finish(partials, arch)
        ctx.save_for_backward(d_logp, given["weight"] if ctx.needs_input_grad[1] else None)
        ctx.bonus, ctx.entropy_dtype = settings.entropy, None if entropy is None else entropy.dtype
        ctx.mark_non_differentiable(sums)
        return loss, sums

    @staticmethod
    def backward(ctx, d_loss, _):
        d_logp, weights = ctx.saved_tensors
        d_entropy = None if weights is None else (weights * (d_loss * -ctx.bonus)).to(ctx.entropy_dtype)
        return None if d_logp is None else scaled(d_logp, d_loss), d_entropy, None, None


def scaled(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``gradient * factor`` in float32, rounded once; a factor without dimensions would be rounded first."""
    return torch.mul(gradient, factor.reshape([1] * gradient.ndim).float(), out=torch.empty_like(gradient))


def bounds(settings: LossSettings) -> tuple[float, float]:
    return float(1 - settings.clip_low), float(1 + settings.clip_high)


def finish(partials: torch.Tensor, arch: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the metrics [8] of partial sums [9, columns]."""
    sums = partials.new_empty(SUMS.value)
    config = config_for("policy_loss_finish", arch, "any", "fp32")
    policy_loss_finish_kernel[(SUMS.value,)](partials, sums, partials.shape[1], **config.launch())
    return sums[0].clone(), sums[1:]


def sequence_statistics(logp, given, settings, arch):
    """Mean log ratio, summed engine gap and mean slope of each sequence; None where the settings need none."""
    of_ratio, of_gap = settings.sequence_ratio, settings.importance == "sequence"
    if not (of_ratio or of_gap) or not len(logp):
        return None, None, None
    by_sequence, order = given["sequence"].sort(stable=True)
    count = int(by_sequence[-1]) + 1
    offsets = torch.searchsorted(by_sequence, torch.arange(count + 1, device=logp.device))
    new = lambda wanted: logp.new_empty(count, dtype=torch.float32) if wanted else None  # noqa: E731
    ratio, gap, slope = new(of_ratio), new(of_gap), new(of_ratio)
    policy_loss_sequence_kernel[(count,)](
        logp, given["old"], given["advantage"], given["weight"], given["engine"], order, offsets,
        ratio, gap, slope, *bounds(settings), settings.dual_clip, float(settings.importance_cap),
        TOKEN_IMPORTANCE=settings.importance == "token", MASKED=settings.importance_mode == "mask",
        **config_for("policy_loss_sequence", arch, "any", "fp32").launch(),
    )  # fmt: skip
    return ratio, gap, slope


# Which optional arguments a shipped variant has; the rest are compiled out.
FEATURES = {
    "ratio-one": (),
    "ratio": ("old_ptr",),
    "full": ("old_ptr", "engine_ptr", "ref_ptr", "entropy_ptr", "dual_clip"),
    "sequence": ("old_ptr", "engine_ptr", "sequence_ptr", "sequence_ratio_ptr", "sequence_gap_ptr",
                 "sequence_slope_ptr", "ratio_ptr", "gap_ptr", "slope_ptr"),
}  # fmt: skip
OPTIONAL = {name for names in FEATURES.values() for name in names}
INTEGERS = {"sequence_ptr": "*i64:16", "order_ptr": "*i64:16", "offset_ptr": "*i64:16", "n": "i64", "columns": "i32"}


def variants() -> Iterator[Variant]:
    """Every shipped configuration, with the sets of optional inputs that trainers use."""
    for features in FEATURES:
        yield from _variants("policy_loss", policy_loss_kernel, features)
    yield from _variants("policy_loss_sequence", policy_loss_sequence_kernel, "sequence")
    yield from _variants("policy_loss_finish", policy_loss_finish_kernel, "ratio")


def _variants(kernel: str, fn, features: str) -> Iterator[Variant]:
    for arch, shape_class, dtype, config in configs(kernel):
        flags = {"TOKEN_IMPORTANCE": features == "full", "MASKED": False}
        constexprs = {k: v for k, v in {**flags, **config.constants}.items() if k in fn.arg_names}
        signature = {}
        for name in fn.arg_names:
            if name in OPTIONAL and name not in FEATURES[features]:
                constexprs[name] = None
            elif name not in constexprs:
                signature[name] = INTEGERS.get(name, "*fp32:16" if name.endswith("_ptr") else "fp32")
        yield Variant(
            "policy_loss", kernel, arch, dtype, f"{shape_class}/{features}", fn, signature, constexprs,
            config.num_warps, config.num_stages,
        )  # fmt: skip


def tunables() -> Iterator[Tunable]:
    """Each kernel under 16M tokens in 2,048 sequences."""
    token, sequence = LossSettings(), LossSettings(sequence_ratio=True)
    blocks, warps = [512, 1024, 2048, 4096], [4, 8, 16]
    programs = {"PROGRAMS": [264, 396, 528, 792, 1056]}
    common = {"num_warps": warps, "num_stages": [1], "BLOCK": blocks}
    yield Tunable("policy_loss", "any", "fp32", {**common, **programs}, lambda device: _workload(device, token))
    yield Tunable("policy_loss_finish", "any", "fp32", common, lambda device: _workload(device, token))
    yield Tunable("policy_loss_sequence", "any", "fp32", common, lambda device: _workload(device, sequence))


def _workload(device: torch.device, settings: LossSettings):
    n = 16 << 20
    logp, old, advantages, weights = (torch.rand(n, device=device) for _ in range(4))
    absent = dict(engine_logp=None, ref_logp=None, entropy=None)
    sequence = torch.arange(n, device=device) // 8192
    logp.requires_grad_()
    return lambda: policy_loss(
        logp, old_logp=old, advantages=advantages, weights=weights, settings=settings, sequence=sequence, **absent
    )
