"""turn_advantages's device code: one program per pool of groups, from rewards to advantages of turns and of their
tokens.

All arithmetic is float64. Scalars are annotated because Triton passes a bare Python float in float32, and takes a
literal for float32 if it is compared or an argument.
"""

import triton
import triton.language as tl

from igpo_kernels.turn_advantages import reference

GAIN, OUTCOME = tl.constexpr(reference.GAIN), tl.constexpr(reference.OUTCOME)
MIN_OUTCOME_SCALE = tl.constexpr(reference.MIN_OUTCOME_SCALE)
MAX_FACTOR = tl.constexpr(reference.MAX_FACTOR)
NEITHER = tl.constexpr(2)
QUAD, LANES = tl.constexpr(4), tl.constexpr(32)


@triton.jit
def quads(base, begin, end, BLOCK: tl.constexpr):
    """Places base .. base + BLOCK - 1 relative to base as [BLOCK / 4, 4], the last four first, each four in order;
    which are in the pool; first place of each quad, first place of the pool and the one behind its last."""
    first = BLOCK - QUAD * (1 + tl.arange(0, BLOCK // QUAD)[:, None])
    place = first + tl.arange(0, QUAD)[None, :]
    low, high = tl.maximum(begin - base, 0).to(tl.int32), tl.minimum(end - base, BLOCK).to(tl.int32)
    return place, (place >= low) & (place < high), first, low, high


@triton.jit
def mirrored(x, BLOCK: tl.constexpr):
    """Quads as turns, the last first."""
    return tl.reshape(tl.flip(x, 1), [BLOCK])


@triton.jit
def load_tile(reward_ptr, kind_ptr, base, begin, end, turns, gate, BLOCK: tl.constexpr):
    """Turns base .. base + BLOCK - 1, the last first: rewards after the gate in their own dtype, 0 outside the pool;
    kinds, `NEITHER` outside.

    Tiles run backwards because the discounted sum does, and Triton's reverse scan costs eight times the exchanges of a
    forward one. They come in quads so that a thread holds neighbours and does most of the scan alone.
    """
    place, inside, first, low, high = quads(base, begin, end, BLOCK)
    reward_ptr, kind_ptr = reward_ptr + base, kind_ptr + base
    if end <= turns // QUAD * QUAD:  # a quad that the pool shares with its neighbour is read whole, in one access
        touched = tl.broadcast_to((first + QUAD > low) & (first < high), [BLOCK // QUAD, QUAD])
        x = tl.load(reward_ptr + place, mask=touched, other=0)
        kind = tl.load(kind_ptr + place, mask=touched, other=0)
    else:
        x = tl.load(reward_ptr + place, mask=inside, other=0)
        kind = tl.load(kind_ptr + place, mask=inside, other=0)
    dropped = (inside == 0) | (kind == GAIN) & (tl.abs(x) < gate.to(x.dtype))
    kind = tl.where(inside, kind.to(tl.int32), NEITHER)
    return mirrored(tl.where(dropped, 0.0, x), BLOCK), mirrored(kind, BLOCK)


@triton.jit
def outcomes_of(reward_ptr, rollout_offset_ptr, first, last):
    """Outcomes of LANES rollouts from the first on, and which of them are before the last. Every warp has them all, so
    that their sums need no exchange between warps."""
    rollout = first + tl.arange(0, LANES)
    end = tl.load(rollout_offset_ptr + 1 + rollout, mask=rollout < last, other=1)
    return tl.load(reward_ptr + end - 1, mask=rollout < last, other=0), rollout < last


@triton.jit
def store_tile(advantage_ptr, base, begin, end, advantage, BLOCK: tl.constexpr):
    place, inside, first, low, high = quads(base, begin, end, BLOCK)
    advantage = tl.reshape(advantage.to(advantage_ptr.dtype.element_ty), [BLOCK // QUAD, QUAD])
    advantage = tl.flip(advantage, 1)
    whole = tl.broadcast_to((first >= low) & (first + QUAD <= high), [BLOCK // QUAD, QUAD])
    tl.store(advantage_ptr + base + place, advantage, mask=whole)
    if (low % QUAD != 0) | (high % QUAD != 0):  # what neighbours share
        tl.store(advantage_ptr + base + place, advantage, mask=inside & (whole == 0))


@triton.jit
def in_pool(kind, JOINT: tl.constexpr):
    """Membership of the gains' pool."""
    if JOINT:
        return kind != NEITHER
    else:
        return kind == GAIN


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def wider(low_a, high_a, sum_a, low_b, high_b, sum_b):
    return smaller(low_a, low_b), larger(high_a, high_b), sum_a + sum_b


@triton.jit
def extent(x, member):
    """Smallest, largest, sum: one reduction, so one exchange between warps."""
    low, high = tl.where(member, x, float("inf")), tl.where(member, x, float("-inf"))
    return tl.reduce((low, high, tl.where(member, x, 0.0).to(tl.float64)), 0, wider)


@triton.jit
def mean_of(low, high, total, count):
    """A rounded mean can lie outside the range of its numbers. Held between the smallest and the largest it is exact
    for equal numbers, which then deviate by exactly 0. 0 without any."""
    return tl.where(low > high, 0.0, smaller(larger(total / count, low), high))


@triton.jit
def sum_of_squares(x, member, mean):
    deviation = tl.where(member, x.to(tl.float64) - mean, 0.0)
    return tl.sum(deviation * deviation, 0)


@triton.jit
def sum_of_sizes(x, member, shift):
    return tl.sum(tl.where(member, tl.abs(x.to(tl.float64) - shift), 0.0), 0)


@triton.jit
def scale_of(variance, numerator, min_var, floor, scale_std):
    """Factor of a deviation. A variance of 0 means equal rewards, or squares that underflow."""
    divisor = tl.where(scale_std != 0, tl.sqrt(variance + min_var) + floor, 1.0)
    return tl.where(variance == 0, 0.0, numerator / divisor)


@triton.jit
def then_earlier(decay_late, sum_late, decay_early, sum_early):
    """Join two adjacent runs of turns. A of a run's first turn is ``sum + decay * (A of the turn after the run)``."""
    return decay_late * decay_early, sum_early + decay_early * sum_late


@triton.jit
def advantages_of_tile(x, kind, shift_g, scale_g, shift_o, scale_o, gamma, after):
    """A_t of a tile's turns, given A of the turn after it. What lies behind the pool's end counts for nothing, for the
    pool's last turn is an outcome."""
    outcome = kind == OUTCOME
    z = (x.to(tl.float64) - tl.where(outcome, shift_o, shift_g)) * tl.where(outcome, scale_o, scale_g)
    decay, advantage = tl.associative_scan((tl.where(outcome, 0.0, gamma), z), 0, then_earlier)
    return advantage + decay * after


@triton.jit
def earliest(advantage, BLOCK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, advantage, 0.0), 0)


@triton.jit
def spread_to_tokens(
    advantage_ptr, token_offset_ptr, out_ptr, begin, end, first, stride, n_tokens, BLOCK: tl.constexpr
):
    """Write tiles ``first, first + stride, ...`` of the tokens of turns begin .. end - 1."""
    token_offset_ptr += begin
    turns = (end - begin).to(tl.int32)
    token_begin, token_end = tl.load(token_offset_ptr), tl.minimum(tl.load(token_offset_ptr + turns), n_tokens)
    for start in range(token_begin + first * BLOCK, token_end, stride * BLOCK):
        token = start + tl.arange(0, BLOCK)
        # The last turn that starts at or before the token: other turns that start there are empty.
        turn, above = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32) + turns
        width = turns
        while width > 1:
            middle = (turn + above) // 2
            reached = tl.load(token_offset_ptr + middle) <= token
            turn, above = tl.where(reached, middle, turn), tl.where(reached, above, middle)
            width = (width + 1) // 2
        tl.store(out_ptr + token, tl.load(advantage_ptr + begin + turn), mask=token < token_end)


@triton.jit(
    do_not_specialize=[
        "turns", "rollouts_per_pool", "groups_per_pool", "splits", "n_tokens", "scale_std", "leave_one_out",
    ]
)  # fmt: skip
def turn_advantages_kernel(
    reward_ptr, kind_ptr, rollout_offset_ptr, group_offset_ptr, token_offset_ptr, advantage_ptr, out_ptr,
    turns: tl.int64, rollouts_per_pool: tl.int64, groups_per_pool: tl.int64, splits: tl.int64, n_tokens: tl.int64,
    gamma: tl.float64, gate: tl.float64, center: tl.float64, min_std: tl.float64, outcome_floor: tl.float64,
    min_var: tl.float64, gain_weight: tl.float64, outcome_weight: tl.float64, scale_std: tl.int32,
    leave_one_out: tl.int32, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages [S] of pool ``program // splits``; with token_offset_ptr also this program's share of out [M].

    The last BLOCK turns of the pool are one tile, read once and kept in registers, and so are the outcomes of its first
    LANES rollouts. What a larger pool has more is read again for each kind of sum, the turns in tiles of PART from
    there backwards. Programs of one pool write the same advantages.
    """
    JOINT: tl.constexpr = POOL == "joint"
    PART: tl.constexpr = BLOCK // 4
    program = tl.program_id(0).to(tl.int64)
    pool = program // splits
    first = tl.load(group_offset_ptr + pool * groups_per_pool)
    last = tl.load(group_offset_ptr + (pool + 1) * groups_per_pool)
    # Groups are mostly of one size: then the pool's rollouts are these, and no load waits for another's result.
    likely = pool * rollouts_per_pool
    begin = tl.load(rollout_offset_ptr + likely)
    end = tl.load(rollout_offset_ptr + likely + rollouts_per_pool)
    if (first != likely) | (last != likely + rollouts_per_pool):
        begin, end = tl.load(rollout_offset_ptr + first), tl.load(rollout_offset_ptr + last)
    top = (end + QUAD - 1) // QUAD * QUAD  # quads are aligned
    rest = top - BLOCK - PART
    # For the interpreter, which ignores the annotations.
    gate, gamma = tl.full([], gate, tl.float64), tl.full([], gamma, tl.float64)

    outcomes = (last - first).to(tl.float64)
    gains = tl.maximum(end - begin - (last - first), 1).to(tl.float64)
    count = (end - begin).to(tl.float64) if JOINT else gains
    x, kind = load_tile(reward_ptr, kind_ptr, top - BLOCK, begin, end, turns, gate, BLOCK)
    o, is_o = outcomes_of(reward_ptr, rollout_offset_ptr, first, last)

    low, high, total = extent(x, in_pool(kind, JOINT))
    for base in range(rest, begin - PART, -PART):
        y, kind_y = load_tile(reward_ptr, kind_ptr, base, begin, end, turns, gate, PART)
        low_y, high_y, total_y = extent(y, in_pool(kind_y, JOINT))
        low, high, total = wider(low, high, total, low_y, high_y, total_y)
    mean_g = mean_of(low, high, total, count)
    squares = sum_of_squares(x, in_pool(kind, JOINT), mean_g)
    for base in range(rest, begin - PART, -PART):
        y, kind_y = load_tile(reward_ptr, kind_ptr, base, begin, end, turns, gate, PART)
        squares += sum_of_squares(y, in_pool(kind_y, JOINT), mean_g)
    variance_g = squares / count

    mean_o, variance_o, count_o = mean_g, variance_g, count
    if not JOINT:
        low, high, total = extent(o, is_o)
        for rollout in range(first + LANES, last, LANES):
            p, is_p = outcomes_of(reward_ptr, rollout_offset_ptr, rollout, last)
            low_p, high_p, total_p = extent(p, is_p)
            low, high, total = wider(low, high, total, low_p, high_p, total_p)
        mean_o = mean_of(low, high, total, outcomes)
        squares = sum_of_squares(o, is_o, mean_o)
        for rollout in range(first + LANES, last, LANES):
            p, is_p = outcomes_of(reward_ptr, rollout_offset_ptr, rollout, last)
            squares += sum_of_squares(p, is_p, mean_o)
        variance_o, count_o = squares / outcomes, outcomes

    shift_g = mean_g * center
    others = tl.where(leave_one_out != 0, count_o / tl.maximum(count_o - 1, 1), 1.0)
    scale_g = scale_of(variance_g, 1.0, min_var, min_std, scale_std)
    scale_o = scale_of(variance_o, others, min_var, outcome_floor, scale_std)
    if POOL == "scaled_separate":  # brings gains to the size of outcomes
        size_g, size_o = sum_of_sizes(x, kind == GAIN, shift_g), sum_of_sizes(o, is_o, mean_o)
        for base in range(rest, begin - PART, -PART):
            y, kind_y = load_tile(reward_ptr, kind_ptr, base, begin, end, turns, gate, PART)
            size_g += sum_of_sizes(y, kind_y == GAIN, shift_g)
        for rollout in range(first + LANES, last, LANES):
            p, is_p = outcomes_of(reward_ptr, rollout_offset_ptr, rollout, last)
            size_o += sum_of_sizes(p, is_p, mean_o)
        size_g, size_o = size_g * (scale_g / gains), size_o * (scale_o / outcomes)
        factor = larger(size_o, tl.full([], MIN_OUTCOME_SCALE, tl.float64)) / size_g
        scale_g *= smaller(factor, tl.full([], MAX_FACTOR, tl.float64))
    scale_g, scale_o = scale_g * gain_weight, scale_o * outcome_weight

    after = tl.full([], 0.0, tl.float64)
    advantage = advantages_of_tile(x, kind, shift_g, scale_g, mean_o, scale_o, gamma, after)
    store_tile(advantage_ptr, top - BLOCK, begin, end, advantage, BLOCK)
    if rest + PART > begin:
        after = earliest(advantage, BLOCK)
    for base in range(rest, begin - PART, -PART):
        y, kind_y = load_tile(reward_ptr, kind_ptr, base, begin, end, turns, gate, PART)
        earlier = advantages_of_tile(y, kind_y, shift_g, scale_g, mean_o, scale_o, gamma, after)
        store_tile(advantage_ptr, base, begin, end, earlier, PART)
        after = earliest(earlier, PART)
    if token_offset_ptr is not None:
        tl.debug_barrier()  # other threads read the advantages than wrote them
        spread_to_tokens(
            advantage_ptr, token_offset_ptr, out_ptr, begin, end, program % splits, splits, n_tokens, BLOCK
        )
