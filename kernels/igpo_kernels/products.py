"""Matrix products accumulated in float32 whatever the operands' dtype."""

from __future__ import annotations

import torch


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    """``out = a @ b``, or ``out += a @ b`` with ``accumulate``; returns ``out``.

    Args:
        a: [M, K]. b: [K, N]. One dtype: float32, bfloat16 or float16; CUDA tensors are multiplied as they are.
        out: [M, N], float32, or a's dtype, in which nothing is added up: not with ``accumulate``.
    """
    if out.dtype != torch.float32:
        assert not accumulate
        return torch.mm(a, b, out=out)
    beta = 1 if accumulate else 0
    if a.dtype == torch.float32 or not a.is_cuda:  # only CUDA has half operands with a float32 output
        return torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
    return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
