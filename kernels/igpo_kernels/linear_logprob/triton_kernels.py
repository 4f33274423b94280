"""The Triton kernels of linear_logprob; triton_path.py launches them, README.md derives them.

U distinct rows, C cells (distinct (row, label) pairs, sorted by row), V vocabulary entries, H hidden sizes. All
arithmetic after the products is in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from igpo_kernels.triton_math import (
    BARRED,
    FLOOR,
    LN_2,
    LOG2_E,
    above_barred,
    base_of,
    gradients_of,
    soft_capped,
)

LENGTHS = ("n_rows", "first_row", "n_vocab", "first_vocab", "n_cells", "n_tiles")
"""Arguments without specialisation, so that a kernel compiles once for all batches. A model's own sizes (n_hidden,
strides) are specialised."""


@triton.jit
def tile_of(index, row_tiles, vocab_tiles, GROUP_ROWS: tl.constexpr):
    """Row tile and vocabulary tile, in bands of GROUP_ROWS row tiles: concurrent programs share weights and rows in
    L2."""
    band = index // (GROUP_ROWS * vocab_tiles)
    height = tl.minimum(row_tiles - band * GROUP_ROWS, GROUP_ROWS)
    within = index % (GROUP_ROWS * vocab_tiles)
    return band * GROUP_ROWS + within % height, within // height


@triton.jit
def load_tile(
    source, stride, first_row, n_rows, first_column, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of a matrix, zero beyond it; ``source`` is a host descriptor with TMA, else a pointer."""
    if TMA:
        tile = source.load([first_row, first_column])
    else:
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tile = tl.load(source + at, mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :], other=0.0)
    return tile


@triton.jit
def store_tile(target, stride, first_row, n_rows, first_column, tile, TMA: tl.constexpr):
    """The counterpart of load_tile; the target's rows are as long as its tiles need."""
    if TMA:
        target.store([first_row, first_column], tile.to(target.dtype))
    else:
        rows = first_row + tl.arange(0, tile.shape[0])
        columns = first_column + tl.arange(0, tile.shape[1])
        at = rows.to(tl.int64)[:, None] * stride + columns[None, :]
        tl.store(target + at, tile.to(target.dtype.element_ty), mask=(rows < n_rows)[:, None])


