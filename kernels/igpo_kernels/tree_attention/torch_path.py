"""Tree attention without an N x N mask: tile by tile, work proportional to the visible area.

Each tile of queries attends to the path above it and to itself, as many heads at a time as the workspace has room for.
On a CPU that runs through ATen's flash attention, forward and backward (the backward needs only the output and its
log-sum-exp); with soft-capping or on another device through plain products, recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch.autograd.function import once_differentiable

from igpo_kernels.tree_attention.schedule import Tile, mask, tiles
from igpo_kernels.workspace import workspace_bytes

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention(q, k, v, plan, scale, softcap, window):
    return _TreeAttention.apply(q, k, v, plan, scale, softcap, window)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softcap, window):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = []
        for piece in _pieces(plan, window, q, k, softcap):
            bias = mask(plan, piece.number, window, q.dtype, q.device)
            q_piece, k_piece, v_piece = piece.queries(q), piece.keys(k), piece.keys(v)
            if _uses_flash(q, softcap):
                k_piece, v_piece = (x.unsqueeze(1).expand(-1, q_piece.shape[1], -1, -1) for x in (k_piece, v_piece))
                out_piece, lse_piece = _flash(q_piece, k_piece, v_piece, 0.0, False, attn_mask=bias, scale=scale)
                lse.append(lse_piece)
            else:
                p, _ = _probabilities(q_piece, k_piece, bias, scale, softcap)
                out_piece = (p.to(v.dtype) @ v_piece).view(q_piece.shape)
            piece.queries(out).copy_(out_piece)
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.plan, ctx.scale, ctx.softcap, ctx.window = plan, scale, softcap, window
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, *lse = ctx.saved_tensors
        plan, scale, softcap, window = ctx.plan, ctx.scale, ctx.softcap, ctx.window
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        dv = torch.zeros_like(dk)
        for i, piece in enumerate(_pieces(plan, window, q, k, softcap)):
            bias = mask(plan, piece.number, window, q.dtype, q.device)
            q_piece, k_piece, v_piece = piece.queries(q), piece.keys(k), piece.keys(v)
            out_piece, dout_piece = piece.queries(out), piece.queries(dout)
            if _uses_flash(q, softcap):
                k_piece, v_piece = (x.unsqueeze(1).expand(-1, q_piece.shape[1], -1, -1) for x in (k_piece, v_piece))
                dq_piece, dk_piece, dv_piece = _flash_backward(
                    dout_piece, q_piece, k_piece, v_piece, out_piece, lse[i], 0.0, False, attn_mask=bias, scale=scale
                )
                dk_piece, dv_piece = (_summed(x, dk.dtype) for x in (dk_piece, dv_piece))
            else:
                dq_piece, dk_piece, dv_piece = _plain_backward(
                    dout_piece, q_piece, k_piece, v_piece, out_piece, bias, scale, softcap
                )
            piece.queries(dq).copy_(dq_piece)
            piece.add(dk, dk_piece)
            piece.add(dv, dv_piece)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


class _Piece(NamedTuple):
    """Some heads of a tile: key heads, and query heads of each one's group."""

    number: int
    tile: Tile
    kv_heads: slice
    heads: slice
    group: int

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """Of [N, Hq, D], as a view [h, g, tile, D]."""
        rows = x[self.tile.start : self.tile.stop].unflatten(1, (-1, self.group))
        return rows[:, self.kv_heads, self.heads].permute(1, 2, 0, 3)

    def keys(self, x: torch.Tensor) -> torch.Tensor:
        """Of [N, Hkv, D]: [h, keys, D]."""
        return self.tile.keys_of(x[:, self.kv_heads]).transpose(0, 1)

    def add(self, grad: torch.Tensor, grad_piece: torch.Tensor) -> None:
        """Add [h, keys, D] to the keys of [N, Hkv, D]."""
        first = 0
        for run in self.tile.runs:
            count = run.stop - run.start
            grad[run, self.kv_heads] += grad_piece[:, first : first + count].transpose(0, 1)
            first += count


def _pieces(plan, window, q, k, softcap) -> Iterator[_Piece]:
    """Every tile, in pieces whose temporaries take half the workspace: masks, those kept included, have the rest."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    room = workspace_bytes(q.device) // 2
    width = torch.promote_types(q.dtype, torch.float32).itemsize
    for number, tile in enumerate(tiles(plan, window)):
        scores = 0 if _uses_flash(q, softcap) else 4 * (tile.stop - tile.start)
        at_once = max(1, room // (width * tile.n_keys * (scores + 6 * q.shape[2])))  # 6: keys, values, gradients, sums
        step, part = (at_once // group, group) if at_once >= group else (1, at_once)
        for first_kv in range(0, kv_heads, step):
            for first in range(0, group, part):
                yield _Piece(number, tile, slice(first_kv, first_kv + step), slice(first, first + part), group)


def _uses_flash(q: torch.Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap


def _summed(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Over the heads of a group: [h, g, keys, D] -> [h, keys, D]."""
    return grad[:, 0] if grad.shape[1] == 1 else grad.sum(1, dtype=dtype)


def _probabilities(q, k, bias, scale, softcap):
    """Softmax, and the tanh where scores are capped, of q [h, g, tile, D] and k [h, keys, D]: [h, g * tile, keys],
    float32 at least."""
    scores = (q.flatten(1, 2) @ k.transpose(1, 2)).to(torch.promote_types(q.dtype, torch.float32)).mul_(scale)
    capped = scores.div_(softcap).tanh_() if softcap else None
    scores = capped * softcap if softcap else scores
    scores.unflatten(1, (-1, len(bias))).add_(bias)
    return scores.softmax(-1), capped


def _plain_backward(dout, q, k, v, out, bias, scale, softcap):
    """dq [h, g, tile, D]; dk, dv [h, keys, D], summed over the group by the products."""
    p, capped = _probabilities(q, k, bias, scale, softcap)
    delta = (dout.to(p.dtype) * out).sum(-1).flatten(1, 2).unsqueeze(2)
    dout = dout.flatten(1, 2)
    dv = p.to(v.dtype).transpose(1, 2) @ dout
    ds = (dout @ v.transpose(1, 2)).to(p.dtype).sub_(delta).mul_(p)
    if softcap:
        ds.mul_(capped.square_().neg_().add_(1))
    ds = ds.mul_(scale).to(q.dtype)
    dk = ds.transpose(1, 2) @ q.flatten(1, 2)
    return (ds @ k).view(q.shape), dk, dv
