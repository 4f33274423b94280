"""Attention under a TreePlan's mask."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch

from igpo_kernels.autograd import autocast_dtype, no_autocast
from igpo_kernels.backend import choose, lazy, resolve
from igpo_kernels.checks import check_kind, check_tensors, described, is_whole, number
from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention import reference, torch_path

IMPLEMENTATIONS = {
    "reference": reference.tree_attention,
    "torch": torch_path.tree_attention,
    "triton": lazy("igpo_kernels.tree_attention.triton_path", "tree_attention"),
    "flash": lazy("igpo_kernels.tree_attention.flash_path", "tree_attention"),
    "flex": lazy("igpo_kernels.tree_attention.flex_path", "tree_attention"),
}
CHOOSE_ROWS = "reference", "torch", "triton"
"""Implementations that can compute some rows alone; Triton's computes the tiles that hold them."""
ROWS = "rows_read", "rows_without_gradient", "rows_read_without_gradient"
"""Rows of a plan that can be computed alone."""
FLASH_DTYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
"""Largest head size that the Triton kernels and flash-attn support."""
LARGEST_GROUP = 16
"""Most query heads per key head that the Triton kernels support."""
log = logging.getLogger(__name__)


def tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: TreePlan,
    scale: float | None = None,
    softcap: float | None = 0.0,
    window: int | None = None,
    backend: str = "auto",
    *,
    rows: str | None = None,
) -> torch.Tensor:
    """``out[q] = sum_k softmax_k(softcap(scale * q . k)) v[k]`` over keys with ``k <= q < subtree_end[k]``.

    Args:
        q: floating point [N, Hq, D].
        k, v: [N, Hkv, D], Hkv dividing Hq (grouped queries: head h reads key head h // (Hq / Hkv)); of q's dtype, on
            q's device. Any strides. Under ``torch.autocast`` all three are cast to its dtype first, as torch's
            scaled_dot_product_attention does; float64 is not.
        plan: a TreePlan of N tokens.
        scale: above 0; default ``D ** -0.5``.
        softcap: ``c * tanh(score / c)`` where above 0 (Gemma-2); 0 or None is none.
        window: keys at least this many *positions* back are hidden (Mistral); 1 or more.
        backend: ``auto`` (see ``automatic``), ``triton``, ``torch``, ``reference``, ``flash`` (flash-attn, for plans
            whose trees are single sequences), or ``flex`` (torch's FlexAttention, which ``auto`` never takes; gradients
            on a GPU only).
        rows: one of ``ROWS``: q has those rows of the plan alone, [len(plan.<rows>), Hq, D]. Backends in
            ``CHOOSE_ROWS`` then compute no others; the other backends compute all rows, and give those.
    Returns:
        Of q's shape and dtype. Differentiable once in q, k, v; a second time raises RuntimeError.
    Raises:
        ValueError: other shapes, dtypes, devices or numbers; an unknown backend, or one that does not support the
            plan, the heads, the dtype or the device.
    """
    op = "tree_attention"
    check_tensors(op, q=q, k=k, v=v)
    check_kind(op, "plan", plan, TreePlan)
    q, k, v = _autocast(q, k, v)
    scale = None if scale is None else number(op, "scale", scale)
    softcap = 0.0 if softcap is None else number(op, "softcap", softcap)
    _check(q, k, v, plan, scale, softcap, window, rows)
    window = None if window is None else int(window)
    d = q.shape[2]
    if backend == "auto":
        backend = backend_for(plan, q.device, q.dtype, d, q.shape[1] // k.shape[1])
    attend = choose("tree_attention", backend, q.device, IMPLEMENTATIONS)
    scale = d**-0.5 if scale is None else scale
    with no_autocast(q.device):
        if rows is None:
            return attend(q, k, v, plan, scale, softcap, window)
        if backend in CHOOSE_ROWS:
            return attend(q, k, v, plan, scale, softcap, window, rows)
        return rows_of_all(lambda every: attend(every, k, v, plan, scale, softcap, window), q, plan, rows)


def rows_of_all(attend: Callable[[torch.Tensor], torch.Tensor], q: torch.Tensor, plan: TreePlan, rows: str):
    """Rows of what ``attend`` gives for queries of all tokens [N, Hq, D], of which ``q`` is those rows alone and the
    others are zeros."""
    places = plan.tensor(rows, q.device)
    every = q.new_zeros(plan.n_tokens, *q.shape[1:]).index_copy(0, places, q)
    return attend(every).index_select(0, places)


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    dtype = autocast_dtype(tensors[0].device)
    if dtype is None:
        return tensors
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _check(q, k, v, plan, scale, softcap, window, rows) -> None:
    if rows not in (None, *ROWS):
        raise ValueError(f"tree_attention: got rows {described(rows)}; expected one of {', '.join(ROWS)}, or None")
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if q.ndim != 3 or shapes[1] != shapes[2] or k.ndim != 3 or 0 in shapes[0] + shapes[1]:
        expected = "[N, Hq, D] and twice [N, Hkv, D], nothing of size 0"
        raise ValueError(f"tree_attention: q {shapes[0]}, k {shapes[1]}, v {shapes[2]} do not fit; expected {expected}")
    (n, q_heads, d), (k_rows, kv_heads, k_size) = shapes[:2]
    if (k_rows != n and rows is None) or k_size != d or q_heads % kv_heads:
        expected = "one N, one D, and Hq a multiple of Hkv"
        raise ValueError(f"tree_attention: q {shapes[0]}, k and v {shapes[1]} do not fit; expected {expected}")
    if not q.is_floating_point() or not (q.dtype, q.device) == (k.dtype, k.device) == (v.dtype, v.device):
        got = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in zip("qkv", (q, k, v), strict=True))
        raise ValueError(f"tree_attention: got {got}; expected one floating-point dtype and one device")
    due = len(getattr(plan, rows)) if rows else plan.n_tokens
    if n != due:
        what = rows or "tokens"
        raise ValueError(f"tree_attention: q has {n} rows, the plan {due} {what}")
    if k_rows != plan.n_tokens:
        raise ValueError(f"tree_attention: k and v have {k_rows} rows, the plan {plan.n_tokens} tokens")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"tree_attention: got scale {scale}; expected a number above 0")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"tree_attention: got softcap {softcap}; expected a number above 0, or 0 for none")
    if window is not None and not (is_whole(window) and window >= 1):
        got = described(window)
        raise ValueError(f"tree_attention: got window {got}; expected a whole number of 1 or more, or None for none")