@triton.jit
def tile_products(
    x, weight, x_stride, weight_stride, first_row, n_rows, first_vocab, n_vocab, n_hidden,
    BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Raw logits without bias of a tile, as two halves [BLOCK_ROWS, BLOCK_VOCAB / 2].

    An epilogue over halves keeps the accumulator's registers from doubling.
    """
    acc = tl.zeros((BLOCK_ROWS, BLOCK_VOCAB), dtype=tl.float32)
    for k in range(0, n_hidden, BLOCK_HIDDEN):
        x_tile = load_tile(x, x_stride, first_row, n_rows, k, n_hidden, BLOCK_ROWS, BLOCK_HIDDEN, TMA)
        w_tile = load_tile(weight, weight_stride, first_vocab, n_vocab, k, n_hidden, BLOCK_VOCAB, BLOCK_HIDDEN, TMA)
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision="ieee")
    return tl.split(tl.permute(tl.reshape(acc, (BLOCK_ROWS, 2, BLOCK_VOCAB // 2)), (0, 2, 1)))


@triton.jit
def logits_of(products, bias_ptr, columns, n_vocab, softcap, CAPPED: tl.constexpr):
    """Products of a tile to logits, before the temperature. A bias bars the columns beyond the vocabulary, too."""
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < n_vocab, other=BARRED).to(tl.float32)
        products += above_barred(bias)[None, :]
    return soft_capped(products, softcap, CAPPED)


@triton.jit
def mass_and_moment(z, scale, base):
    fall = tl.fma(z, scale, -base[:, None])
    e = tl.exp2(fall)
    return tl.sum(e, axis=1), tl.sum(e * fall, axis=1)


@triton.jit(do_not_specialize=LENGTHS)
def tile_statistics(
    x, weight, bias_ptr, top_ptr, mass_ptr, moment_ptr,
    x_stride, weight_stride, n_rows, n_vocab, n_hidden, inverse_temperature, softcap,
    CAPPED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr, FLATTEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Largest logit, mass and moment (if ``moment_ptr``) of every row in every vocabulary tile: [vocab tiles, U]."""
    row_tiles, vocab_tiles = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_vocab, BLOCK_VOCAB)
    scale = inverse_temperature * LOG2_E
    for index in tl.range(tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, vocab_tile = tile_of(index, row_tiles, vocab_tiles, GROUP_ROWS)
        first_row, first_vocab = row_tile * BLOCK_ROWS, vocab_tile * BLOCK_VOCAB
        left, right = tile_products(
            x, weight, x_stride, weight_stride, first_row, n_rows, first_vocab, n_vocab, n_hidden,
            BLOCK_ROWS, BLOCK_VOCAB, BLOCK_HIDDEN, TMA,
        )  # fmt: skip
        columns = first_vocab + tl.arange(0, BLOCK_VOCAB // 2)
        left = logits_of(left, bias_ptr, columns, n_vocab, softcap, CAPPED)
        right = logits_of(right, bias_ptr, columns + BLOCK_VOCAB // 2, n_vocab, softcap, CAPPED)
        if (CAPPED or bias_ptr is None) and first_vocab + BLOCK_VOCAB > n_vocab:  # only in the last tile
            left = tl.where((columns < n_vocab)[None, :], left, BARRED)
            right = tl.where((columns + BLOCK_VOCAB // 2 < n_vocab)[None, :], right, BARRED)
        top = tl.maximum(tl.maximum(tl.max(left, axis=1), tl.max(right, axis=1)), FLOOR)
        base, rest = base_of(top, scale)
        left_mass, left_moment = mass_and_moment(left, scale, base)
        right_mass, right_moment = mass_and_moment(right, scale, base)
        mass, moment = left_mass + right_mass, left_moment + right_moment
        # Relative to base; relative to top each is exp2(-rest) times as large, of barred tiles 0 times anything finite.
        lift = tl.exp2(tl.minimum(-rest, 100.0))
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        at = vocab_tile.to(tl.int64) * n_rows + rows
        tl.store(top_ptr + at, top * inverse_temperature, mask=rows < n_rows)
        tl.store(mass_ptr + at, mass * lift, mask=rows < n_rows)
        if moment_ptr is not None:
            tl.store(moment_ptr + at, (moment - rest * mass) * (lift * LN_2), mask=rows < n_rows)


@triton.jit(do_not_specialize=LENGTHS)
def combine_tiles(
    tile_top_ptr, tile_mass_ptr, tile_moment_ptr, top_ptr, log_mass_ptr, entropy_ptr, n_rows, n_tiles,
    BLOCK_ROWS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Combine the tiles' statistics into each row's largest logit, log mass and entropy [U], in a fixed order."""
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    top = tl.full((BLOCK_ROWS,), BARRED, dtype=tl.float32)
    mass = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_ROWS,), dtype=tl.float32)
    for start in range(0, n_tiles, BLOCK_TILES):
        tiles = start + tl.arange(0, BLOCK_TILES)
        at = tiles.to(tl.int64)[:, None] * n_rows + tl.minimum(rows, n_rows - 1)[None, :]
        inside = (tiles < n_tiles)[:, None]
        tile_top = tl.load(tile_top_ptr + at, mask=inside, other=BARRED)
        tile_mass = tl.load(tile_mass_ptr + at, mask=inside, other=0.0)
        new_top = tl.maximum(top, tl.max(tile_top, axis=0))
        fall, tile_fall = top - new_top, tile_top - new_top[None, :]
        if entropy_ptr is not None:
            tile_moment = tl.load(tile_moment_ptr + at, mask=inside, other=0.0)
            moment = (moment + fall * mass) * tl.exp(fall)
            moment += tl.sum((tile_moment + tile_fall * tile_mass) * tl.exp(tile_fall), axis=0)
        mass = mass * tl.exp(fall) + tl.sum(tile_mass * tl.exp(tile_fall), axis=0)
        top = new_top
    log_mass = tl.log(mass)
    tl.store(top_ptr + rows, top, mask=rows < n_rows)
    tl.store(log_mass_ptr + rows, log_mass, mask=rows < n_rows)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, log_mass - moment / mass, mask=rows < n_rows)


@triton.jit(do_not_specialize=LENGTHS)
def cell_logits(
    x_ptr, weight_ptr, bias_ptr, row_ptr, label_ptr, logit_ptr, x_stride, weight_stride,
    first_row, n_rows, n_cells, n_hidden, inverse_temperature, softcap,
    CAPPED: tl.constexpr, BLOCK_CELLS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Scaled logit of every cell whose row lies in first_row .. first_row + n_rows - 1 (x holds those rows)."""
    cells = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    row = tl.load(row_ptr + cells, mask=cells < n_cells, other=-1) - first_row
    mine = (row >= 0) & (row < n_rows)
    label = tl.load(label_ptr + cells, mask=mine, other=0)
    acc = tl.zeros((BLOCK_CELLS, BLOCK_HIDDEN), dtype=tl.float32)
    for k in range(0, n_hidden, BLOCK_HIDDEN):
        at = k + tl.arange(0, BLOCK_HIDDEN)
        inside = mine[:, None] & (at < n_hidden)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + at[None, :], mask=inside, other=0.0)
        w = tl.load(weight_ptr + label[:, None] * weight_stride + at[None, :], mask=inside, other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(acc, axis=1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + label, mask=mine, other=0.0).to(tl.float32)
    tl.store(logit_ptr + cells, soft_capped(z, softcap, CAPPED) * inverse_temperature, mask=mine)


@triton.jit(do_not_specialize=LENGTHS)
def tile_gradients(
    x, weight, bias_ptr, dz, top_ptr, log_mass_ptr, entropy_ptr, d_logp_ptr, d_entropy_ptr,
    x_stride, weight_stride, dz_stride, n_rows, n_vocab, n_hidden, inverse_temperature, softcap,
    CAPPED: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VOCAB: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
    GROUP_ROWS: tl.constexpr, FLATTEN: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw logits of a vocabulary chunk, from recomputed logits, as if no label lay in it."""
    row_tiles, vocab_tiles = tl.cdiv(n_rows, BLOCK_ROWS), tl.cdiv(n_vocab, BLOCK_VOCAB)
    scale = inverse_temperature * LOG2_E
    for index in tl.range(tl.program_id(0), row_tiles * vocab_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, vocab_tile = tile_of(index, row_tiles, vocab_tiles, GROUP_ROWS)
        first_row, first_vocab = row_tile * BLOCK_ROWS, vocab_tile * BLOCK_VOCAB
        left, right = tile_products(
            x, weight, x_stride, weight_stride, first_row, n_rows, first_vocab, n_vocab, n_hidden,
            BLOCK_ROWS, BLOCK_VOCAB, BLOCK_HIDDEN, TMA,
        )  # fmt: skip
        rows = first_row + tl.arange(0, BLOCK_ROWS)
        inside = rows < n_rows
        base, rest = base_of(tl.load(top_ptr + rows, mask=inside, other=0.0), LOG2_E)
        log_mass = tl.load(log_mass_ptr + rows, mask=inside, other=0.0)
        d_logp = tl.load(d_logp_ptr + rows, mask=inside, other=0.0)
        # p = exp2(z scale - base) share
        share = tl.exp2(tl.fma(log_mass, -LOG2_E, -rest))
        slope = -share * inverse_temperature
        if d_entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + rows, mask=inside, other=0.0)
            d_entropy = tl.load(d_entropy_ptr + rows, mask=inside, other=0.0)
            d_logp += d_entropy * (entropy - log_mass - rest * LN_2)
            pull = (slope * d_entropy * LN_2)[:, None]
        else:
            pull = None
        base, push = base[:, None], (slope * d_logp)[:, None]
        columns = first_vocab + tl.arange(0, BLOCK_VOCAB // 2)
        left = logits_of(left, bias_ptr, columns, n_vocab, softcap, CAPPED)
        left = gradients_of(left, scale, base, push, pull, softcap, CAPPED)
        store_tile(dz, dz_stride, first_row, n_rows, first_vocab, left, TMA)
        right = logits_of(right, bias_ptr, columns + BLOCK_VOCAB // 2, n_vocab, softcap, CAPPED)
        right = gradients_of(right, scale, base, push, pull, softcap, CAPPED)
        store_tile(dz, dz_stride, first_row, n_rows, first_vocab + BLOCK_VOCAB // 2, right, TMA)


@triton.jit(do_not_specialize=LENGTHS)
def cell_gradients(
    dz_ptr, row_ptr, label_ptr, logit_ptr, cell_d_logp_ptr,
    top_ptr, log_mass_ptr, entropy_ptr, d_logp_ptr, d_entropy_ptr, dz_stride,
    first_row, n_rows, first_vocab, n_vocab, n_cells, inverse_temperature, softcap,
    CAPPED: tl.constexpr, BLOCK_CELLS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of every cell in the chunk; it replaces the chunk's value, so that it is rounded once."""
    cells = tl.program_id(0) * BLOCK_CELLS + tl.arange(0, BLOCK_CELLS)
    row = tl.load(row_ptr + cells, mask=cells < n_cells, other=-1) - first_row
    label = tl.load(label_ptr + cells, mask=cells < n_cells, other=-1) - first_vocab
    mine = (row >= 0) & (row < n_rows) & (label >= 0) & (label < n_vocab)
    z = tl.load(logit_ptr + cells, mask=mine, other=0.0)
    cell_d_logp = tl.load(cell_d_logp_ptr + cells, mask=mine, other=0.0)
    top = tl.load(top_ptr + row, mask=mine, other=0.0)
    log_mass = tl.load(log_mass_ptr + row, mask=mine, other=0.0)
    pull = tl.load(d_logp_ptr + row, mask=mine, other=0.0)
    log_p = z - top - log_mass
    if d_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row, mask=mine, other=0.0)
        d_entropy = tl.load(d_entropy_ptr + row, mask=mine, other=0.0)
        pull += d_entropy * (entropy + above_barred(log_p))  # of a barred label 0 times -inf would be NaN
    dz = (cell_d_logp - tl.exp(log_p) * pull) * inverse_temperature
    if CAPPED:
        t = z / (inverse_temperature * softcap)
        dz *= 1 - t * t
    tl.store(dz_ptr + row * dz_stride + label, dz.to(dz_ptr.dtype.element_ty), mask=mine)
