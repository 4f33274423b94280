"""The blocked LM head against full logits in float64, forward and gradients, and its workspace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels import linear_logprob
from igpo_kernels.linear_logprob import torch_path
from igpo_kernels.workspace import CPU_BYTES
from tests.allocations import peak_bytes


def make(n, h, v, m, seed=0, bias=True, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    rows = torch.randint(0, n, (m,), generator=g)
    labels = torch.randint(0, v, (m,), generator=g)
    return randn(n, h), randn(v, h), randn(v) + shift if bias else None, rows, labels, randn(m), randn(m)


def run(case, dtype, backend, **options):
    hidden, weight, bias, rows, labels, g_logp, g_entropy = case
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias) if x is not None]
    b = leaves[2] if bias is not None else None
    logp, entropy = linear_logprob(leaves[0], leaves[1], labels, rows, bias=b, entropy=True, backend=backend, **options)
    loss = (logp * g_logp).sum() + (entropy * g_entropy).sum()
    return [logp.detach(), entropy.detach(), *torch.autograd.grad(loss, leaves)]


def check(case, dtype=torch.float32, **options):
    exact = run(case, torch.float64, "reference", **options)
    ours, plain = run(case, dtype, "torch", **options), run(case, dtype, "reference", **options)
    names = ("logp", "entropy", "dhidden", "dweight", "dbias")
    upstream = float(case[-2].abs().sum() + case[-1].abs().sum())  # what gradients sum, and may cancel to nothing
    for name, e, o, p in zip(names, exact, ours, plain, strict=False):
        rounding = 2e-6 * (1 + e.abs().max()) + 3e-7 * upstream
        assert (o.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + rounding, name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40), h=st.integers(1, 33), v=st.integers(1, 70), m=st.integers(1, 90), seed=st.integers(0, 999),
    softcap=st.sampled_from([0.0, 3.0]), temperature=st.sampled_from([0.5, 1.0, 1.7]), bias=st.booleans(),
)  # fmt: skip
def test_ragged_shapes(n, h, v, m, seed, softcap, temperature, bias):
    check(make(n, h, v, m, seed, bias), softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_of_any_width_give_the_same(monkeypatch, block):
    monkeypatch.setattr(torch_path, "VOCAB_BLOCK", block)
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: 8 * torch_path.LIVE_BLOCKS * block * 3)
    check(make(20, 8, 65, 50))


def test_all_negative_logits_keep_their_mass():
    check(make(5, 4, 30, 9, shift=-200.0))


def test_large_logits_do_not_overflow():
    case = make(5, 4, 30, 9)
    check((case[0] * 60, case[1] * 60, *case[2:]))


def test_bfloat16_errs_no_more_than_plain_torch():
    check(make(30, 32, 100, 64, bias=False), dtype=torch.bfloat16)


def test_repeated_rows_accumulate():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    labels = torch.tensor([1, 2, 1])
    once = torch.autograd.grad(linear_logprob(hidden, weight, labels[:1], torch.tensor([1])).sum(), hidden)[0]
    again = torch.autograd.grad(linear_logprob(hidden, weight, labels[[0, 2]], torch.tensor([1, 1])).sum(), hidden)[0]
    torch.testing.assert_close(again, 2 * once)


def test_strided_upstream_gradient():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(7, 4)
    logp = linear_logprob(hidden, weight, torch.arange(6))
    upstream = torch.randn(6, 2)[:, 0]
    got = torch.autograd.grad(logp, hidden, upstream)[0]
    want = torch.autograd.grad(
        linear_logprob(hidden, weight, torch.arange(6), backend="reference"), hidden, upstream.clone()
    )[0]
    torch.testing.assert_close(got, want)


def test_no_tensor_of_all_logits_is_made():
    # 12,000 x 5,000 logits would be 240 MB; all rows of a block of the vocabulary 98.
    hidden, weight = torch.randn(12_000, 8, requires_grad=True), torch.randn(5000, 8, requires_grad=True)
    labels = torch.randint(0, 5000, (12_000,))
    peak, _ = peak_bytes(lambda: linear_logprob(hidden, weight, labels).sum().backward())
    assert weight.nbytes < peak <= CPU_BYTES


def test_bad_arguments_are_refused():
    hidden, weight = torch.zeros(3, 4), torch.zeros(7, 4)
    with pytest.raises(ValueError, match="temperature"):
        linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.long), temperature=0)
    with pytest.raises(ValueError, match="do not fit"):
        linear_logprob(hidden, weight.T, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="labels for"):
        linear_logprob(hidden, weight, torch.zeros(2, dtype=torch.long))
