"""The Triton kernels of tree attention; triton_path.py launches them, README.md derives them.

A tile holds ``BLOCK_M // group`` consecutive queries in each of the ``group`` heads that share a key head: row r is
query ``r // group``, head ``r % group``, for any group size. Scores are in units of log 2. Statistics and gradients
accumulate in float32.

Numbers per token (statistics [Hq, N], ends of subtrees and positions [1, N]) come by TMA too where a loop reads them:
through pointers every thread would fetch, for itself, all that its part of a product's layout needs.

A program walks its row of a BlockLists: full runs, then masked ones. The innermost loop is over consecutive blocks, so
that it loads no indices and Triton pipelines it. In half precision that loop hoists nothing (``disable_licm``): the
accumulators leave no registers for values that LLVM would keep across it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from igpo_kernels.triton_math import soft_capped

LENGTHS = ("n_tokens", "window", "heads", "kv_heads", "group")
"""Arguments without specialisation, so that a kernel compiles once for all packs and any grouping of heads."""


@triton.jit
def tile_rows(tile, head, n_tokens, group, BLOCK_M: tl.constexpr):
    """Each row's query, its query head, and whether the row holds a query."""
    row = tl.arange(0, BLOCK_M)
    queries = BLOCK_M // group
    query = tile * queries + row // group
    return query, head * group + row % group, (row < queries * group) & (query < n_tokens)


