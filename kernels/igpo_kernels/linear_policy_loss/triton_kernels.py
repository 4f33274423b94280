"""linear_policy_loss's device code: from a row of raw logits to the loss of its pairs and the row's gradient.

One program per distinct row. The gradient overwrites the logits, so every thread has read a tile (barrier) before any
thread writes it. Values are float32; NaN stays NaN.
"""

import triton
import triton.language as tl

from igpo_kernels.policy_loss.triton_kernels import (
    combine,
    importance_weight,
    load,
    no_terms,
    pair_terms,
    scaled_range,
    store_partials,
)
from igpo_kernels.triton_math import BARRED, FLOOR, LN_2, LOG2_E, above_barred, base_of, gradients_of, soft_capped


@triton.jit
def logits_at(row_ptr, bias_ptr, at, mask, softcap, CAPPED: tl.constexpr):
    """Logits before the temperature."""
    raw = load(row_ptr, at, mask)
    if bias_ptr is not None:
        raw += load(bias_ptr, at, mask)
    return soft_capped(raw, softcap, CAPPED)


@triton.jit
def finite_logits_at(row_ptr, bias_ptr, at, mask, softcap, CAPPED: tl.constexpr):
    """The same, barred tokens' and those beyond ``mask`` (None: all are inside) as BARRED."""
    z = logits_at(row_ptr, bias_ptr, at, mask, softcap, CAPPED)
    if bias_ptr is not None:
        z = above_barred(z)
    return z if mask is None else tl.where(mask, z, BARRED)


@triton.jit
def mass_and_moment(z, top, scale):
    """Per lane, to base 2, relative to the logit ``top``."""
    fall = (z - top[:, None]) * scale
    e = tl.exp2(fall)
    return tl.sum(e, 1), tl.sum(e * fall, 1)


