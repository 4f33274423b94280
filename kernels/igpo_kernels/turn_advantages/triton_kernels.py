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
QUAD = tl.constexpr(4)


@triton.jit
def quads(base, begin, end, BLOCK: tl.constexpr):
    """Turns base .. base + BLOCK - 1 as [BLOCK / 4, 4], the last four first, each four in order; which are inside."""
    turn = base + BLOCK - QUAD * (1 + tl.arange(0, BLOCK // QUAD).to(tl.int64)[:, None])
    turn += tl.arange(0, QUAD)[None, :]
    return turn, (turn >= begin) & (turn < end)


@triton.jit
def mirrored(x, BLOCK: tl.constexpr):
    return tl.reshape(tl.flip(x, 1), [BLOCK])


@triton.jit
def load_tile(reward_ptr, kind_ptr, base, begin, end, gate, BLOCK: tl.constexpr):
    """Turns base .. base + BLOCK - 1, the last first: rewards after the gate in their own dtype, 0 outside the group;
    which turns are gains, which outcomes.

    Tiles run backwards because the discounted sum does, and Triton's reverse scan costs eight times the exchanges of a
    forward one. They come in quads so that a thread holds neighbours and does most of the scan alone.
    """
    turn, inside = quads(base, begin, end, BLOCK)
    x = tl.load(reward_ptr + turn, mask=inside, other=0)
    outcome = inside & (tl.load(kind_ptr + turn, mask=inside, other=0) == OUTCOME)
    kind = mirrored(tl.where(inside, outcome.to(tl.int32), 2), BLOCK)  # 2: outside the group
    x, gain, outcome = mirrored(x, BLOCK), kind == GAIN, kind == OUTCOME
    return tl.where(gain & (tl.abs(x.to(tl.float64)) < gate), 0.0, x), gain, outcome


@triton.jit
def store_tile(advantage_ptr, base, begin, end, advantage, BLOCK: tl.constexpr):
    turn, inside = quads(base, begin, end, BLOCK)
    advantage = tl.reshape(advantage.to(advantage_ptr.dtype.element_ty), [BLOCK // QUAD, QUAD])
    tl.store(advantage_ptr + turn, tl.flip(advantage, 1), mask=inside)


@triton.jit
def pools(gain, outcome, JOINT: tl.constexpr):
    """Membership masks of the gains' pool and of the outcomes' pool."""
    if JOINT:
        return gain | outcome, gain | outcome
    else:
        return gain, outcome


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
    return tl.reduce((low, high, tl.where(member, x.to(tl.float64), 0.0)), 0, wider)


@triton.jit
def sum_of_squares(x, member, mean):
    deviation = x.to(tl.float64) - mean
    return tl.sum(tl.where(member, deviation * deviation, 0.0), 0)


@triton.jit
def sum_of_sizes(x, member, shift):
    return tl.sum(tl.where(member, tl.abs(x.to(tl.float64) - shift), 0.0), 0)


@triton.jit
def statistics(
    reward_ptr, kind_ptr, begin, end, top, tiles, gate, count_g, count_o, JOINT: tl.constexpr, BLOCK: tl.constexpr
):
    """Mean and population variance of the gains' pool and of the outcomes'.

    A rounded mean can lie outside the range of its numbers. Held between the smallest and the largest it is exact for
    equal numbers, which then deviate by exactly 0.
    """
    low_g = tl.full([], float("inf"), reward_ptr.dtype.element_ty)
    high_g, low_o, high_o = -low_g, low_g, -low_g
    sum_g = tl.full([], 0.0, tl.float64)
    sum_o, squares_g, squares_o = sum_g, sum_g, sum_g
    for tile in range(tiles):
        x, gain, outcome = load_tile(reward_ptr, kind_ptr, top - (tile + 1) * BLOCK, begin, end, gate, BLOCK)
        in_g, in_o = pools(gain, outcome, JOINT)
        low, high, total = extent(x, in_g)
        low_g, high_g, sum_g = wider(low_g, high_g, sum_g, low, high, total)
        low, high, total = extent(x, in_o)
        low_o, high_o, sum_o = wider(low_o, high_o, sum_o, low, high, total)
    mean_g = smaller(larger(sum_g / count_g, low_g), high_g)
    mean_o = smaller(larger(sum_o / count_o, low_o), high_o)
    for tile in range(tiles):
        x, gain, outcome = load_tile(reward_ptr, kind_ptr, top - (tile + 1) * BLOCK, begin, end, gate, BLOCK)
        in_g, in_o = pools(gain, outcome, JOINT)
        squares_g += sum_of_squares(x, in_g, mean_g)
        squares_o += sum_of_squares(x, in_o, mean_o)
    return mean_g, squares_g / count_g, mean_o, squares_o / count_o


@triton.jit
def scale_of(variance, numerator, min_var, floor, scale_std):
    """Factor of a deviation. A variance of 0 means equal rewards, or squares that underflow."""
    divisor = tl.where(scale_std != 0, tl.sqrt(variance + min_var) + floor, 1.0)
    return tl.where(variance == 0, 0.0, numerator / divisor)


@triton.jit
def factor_of_gains(
    reward_ptr, kind_ptr, begin, end, top, tiles, gate, shift_g, scale_g, shift_o, scale_o, BLOCK: tl.constexpr
):
    """Factor that brings gains to the size of outcomes: mean sizes after ``(x - shift) * scale``, as scales per
    turn."""
    size_g = tl.full([], 0.0, tl.float64)
    size_o = size_g
    for tile in range(tiles):
        x, gain, outcome = load_tile(reward_ptr, kind_ptr, top - (tile + 1) * BLOCK, begin, end, gate, BLOCK)
        size_g += sum_of_sizes(x, gain, shift_g)
        size_o += sum_of_sizes(x, outcome, shift_o)
    size_g, size_o = size_g * scale_g, size_o * scale_o
    factor = larger(size_o, tl.full([], MIN_OUTCOME_SCALE, tl.float64)) / size_g
    return smaller(factor, tl.full([], MAX_FACTOR, tl.float64))


@triton.jit
def then_earlier(decay_late, sum_late, decay_early, sum_early):
    """Join two adjacent runs of turns. A of a run's first turn is ``sum + decay * (A of the turn after the run)``."""
    return decay_late * decay_early, sum_early + decay_early * sum_late


@triton.jit
def advantages_of_tile(x, gain, outcome, shift_g, scale_g, shift_o, scale_o, gamma, after):
    """A_t of a tile's turns, given A of the turn after it."""
    x = x.to(tl.float64)
    z = tl.where(gain, (x - shift_g) * scale_g, tl.where(outcome, (x - shift_o) * scale_o, 0.0))
    decay = tl.where(outcome, 0.0, 1.0).to(tl.float64) * gamma
    decay, advantage = tl.associative_scan((decay, z), 0, then_earlier)
    return advantage + decay * after


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


@triton.jit(do_not_specialize=["groups_per_pool", "splits", "n_tokens", "scale_std", "leave_one_out"])
def turn_advantages_kernel(
    reward_ptr, kind_ptr, rollout_offset_ptr, group_offset_ptr, token_offset_ptr, advantage_ptr, out_ptr,
    groups_per_pool: tl.int64, splits: tl.int64, n_tokens: tl.int64, gamma: tl.float64, gate: tl.float64,
    center: tl.float64, min_std: tl.float64, outcome_floor: tl.float64, min_var: tl.float64, gain_weight: tl.float64,
    outcome_weight: tl.float64, scale_std: tl.int32, leave_one_out: tl.int32, POOL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advantages [S] of pool ``program // splits``; with token_offset_ptr also this program's share of out [M].

    Tiles of BLOCK turns from the pool's end backwards, read once for each kind of sum: the second time from a cache.
    Programs of one pool write the same advantages.
    """
    program = tl.program_id(0).to(tl.int64)
    pool = program // splits
    first = tl.load(group_offset_ptr + pool * groups_per_pool)
    last = tl.load(group_offset_ptr + (pool + 1) * groups_per_pool)
    begin, end = tl.load(rollout_offset_ptr + first), tl.load(rollout_offset_ptr + last)
    top = (end + QUAD - 1) // QUAD * QUAD  # quads are aligned
    tiles = (top - begin + BLOCK - 1) // BLOCK
    gate = tl.full([], gate, tl.float64)  # for the interpreter, which ignores the annotation

    outcomes, gains = (last - first).to(tl.float64), tl.maximum(end - begin - (last - first), 1).to(tl.float64)
    count_g, count_o = gains, outcomes
    if POOL == "joint":
        count_g, count_o = (end - begin).to(tl.float64), (end - begin).to(tl.float64)
    mean_g, variance_g, mean_o, variance_o = statistics(
        reward_ptr, kind_ptr, begin, end, top, tiles, gate, count_g, count_o, POOL == "joint", BLOCK
    )
    shift_g, shift_o = mean_g * center, mean_o
    others = tl.where(leave_one_out != 0, count_o / tl.maximum(count_o - 1, 1), 1.0)
    scale_g = scale_of(variance_g, 1.0, min_var, min_std, scale_std)
    scale_o = scale_of(variance_o, others, min_var, outcome_floor, scale_std)
    if POOL == "scaled_separate":
        scale_g *= factor_of_gains(
            reward_ptr, kind_ptr, begin, end, top, tiles, gate, shift_g, scale_g / gains, shift_o, scale_o / outcomes,
            BLOCK,
        )  # fmt: skip
    scale_g, scale_o = scale_g * gain_weight, scale_o * outcome_weight

    after = tl.full([], 0.0, tl.float64)
    for tile in range(tiles):
        base = top - (tile + 1) * BLOCK
        x, gain, outcome = load_tile(reward_ptr, kind_ptr, base, begin, end, gate, BLOCK)
        advantage = advantages_of_tile(x, gain, outcome, shift_g, scale_g, shift_o, scale_o, gamma, after)
        store_tile(advantage_ptr, base, begin, end, advantage, BLOCK)
        after = tl.sum(tl.where(tl.arange(0, BLOCK) == BLOCK - 1, advantage, 0.0), 0)
    if token_offset_ptr is not None:
        tl.debug_barrier()  # other threads read the advantages than wrote them
        spread_to_tokens(
            advantage_ptr, token_offset_ptr, out_ptr, begin, end, program % splits, splits, n_tokens, BLOCK
        )
