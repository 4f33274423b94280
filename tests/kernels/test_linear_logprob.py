"""The blocked LM head against full logits in float64, forward and gradients, and its workspace."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import GroupMember
from torch.utils._python_dispatch import TorchDispatchMode

from igpo_kernels import linear_logprob, workspace
from igpo_kernels.linear_logprob import torch_path
from tests.allocations import peak_bytes

NAMES = ("logp", "entropy", "logsumexp", "dhidden", "dweight", "dbias")


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
    options = dict(bias=b, entropy=True, logsumexp=True, backend=backend, **options)
    logp, entropy, logsumexp = linear_logprob(leaves[0], leaves[1], labels, rows, **options)
    loss = (logp * g_logp).sum() + (entropy * g_entropy).sum() + (logsumexp * g_logp.roll(1)).sum()
    return [logp.detach(), entropy.detach(), logsumexp.detach(), *torch.autograd.grad(loss, leaves)]


def check(case, dtype=torch.float32, **options):
    exact = run(case, torch.float64, "reference", **options)
    ours, plain = run(case, dtype, "torch", **options), run(case, dtype, "reference", **options)
    upstream = float(2 * case[-2].abs().sum() + case[-1].abs().sum())  # what gradients sum, and may cancel to nothing
    for name, e, o, p in zip(NAMES, exact, ours, plain, strict=False):
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
    monkeypatch.setattr(workspace, "CPU_BYTES", 1 << 10)  # 12, 5 and 1 rows a block
    check(make(20, 8, 65, 50))


def test_all_negative_logits_keep_their_mass():
    check(make(5, 4, 30, 9, shift=-200.0))


def test_large_logits_do_not_overflow():
    case = make(5, 4, 30, 9)
    check((case[0] * 60, case[1] * 60, *case[2:]))


def test_bfloat16_errs_no_more_than_plain_torch():
    check(make(30, 32, 100, 64, bias=False), dtype=torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_z_loss(backend):
    check_z_loss(backend)


def check_z_loss(backend, device="cpu"):
    """``logp + 0.1 logsumexp ** 2`` and its gradients are those of full logits in float64."""
    g = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 8, generator=g).to(device).requires_grad_() for n in (5, 20))
    rows, labels = torch.tensor([0, 3, 3, 4], device=device), torch.tensor([1, 2, 2, 19], device=device)
    z = (hidden.double() @ weight.double().T / 0.7)[rows]
    want = (z.log_softmax(1).gather(1, labels[:, None])[:, 0] + 0.1 * z.logsumexp(1).square()).sum()
    options = dict(temperature=0.7, logsumexp=True, backend=backend)
    logp, logsumexp = linear_logprob(hidden, weight, labels, rows, **options)
    got = (logp + 0.1 * logsumexp.square()).sum()
    for ours, exact in ((got, want), (logsumexp.sum(), z.logsumexp(1).sum())):
        torch.testing.assert_close(ours, exact.float())
        ours, exact = (torch.autograd.grad(x, (hidden, weight), retain_graph=True) for x in (ours, exact))
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


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


def beyond_results(backend, hidden, weight, **options):
    """Peak bytes of forward and of backward, less those of outputs and of gradients."""
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    rows = torch.arange(1, len(hidden))
    labels = torch.randint(0, len(weight), rows.shape)

    def forward():
        out = linear_logprob(hidden, weight, labels, rows, backend=backend, **options)
        return out if options.get("entropy") else (out,)

    forward_peak, out = peak_bytes(forward)
    backward_peak, gradients = peak_bytes(lambda: torch.autograd.grad(sum(x.sum() for x in out), leaves))
    return [forward_peak - sum(x.nbytes for x in out), backward_peak - sum(x.nbytes for x in gradients)]


@pytest.mark.parametrize("size, n, vocab, megabytes", [(1024, 600, 1100, 2), (8192, 300, 300, 4)])
@pytest.mark.parametrize("dtype, head_trained", [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("options", [dict(entropy=True), dict(softcap=3.0), dict(softcap=3.0, entropy=True)])
def test_never_more_than_the_workspace(monkeypatch, size, n, vocab, megabytes, dtype, head_trained, options):
    made, blocks = [], torch_path.Blocks
    monkeypatch.setattr(torch_path, "Blocks", lambda *a, **k: made.append(blocks(*a, **k)) or made[-1])
    monkeypatch.setattr(workspace, "CPU_BYTES", megabytes << 20)
    hidden, weight = torch.randn(n, size, dtype=dtype, requires_grad=True), torch.randn(vocab, size, dtype=dtype)
    weight.requires_grad_(head_trained)
    taken = beyond_results("torch", hidden, weight, **options)
    assert all(megabytes * 0.7 < part / 2**20 <= megabytes for part in taken), taken
    assert all(len(each.rows) >= 3 for each in made)  # else what is made anew in each would not show


@pytest.mark.parametrize("frozen, products", [((), 4), (("hidden",), 3), (("weight",), 3)])
def test_what_is_frozen_costs_no_product(frozen, products):
    case = make(6, 4, 30, 9, bias=False)
    leaves = dict(zip(("hidden", "weight"), (x.requires_grad_() for x in case[:2]), strict=True))
    trained = [x for name, x in leaves.items() if name not in frozen]
    want = torch.autograd.grad(linear_logprob(*case[:2], case[4], case[3], backend="reference").sum(), trained)
    for name in frozen:
        leaves[name].requires_grad_(False)
    with Products() as seen:
        linear_logprob(*case[:2], case[4], case[3], backend="torch").sum().backward()
    assert seen.count == products
    torch.testing.assert_close([x.grad for x in trained], list(want))
    assert all(leaves[name].grad is None for name in frozen)


class Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("barred", [slice(0, 2100), slice(100, 2200), slice(7, 8)])
def test_barred_tokens(backend, barred):
    check_barred(backend, barred)


def check_barred(backend, barred, device="cpu"):
    """A bias of -inf, on whole blocks of the vocabulary, is as if the tokens were not there."""
    case = [x.to(device) for x in make(5, 8, 2200, 9)]
    left = torch.ones(2200, dtype=torch.bool, device=device)
    left[barred] = False
    case[2][barred] = -torch.inf
    labels = case[4] % left.sum()
    case[4] = left.nonzero()[labels, 0]
    want = run((case[0], case[1][left], case[2][left], case[3], labels, *case[5:]), torch.float64, "reference")
    got = run(case, torch.float32, backend)
    for name, g, w in zip(NAMES, got, want, strict=True):
        if name in ("dweight", "dbias"):
            assert not g[barred].any(), name
            g = g[left]
        torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_int32_indices(backend):
    check_int32(backend)


def check_int32(backend, device="cpu"):
    """Row times vocabulary is past 2^31."""
    hidden, weight = torch.ones(1, 1, device=device).expand(2**24, 1), torch.randn(300, 1, device=device)
    labels = torch.tensor([5, 299, 0], dtype=torch.int32, device=device)
    rows = torch.tensor([2**24 - 1, 2**24 - 2, 0], dtype=torch.int32, device=device)
    want = weight[:, 0].log_softmax(0)[labels.long()]
    torch.testing.assert_close(linear_logprob(hidden, weight, labels, rows, backend=backend), want)


def test_the_backward_takes_the_saved_weight():
    check_saved_weight("torch")


def check_saved_weight(backend, device="cpu"):
    """Between the passes the weight may be elsewhere: saved-tensor hooks, shards let go."""
    hidden, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (5, 20))
    labels = torch.arange(5, device=device)
    want = torch.autograd.grad(linear_logprob(hidden, weight, labels, backend=backend).sum(), (hidden, weight))
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda kept: kept):
        logp = linear_logprob(hidden, weight, labels, backend=backend).sum()
    weight.data.fill_(torch.nan)
    torch.testing.assert_close(torch.autograd.grad(logp, (hidden, weight)), want)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_half_inputs_give_float32(backend):
    hidden, weight = torch.randn(5, 8).bfloat16(), torch.randn(7, 8).bfloat16()
    out = linear_logprob(hidden, weight, torch.arange(5), entropy=True, backend=backend)
    assert [x.dtype for x in out] == [torch.float32] * 2


@pytest.mark.parametrize("match, change", [
    ("temperature must be above 0, got 0", dict(temperature=0)),
    ("temperature must be above 0, got nan", dict(temperature=float("nan"))),
    ("softcap must be at least 0", dict(softcap=-1.0)),
    ("softcap must be at least 0 .* and finite, got inf", dict(softcap=float("inf"))),
    (r"weight \(0, 4\) has no vocabulary; give \[V, H\]", dict(weight=torch.zeros(0, 4))),
    ("hidden is torch.int64; give floating point", dict(hidden=torch.zeros(3, 4, dtype=torch.long))),
    ("bias is torch.bool; give floating point", dict(bias=torch.zeros(7, dtype=torch.bool))),
    ("hidden is None; give a tensor", dict(hidden=None)),
    ("weight is None; give a tensor", dict(weight=None)),
    ("group is a list; give a ProcessGroup", dict(group=[0, 1])),
    ("do not fit", dict(weight=torch.zeros(4, 7))),
    (r"labels for \(3,\) rows", dict(labels=torch.zeros(2, dtype=torch.long))),
    (r"bias \(1,\) .* give \[7\]", dict(bias=torch.zeros(1))),
    ("labels must be integers, got torch.float32", dict(labels=torch.zeros(3))),
    ("rows must be integers, got torch.bool", dict(rows=torch.ones(3, dtype=torch.bool))),
    ("label -100 of pair 1 is not in 0 .. 6; leave ignored pairs out", dict(labels=torch.tensor([0, -100, 7]))),
    ("label 7 of pair 2 is not in 0 .. 6", dict(labels=torch.tensor([0, 6, 7], dtype=torch.int8))),
    ("row 3 of pair 0 is not in 0 .. 2", dict(rows=torch.tensor([3, 0, 1]))),
    ("bias on meta, hidden on cpu; move them to one device", dict(bias=torch.zeros(7, device="meta"))),
    ("not in the group; call it on the group's ranks alone", dict(group=GroupMember.NON_GROUP_MEMBER)),
])  # fmt: skip
def test_bad_arguments_are_refused(match, change):
    arguments = dict(hidden=torch.zeros(3, 4), weight=torch.zeros(7, 4), labels=torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=f"^linear_logprob: .*{match}"):
        linear_logprob(**{**arguments, **change})
    linear_logprob(**arguments)


def test_options_are_given_by_name():
    with pytest.raises(TypeError):
        linear_logprob(torch.zeros(3, 4), torch.zeros(7, 4), torch.zeros(3, dtype=torch.long), None, None, 1.0, True)


def test_numbers_of_other_kinds_are_taken_and_what_is_no_tensor_named():
    hidden, weight, labels = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 6, 2])
    expected = linear_logprob(hidden, weight, labels, temperature=0.7)
    assert torch.equal(linear_logprob(hidden, weight, labels, temperature=torch.tensor(0.7), softcap=None), expected)
    with pytest.raises(
        ValueError, match=r"^linear_logprob: labels is a ndarray; give a tensor: torch.as_tensor\(labels\)$"
    ):
        linear_logprob(hidden, weight, labels.numpy())
    with pytest.raises(ValueError, match=r"got temperature a tensor .*, with gradient; give a plain number"):
        linear_logprob(hidden, weight, labels, temperature=torch.ones(1, requires_grad=True))