@triton.jit
def with_tile(
    tops, masses, moments, row_ptr, bias_ptr, start, n_vocab, scale, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Add a tile to each lane's largest logit, and to its mass and moment relative to it.

    A lane has 4 logits of either half of the tile, which one thread holds: a tile rescales its sums once, not 8 times.
    """
    at = start + 4 * tl.arange(0, BLOCK // 8)[:, None] + tl.arange(0, 4)[None, :]
    left = finite_logits_at(row_ptr, bias_ptr, at, None if WHOLE else at < n_vocab, softcap, CAPPED)
    at += BLOCK // 2
    right = finite_logits_at(row_ptr, bias_ptr, at, None if WHOLE else at < n_vocab, softcap, CAPPED)
    higher = tl.maximum(tops, tl.maximum(tl.max(left, 1), tl.max(right, 1)))
    left_mass, left_moment = mass_and_moment(left, higher, scale)
    right_mass, right_moment = mass_and_moment(right, higher, scale)
    fall = (tops - higher) * scale
    decay = tl.exp2(fall)
    moments = (moments + fall * masses) * decay + (left_moment + right_moment)
    return higher, masses * decay + (left_mass + right_mass), moments


@triton.jit
def softmax_of(row_ptr, bias_ptr, n_vocab, softcap, inverse_temperature, CAPPED: tl.constexpr, BLOCK: tl.constexpr):
    """Largest logit (before the temperature), log of the mass below it, entropy. The first two stay separate: their sum
    would lose digits."""
    scale = inverse_temperature * LOG2_E
    tops = tl.full([BLOCK // 8], FLOOR, tl.float32)
    masses, moments = tl.zeros([BLOCK // 8], tl.float32), tl.zeros([BLOCK // 8], tl.float32)
    whole = n_vocab // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        tops, masses, moments = with_tile(
            tops, masses, moments, row_ptr, bias_ptr, start, n_vocab, scale, softcap, CAPPED, BLOCK, True
        )
    if whole < n_vocab:
        tops, masses, moments = with_tile(
            tops, masses, moments, row_ptr, bias_ptr, whole, n_vocab, scale, softcap, CAPPED, BLOCK, False
        )
    top = tl.max(tops, 0)
    fall = (tops - top) * scale
    decay = tl.exp2(fall)
    mass = tl.sum(masses * decay, 0)
    moment = tl.sum((moments + fall * masses) * decay, 0) * LN_2
    log_mass = tl.log(mass)
    return top, log_mass, log_mass - moment / mass


@triton.jit(do_not_specialize=["first", "columns"])
def row_loss_kernel(
    logits_ptr, d_logits_ptr, bias_ptr, label_ptr, order_ptr, offset_ptr, old_ptr, advantage_ptr, weight_ptr,
    clip_scale_ptr, engine_ptr, ref_ptr, scale_ptr, logp_ptr, d_logp_ptr, partial_ptr,
    first, columns, n_vocab, logits_stride, d_logits_stride,
    inverse_temperature, softcap, low, high, dual_clip, kl, bonus,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr, PAIRS: tl.constexpr,
    importance_floor=None, importance_cap=None, MASKED: tl.constexpr = False,
    shape_pos=None, shape_neg=None, rate_pos=None, rate_neg=None,
    SURROGATE: tl.constexpr = "clip", UNBIASED_KL: tl.constexpr = False,
):  # fmt: skip
    """Row ``first + program``: logp and d_logp of its pairs, partial sums [SUMS, columns], the gradient of its logits.

    The row's pairs are order[offset[row] : offset[row + 1]], by label; d_logp is in that order. d_logits_ptr None:
    values only. importance_cap None: no importance weights.
    """
    program = tl.cast(tl.program_id(0), tl.int64)
    row = first + program
    row_ptr = logits_ptr + program * logits_stride
    top, log_mass, entropy = softmax_of(row_ptr, bias_ptr, n_vocab, softcap, inverse_temperature, CAPPED, BLOCK)
    begin, end = tl.load(offset_ptr + row), tl.load(offset_ptr + row + 1)
    scale = 1.0 if scale_ptr is None else tl.load(scale_ptr)
    # Sums over the row's pairs, in its gradient -p (logp_slope + entropy_slope (log p + entropy)).
    logp_slope, entropy_slope = 0.0, 0.0
    total = no_terms(PAIRS)
    for start in range(begin, end, PAIRS):
        at = start + tl.arange(0, PAIRS)
        mask = at < end
        pair = tl.load(order_ptr + at, mask=mask, other=0)
        label = tl.load(label_ptr + pair, mask=mask, other=0)
        z = logits_at(row_ptr, bias_ptr, label, mask, softcap, CAPPED)
        logp = (z - top) * inverse_temperature - log_mass
        tl.store(logp_ptr + pair, logp, mask=mask)
        logp = tl.where(mask, logp, 0.0)
        old = load(old_ptr, pair, mask) if old_ptr is not None else logp
        gap = old - load(engine_ptr, pair, mask) if engine_ptr is not None else tl.zeros_like(logp)
        weight = load(weight_ptr, pair, mask)
        ref_logp = load(ref_ptr, pair, mask) if ref_ptr is not None else None
        correction = 1.0
        if importance_cap is not None:
            correction = importance_weight(gap, importance_floor, importance_cap, MASKED)
        log_ratio, lowest, highest = logp - old, low, high
        advantage = load(advantage_ptr, pair, mask)
        if clip_scale_ptr is not None:
            lowest, highest, advantage = scaled_range(load(clip_scale_ptr, pair, mask), low, high, advantage)
        d_logp, terms = pair_terms(
            logp, log_ratio, gap, correction, advantage, weight, ref_logp,
            tl.zeros_like(logp) + entropy, lowest, highest, dual_clip, kl, bonus,
            log_ratio if UNBIASED_KL else None, None, shape_pos, shape_neg, rate_pos, rate_neg, SURROGATE,
        )  # fmt: skip
        d_logp *= scale
        tl.store(d_logp_ptr + at, d_logp, mask=mask)
        logp_slope += tl.sum(d_logp, 0)
        entropy_slope -= tl.sum(weight, 0) * bonus * scale
        total = combine(total, terms)
    store_partials(partial_ptr, row, columns, total)
    if d_logits_ptr is not None:
        d_row_ptr = d_logits_ptr + program * d_logits_stride
        tl.debug_barrier()
        scale = inverse_temperature * LOG2_E
        base, rest = base_of(top, scale)
        share = -inverse_temperature * tl.exp2(tl.fma(log_mass, -LOG2_E, -rest))
        push = share * (logp_slope + entropy_slope * (entropy - log_mass - rest * LN_2))
        pull = share * entropy_slope * LN_2
        whole = n_vocab // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            at = start + tl.arange(0, BLOCK)
            z = finite_logits_at(row_ptr, bias_ptr, at, None, softcap, CAPPED)
            d_z = gradients_of(z, scale, base, push, pull, softcap, CAPPED)
            tl.debug_barrier()
            tl.store(d_row_ptr + at, d_z.to(d_logits_ptr.dtype.element_ty))
        if whole < n_vocab:
            at = whole + tl.arange(0, BLOCK)
            z = finite_logits_at(row_ptr, bias_ptr, at, at < n_vocab, softcap, CAPPED)
            d_z = gradients_of(z, scale, base, push, pull, softcap, CAPPED)
            tl.debug_barrier()
            tl.store(d_row_ptr + at, d_z.to(d_logits_ptr.dtype.element_ty), mask=at < n_vocab)
        tl.debug_barrier()
        add_labels(
            d_row_ptr, label_ptr, order_ptr, logp_ptr, d_logp_ptr, offset_ptr + row, logp_slope, entropy_slope,
            top * inverse_temperature + log_mass, entropy, softcap, inverse_temperature, CAPPED, PAIRS,
        )  # fmt: skip


@triton.jit
def joined(sum_a, begins_a, sum_b, begins_b):
    """Segmented sum: it begins anew at each label."""
    return tl.where(begins_b != 0, sum_b, sum_a + sum_b), begins_a | begins_b


@triton.jit
def label_of(label_ptr, order_ptr, at, mask):
    pair = tl.load(order_ptr + at, mask=mask, other=0)
    return tl.load(label_ptr + pair, mask=mask, other=-1)


@triton.jit
def add_labels(
    d_row_ptr, label_ptr, order_ptr, logp_ptr, d_logp_ptr, offset_ptr, logp_slope, entropy_slope,
    log_sum, entropy, softcap, inverse_temperature, CAPPED: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Overwrite the gradient at each label, with the one-hots of all its pairs; the last of these pairs writes.

    The row's pairs are in the order of their labels.
    """
    begin, end = tl.load(offset_ptr), tl.load(offset_ptr + 1)  # again: kept since the first pass they might spill
    lanes = tl.arange(0, PAIRS)
    unfinished = 0.0
    for start in range(begin, end, PAIRS):
        at = start + lanes
        mask = at < end
        label = label_of(label_ptr, order_ptr, at, mask)
        begins = label != label_of(label_ptr, order_ptr, at - 1, mask & (at > begin))
        ends = label != label_of(label_ptr, order_ptr, at + 1, at + 1 < end)
        onehot, begun = tl.associative_scan((load(d_logp_ptr, at, mask), begins.to(tl.int32)), 0, joined)
        onehot = tl.where(begun != 0, onehot, unfinished + onehot)
        unfinished = tl.sum(tl.where(lanes == PAIRS - 1, onehot, 0.0), 0)
        # The logit itself is overwritten; the slope of soft-capping follows from z = logp + log-sum-exp.
        logp = load(logp_ptr, tl.load(order_ptr + at, mask=mask, other=0), mask)
        slope = tl.zeros_like(logp) + inverse_temperature
        if CAPPED:
            t = (logp + log_sum) / (softcap * inverse_temperature)
            slope = (1 - t * t) * inverse_temperature
        logp = above_barred(logp)
        d_z = (onehot - tl.exp(logp) * (logp_slope + entropy_slope * (logp + entropy))) * slope
        tl.store(d_row_ptr + label, d_z.to(d_row_ptr.dtype.element_ty), mask=mask & ends)
