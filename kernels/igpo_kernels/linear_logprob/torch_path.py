"""linear_logprob block by block: never more logits than the workspace holds, distinct rows only.

Rows repeat (a shared token has several owners), so the LM head runs on the U <= M distinct rows; pairs gather from
them and scatter their gradients back. The backward recomputes each block's logits: 4 products in all, of which the
forward keeps only the log-sum-exp (and entropy) of each distinct row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from igpo_kernels.workspace import workspace_bytes

LIVE_BLOCKS = 4
"""Blocks of logits alive at once in the backward: logits, probabilities, gradient, and a product's temporary."""
VOCAB_BLOCK = 8192
MOST_FALL = -1e30
"""Stands for -inf (the maximum before the first block), whose product with a mass of 0 would be NaN."""


def linear_logprob(hidden, weight, labels, rows, bias, temperature, softcap, entropy):
    logp, h = _LinearLogprob.apply(hidden, weight, bias, labels, rows, temperature, softcap, entropy)
    return (logp, h) if entropy else logp


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rows, temperature, softcap, entropy):
        distinct, pair_row = torch.unique(rows, return_inverse=True)
        compute = torch.promote_types(hidden.dtype, torch.float32)
        x = hidden[distinct].to(compute)
        top = x.new_full((len(x),), float("-inf"))
        mass, moment = torch.zeros_like(top), torch.zeros_like(top)
        target = x.new_empty(len(labels))
        for r, c in _blocks(len(x), len(weight), x.device):
            z, _ = block_logits(x[r], weight[c], _part(bias, c), temperature, softcap)
            pairs = _pairs(pair_row, labels, r, c)
            target[pairs] = z[pair_row[pairs] - r.start, labels[pairs] - c.start]
            new_top = torch.maximum(top[r], z.max(1).values)
            fall = (top[r] - new_top).clamp(min=MOST_FALL)
            z -= new_top[:, None]
            e = z.exp()
            if entropy:
                moment[r] = (moment[r] + fall * mass[r]) * fall.exp() + (e * z).sum(1)
            mass[r] = mass[r] * fall.exp() + e.sum(1)
            top[r] = new_top
        # The log-sum-exp stays in two parts, largest logit and log mass: their sum would lose the digits that large
        # logits have no room for. H = log mass - E[z - top].
        log_mass = mass.log()
        row_entropy = log_mass - moment / mass if entropy else torch.zeros_like(mass)
        ctx.save_for_backward(hidden, weight, bias, labels, distinct, pair_row, top, log_mass, row_entropy)
        ctx.temperature, ctx.softcap, ctx.entropy = temperature, softcap, entropy
        return target - top[pair_row] - log_mass[pair_row], row_entropy[pair_row]

    @staticmethod
    def backward(ctx, d_logp, d_entropy):
        hidden, weight, bias, labels, distinct, pair_row, top, log_mass, row_entropy = ctx.saved_tensors
        x = hidden[distinct].to(top.dtype)
        # d logp_m / dz = onehot - p, d entropy / dz = -p * (log p + entropy), each summed over the pairs of a row.
        d_logp = d_logp.to(top.dtype)
        row_d_logp = torch.zeros_like(top).index_add_(0, pair_row, d_logp)
        row_d_entropy = torch.zeros_like(top).index_add_(0, pair_row, d_entropy.to(top.dtype))
        dx = torch.zeros_like(x)
        d_weight = torch.zeros(weight.shape, dtype=top.dtype, device=weight.device)
        d_bias = torch.zeros(len(weight), dtype=top.dtype, device=weight.device) if bias is not None else None
        for r, c in _blocks(len(x), len(weight), x.device):
            z, slope = block_logits(x[r], weight[c], _part(bias, c), ctx.temperature, ctx.softcap)
            log_p = z.sub_(top[r, None]).sub_(log_mass[r, None])
            dz = log_p.exp()
            if ctx.entropy:
                dz *= -row_d_logp[r, None] - row_d_entropy[r, None] * (log_p + row_entropy[r, None])
            else:
                dz *= -row_d_logp[r, None]
            pairs = _pairs(pair_row, labels, r, c)
            at = (pair_row[pairs] - r.start, labels[pairs] - c.start)
            dz.index_put_(at, d_logp[pairs], accumulate=True)
            dz *= slope
            dx[r].addmm_(dz, weight[c].to(dz.dtype))
            d_weight[c].addmm_(dz.T, x[r])
            if d_bias is not None:
                d_bias[c] += dz.sum(0)
        d_hidden = torch.zeros(hidden.shape, dtype=top.dtype, device=hidden.device).index_add_(0, distinct, dx)
        d_bias = d_bias.to(bias.dtype) if d_bias is not None else None
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias, None, None, None, None, None


def _blocks(n_rows: int, vocab: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Vocabulary blocks outside, row blocks inside, so that a block of the weight is read while it is hot."""
    elements = workspace_bytes(device) // (4 * LIVE_BLOCKS)
    width = min(vocab, VOCAB_BLOCK)
    height = max(1, elements // width)
    for c in range(0, vocab, width):
        for r in range(0, n_rows, height):
            yield slice(r, min(r + height, n_rows)), slice(c, min(c + width, vocab))


def block_logits(x, weight, bias, temperature, softcap):
    """Scaled logits [rows, V], and their slope in the raw logits (a number without soft-capping)."""
    z = x @ weight.to(x.dtype).T
    if bias is not None:
        z += bias
    slope = 1 / temperature
    if softcap:
        t = torch.tanh(z.div_(softcap))
        slope = (1 - t * t) / temperature
        z = t * softcap
    return z.div_(temperature), slope


def _pairs(pair_row, labels, r: slice, c: slice) -> torch.Tensor:
    """Indices of the pairs whose row and label fall into a block."""
    inside = (pair_row >= r.start) & (pair_row < r.stop) & (labels >= c.start) & (labels < c.stop)
    return inside.nonzero()[:, 0]


def _part(bias, c: slice):
    return None if bias is None else bias[c]
