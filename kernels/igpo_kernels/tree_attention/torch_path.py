"""Tree attention without an N x N mask: tile by tile, work proportional to the visible area.

Each tile of queries attends to the path above it and to itself. On a CPU the tile runs through ATen's flash
attention, forward and backward (the backward needs only the output and its log-sum-exp); with soft-capping or on
another device through plain products, recomputed in the backward.
"""

from __future__ import annotations

import torch

from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention.schedule import Tile, tiles

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention(q, k, v, plan, scale, softcap, window):
    return _TreeAttention.apply(q, k, v, plan, scale, softcap, window)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softcap, window):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = []
        for tile in tiles(plan, window):
            q_tile, k_tile, v_tile = _heads(q, k, v, tile)
            mask = _mask(plan, tile, window, q)
            if _uses_flash(q, softcap):
                out_tile, lse_tile = _flash(q_tile, k_tile, v_tile, 0.0, False, attn_mask=mask, scale=scale)
                lse.append(lse_tile)
            else:
                out_tile = _plain(q_tile, k_tile, v_tile, mask, scale, softcap)
            _rows(out, tile, k.shape[1]).copy_(out_tile)
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.plan, ctx.scale, ctx.softcap, ctx.window = plan, scale, softcap, window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *lse = ctx.saved_tensors
        plan, scale, softcap, window = ctx.plan, ctx.scale, ctx.softcap, ctx.window
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        dv = torch.zeros_like(dk)
        for i, tile in enumerate(tiles(plan, window)):
            q_tile, k_tile, v_tile = _heads(q, k, v, tile)
            mask = _mask(plan, tile, window, q)
            dout_tile = _rows(dout, tile, k.shape[1])
            if _uses_flash(q, softcap):
                out_tile = _rows(out, tile, k.shape[1])
                dq_tile, dk_tile, dv_tile = _flash_backward(
                    dout_tile, q_tile, k_tile, v_tile, out_tile, lse[i], 0.0, False, attn_mask=mask, scale=scale
                )
            else:
                inputs = [x.detach().requires_grad_() for x in (q_tile, k_tile, v_tile)]
                with torch.enable_grad():
                    out_tile = _plain(*inputs, mask, scale, softcap)
                dq_tile, dk_tile, dv_tile = torch.autograd.grad(out_tile, inputs, dout_tile)
            _rows(dq, tile, k.shape[1]).copy_(dq_tile)
            _scatter(dk, dk_tile, tile)
            _scatter(dv, dv_tile, tile)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _uses_flash(q: torch.Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap


def _rows(x: torch.Tensor, tile: Tile, kv_heads: int) -> torch.Tensor:
    """The tile's rows of [N, Hq, D] as a view [Hkv, Hq / Hkv, tile, D]."""
    part = x[tile.start : tile.stop]
    return part.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _heads(q, k, v, tile: Tile):
    """q [Hkv, Hq / Hkv, tile, D]; k, v [Hkv, Hq / Hkv (a view of one), keys, D]."""
    kv_heads = k.shape[1]
    q_tile = _rows(q, tile, kv_heads)
    groups = q_tile.shape[1]
    return q_tile, *(
        _gather(x, tile).transpose(0, 1).unsqueeze(1).expand(-1, groups, -1, -1) for x in (k, v)
    )


def _gather(x: torch.Tensor, tile: Tile) -> torch.Tensor:
    """The tile's keys: a view where they are one range."""
    if not tile.before:
        return x[tile.start : tile.stop]
    if len(tile.before) == 1 and tile.before[0][1] == tile.start:
        return x[tile.before[0][0] : tile.stop]
    return torch.cat([*(x[a:b] for a, b in tile.before), x[tile.start : tile.stop]])


def _scatter(grad: torch.Tensor, grad_tile: torch.Tensor, tile: Tile) -> None:
    """Add [Hkv, Hq / Hkv, keys, D] to the tile's keys of [N, Hkv, D]."""
    summed = grad_tile.sum(1, dtype=grad.dtype).transpose(0, 1)
    at = 0
    for a, b in (*tile.before, (tile.start, tile.stop)):
        grad[a:b] += summed[at : at + b - a]
        at += b - a


def _mask(plan: TreePlan, tile: Tile, window: int | None, q: torch.Tensor) -> torch.Tensor:
    """0 where visible, -inf elsewhere: [tile, keys] in q's dtype."""
    device = q.device
    query = torch.arange(tile.start, tile.stop, device=device)[:, None]
    key = _gather(torch.arange(plan.n_tokens, device=device), tile)
    hidden = (key > query) | (query >= _gather(plan.tensor("subtree_end", device), tile))
    if window is not None:
        position = plan.tensor("position_ids", device)
        hidden |= position[tile.start : tile.stop, None] - _gather(position, tile) >= window
    return torch.zeros(hidden.shape, dtype=q.dtype, device=device).masked_fill_(hidden, float("-inf"))


def _plain(q, k, v, mask, scale, softcap):
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores + mask).float().softmax(-1).to(v.dtype) @ v
