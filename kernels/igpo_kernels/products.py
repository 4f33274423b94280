"""Matrix products accumulated in float32 whatever the operands' dtype."""

from __future__ import annotations

import torch


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> torch.Tensor:
    """``out (+)= a @ b`` into a float32 ``out``; CUDA tensors of bfloat16 and float16 are multiplied as they are."""
    beta = 1 if accumulate else 0
    if a.dtype == torch.float32 or not a.is_cuda:  # only CUDA has half operands with a float32 output
        return torch.addmm(out, a.float(), b.float(), beta=beta, out=out)
    return torch.addmm(out, a, b, out_dtype=torch.float32, beta=beta, out=out)