def automatic(device: torch.device, dtype: torch.dtype, head_dim: int, group: int = 1, sequences: bool = False) -> str:
    """The backend that ``backend="auto"`` chooses.

    ``torch`` on a CPU or a GPU without configurations, and for dtypes, head sizes over ``LARGEST_HEAD`` and groups of
    more than ``LARGEST_GROUP`` query heads, which the Triton kernels do not support. ``flash`` for plans whose trees
    are single sequences, if flash-attn's function imports and supports the dtype. Else ``triton``.

    Args:
        head_dim: head size. group: query heads per key head.
        sequences: ``plan.is_sequences``.
    """
    name = resolve("auto", device, IMPLEMENTATIONS, (dtype,))
    if name != "triton" or head_dim > LARGEST_HEAD:
        return "torch"
    if sequences and dtype in FLASH_DTYPES and _flash_attn_imports():
        return "flash"
    return "triton" if group <= LARGEST_GROUP else "torch"


def backend_for(plan: TreePlan, device: torch.device, dtype: torch.dtype, head_dim: int, group: int = 1) -> str:
    """``automatic`` for a plan: decided once and kept on it, so call it as soon as the plan is built; logged once per
    process. ``tree_attention`` calls it for every call with ``backend="auto"``."""

    def decide() -> str:
        sequences = plan.is_sequences
        name = automatic(device, dtype, head_dim, group, sequences)
        what = f"{'single sequences' if sequences else 'trees'}, {dtype} on {device}, heads of {head_dim} by {group}"
        _log_once(f"tree_attention: {name} for {what}")
        return name

    return plan.cached(("backend", device, dtype, head_dim, group), decide)


def _flash_attn_imports() -> bool:
    """Whether the function imports: an installed package may hold ``flash_attn.cute`` alone."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return False
    return True


@functools.cache
def _log_once(message: str) -> None:
    log.info(message)
