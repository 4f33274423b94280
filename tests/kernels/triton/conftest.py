"""Triton kernels run natively where there is a GPU, else in Triton's interpreter (tests/conftest.py chooses).

Tests that compile start a process of their own, without TRITON_INTERPRET.
"""

import pytest
import torch

from igpo_kernels.poison import Poison


@pytest.fixture
def poison():
    with Poison():
        yield


@pytest.fixture(scope="module")
def bf16_dots():
    """The interpreter keeps bf16 as 16-bit integers, and multiplies them as such."""
    if torch.cuda.is_available():
        yield
        return
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, widened(a), widened(b), *rest)
        )
        yield


@pytest.fixture(scope="module")
def fused():
    """The interpreter's ``tl.fma`` rounds twice; a GPU's rounds once, and kernels count on it."""
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(self, x, y, z):
        wide = (handle.data.astype("float64") for handle in (x, y, z))
        return TensorHandle((next(wide) * next(wide) + next(wide)).astype(z.data.dtype), z.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_fma", fma)
        yield


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
