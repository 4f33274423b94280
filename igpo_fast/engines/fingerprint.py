"""A checksum of a tensor that does not depend on memory layout or sharding; any changed bit changes it.

The bit patterns of its elements, as integers, are summed with pseudo-random odd coefficients of their row and column,
modulo 2**64: exact, so equal tensors give equal numbers on every device and in every order of adding.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

CHUNK = 1 << 22
"""Elements widened to int64 at a time."""


def fingerprint(tensor: torch.Tensor) -> int:
    """The checksum of a whole tensor of any shape, in its own dtype: -2**63 .. 2**63 - 1.

    Zeros of either sign, and numbers too small to be normal (which some CPU kernels flush), count as 0.
    """
    matrix = tensor.detach()[..., None].flatten(1) if tensor.ndim < 2 else tensor.detach().flatten(1)
    return block_sum(matrix, 0, 0)


def block_sum(block_RC: torch.Tensor, first_row: int, first_column: int) -> int:
    """A block's contribution to the fingerprint of its matrix; ``combine`` adds the contributions of all blocks."""
    rows, columns = block_RC.shape
    c_C = _coefficients(first_column, columns, 0x5851F42D4C957F2D, block_RC.device)
    r_R = _coefficients(first_row, rows, 0x14057B7EF767814F, block_RC.device)
    some = max(1, CHUNK // max(1, columns))
    return combine(_sum(part, r, c_C) for part, r in zip(block_RC.split(some), r_R.split(some), strict=True))


def _sum(block_RC: torch.Tensor, r_R: torch.Tensor, c_C: torch.Tensor) -> int:
    integer = {2: torch.int16, 4: torch.int32}[block_RC.element_size()]
    flushed = block_RC.masked_fill(block_RC.abs() < torch.finfo(block_RC.dtype).tiny, 0)
    bits_RC = flushed.contiguous().view(integer).long()
    return int((bits_RC.mul_(c_C).sum(1) * r_R).sum())


def combine(sums: Iterable[int]) -> int:
    """The sum of contributions modulo 2**64, as a signed integer."""
    return (sum(sums) + 2**63) % 2**64 - 2**63


def _coefficients(first: int, count: int, seed: int, device: torch.device) -> torch.Tensor:
    """Odd pseudo-random int64 [count] for the indices from ``first``; products wrap on purpose."""
    x = torch.arange(first + 1, first + 1 + count, device=device) * seed
    x = (x ^ (x >> 29)) * 0x2545F4914F6CDD1D
    return (x ^ (x >> 32)) | 1
