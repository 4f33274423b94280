"""Tree attention without an N x N mask: tile by tile, work proportional to the visible area.

Each tile of queries attends to the path above it and to itself. On a CPU the tile runs through ATen's flash
attention, forward and backward (the backward needs only the output and its log-sum-exp); with soft-capping or on
another device through plain products, recomputed in the backward.
"""

from __future__ import annotations

import torch

from igpo_kernels.tree_attention.schedule import Tile, mask, tiles

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def tree_attention(q, k, v, plan, scale, softcap, window):
    return _TreeAttention.apply(q, k, v, plan, scale, softcap, window)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, softcap, window):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = []
        for number, tile in enumerate(tiles(plan, window)):
            q_tile, k_tile, v_tile = _heads(q, k, v, tile)
            bias = mask(plan, number, window, q.dtype, q.device)
            if _uses_flash(q, softcap):
                out_tile, lse_tile = _flash(q_tile, k_tile, v_tile, 0.0, False, attn_mask=bias, scale=scale)
                lse.append(lse_tile)
            else:
                out_tile = _plain(q_tile, k_tile, v_tile, bias, scale, softcap)
            _rows(out, tile, k.shape[1]).copy_(out_tile)
        ctx.save_for_backward(q, k, v, out, *lse)
        ctx.plan, ctx.scale, ctx.softcap, ctx.window = plan, scale, softcap, window
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, *lse = ctx.saved_tensors
        plan, scale, softcap, window = ctx.plan, ctx.scale, ctx.softcap, ctx.window
        kv_heads = k.shape[1]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        dk = torch.zeros(k.shape, dtype=torch.promote_types(k.dtype, torch.float32), device=k.device)
        dv = torch.zeros_like(dk)
        for number, tile in enumerate(tiles(plan, window)):
            q_tile, k_tile, v_tile = _heads(q, k, v, tile)
            bias = mask(plan, number, window, q.dtype, q.device)
            dout_tile = _rows(dout, tile, kv_heads)
            if _uses_flash(q, softcap):
                dq_tile, dk_tile, dv_tile = _flash_backward(
                    dout_tile, q_tile, k_tile, v_tile, _rows(out, tile, kv_heads), lse[number], 0.0, False,
                    attn_mask=bias, scale=scale,
                )  # fmt: skip
            else:
                inputs = [x.detach().requires_grad_() for x in (q_tile, k_tile, v_tile)]
                with torch.enable_grad():
                    out_tile = _plain(*inputs, bias, scale, softcap)
                dq_tile, dk_tile, dv_tile = torch.autograd.grad(out_tile, inputs, dout_tile)
            _rows(dq, tile, kv_heads).copy_(dq_tile)
            _accumulate(dk, dk_tile, tile)
            _accumulate(dv, dv_tile, tile)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _uses_flash(q: torch.Tensor, softcap: float) -> bool:
    return q.device.type == "cpu" and not softcap


def _rows(x: torch.Tensor, tile: Tile, kv_heads: int) -> torch.Tensor:
    """The tile's rows of [N, Hq, D] as a view [Hkv, Hq / Hkv, tile, D]."""
    return x[tile.start : tile.stop].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _heads(q, k, v, tile: Tile):
    """q [Hkv, Hq / Hkv, tile, D]; k, v [Hkv, Hq / Hkv (a view of one), keys, D]."""
    q_tile = _rows(q, tile, k.shape[1])
    k_tile, v_tile = (tile.keys_of(x).transpose(0, 1).unsqueeze(1).expand(-1, q_tile.shape[1], -1, -1) for x in (k, v))
    return q_tile, k_tile, v_tile


def _accumulate(grad: torch.Tensor, grad_tile: torch.Tensor, tile: Tile) -> None:
    """Add [Hkv, Hq / Hkv, keys, D] to the tile's keys of [N, Hkv, D]."""
    if grad_tile.shape[1] == 1:
        summed = grad_tile[:, 0].transpose(0, 1)
    else:
        summed = grad_tile.sum(1, dtype=grad.dtype).transpose(0, 1)
    first = 0
    for run in tile.runs:
        count = run.stop - run.start
        grad[run] += summed[first : first + count]
        first += count


def _plain(q, k, v, bias, scale, softcap):
    scores = (q @ k.transpose(-1, -2)) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores + bias).float().softmax(-1).to(v.dtype) @ v