@triton.jit
def load_rows(
    pointer, token_stride, head_stride, token, head, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """[rows, BLOCK_D] of a matrix [N, heads, D], zero where not ``live`` and beyond the head's size."""
    columns = tl.arange(0, BLOCK_D)
    at = token.to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    inside = live[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    return tl.load(pointer + at[:, None] + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_block(
    source, token_stride, head_stride, first, n_tokens, head,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Consecutive keys or values of one head; ``source`` is a host descriptor with TMA, else a pointer."""
    if TMA:
        block = source.load([first, head, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        token = first + tl.arange(0, BLOCK_N)
        block = load_rows(source, token_stride, head_stride, token, head, token < n_tokens, HEAD_DIM, BLOCK_D)
    return block


@triton.jit
def number_at(row, token, n_tokens):
    """Where a token's number stands in a matrix [rows, N], whose rows lie a multiple of 16 bytes apart for TMA."""
    return row * ((n_tokens + 3) // 4 * 4).to(tl.int64) + token


@triton.jit
def load_numbers(source, row, first, n_tokens, BLOCK: tl.constexpr, TMA: tl.constexpr):
    """Numbers of consecutive tokens [BLOCK], 0 behind the last token; ``source`` as in load_block."""
    if TMA:
        numbers = source.load([row, first]).reshape(BLOCK)
    else:
        token = first + tl.arange(0, BLOCK)
        numbers = tl.load(source + number_at(row, token, n_tokens), mask=token < n_tokens, other=0)
    return numbers


@triton.jit
def store_rows(pointer, token, head, heads, values, live, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of load_rows, into a contiguous [N, heads, HEAD_DIM]."""
    columns = tl.arange(0, BLOCK_D)
    at = (token.to(tl.int64) * heads + head) * HEAD_DIM
    inside = live[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (columns < HEAD_DIM)[None, :]
    tl.store(pointer + at[:, None] + columns[None, :], values.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def sees(
    query, query_position, first, subtree_end, position, n_tokens, window,
    BLOCK_N: tl.constexpr, WINDOWED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """``key <= query < subtree_end[key]``, and within the window: queries down, keys across."""
    key = first + tl.arange(0, BLOCK_N)
    end = load_numbers(subtree_end, 0, first, n_tokens, BLOCK_N, TMA)
    visible = (key[None, :] <= query[:, None]) & (query[:, None] < end[None, :])
    if WINDOWED:
        key_position = load_numbers(position, 0, first, n_tokens, BLOCK_N, TMA)
        visible = visible & (query_position[:, None] - key_position[None, :] < window)
    return visible


@triton.jit
def load_keys(
    k, v, block, head, query, query_position, subtree_end, position,
    k_token_stride, k_head_stride, v_token_stride, v_head_stride, n_tokens, window,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A block of one head's keys and values, and the mask of visible ones: all, unless MASKED."""
    first = block * BLOCK_N
    k_block = load_block(k, k_token_stride, k_head_stride, first, n_tokens, head, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
    v_block = load_block(v, v_token_stride, v_head_stride, first, n_tokens, head, BLOCK_N, HEAD_DIM, BLOCK_D, TMA)
    visible = True
    if MASKED:
        visible = sees(query, query_position, first, subtree_end, position, n_tokens, window, BLOCK_N, WINDOWED, TMA)
    return k_block, v_block, visible


@triton.jit
def softcapped(products, scale, softcap, CAPPED: tl.constexpr):
    """Products of queries and keys to scores that ``unit`` brings to units of log 2."""
    if CAPPED:
        products = soft_capped(products * scale, softcap, CAPPED)
    return products


@triton.jit
def attend(acc, top, mass, q, k, v, visible, unit, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Add one block to the running maximum, mass and weighted values of a tile."""
    s = softcapped(tl.dot(q, k.T, input_precision="ieee"), scale, softcap, CAPPED)
    if MASKED:
        s = tl.where(visible, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1) * unit)
    if MASKED:  # a row may have seen no key so far: -inf - -inf would be NaN
        new_top = tl.maximum(new_top, -1e30)
    p = tl.exp2(s * unit - new_top[:, None])
    fall = tl.exp2(top - new_top)
    mass = mass * fall + tl.sum(p, axis=1)
    acc = tl.dot(p.to(v.dtype), v, acc * fall[:, None], input_precision="ieee")
    return acc, new_top, mass


@triton.jit(do_not_specialize=LENGTHS)
def attention_forward(
    q_ptr, k, v, out_ptr, mass_ptr, subtree_end, position, position_ptr, order_ptr, offset_ptr, run_ptr,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    n_tokens, kv_heads, group, unit, scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Output [N, Hq, D] and log2-sum-exp2 [Hq, N], one tile and key head per program, longest tiles first."""
    HALF: tl.constexpr = out_ptr.dtype.element_ty != tl.float32
    tile, head = tl.load(order_ptr + tl.program_id(0) // kv_heads), tl.program_id(0) % kv_heads
    query, q_head, live = tile_rows(tile, head, n_tokens, group, BLOCK_M)
    q = load_rows(q_ptr, q_token_stride, q_head_stride, query, q_head, live, HEAD_DIM, BLOCK_D)
    top = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    query_position = tl.load(position_ptr + query, mask=live, other=0) if WINDOWED else query
    for MASKED in tl.static_range(2):
        runs = offset_ptr + 2 * tile + MASKED
        for run in range(tl.load(runs), tl.load(runs + 1)):
            for block in tl.range(tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1), disable_licm=HALF):
                k_block, v_block, visible = load_keys(
                    k, v, block, head, query, query_position, subtree_end, position,
                    k_token_stride, k_head_stride, v_token_stride, v_head_stride, n_tokens, window,
                    BLOCK_N, HEAD_DIM, BLOCK_D, WINDOWED, TMA, MASKED,
                )  # fmt: skip
                acc, top, mass = attend(
                    acc, top, mass, q, k_block, v_block, visible, unit, scale, softcap, CAPPED, MASKED
                )
    mass = tl.where(live, mass, 1.0)
    store_rows(out_ptr, query, q_head, kv_heads * group, acc / mass[:, None], live, HEAD_DIM, BLOCK_D)
    tl.store(mass_ptr + number_at(q_head, query, n_tokens), top + tl.log2(mass), mask=live)


@triton.jit(do_not_specialize=LENGTHS)
def attention_deltas(
    out_ptr, d_out_ptr, delta_ptr, d_out_token_stride, d_out_head_stride, n_tokens, heads,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``sum_d out * d_out`` [Hq, N], which the softmax's gradient subtracts."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < n_tokens.to(tl.int64) * heads
    token, head = row % n_tokens, row // n_tokens
    out = load_rows(out_ptr, heads * HEAD_DIM, HEAD_DIM, token, head, live, HEAD_DIM, BLOCK_D)
    d_out = load_rows(d_out_ptr, d_out_token_stride, d_out_head_stride, token, head, live, HEAD_DIM, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), axis=1)
    tl.store(delta_ptr + number_at(head, token, n_tokens), delta, mask=live)


@triton.jit
def score_gradients(s, p, d_p, delta, softcap, CAPPED: tl.constexpr):
    """Gradient of ``scale * q . k``."""
    d_s = p * (d_p - delta)
    if CAPPED:
        t = s / softcap
        d_s *= 1 - t * t
    return d_s


@triton.jit
def query_gradients(
    d_q, q, d_out, k, v, log_mass, delta, visible, unit, scale, softcap, CAPPED: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    s = softcapped(tl.dot(q, k.T, input_precision="ieee"), scale, softcap, CAPPED)
    p = tl.exp2(s * unit - log_mass[:, None])
    if MASKED:
        p = tl.where(visible, p, 0.0)
    d_p = tl.dot(d_out, v.T, input_precision="ieee")
    d_s = score_gradients(s, p, d_p, delta[:, None], softcap, CAPPED)
    return tl.dot(d_s.to(k.dtype), k, d_q, input_precision="ieee")


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_q(
    q_ptr, k, v, d_out_ptr, mass_ptr, delta_ptr, d_q_ptr, subtree_end, position, position_ptr,
    order_ptr, offset_ptr, run_ptr,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    d_out_token_stride, d_out_head_stride,
    n_tokens, kv_heads, group, unit, scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries [N, Hq, D], one tile and key head per program."""
    HALF: tl.constexpr = d_q_ptr.dtype.element_ty != tl.float32
    tile, head = tl.load(order_ptr + tl.program_id(0) // kv_heads), tl.program_id(0) % kv_heads
    query, q_head, live = tile_rows(tile, head, n_tokens, group, BLOCK_M)
    q = load_rows(q_ptr, q_token_stride, q_head_stride, query, q_head, live, HEAD_DIM, BLOCK_D)
    d_out = load_rows(d_out_ptr, d_out_token_stride, d_out_head_stride, query, q_head, live, HEAD_DIM, BLOCK_D)
    at = number_at(q_head, query, n_tokens)
    log_mass = tl.load(mass_ptr + at, mask=live, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=live, other=0.0)
    d_q = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    query_position = tl.load(position_ptr + query, mask=live, other=0) if WINDOWED else query
    for MASKED in tl.static_range(2):
        runs = offset_ptr + 2 * tile + MASKED
        for run in range(tl.load(runs), tl.load(runs + 1)):
            for block in tl.range(tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1), disable_licm=HALF):
                k_block, v_block, visible = load_keys(
                    k, v, block, head, query, query_position, subtree_end, position,
                    k_token_stride, k_head_stride, v_token_stride, v_head_stride, n_tokens, window,
                    BLOCK_N, HEAD_DIM, BLOCK_D, WINDOWED, TMA, MASKED,
                )  # fmt: skip
                d_q = query_gradients(
                    d_q, q, d_out, k_block, v_block, log_mass, delta, visible, unit, scale, softcap, CAPPED, MASKED
                )
    store_rows(d_q_ptr, query, q_head, kv_heads * group, d_q * scale, live, HEAD_DIM, BLOCK_D)


@triton.jit
def key_gradients(
    d_k, d_v, k, v, key, tile, head,
    q, d_out, mass, deltas, subtree_end_ptr, position_ptr,
    q_token_stride, q_head_stride, d_out_token_stride, d_out_head_stride,
    n_tokens, unit, scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add one head's queries to the gradients of a block of keys; products are transposed, keys down."""
    first = tile * BLOCK_M
    q_block = load_block(q, q_token_stride, q_head_stride, first, n_tokens, head, BLOCK_M, HEAD_DIM, BLOCK_D, TMA)
    d_out_block = load_block(
        d_out, d_out_token_stride, d_out_head_stride, first, n_tokens, head, BLOCK_M, HEAD_DIM, BLOCK_D, TMA
    )
    query = first + tl.arange(0, BLOCK_M)
    # Behind the last token q and d_out are zero, so that whatever p is there adds nothing.
    log_mass = load_numbers(mass, head, first, n_tokens, BLOCK_M, TMA)
    delta = load_numbers(deltas, head, first, n_tokens, BLOCK_M, TMA)
    s = softcapped(tl.dot(k, q_block.T, input_precision="ieee"), scale, softcap, CAPPED)
    p = tl.exp2(s * unit - log_mass[None, :])
    if MASKED:
        end = tl.load(subtree_end_ptr + key, mask=key < n_tokens, other=0)
        visible = (key[:, None] <= query[None, :]) & (query[None, :] < end[:, None])
        if WINDOWED:
            query_position = tl.load(position_ptr + query, mask=query < n_tokens, other=0)
            position = tl.load(position_ptr + key, mask=key < n_tokens, other=0)
            visible = visible & (query_position[None, :] - position[:, None] < window)
        p = tl.where(visible, p, 0.0)
    d_v = tl.dot(p.to(d_out_block.dtype), d_out_block, d_v, input_precision="ieee")
    d_p = tl.dot(v, d_out_block.T, input_precision="ieee")
    d_s = score_gradients(s, p, d_p, delta[None, :], softcap, CAPPED)
    d_k = tl.dot(d_s.to(q_block.dtype), q_block, d_k, input_precision="ieee")
    return d_k, d_v


@triton.jit(do_not_specialize=LENGTHS)
def attention_backward_kv(
    q, k_ptr, v_ptr, d_out, mass, deltas, d_k_ptr, d_v_ptr, subtree_end_ptr, position_ptr,
    order_ptr, offset_ptr, run_ptr,
    q_token_stride, q_head_stride, k_token_stride, k_head_stride, v_token_stride, v_head_stride,
    d_out_token_stride, d_out_head_stride,
    n_tokens, kv_heads, group, unit, scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values [N, Hkv, D], one key block and head per program: every sum in a fixed order."""
    HALF: tl.constexpr = d_k_ptr.dtype.element_ty != tl.float32
    block, head = tl.load(order_ptr + tl.program_id(0) // kv_heads), tl.program_id(0) % kv_heads
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    live = key < n_tokens
    k = load_rows(k_ptr, k_token_stride, k_head_stride, key, head, live, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, v_token_stride, v_head_stride, key, head, live, HEAD_DIM, BLOCK_D)
    d_k = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    d_v = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for MASKED in tl.static_range(2):
        runs = offset_ptr + 2 * block + MASKED
        for run in range(tl.load(runs), tl.load(runs + 1)):
            start, stop = tl.load(run_ptr + 2 * run), tl.load(run_ptr + 2 * run + 1)
            tile, q_head = start, head * group
            for _ in tl.range((stop - start) * group, disable_licm=HALF):
                d_k, d_v = key_gradients(
                    d_k, d_v, k, v, key, tile, q_head,
                    q, d_out, mass, deltas, subtree_end_ptr, position_ptr,
                    q_token_stride, q_head_stride, d_out_token_stride, d_out_head_stride,
                    n_tokens, unit, scale, softcap, window,
                    HEAD_DIM, BLOCK_D, BLOCK_M, CAPPED, WINDOWED, TMA, MASKED,
                )  # fmt: skip
                wraps = tile + 1 == stop
                tile = tl.where(wraps, start, tile + 1)
                q_head += wraps.to(tl.int32)
    store_rows(d_k_ptr, key, head, kv_heads, d_k * scale, live, HEAD_DIM, BLOCK_D)
    store_rows(d_v_ptr, key, head, kv_heads, d_v, live, HEAD_DIM, BLOCK_D)
