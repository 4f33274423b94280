"""What ops do under autocast, inference mode, torch.compile, and when differentiated twice."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from igpo_kernels import LossSettings, linear_logprob, linear_policy_loss, policy_loss, tree_attention
from tests.kernels.test_tree_attention import comb

BF16 = torch.bfloat16


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def qkv(plan, d=8, dtypes=(torch.float32,) * 3):
    return [
        normal(plan.n_tokens, h, d, seed=i, dtype=t) for i, (h, t) in enumerate(zip((4, 2, 2), dtypes, strict=True))
    ]


@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("backend", ["torch", "reference", "auto"])
def test_attention_under_autocast_is_cast_as_sdpa_is(softcap, backend):
    plan = comb(30, 3)
    inputs = qkv(plan, dtypes=(torch.float32, torch.float32, BF16))
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast("cpu", dtype=BF16):
        out = tree_attention(*leaves, plan, softcap=softcap, backend=backend)
        gradients = torch.autograd.grad(out.float().square().sum(), leaves)
    expected = tree_attention(*(x.bfloat16() for x in inputs), plan, softcap=softcap, backend=backend)
    assert out.dtype == BF16 and torch.equal(out, expected)
    assert [g.dtype for g in gradients] == [x.dtype for x in inputs]


def test_autocast_leaves_float64_as_it_is():
    plan = comb(30, 3)
    inputs = qkv(plan, dtypes=(torch.float64,) * 3)
    with torch.autocast("cpu", dtype=BF16):
        out = tree_attention(*inputs, plan, softcap=3.0)
    assert torch.equal(out, tree_attention(*inputs, plan, softcap=3.0)) and out.dtype == torch.float64


def test_a_backward_under_autocast_is_as_exact_as_its_forward():
    plan = comb(30, 3)
    leaves = [x.requires_grad_() for x in qkv(plan)]
    out = tree_attention(*leaves, plan, softcap=3.0)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    with torch.autocast("cpu", dtype=BF16):
        found = torch.autograd.grad(out.sum(), leaves)
    assert all(map(torch.equal, found, expected))


def head():
    return [x.requires_grad_() for x in (normal(6, 5), normal(9, 5, seed=1), normal(9, seed=2))]


LABELS, ROWS = torch.tensor([1, 3, 8, 1]), torch.tensor([0, 5, 2, 0])
NUMBERS = [normal(4, seed=i) for i in (3, 4, 5)]


def logprob(backend, hidden, weight, bias):
    return linear_logprob(hidden, weight, LABELS, ROWS, bias, softcap=2.0, backend=backend)


def fused(backend, hidden, weight, bias):
    old, advantages, weights = NUMBERS
    return linear_policy_loss(hidden, weight, LABELS, ROWS, old - 2, advantages, weights, bias=bias, backend=backend)[0]


@pytest.mark.parametrize("op", [logprob, fused])
@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_autocast_changes_nothing_of_the_lm_head(op, backend):
    inputs = head()
    outs = op(backend, *inputs)
    with torch.autocast("cpu", dtype=BF16):
        under = op(backend, *inputs)
    assert torch.equal(under, outs) and under.dtype == torch.float32


@pytest.mark.parametrize("op", [logprob, fused])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_hidden_states_below_the_heads_precision(op, backend):
    # What a decoder under autocast gives beside a float32 head.
    hidden, *rest = head()
    low = hidden.detach().bfloat16()
    with torch.autocast("cpu", dtype=BF16):
        found = op(backend, low, *rest)
    torch.testing.assert_close(found, op(backend, low.float(), *rest))


def attention_sum(backend, *leaves):
    return tree_attention(*leaves, comb(20, 2), backend=backend)


def loss(backend, logp):
    _, advantages, weights = NUMBERS
    return policy_loss(
        logp, logp.detach() - 0.1, advantages, weights, LossSettings(clip_high=3.0, ratio="turn"),
        clip_scale=torch.full((4,), 3.0), segment=torch.tensor([0, 0, 1, 1]), backend=backend,
    )[0]  # fmt: skip


TWICE = {
    "tree_attention": (attention_sum, lambda: [x.requires_grad_() for x in qkv(comb(20, 2))]),
    "linear_logprob": (logprob, head),
    "linear_policy_loss": (fused, head),
    "policy_loss": (loss, lambda: [NUMBERS[0].clone().requires_grad_()]),
}


@pytest.mark.parametrize(
    ("op", "backend"),
    [(op, backend) for op in TWICE for backend in ("torch", "triton") if (op, backend) != ("policy_loss", "torch")],
)
@pytest.mark.parametrize("upstream", ["constant", "of the result"])
def test_a_second_derivative_is_refused_not_lost(op, backend, upstream):
    run, leaves = TWICE[op]
    leaves = leaves()
    out = run(backend, *leaves)
    out = out.sum() if upstream == "constant" else out.square().sum()
    gradients = torch.autograd.grad(out, leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(
            RuntimeError, match=f"^{op}: its gradients were differentiated, .*; pass backend='reference'"
        ):
            gradient.sum().backward(retain_graph=True)


def test_the_definitions_have_second_derivatives():
    for op, leaves in ((logprob, head()), (loss, [NUMBERS[0].clone().requires_grad_()])):
        (first, *_) = torch.autograd.grad(op("reference", *leaves).sum(), leaves, create_graph=True)
        assert bool(torch.autograd.grad(first.sum(), leaves[0])[0].any())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("window", [None, 5])
def test_a_plan_scored_under_inference_mode_can_be_trained_with(backend, window):
    plan, fresh = comb(20, 2), comb(20, 2)
    leaves = [x.requires_grad_() for x in qkv(plan)]
    names = ("label", "row", "subtree_end", "position_ids")
    with torch.inference_mode():
        tree_attention(*qkv(plan), plan, window=window, softcap=2.0, backend=backend)
        for name in names:
            plan.tensor(name)
    assert not any(plan.tensor(name).is_inference() for name in names)

    def train(plan):
        out = tree_attention(*leaves, plan, window=window, softcap=2.0, backend=backend).flatten(1)
        logp = linear_logprob(out, normal(50, 32, seed=7), plan.tensor("label"), plan.tensor("row"), backend=backend)
        return torch.autograd.grad(logp.sum(), leaves)

    assert all(map(torch.equal, train(plan), train(fresh)))


@pytest.mark.parametrize("change", [replace, copy.copy, copy.deepcopy, lambda plan: pickle.loads(pickle.dumps(plan))])
def test_a_copy_of_a_used_plan_has_no_cache(change):
    plan = comb(20, 2)
    unused = len(pickle.dumps(plan))
    tree_attention(*qkv(plan), plan)
    plan.tensor("label")
    assert plan.cache and len(pickle.dumps(plan)) == unused
    other = change(plan)
    assert other.cache == {}
    assert torch.equal(tree_attention(*qkv(plan), other), tree_attention(*qkv(plan), plan))


def test_a_replaced_plan_is_attended_as_it_says():
    plan = comb(20, 2)
    tree_attention(*qkv(plan), plan, window=4)
    shorter = replace(plan, subtree_end=np.minimum(plan.subtree_end, np.arange(plan.n_tokens) + 3))
    later = replace(plan, position_ids=plan.position_ids * 2)
    for changed in (shorter, later):
        out = tree_attention(*qkv(plan), changed, window=4, backend="reference")
        assert (out - tree_attention(*qkv(plan), plan, window=4)).abs().max() > 0.1
    assert later.tensor("position_ids").tolist() == (2 * plan.position_ids).tolist()


def test_a_plans_tensors_are_no_views_of_its_arrays():
    plan = comb(20, 2)
    plan.tensor("label").zero_()
    assert plan.label.any()


def test_compiled_on_a_plans_first_use():
    torch._dynamo.reset()
    run = torch.compile(lambda q, k, v, plan: tree_attention(q, k, v, plan), backend="aot_eager")
    for tokens in (20, 20, 33):
        plan = comb(tokens, 2)
        leaves = [x.requires_grad_() for x in qkv(plan)]
        out, expected = run(*leaves, plan), tree_attention(*leaves, comb(tokens, 2))
        torch.testing.assert_close(out, expected)
        for ours, theirs in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (out, expected)), strict=True):
            torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()
