"""The meter of tests and benches."""

import torch

from tests.allocations import peak_bytes

MEGABYTE = 1 << 20


def chain():
    """4 MiB, then 4 more, then (the first freed) 4 more."""
    x = torch.empty(MEGABYTE)
    y = x + 1
    del x
    return y * 2


def test_the_peak_counts_what_is_live_at_once():
    peak, result = peak_bytes(chain)
    assert result.nbytes == 4 * MEGABYTE
    assert 8 * MEGABYTE <= peak < 8 * MEGABYTE + 100  # scalars are wrapped in tensors


def test_nothing_is_nothing():
    x = torch.empty(MEGABYTE)
    assert peak_bytes(lambda: x.view(2, -1).t())[0] == 0


def test_temporaries_of_the_backward_count():
    x = torch.ones(MEGABYTE, requires_grad=True)
    peak, gradient = peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x)[0])
    assert gradient.nbytes == 4 * MEGABYTE and 8 * MEGABYTE <= peak < 9 * MEGABYTE
