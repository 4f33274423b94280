"""Device functions that kernels of several ops call."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def soft_capped(x, softcap, CAPPED: tl.constexpr):
    """``softcap * tanh(x / softcap)``, from one exponential that may overflow to inf without harm."""
    if CAPPED:
        x = softcap * (1 - 2 / (1 + tl.exp(x * (2 / softcap))))
    return x
