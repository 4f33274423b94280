"""Tree attention without an N x N mask: tile by tile, work proportional to the visible area.

Each tile of queries attends to the path above it and to itself, as many heads at a time as the workspace has room for.
Tiles come depth-first: most of a tile's path is the path of the tile before, whose keys and values stay in place.
On a CPU it runs ATen's flash attention, forward and backward (the backward needs only the output and its
log-sum-exp); with soft-capping or on another device it runs plain products, recomputed in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from igpo_kernels.autograd import first_order
from igpo_kernels.recompute import once
from igpo_kernels.tree_attention.schedule import Tile, mask, tiles
from igpo_kernels.workspace import workspace_bytes

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention(q, k, v, plan, scale, softcap, window, rows=None):
    return _TreeAttention.apply(q, k, v, plan, scale, softcap, window, rows)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softcap, window, chosen):
        # ATen's flash attention assumes contiguous heads, and does not check.
        q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
        out, *lse = once(lambda: _forward(q, k, v, plan, scale, softcap, window, chosen))
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.plan, ctx.scale, ctx.softcap, ctx.window, ctx.chosen = plan, scale, softcap, window, chosen
        return out

    @staticmethod
    @first_order("tree_attention")
    def backward(ctx, dout):
        q, k, v, out, *lse = ctx.saved_tensors
        plan, scale, softcap, window = ctx.plan, ctx.scale, ctx.softcap, ctx.window
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        dv = torch.zeros_like(dk)
        lse = iter(lse)
        for heads in _pieces(plan, window, q, k, softcap):
            for tile, rows, bias, k_tile, v_tile in heads.tiles(plan, window, k, v, ctx.chosen):
                q_tile, out_tile, dout_tile = (heads.queries(x, rows) for x in (q, out, dout))
                if _uses_flash(q, softcap):
                    k_tile, v_tile = (x.unsqueeze(1).expand(-1, q_tile.shape[1], -1, -1) for x in (k_tile, v_tile))
                    dq_tile, dk_tile, dv_tile = _flash_backward(
                        dout_tile, q_tile, k_tile, v_tile, out_tile, next(lse), 0.0, False, attn_mask=bias, scale=scale
                    )
                    dk_tile, dv_tile = (_summed(x, dk.dtype) for x in (dk_tile, dv_tile))
                else:
                    dq_tile, dk_tile, dv_tile = _plain_backward(
                        dout_tile, q_tile, k_tile, v_tile, out_tile, bias, scale, softcap
                    )
                heads.queries(dq, rows).copy_(dq_tile)
                heads.add(dk, dk_tile, tile)
                heads.add(dv, dv_tile, tile)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None


def _forward(q, k, v, plan, scale, softcap, window, chosen) -> tuple[torch.Tensor, ...]:
    """The output, and the log-sum-exp of each tile if it runs as flash attention."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = []
    for heads in _pieces(plan, window, q, k, softcap):
        for _, rows, bias, k_tile, v_tile in heads.tiles(plan, window, k, v, chosen):
            q_tile = heads.queries(q, rows)
            if _uses_flash(q, softcap):
                k_tile, v_tile = (x.unsqueeze(1).expand(-1, q_tile.shape[1], -1, -1) for x in (k_tile, v_tile))
                out_tile, lse_tile = _flash(q_tile, k_tile, v_tile, 0.0, False, attn_mask=bias, scale=scale)
                lse.append(lse_tile)
            else:
                p, _ = _probabilities(q_tile, k_tile, bias, scale, softcap)
                out_tile = (p.to(v.dtype) @ v_tile).view(q_tile.shape)
            heads.queries(out, rows).copy_(out_tile)
    return out, *lse


class _Heads(NamedTuple):
    """A range of key heads, and a range of query heads in each one's group."""

    of_keys: slice
    of_queries: slice
    group: int

    def tiles(
        self, plan, window, k, v, chosen
    ) -> Iterator[tuple[Tile, slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Every tile that has queries: it, the rows of q in it, their mask [rows, keys], and its keys and values
        [h, keys, D], valid until the next tile."""
        every = tiles(plan, window)
        paths = (_paths(x[:, self.of_keys], every) for x in (k, v))
        for number, (tile, *path) in enumerate(zip(every, *paths, strict=True)):
            rows = slice(*np.searchsorted(getattr(plan, chosen), tile[:2])) if chosen else slice(*tile[:2])
            if rows.start == rows.stop:
                continue
            bias = mask(plan, number, window, k.dtype, k.device)
            if chosen:
                bias = bias[plan.tensor(chosen, k.device)[rows] - tile.start]
            yield tile, rows, bias, *path

    def queries(self, x: torch.Tensor, rows: slice) -> torch.Tensor:
        """Some rows of ``x`` [U, Hq, D], as a view [h, g, rows, D]."""
        part = x[rows].unflatten(1, (-1, self.group))
        return part[:, self.of_keys, self.of_queries].permute(1, 2, 0, 3)

    def add(self, grad: torch.Tensor, grad_tile: torch.Tensor, tile: Tile) -> None:
        """Add [h, keys, D] to the tile's keys of [N, Hkv, D]."""
        first = 0
        for run in tile.runs:
            count = run.stop - run.start
            grad[run, self.of_keys] += grad_tile[:, first : first + count].transpose(0, 1)
            first += count


def _paths(x: torch.Tensor, every: list[Tile]) -> Iterator[torch.Tensor]:
    """Each tile's keys of ``x`` [N, h, D] as [h, keys, D]: views where all are one range, else parts of one buffer."""
    if all(len(tile.runs) == 1 for tile in every):
        yield from (x[tile.runs[0]].transpose(0, 1) for tile in every)
        return
    buffer = x.new_empty(x.shape[1], max(tile.n_keys for tile in every), x.shape[2])
    for tile in every:
        stop = tile.n_keys
        for run in reversed(tile.fresh):
            start = stop - (run.stop - run.start)
            buffer[:, start:stop] = x[run].transpose(0, 1)
            stop = start
        yield buffer[:, : tile.n_keys]


def _pieces(plan, window, q, k, softcap) -> Iterator[_Heads]:
    """All heads, in pieces whose temporaries take half the workspace; masks, cached ones included, take the rest."""
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    width = torch.promote_types(q.dtype, torch.float32).itemsize
    scores = 0 if _uses_flash(q, softcap) else 4
    of_head = max(  # 6: keys, values, gradients, sums
        t.n_keys * (scores * (t.stop - t.start) + 6 * q.shape[2]) for t in tiles(plan, window)
    )
    at_once = max(1, workspace_bytes(q.device) // 2 // (width * of_head))
    step, part = (at_once // group, group) if at_once >= group else (1, at_once)
    for first_kv in range(0, kv_heads, step):
        for first in range(0, group, part):
            yield _Heads(slice(first_kv, first_kv + step), slice(first, first + part), group)


def _uses_flash(q: torch.Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap


def _summed(grad: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over the heads of a group: [h, g, keys, D] -> [h, keys, D]."""
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
