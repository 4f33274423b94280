"""What `make mutants` found unguarded in the Triton kernels, or guarded only by tests that run for long."""

import pytest
import torch

pytest.importorskip("triton")

from igpo_kernels import linear_logprob, tree_attention
from igpo_kernels.linear_logprob import triton_path
from tests.kernels.test_tree_attention import comb


def both(run):
    """Values and gradients by the kernels, and by the definition."""
    return run("triton"), run("reference")


def test_a_vocabulary_in_chunks(monkeypatch, device):
    hidden, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (5, 600))
    labels = torch.tensor([0, 255, 256, 511, 599], device=device)
    monkeypatch.setattr(triton_path.Head, "backward_chunks", lambda *_: (4, 256))

    def run(backend):
        options = dict(softcap=4.0, temperature=0.7, entropy=True, backend=backend)
        logp, entropy = linear_logprob(hidden, weight, labels, **options)
        return [logp, entropy, *torch.autograd.grad(logp.sum() + 2 * entropy.sum(), (hidden, weight))]

    torch.testing.assert_close(*both(run))


@pytest.mark.parametrize("options", [dict(window=4), dict(softcap=2.0, scale=0.7)], ids=str)
def test_groups_of_heads(options, device):
    plan = comb(9, 2)
    g = torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(plan.n_tokens, heads, 16, generator=g).to(device) for heads in (6, 2, 2, 6))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def run(backend):
        out = tree_attention(*leaves, plan, **options, backend=backend)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    torch.testing.assert_close(*both(run))
