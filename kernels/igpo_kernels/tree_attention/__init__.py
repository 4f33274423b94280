"""Attention under a TreePlan's mask."""

from __future__ import annotations

import importlib.util
import logging

import torch

from igpo_kernels.backend import choose, lazy, resolve
from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention import reference, torch_path

IMPLEMENTATIONS = {
    "reference": reference.tree_attention,
    "torch": torch_path.tree_attention,
    "triton": lazy("igpo_kernels.tree_attention.triton_path", "tree_attention"),
    "flash": lazy("igpo_kernels.tree_attention.flash_path", "tree_attention"),
}
FLASH_DTYPES = (torch.bfloat16, torch.float16)
log = logging.getLogger(__name__)


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
        backend: ``auto``, ``triton``, ``torch``, ``reference``, or ``flash`` (flash-attn, for plans whose trees are
            single sequences). On a GPU ``auto`` takes ``flash`` where it can, else ``triton``, once for a plan.
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
    if scale is not None and not scale > 0:
        raise ValueError(f"tree_attention: got scale {scale}; expected a number above 0")
    name = backend if backend != "auto" else _automatic(q, k, v, plan)
    attend = choose("tree_attention", name, q.device, IMPLEMENTATIONS)
    return attend(q, k, v, plan, d**-0.5 if scale is None else scale, softcap, window)


def _automatic(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: TreePlan) -> str:
    """What ``auto`` is for a plan and the kind of tensors that it serves: decided and logged once."""
    kind = ("backend", q.device, q.dtype, k.dtype, v.dtype, q.shape[2])
    if kind not in plan.cache:
        name = resolve("auto", q.device, IMPLEMENTATIONS, (q.dtype, k.dtype, v.dtype))
        fits = name == "triton" and q.dtype in FLASH_DTYPES and q.shape[2] <= 256
        if fits and plan.is_sequences and importlib.util.find_spec("flash_attn"):
            name = "flash"
        log.info("tree_attention: %s for a plan of %d tokens", name, plan.n_tokens)
        plan.cache[kind] = name
    return plan.cache[kind]
