"""Attention under a TreePlan's mask."""

from __future__ import annotations

import torch

from igpo_kernels.backend import choose
from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention import reference, torch_path

IMPLEMENTATIONS = {"reference": reference.tree_attention, "torch": torch_path.tree_attention}


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TreePlan,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``out[q] = sum_k softmax_k(softcap(scale * q . k)) v[k]`` over keys with ``k <= q < subtree_end[k]``.

    Args:
        q: [N, Hq, D]. k, v: [N, Hkv, D], Hkv dividing Hq (grouped queries: head h reads key head h // (Hq / Hkv)).
        plan: of N tokens.
        scale: default ``D ** -0.5``.
        softcap: ``c * tanh(score / c)`` where above 0 (Gemma-2).
        window: keys at least this many *positions* back are hidden (Mistral).
        backend: ``auto``, ``torch`` or ``reference``.
    Returns:
        [N, Hq, D], in q's dtype. Differentiable in q, k, v.
    Raises:
        ValueError: shapes that do not fit.
    """
    n, q_heads, d = q.shape
    if k.shape != v.shape or k.shape[0] != n or k.shape[2] != d or q_heads % k.shape[1]:
        raise ValueError(f"tree_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if n != plan.n_tokens:
        raise ValueError(f"tree_attention: q has {n} rows, the plan {plan.n_tokens} tokens")
    attend = choose("tree_attention", backend, q.device, IMPLEMENTATIONS)
    return attend(q, k, v, plan, d**-0.5 if scale is None else scale, softcap, window)
