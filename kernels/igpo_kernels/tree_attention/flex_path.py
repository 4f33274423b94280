"""torch's FlexAttention under a plan's mask: a peer to compare with, and a way for chips without Triton tables."""

from __future__ import annotations

import functools
from itertools import chain

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention.blocks import BlockLists, block_lists

BLOCK = 128
"""Queries and keys of a block: what FlexAttention's kernels expect."""


def tree_attention(q, k, v, plan, scale, softcap, window):
    if q.device.type != "cuda" and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            f"tree_attention: FlexAttention computes gradients on a GPU only, got tensors on {q.device}; pass "
            "backend='torch', or call it under torch.no_grad()"
        )
    attend = _compiled() if q.device.type == "cuda" else flex_attention  # which is a dense mask
    out = attend(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), score_mod=_capped(softcap) if softcap else None,
        block_mask=block_mask(plan, window, q.device), scale=scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out[0].transpose(0, 1)


@functools.cache
def _compiled():
    return torch.compile(flex_attention)


def block_mask(plan: TreePlan, window: int | None = None, device: torch.device | str = "cpu") -> BlockMask:
    """The plan's mask as FlexAttention takes it, kept on the plan.

    It is made from the lists of blocks, so that nothing of size N x N is: ``create_block_mask`` would be.

    Args:
        window: keys at least this many positions back are hidden.
    """
    device = torch.device(device)
    return plan.cached(("flex", window, str(device)), lambda: _block_mask(plan, window, device))


def _block_mask(plan: TreePlan, window: int | None, device: torch.device) -> BlockMask:
    by_query, by_key = (block_lists(plan, window, BLOCK, BLOCK, by_key=by_key) for by_key in (False, True))
    end, position = plan.tensor("subtree_end", device), plan.tensor("position_ids", device)

    def sees(batch, head, query, key):
        seen = (key <= query) & (query < end[key])
        return seen if window is None else seen & (position[query] - position[key] < window)

    visits = [_visits(lists, masked, device) for lists in (by_query, by_key) for masked in (True, False)]
    return BlockMask((plan.n_tokens,) * 2, *chain(*visits), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=sees)


def _visits(lists: BlockLists, masked: bool, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """How many columns each row visits, int32 [1, 1, rows], and which, int32 [1, 1, rows, most of them, 1 at least]."""
    rows = [lists.columns(row, masked) for row in range(len(lists.order))]
    most = max(1, *map(len, rows))
    columns = torch.tensor([row + [0] * (most - len(row)) for row in rows], dtype=torch.int32, device=device)
    return torch.tensor([[[*map(len, rows)]]], dtype=torch.int32, device=device), columns[None, None]


def _capped(softcap: float):
    return lambda score, batch, head, query, key: softcap * torch.tanh(score / softcap)
