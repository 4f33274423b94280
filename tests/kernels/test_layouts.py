"""Every op on tensors that lie in memory in every way that torch allows, against its definition in float64.

What lies between a tensor's numbers is NaN, so an op that reads it shows.
"""

import functools

import numpy as np
import pytest
import torch

from igpo_kernels import (
    Branch,
    LossSettings,
    Normaliser,
    RolloutTokens,
    Tree,
    linear_logprob,
    linear_policy_loss,
    pack,
    policy_loss,
    tree_attention,
    turn_advantages,
)


def within(x, shape, part):
    """``x`` as that part of a tensor of ``shape`` that holds junk elsewhere."""
    room = torch.full(shape, float("nan") if x.is_floating_point() else -7, dtype=x.dtype)
    room[part] = x
    return room[part]


def spread(x, dim):
    shape = [2 * n if i == dim % x.ndim else n for i, n in enumerate(x.shape)]
    return within(x, shape, tuple(slice(None, None, 2 if i == dim % x.ndim else 1) for i in range(x.ndim)))


LAYOUTS = {
    "dense": lambda x: x.clone(),
    "last stride 2": lambda x: spread(x, -1),
    "first stride 2": lambda x: spread(x, 0),
    "behind an offset": lambda x: within(x, (len(x) + 1, *x.shape[1:]), np.s_[1:]),
    "columns of a wider one": lambda x: within(x, (*x.shape[:-1], x.shape[-1] + 3), np.s_[..., 1:-2]),
    "reversed dimensions": lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
    "heads first": lambda x: x.movedim(0, -2).contiguous().movedim(-2, 0) if x.ndim > 1 else x.clone(),
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one number expanded": lambda x: x[..., :1].expand_as(x),
}
EXACT = (torch.float64, "reference")


def compare(run, dtypes=(torch.float32,), backend="torch"):
    """``run(dtype, backend)`` gives results by name; they may err as much as the definition in their dtype does."""
    exact = run(*EXACT)
    for dtype in dtypes:
        found, plain = run(dtype, backend), run(dtype, "reference")
        for name, e in exact.items():
            assert found[name].shape == e.shape, name
            # In float64 the definition errs by nothing; how an op's sums are grouped depends on the processor.
            rounding = torch.finfo(found[name].dtype).eps * 32 * (1 + float(e.abs().max()))
            allowed = 2 * float((plain[name].double() - e).abs().max()) + rounding
            assert float((found[name].double() - e).abs().max()) <= allowed, (name, dtype)


def leaves(layout, dtype, seed, *shapes):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=g, dtype=torch.float64).bfloat16() for shape in shapes]
    return [layout(x.to(dtype)).detach().requires_grad_() for x in made]


def gradients(names, out, inputs, upstream):
    return dict(zip(names, torch.autograd.grad(out, inputs, upstream), strict=True))


@functools.cache
def plan():
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50, 19)
    rollouts = [RolloutTokens(i, np.append(ids, i), np.where(np.arange(20) < 3, -1, 0), [5, 11]) for i in range(2)]
    return pack([Tree(rollouts, [Branch(rng.integers(0, 50, 4), 1, 4)]), Tree(rollouts)])


def attention(layout, options, dtype, backend):
    n = plan().n_tokens
    *qkv, upstream = leaves(layout, dtype, 0, (n, 4, 6), (n, 2, 6), (n, 2, 6), (n, 4, 6))
    out = tree_attention(*qkv, plan(), **options, backend=backend)
    return {"out": out.detach(), **gradients(("dq", "dk", "dv"), out, qkv, upstream.detach())}


def pair_numbers(layout, dtype, m, count):
    return [x.detach() * 0.5 for x in leaves(layout, dtype, 1, *[(m,)] * count)]


def labels_and_rows(layout, m, n, vocab):
    g = torch.Generator().manual_seed(2)
    return [layout(torch.randint(0, stop, (m,), generator=g)) for stop in (vocab, n)]


