"""The definition of tree attention: a dense mask, any device, any dtype."""

from __future__ import annotations

import torch

from igpo_kernels.plan import TreePlan


def visible(plan: TreePlan, window: int | None, device: torch.device) -> torch.Tensor:
    """``k <= q < subtree_end[k]``, and within ``window`` positions: bool [N, N], queries in rows."""
    index = torch.arange(plan.n_tokens, device=device)
    mask = (index[None, :] <= index[:, None]) & (index[:, None] < plan.tensor("subtree_end", device)[None, :])
    if window is not None:
        position = plan.tensor("position_ids", device)
        mask &= position[:, None] - position[None, :] < window
    return mask


def tree_attention(q, k, v, plan, scale, softcap, window, rows=None):
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(plan, window, q.device)
    seen = seen[plan.tensor(rows, q.device)] if rows else seen
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
