"""Device functions that kernels of several ops call."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
"""Exponentials are taken to base 2, as GPUs have them: exp(x) = 2^(x log2 e), the factor folded into one before it."""
LN_2 = tl.constexpr(0.6931471805599453)
BARRED = tl.constexpr(-1e30)
"""A logit that stands for -inf: its probability is 0, and 0 times its logarithm is 0 and no NaN."""
FLOOR = tl.constexpr(-1e15)
"""Least logit to subtract from others: so that where all are barred, none is its own maximum."""


@triton.jit
def above_barred(x):
    """``x``, or BARRED if that is higher. NaN stays NaN."""
    return tl.where(x < BARRED, BARRED, x)


@triton.jit
def soft_capped(x, softcap, CAPPED: tl.constexpr):
    """``softcap * tanh(x / softcap)``, from one exponential that may overflow to inf without harm."""
    if CAPPED:
        x = softcap * (1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E / softcap))))
    return x


@triton.jit
def base_of(top, scale):
    """``top * scale`` as two numbers, the second what rounding left of the first."""
    base = top * scale
    return base, tl.fma(top, scale, -base)


@triton.jit
def gradients_of(z, scale, base, push, pull, softcap, CAPPED: tl.constexpr):
    """``2^f (push + f pull) slope``, f = z scale - base: the gradient of raw logits from soft-capped ones ``z``.

    That is ``p (a + b log p)``; a and b, the temperature and what p lacks are in ``push`` and ``pull`` (None: b = 0).
    """
    fall = tl.fma(z, scale, -base)
    dz = tl.exp2(fall) * (push if pull is None else tl.fma(fall, pull, push))
    if CAPPED:
        t = z * (1 / softcap)
        dz *= 1 - t * t
    return dz