def logprob(layout, options, dtype, backend):
    inputs = leaves(layout, dtype, 3, (7, 5), (11, 5), (11,))
    labels, rows = labels_and_rows(layout, 13, 7, 11)
    logp, entropy = linear_logprob(
        *inputs[:2], labels, rows, inputs[2], temperature=1.3, entropy=True, backend=backend, **options
    )
    upstream = [x.to(logp.dtype) for x in pair_numbers(layout, dtype, 13, 2)]
    upstream = [layout(x.clone()) for x in upstream]
    found = dict(logp=logp.detach(), entropy=entropy.detach())
    return found | gradients(("dhidden", "dweight", "dbias"), (logp, entropy), inputs, upstream)


def fused(layout, options, dtype, backend):
    inputs = leaves(layout, dtype, 3, (7, 5), (11, 5), (11,))
    labels, rows = labels_and_rows(layout, 13, 7, 11)
    wide = torch.promote_types(dtype, torch.float32)
    old, advantages, weights, ref, clip_scale = pair_numbers(layout, wide, 13, 5)
    loss, metrics = linear_policy_loss(
        *inputs[:2], labels, rows, layout(old - 2), advantages, weights, LossSettings(kl=0.1, entropy=0.1),
        bias=inputs[2], clip_scale=layout(clip_scale.abs()), ref_logp=layout(ref - 2), backend=backend, **options,
    )  # fmt: skip
    found = dict(loss=loss.detach(), logp=metrics["logp"])
    return found | gradients(("dhidden", "dweight", "dbias"), loss, inputs, torch.ones_like(loss))


def loss(layout, options, dtype, backend):
    logp, entropy = leaves(layout, dtype, 4, (13,), (13,))
    old, advantages, weights, ref, engine, clip_scale = pair_numbers(layout, dtype, 13, 6)
    segment, sequence = layout(torch.arange(13) // 3), layout(torch.arange(13) // 6)
    settings = LossSettings(**{"kl": 0.1, "entropy": 0.1, "importance": "token"} | options)
    total, _ = policy_loss(
        logp, old, advantages, weights, settings, ref_logp=ref, engine_logp=engine, entropy=entropy,
        clip_scale=layout(clip_scale.abs()), segment=segment, sequence=sequence, backend=backend,
    )  # fmt: skip
    return dict(loss=total.detach()) | gradients(("dlogp", "dentropy"), total, (logp, entropy), torch.ones_like(total))


SWEEP = pytest.mark.parametrize("layout", LAYOUTS)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@SWEEP
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"softcap": 2.0}, {"softcap": 2.0, "window": 3}], ids=str)
def test_tree_attention(layout, options):
    compare(functools.partial(attention, LAYOUTS[layout], options), (*FLOATS, torch.float64))


@SWEEP
@pytest.mark.parametrize("op", [logprob, fused])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}], ids=str)
def test_lm_head(op, layout, options):
    compare(functools.partial(op, LAYOUTS[layout], options), (*FLOATS, torch.float64))


@SWEEP
@pytest.mark.parametrize("options", [{}, {"ratio": "turn"}, {"ratio": "turn", "importance": "geometric"}], ids=str)
def test_policy_loss(layout, options):
    compare(functools.partial(loss, LAYOUTS[layout], options), (torch.float32, torch.float64))


TRITON = ["last stride 2", "one row expanded"]


@pytest.mark.parametrize("layout", TRITON)
@pytest.mark.parametrize("op", [attention, logprob, fused, loss])
def test_triton(op, layout):
    compare(functools.partial(op, LAYOUTS[layout], {}), (torch.float32,), "triton")


@pytest.mark.parametrize(
    ("layout", "backend"),
    [(name, "torch") for name in LAYOUTS if "expanded" not in name] + [("last stride 2", "triton")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_turn_advantages(layout, dtype, backend):
    kinds = torch.tensor([0, 0, 1, 0, 1, 1, 0, 1])
    rollouts, groups = torch.tensor([0, 3, 5, 6, 8]), torch.tensor([0, 2, 4])
    rewards = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    tokens = torch.tensor([0, 2, 2, 5, 6, 7, 9, 12, 13])
    plain = (rewards, kinds, rollouts, groups)
    expected = turn_advantages(*plain, 0.9, Normaliser(), token_offsets=tokens, backend="reference")
    lay = LAYOUTS[layout]
    found = turn_advantages(*map(lay, plain), 0.9, Normaliser(), token_offsets=lay(tokens), backend=backend)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
