"""policy_loss's device code: the terms of one pair, the pass over tokens, statistics of sequences, the final sum.

Every value is float32. Selections are written so that NaN stays NaN: comparisons with NaN are false.
"""

import triton
import triton.language as tl

SUMS = tl.constexpr(9)
"""loss, policy, tokens, clipped, ratio, ratio_max, kl, mismatch, entropy: the order of the rows of partial sums."""
RATIO_MAX = tl.constexpr(5)


@triton.jit
def nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def nan_max_of(x):
    return tl.where(tl.max((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit
def load(pointer, at, mask):
    if mask is None:
        x = tl.load(pointer + at)
    else:
        x = tl.load(pointer + at, mask=mask, other=0)
    return x.to(tl.float32)


@triton.jit
def surrogate_of(ratio, advantage, low, high, dual_clip):
    """The clipped surrogate, and its derivative in the log ratio."""
    free = tl.where((advantage == 0) & (ratio == float("inf")), 0.0, -ratio * advantage)
    clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    bound = -clipped * advantage
    surrogate = tl.where(bound > free, bound, free)
    if dual_clip is not None:
        bound = -dual_clip * advantage
        surrogate = tl.where((advantage < 0) & (surrogate > bound), bound, surrogate)
    return surrogate, tl.where((surrogate > free) | (surrogate < free), 0.0, free)


@triton.jit
def importance_weight(gap, cap, MASKED: tl.constexpr):
    weight = tl.exp(gap)
    return tl.where(weight > cap, 0.0 if MASKED else cap, weight)


@triton.jit
def pair_terms(logp, log_ratio, gap, correction, advantage, weight, ref_logp, entropy, low, high, dual_clip, kl, bonus):
    """The gradient in logp, and the pair's terms in each of the sums. A pair of weight 0 adds nothing.

    ref_logp, entropy and dual_clip may be None.
    """
    ratio = tl.exp(log_ratio)
    surrogate, slope = surrogate_of(ratio, advantage, low, high, dual_clip)
    factor = weight * correction  # 0 where importance drops the pair, even if its ratio overflows
    policy = tl.where(factor == 0, 0.0, factor * surrogate)
    loss = policy
    d_logp = tl.where(factor == 0, 0.0, factor * slope)
    k3 = tl.zeros_like(logp)
    if ref_logp is not None:
        distance = ref_logp - logp
        growth = tl.exp(distance)
        k3 = growth - distance - 1
        loss += weight * kl * k3
        d_logp += weight * kl * (1 - growth)
    if entropy is not None:
        loss -= weight * bonus * entropy
    else:
        entropy = tl.zeros_like(logp)
    active = weight != 0
    d_logp = tl.where(active, d_logp, 0.0)
    loss = tl.where(active, loss, 0.0)
    policy = tl.where(active, policy, 0.0)
    clipped = active & (surrogate > -ratio * advantage)
    ratio = tl.where(active, ratio, 0.0)
    k3 = tl.where(active, k3, 0.0)
    mismatch = tl.where(active, tl.abs(gap), 0.0)
    entropy = tl.where(active, entropy, 0.0)
    one = active.to(tl.float32)
    return d_logp, (loss, policy, one, clipped.to(tl.float32), ratio, ratio, k3, mismatch, entropy)


@triton.jit
def combine(total, part):
    """Add the sums, take the larger maximum."""
    return (
        total[0] + part[0], total[1] + part[1], total[2] + part[2], total[3] + part[3], total[4] + part[4],
        nan_max(total[5], part[5]), total[6] + part[6], total[7] + part[7], total[8] + part[8],
    )  # fmt: skip


@triton.jit
def no_terms(BLOCK: tl.constexpr):
    zero = tl.zeros([BLOCK], tl.float32)
    return zero, zero, zero, zero, zero, zero, zero, zero, zero


@triton.jit
def store_partials(partial_ptr, column, columns, total):
    """Reduce each of the sums over a block's lanes into column ``column`` of partials [SUMS, columns]."""
    for k in tl.static_range(SUMS):
        value = nan_max_of(total[k]) if k == RATIO_MAX else tl.sum(total[k], 0)
        tl.store(partial_ptr + k * columns + column, value)


@triton.jit
def tile_terms(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, engine_ptr, ref_ptr, entropy_ptr,
    sequence_ptr, sequence_ratio_ptr, sequence_gap_ptr, sequence_slope_ptr, d_logp_ptr,
    at, mask, low, high, dual_clip, kl, bonus, cap, TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load a tile of pairs, store its gradient, return its terms."""
    logp = load(logp_ptr, at, mask)
    old = load(old_ptr, at, mask) if old_ptr is not None else logp
    gap = old - load(engine_ptr, at, mask) if engine_ptr is not None else tl.zeros_like(logp)
    log_ratio = logp - old
    correction = importance_weight(gap, cap, MASKED) if TOKEN_IMPORTANCE else tl.zeros_like(logp) + 1
    sequence = None
    if sequence_ptr is not None:
        sequence = tl.load(sequence_ptr + at) if mask is None else tl.load(sequence_ptr + at, mask=mask, other=0)
    if sequence_ratio_ptr is not None:
        log_ratio = load(sequence_ratio_ptr, sequence, mask)
    if sequence_gap_ptr is not None:
        correction = importance_weight(load(sequence_gap_ptr, sequence, mask), cap, MASKED)
    weight = load(weight_ptr, at, mask)
    advantage = load(advantage_ptr, at, mask)
    ref_logp = load(ref_ptr, at, mask) if ref_ptr is not None else None
    entropy = load(entropy_ptr, at, mask) if entropy_ptr is not None else None
    d_logp, terms = pair_terms(
        logp, log_ratio, gap, correction, advantage, weight, ref_logp, entropy, low, high, dual_clip, kl, bonus
    )
    if d_logp_ptr is not None:
        if sequence_slope_ptr is not None:
            # Every pair moves the whole sequence's ratio: its gradient is the sequence's mean slope.
            d_logp = load(sequence_slope_ptr, sequence, mask)
            if MASKED:
                d_logp = tl.where(correction == 0, 0.0, d_logp)
            if ref_logp is not None:
                d_logp += weight * kl * (1 - tl.exp(ref_logp - logp))
            d_logp = tl.where(weight != 0, d_logp, 0.0)
        tl.store(d_logp_ptr + at, d_logp.to(d_logp_ptr.dtype.element_ty), mask=mask)
    return terms


@triton.jit(do_not_specialize=["n"])
def policy_loss_kernel(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, engine_ptr, ref_ptr, entropy_ptr,
    sequence_ptr, sequence_ratio_ptr, sequence_gap_ptr, sequence_slope_ptr, d_logp_ptr, partial_ptr,
    n: tl.int64, low, high, dual_clip, kl, bonus, cap,
    TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over n pairs: d_logp [n], and partial sums [SUMS, programs]."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    full = n // BLOCK
    total = no_terms(BLOCK)
    # Whole tiles carry no mask: with one, an n of unknown divisibility would break 16-byte loads.
    for tile in range(program, full, programs):
        at = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        terms = tile_terms(
            logp_ptr, old_ptr, advantage_ptr, weight_ptr, engine_ptr, ref_ptr, entropy_ptr,
            sequence_ptr, sequence_ratio_ptr, sequence_gap_ptr, sequence_slope_ptr, d_logp_ptr,
            at, None, low, high, dual_clip, kl, bonus, cap, TOKEN_IMPORTANCE, MASKED,
        )  # fmt: skip
        total = combine(total, terms)
    if program == full % programs:
        at = tl.cast(full, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        terms = tile_terms(
            logp_ptr, old_ptr, advantage_ptr, weight_ptr, engine_ptr, ref_ptr, entropy_ptr,
            sequence_ptr, sequence_ratio_ptr, sequence_gap_ptr, sequence_slope_ptr, d_logp_ptr,
            at, at < n, low, high, dual_clip, kl, bonus, cap, TOKEN_IMPORTANCE, MASKED,
        )  # fmt: skip
        total = combine(total, terms)
    store_partials(partial_ptr, program, programs, total)


@triton.jit(do_not_specialize=["columns"])
def policy_loss_finish_kernel(partial_ptr, sums_ptr, columns, BLOCK: tl.constexpr):
    """Reduce row ``program`` of partials [SUMS, columns], always in the same order."""
    k = tl.program_id(0)
    row = partial_ptr + tl.cast(k, tl.int64) * columns
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        part = tl.load(row + at, mask=at < columns, other=0.0)
        total = nan_max(total, part) if k == RATIO_MAX else total + part
    result = nan_max_of(total) if k == RATIO_MAX else tl.sum(total, 0)
    tl.store(sums_ptr + k, result)


@triton.jit(do_not_specialize=["n"])
def policy_loss_scale_kernel(gradient_ptr, factor_ptr, n: tl.int64, BLOCK: tl.constexpr):
    """Multiply n numbers by a scalar in place, rounded once; a scalar of 1 touches no memory."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        program, programs = tl.program_id(0), tl.num_programs(0)
        full = n // BLOCK
        for tile in range(program, full, programs):
            at = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = load(gradient_ptr, at, None) * factor
            tl.store(gradient_ptr + at, x.to(gradient_ptr.dtype.element_ty))
        if program == full % programs:
            at = tl.cast(full, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            x = load(gradient_ptr, at, at < n) * factor
            tl.store(gradient_ptr + at, x.to(gradient_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def policy_loss_sequence_kernel(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, engine_ptr, order_ptr, offset_ptr,
    ratio_ptr, gap_ptr, slope_ptr, low, high, dual_clip, cap,
    TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per sequence: mean log ratio, summed engine gap, mean slope; its pairs are order[offset[s] : offset[s + 1]].

    Pairs of weight 0 are left out, and from ratio and slope also pairs whose own importance is masked.
    """
    s = tl.program_id(0)
    begin, end = tl.load(offset_ptr + s), tl.load(offset_ptr + s + 1)
    counts = tl.zeros([BLOCK], tl.float32)
    log_ratios, gaps = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < end
        pair = tl.load(order_ptr + at, mask=mask, other=0)
        active = load(weight_ptr, pair, mask) != 0
        logp = load(logp_ptr, pair, active)
        old = load(old_ptr, pair, active) if old_ptr is not None else logp
        in_mean = active
        if TOKEN_IMPORTANCE and MASKED:
            in_mean = active & (importance_weight(old - load(engine_ptr, pair, active), cap, MASKED) != 0)
        counts += in_mean.to(tl.float32)
        log_ratios += tl.where(in_mean, logp - old, 0.0)
        if gap_ptr is not None:
            gaps += old - load(engine_ptr, pair, active)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    correction = 1.0
    if gap_ptr is not None:
        gap = tl.sum(gaps, 0)
        tl.store(gap_ptr + s, gap)
        correction = importance_weight(gap, cap, MASKED)
    if ratio_ptr is not None:
        log_ratio = tl.sum(log_ratios, 0) / count
        tl.store(ratio_ptr + s, log_ratio)
        slopes = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < end
            pair = tl.load(order_ptr + at, mask=mask, other=0)
            weight = load(weight_ptr, pair, mask)
            active = weight != 0
            if TOKEN_IMPORTANCE:
                anchor = load(old_ptr if old_ptr is not None else logp_ptr, pair, active)
                correction = importance_weight(anchor - load(engine_ptr, pair, active), cap, MASKED)
            ratio = tl.zeros([BLOCK], tl.float32) + tl.exp(log_ratio)
            _, slope = surrogate_of(ratio, load(advantage_ptr, pair, active), low, high, dual_clip)
            factor = weight * correction
            slopes += tl.where(factor != 0, factor * slope, 0.0)
        tl.store(slope_ptr + s, tl.sum(slopes, 0) / count)
