"""Packs whose trees are single sequences, through flash-attn's variable-length kernels where that is installed."""

from __future__ import annotations

import numpy as np
import torch

from igpo_kernels.cache import on_device
from igpo_kernels.plan import TreePlan

try:
    from flash_attn import flash_attn_varlen_func
except ImportError as error:
    raise ValueError(f"tree_attention: backend='flash' needs flash-attn ({error}); pass 'auto'") from None


def tree_attention(q, k, v, plan, scale, softcap, window):
    offsets, longest = _sequences(plan, q.device)
    return flash_attn_varlen_func(
        q, k, v, offsets, offsets, longest, longest, softmax_scale=scale, causal=True, softcap=softcap,
        window_size=(-1, -1) if window is None else (window - 1, 0), deterministic=True,
    )  # fmt: skip


def _sequences(plan: TreePlan, device: torch.device) -> tuple[torch.Tensor, int]:
    """Offsets of the trees, int32 [trees + 1], and the longest tree's length."""

    def make():
        if not plan.is_sequences:
            raise ValueError("tree_attention: backend='flash' takes plans without branches or sharing; pass 'auto'")
        starts = np.append(np.unique(plan.tree_start), plan.n_tokens).astype(np.int32)
        return on_device(starts, device), int(np.diff(starts).max())

    return plan.cached(("sequences", str(device)), make)
