"""policy_loss's device code: the terms of one pair, the pass over tokens, statistics of segments, the final sum.

Every value is float32. Selections are written so that NaN stays NaN: comparisons with NaN are false.
"""

import triton
import triton.language as tl

from igpo_kernels.policy_loss.reference import LOG_RATIO, LOG_WEIGHT

SUMS = tl.constexpr(9)
"""loss, policy, tokens, clipped, ratio, ratio_max, kl, mismatch, entropy: the order of the rows of partial sums."""
RATIO_MAX = tl.constexpr(5)
LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT = (tl.constexpr(bound) for bound in LOG_WEIGHT)
LARGEST_LOG_RATIO = tl.constexpr(LOG_RATIO)


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
def bounded(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def surrogate_of(
    logp, log_ratio, ratio, advantage, low, high, dual_clip, shape_pos, shape_neg, rate_pos, rate_neg,
    SURROGATE: tl.constexpr,
):  # fmt: skip
    """The surrogate loss, its derivative in the log ratio (in logp where the ratio has no gradient), and whether the
    clip range decided.

    shape: vespo's k. rate: vespo's lambda, sapo's temperature.
    """
    free = tl.where((advantage == 0) & (ratio == float("inf")), 0.0, -ratio * advantage)
    if SURROGATE == "clip":
        bound = -bounded(ratio, low, high) * advantage
        surrogate = tl.where(bound > free, bound, free)
        if dual_clip is not None:
            bound = -dual_clip * advantage
            surrogate = tl.where((advantage < 0) & (surrogate > bound), bound, surrogate)
        slope = tl.where((surrogate > free) | (surrogate < free), 0.0, free)
        clipped = surrogate > -ratio * advantage
    elif SURROGATE == "cispo":
        slope = -bounded(ratio, low, high) * advantage
        surrogate = slope * logp
        clipped = slope > free
    elif SURROGATE == "sapo":
        rate = tl.where(advantage > 0, rate_pos, rate_neg)
        x = rate * (ratio - 1)
        e = tl.exp(-tl.abs(x))
        surrogate = -4 / rate * tl.where(x >= 0, 1.0, e) / (1 + e) * advantage
        slope = tl.where(e == 0, 0.0, 4 * e / ((1 + e) * (1 + e)) * free)
        clipped = ratio < 0
    else:
        rate = tl.where(advantage >= 0, rate_pos, rate_neg)
        shape = tl.where(advantage >= 0, shape_pos, shape_neg)
        slope = -tl.exp(rate + shape * log_ratio - rate * ratio) * advantage
        surrogate = slope * logp
        clipped = ratio < 0
    return surrogate, slope, clipped


@triton.jit
def scaled_range(scale, low, high, advantage):
    """The clip range of a pair, and its advantage: a NaN scale, which the range's comparisons would hide, spoils it."""
    return 1 + (low - 1) * scale, 1 + (high - 1) * scale, tl.where(scale == scale, advantage, scale)


@triton.jit
def importance_weight(gap, floor, cap, MASKED: tl.constexpr):
    """floor may be None."""
    weight = tl.exp(gap)
    bounded = tl.where(weight > cap, 0.0 if MASKED else cap, weight)
    if floor is not None:
        bounded = tl.where(weight < floor, 0.0 if MASKED else floor, bounded)
    return bounded


@triton.jit
def log_weight(x):
    """A log weight of vespo's, in its bounds."""
    return bounded(x, LOWEST_LOG_WEIGHT, HIGHEST_LOG_WEIGHT)


@triton.jit
def load_number(pointer, at, mask):
    return tl.load(pointer + at) if mask is None else tl.load(pointer + at, mask=mask, other=0)


@triton.jit
def correction_of(
    gap, sequence_ptr, gap_ptr, at, mask, floor, cap, TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr
):
    """Importance weights of pairs: of their own gaps, of their sequences', or 1."""
    correction = tl.zeros_like(gap) + 1
    if TOKEN_IMPORTANCE:
        correction = importance_weight(gap, floor, cap, MASKED)
    if gap_ptr is not None:
        gap = load(gap_ptr, load_number(sequence_ptr, at, mask), mask)
        correction = importance_weight(gap, floor, cap, MASKED)
    return correction


@triton.jit
def pair_terms(
    logp, log_ratio, gap, correction, advantage, weight, ref_logp, entropy, low, high, dual_clip, kl, bonus,
    kl_log_ratio=None, shared=None, shape_pos=None, shape_neg=None, rate_pos=None, rate_neg=None,
    SURROGATE: tl.constexpr = "clip",
):  # fmt: skip
    """The gradient in logp, and the pair's terms in each of the sums. A pair of weight 0 adds nothing.

    ref_logp, entropy and dual_clip may be None. kl_log_ratio: of the ratio that multiplies k3, None is 1. shared: the
    gradient by way of a ratio that a segment's pairs share; None is the pair's own.
    """
    ratio = tl.exp(log_ratio)
    surrogate, slope, clipped = surrogate_of(
        logp, log_ratio, ratio, advantage, low, high, dual_clip, shape_pos, shape_neg, rate_pos, rate_neg, SURROGATE
    )
    factor = weight * correction  # 0 where importance drops the pair, even if its ratio overflows
    policy = tl.where(factor == 0, 0.0, factor * surrogate)
    loss = policy
    if shared is None:
        d_logp = tl.where(factor == 0, 0.0, factor * slope)
    elif SURROGATE == "cispo":
        d_logp = shared + tl.where(factor == 0, 0.0, factor * slope)
    else:
        d_logp = shared
    k3 = tl.zeros_like(logp)
    if ref_logp is not None:
        distance = ref_logp - logp
        growth = tl.exp(distance)
        k3 = growth - distance - 1
        slope = 1 - growth
        if kl_log_ratio is not None:
            kl_ratio = tl.exp(kl_log_ratio)
            k3 *= kl_ratio
            slope *= kl_ratio
            if shared is None:
                slope += k3
        loss += weight * kl * k3
        d_logp += weight * kl * slope
    if entropy is not None:
        loss -= weight * bonus * entropy
    else:
        entropy = tl.zeros_like(logp)
    active = weight != 0
    d_logp = tl.where(active, d_logp, 0.0)
    loss = tl.where(active, loss, 0.0)
    policy = tl.where(active, policy, 0.0)
    clipped = active & clipped
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
def add_partials(partial_ptr, sums_ptr, columns, COLUMNS: tl.constexpr):
    """Reduce partials [SUMS, columns] over their columns, always in the same order."""
    k, rows = tl.arange(0, 16), tl.arange(0, 16)[:, None]
    total = tl.zeros([16, COLUMNS], tl.float32)
    for start in range(0, columns, COLUMNS):
        at = start + tl.arange(0, COLUMNS)[None, :]
        mask = (rows < SUMS) & (at < columns)
        # From the L2: other multiprocessors wrote them during this launch.
        part = tl.load(partial_ptr + rows * columns + at, mask=mask, other=0.0, cache_modifier=".cg")
        total = tl.where(rows == RATIO_MAX, nan_max(total, part), total + part)
    sums = tl.where(k == RATIO_MAX, tl.reduce(total, 1, nan_max), tl.sum(total, 1))
    tl.store(sums_ptr + k, sums, mask=k < SUMS)


@triton.jit
def tile_terms(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, clip_scale_ptr, engine_ptr, ref_ptr, entropy_ptr,
    segment_ptr, ratio_ptr, slope_ptr, sequence_ptr, gap_ptr, d_logp_ptr,
    at, mask, low, high, dual_clip, kl, bonus, floor, cap, shape_pos, shape_neg, rate_pos, rate_neg,
    TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr, SURROGATE: tl.constexpr, UNBIASED_KL: tl.constexpr,
):  # fmt: skip
    """Load a tile of pairs, store its gradient, return its terms."""
    logp = load(logp_ptr, at, mask)
    old = load(old_ptr, at, mask) if old_ptr is not None else logp
    gap = old - load(engine_ptr, at, mask) if engine_ptr is not None else tl.zeros_like(logp)
    log_ratio = logp - old
    kl_log_ratio = log_ratio
    correction = correction_of(gap, sequence_ptr, gap_ptr, at, mask, floor, cap, TOKEN_IMPORTANCE, MASKED)
    segment = load_number(segment_ptr, at, mask) if segment_ptr is not None else None
    if ratio_ptr is not None:
        log_ratio = load(ratio_ptr, segment, mask)
    shared = None
    if slope_ptr is not None and d_logp_ptr is not None:
        # Every pair moves the whole segment's ratio: its gradient is the segment's mean slope.
        shared = load(slope_ptr, segment, mask)
        if MASKED:
            shared = tl.where(correction == 0, 0.0, shared)
    if SURROGATE == "vespo":
        # Importance weights are factors of the segment's weight; those of its tokens are in it.
        if gap_ptr is not None:
            log_ratio += log_weight(tl.log(correction))
        log_ratio = log_weight(log_ratio)
        correction = tl.where((correction == 0) & MASKED, 0.0, 1.0)
    else:
        kl_log_ratio = log_ratio
    weight = load(weight_ptr, at, mask)
    advantage = load(advantage_ptr, at, mask)
    if clip_scale_ptr is not None:
        low, high, advantage = scaled_range(load(clip_scale_ptr, at, mask), low, high, advantage)
    ref_logp = load(ref_ptr, at, mask) if ref_ptr is not None else None
    entropy = load(entropy_ptr, at, mask) if entropy_ptr is not None else None
    d_logp, terms = pair_terms(
        logp, log_ratio, gap, correction, advantage, weight, ref_logp, entropy, low, high, dual_clip, kl, bonus,
        kl_log_ratio if UNBIASED_KL else None, shared, shape_pos, shape_neg, rate_pos, rate_neg, SURROGATE,
    )  # fmt: skip
    if d_logp_ptr is not None:
        tl.store(d_logp_ptr + at, d_logp.to(d_logp_ptr.dtype.element_ty), mask=mask)
    return terms


@triton.jit(do_not_specialize=["n"])
def policy_loss_kernel(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, clip_scale_ptr, engine_ptr, ref_ptr, entropy_ptr,
    segment_ptr, ratio_ptr, slope_ptr, sequence_ptr, gap_ptr, d_logp_ptr, partial_ptr,
    counter_ptr, sums_ptr, n: tl.int64,
    low, high, dual_clip, kl, bonus, floor, cap, shape_pos, shape_neg, rate_pos, rate_neg,
    TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr, SURROGATE: tl.constexpr, UNBIASED_KL: tl.constexpr,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One pass over n pairs: d_logp [n], partials [SUMS, programs], and sums [SUMS] by the program that ends last.

    The counter is 0 before the launch and after it.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    full = n // BLOCK
    total = no_terms(BLOCK)
    # Whole tiles carry no mask: with one, an n of unknown divisibility would break 16-byte loads.
    for tile in range(program, full, programs):
        at = tl.cast(tile, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        terms = tile_terms(
            logp_ptr, old_ptr, advantage_ptr, weight_ptr, clip_scale_ptr, engine_ptr, ref_ptr, entropy_ptr,
            segment_ptr, ratio_ptr, slope_ptr, sequence_ptr, gap_ptr, d_logp_ptr,
            at, None, low, high, dual_clip, kl, bonus, floor, cap, shape_pos, shape_neg, rate_pos, rate_neg,
            TOKEN_IMPORTANCE, MASKED, SURROGATE, UNBIASED_KL,
        )  # fmt: skip
        total = combine(total, terms)
    if program == full % programs:
        at = tl.cast(full, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        terms = tile_terms(
            logp_ptr, old_ptr, advantage_ptr, weight_ptr, clip_scale_ptr, engine_ptr, ref_ptr, entropy_ptr,
            segment_ptr, ratio_ptr, slope_ptr, sequence_ptr, gap_ptr, d_logp_ptr,
            at, at < n, low, high, dual_clip, kl, bonus, floor, cap, shape_pos, shape_neg, rate_pos, rate_neg,
            TOKEN_IMPORTANCE, MASKED, SURROGATE, UNBIASED_KL,
        )  # fmt: skip
        total = combine(total, terms)
    store_partials(partial_ptr, program, programs, total)
    tl.debug_barrier()  # all threads have stored before one of them counts; the count releases and acquires
    if tl.atomic_add(counter_ptr, 1) == programs - 1:
        add_partials(partial_ptr, sums_ptr, programs, COLUMNS)
        tl.store(counter_ptr, 0)


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
def policy_loss_gap_kernel(
    anchor_ptr, weight_ptr, engine_ptr, order_ptr, offset_ptr, gap_ptr, MEAN: tl.constexpr, BLOCK: tl.constexpr
):
    """Per sequence: sum or mean of anchor - engine over its pairs order[offset[s] : offset[s + 1]] of weight not 0."""
    s = tl.program_id(0)
    begin, end = tl.load(offset_ptr + s), tl.load(offset_ptr + s + 1)
    counts, gaps = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < end
        pair = tl.load(order_ptr + at, mask=mask, other=0)
        active = load(weight_ptr, pair, mask) != 0
        counts += active.to(tl.float32)
        gaps += load(anchor_ptr, pair, active) - load(engine_ptr, pair, active)
    gap = tl.sum(gaps, 0)
    if MEAN:
        gap /= tl.maximum(tl.sum(counts, 0), 1.0)
    tl.store(gap_ptr + s, gap)


@triton.jit
def policy_loss_segment_kernel(
    logp_ptr, old_ptr, advantage_ptr, weight_ptr, clip_scale_ptr, engine_ptr, kl_ref_ptr, sequence_ptr,
    gap_ptr, order_ptr, offset_ptr, ratio_ptr, slope_ptr, low, high, dual_clip, kl, floor, cap,
    shape_pos, shape_neg, rate_pos, rate_neg,
    TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr, SURROGATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per segment: mean log ratio (vespo: the sum) and mean slope; its pairs are order[offset[s] : offset[s + 1]].

    Pairs of weight 0 are left out, and so are pairs that importance masks. slope_ptr None: nothing's gradient goes by
    way of the segment's ratio. kl_ref_ptr None: nor does the KL's.
    """
    s = tl.program_id(0)
    begin, end = tl.load(offset_ptr + s), tl.load(offset_ptr + s + 1)
    counts, log_ratios = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        pair, kept, logp, old, _, correction = segment_pairs(
            logp_ptr, old_ptr, weight_ptr, engine_ptr, sequence_ptr, gap_ptr, order_ptr, at, at < end, floor, cap,
            TOKEN_IMPORTANCE, MASKED,
        )  # fmt: skip
        counts += kept.to(tl.float32)
        log_ratio = logp - old
        if SURROGATE == "vespo":
            log_ratio = bounded(log_ratio, -LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
            if TOKEN_IMPORTANCE:
                log_ratio += log_weight(tl.log(correction))
        log_ratios += tl.where(kept, log_ratio, 0.0)
    count = tl.maximum(tl.sum(counts, 0), 1.0)
    log_ratio = tl.sum(log_ratios, 0)
    if SURROGATE != "vespo":
        log_ratio /= count
    tl.store(ratio_ptr + s, log_ratio)
    if slope_ptr is not None:
        ratio = tl.zeros([BLOCK], tl.float32) + tl.exp(log_ratio)
        slopes = tl.zeros([BLOCK], tl.float32)
        for start in range(begin, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            mask = at < end
            pair, kept, logp, _, weight, correction = segment_pairs(
                logp_ptr, old_ptr, weight_ptr, engine_ptr, sequence_ptr, gap_ptr, order_ptr, at, mask, floor, cap,
                TOKEN_IMPORTANCE, MASKED,
            )  # fmt: skip
            if SURROGATE != "cispo":
                advantage, lowest, highest = load(advantage_ptr, pair, kept), low, high
                if clip_scale_ptr is not None:
                    lowest, highest, advantage = scaled_range(load(clip_scale_ptr, pair, kept), low, high, advantage)
                _, slope, _ = surrogate_of(
                    logp, log_ratio, ratio, advantage, lowest, highest, dual_clip, shape_pos, shape_neg, rate_pos,
                    rate_neg, SURROGATE,
                )  # fmt: skip
                factor = weight * correction
                slopes += tl.where(factor != 0, factor * slope, 0.0)
            if kl_ref_ptr is not None:
                distance = load(kl_ref_ptr, pair, weight != 0) - logp
                slope = weight * kl * ratio * (tl.exp(distance) - distance - 1)
                slopes += tl.where(weight != 0, slope, 0.0)
        tl.store(slope_ptr + s, tl.sum(slopes, 0) / count)


@triton.jit
def segment_pairs(
    logp_ptr, old_ptr, weight_ptr, engine_ptr, sequence_ptr, gap_ptr, order_ptr, at, mask, floor, cap,
    TOKEN_IMPORTANCE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Load pairs in the order of their segments, and whether each is part of its segment's mean."""
    pair = tl.load(order_ptr + at, mask=mask, other=0)
    weight = load(weight_ptr, pair, mask)
    kept = weight != 0
    logp = load(logp_ptr, pair, kept)
    old = load(old_ptr, pair, kept) if old_ptr is not None else logp
    gap = old - load(engine_ptr, pair, kept) if TOKEN_IMPORTANCE else tl.zeros_like(logp)
    correction = correction_of(gap, sequence_ptr, gap_ptr, pair, kept, floor, cap, TOKEN_IMPORTANCE, MASKED)
    if MASKED:
        kept = kept & (correction != 0)
    return pair, kept, logp, old, weight, correction
