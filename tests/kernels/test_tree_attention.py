"""The tiled torch path against the dense-mask definition in float64, forward and gradients."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels import Branch, RolloutTokens, Tree, pack, tree_attention
from igpo_kernels.tree_attention import reference, schedule
from tests.kernels.test_plan import plan_of


def comb(trunk, turns, wrapper_and_answer=12, trees=1):
    """Rollouts of ``trunk`` tokens with a branch behind each of ``turns`` boundaries."""
    rng = np.random.default_rng(0)
    made = []
    for i in range(trees):
        ids = rng.integers(0, 50, trunk)
        turn = np.where(np.arange(trunk) < 3, -1, 0)
        boundaries = np.linspace(3, trunk - 1, turns).astype(int)
        branch = Branch(rng.integers(0, 50, wrapper_and_answer), 4, wrapper_and_answer)
        made.append(Tree([RolloutTokens(i, ids, turn, boundaries)], [branch] if turns else []))
    return pack(made)


def check(plan, q_heads=4, kv_heads=2, d=16, softcap=0.0, window=None, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = plan.n_tokens
    inputs = [torch.randn(n, h, d, generator=generator, dtype=torch.float64) for h in (q_heads, kv_heads, kv_heads)]
    upstream = torch.randn(n, d, q_heads, generator=generator, dtype=torch.float64).transpose(1, 2)  # strided

    def run(dtype, backend):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        out = tree_attention(*leaves, plan, softcap=softcap, window=window, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(dtype))]

    exact = run(torch.float64, "reference")
    ours, plain = run(dtype, "torch"), run(dtype, "reference")
    for name, e, o, p in zip(("out", "dq", "dk", "dv"), exact, ours, plain, strict=True):
        allowed = 2 * (p.double() - e).abs().max() + 1e-5
        assert (o.double() - e).abs().max() <= allowed, name


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(4, 1), (4, 4), (6, 2), (8, 1)]), st.sampled_from([None, 1, 3, 9]))
def test_random_trees(seed, heads, window):
    check(plan_of(seed)[-1], *heads, window=window, seed=seed)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 4]))
def test_softcapped(seed, window):
    check(plan_of(seed)[-1], softcap=5.0, window=window, seed=seed)


@pytest.mark.parametrize("trunk", [65, schedule.TILE, schedule.TILE + 3, 700])
@pytest.mark.parametrize("window", [None, 100])
def test_trunks_longer_than_a_tile(trunk, window):
    check(comb(trunk, 9, trees=2), window=window)


@pytest.mark.parametrize("d", [16, 40, 64, 128])
def test_head_dims(d):
    check(comb(90, 3), d=d)


def test_bfloat16_errs_no_more_than_plain_torch():
    check(comb(150, 4), dtype=torch.bfloat16)


def test_one_token():
    check(pack([Tree([RolloutTokens(0, np.array([3]), np.array([-1]))])]))


def test_every_query_is_in_one_tile_and_no_visible_key_is_missing():
    plan = comb(600, 16, trees=3)
    cuts = [(t.start, t.stop) for t in schedule.tiles(plan, None)]
    assert [a for a, _ in cuts] == [0, *(b for _, b in cuts[:-1])] and cuts[-1][1] == plan.n_tokens


def test_work_is_proportional_to_the_visible_area():
    plan = comb(4096, 16, 24)
    index = np.arange(plan.n_tokens)
    visible = sum(int(((index <= q) & (q < plan.subtree_end)).sum()) for q in index)
    visited = sum((t.stop - t.start) * t.n_keys for t in schedule.tiles(plan, None))
    assert visited <= 1.2 * visible
    dense = plan.n_tokens**2
    assert visited < 0.7 * dense


def test_a_window_drops_keys_from_the_tiles():
    plan = comb(2048, 4)
    full = sum(t.n_keys for t in schedule.tiles(plan, None))
    windowed = sum(t.n_keys for t in schedule.tiles(plan, 64))
    assert windowed < 0.5 * full


def test_shapes_that_do_not_fit_are_refused():
    plan = comb(10, 2)
    q = torch.zeros(plan.n_tokens, 4, 8)
    with pytest.raises(ValueError, match="do not fit"):
        tree_attention(q, q[:, :3], q[:, :3], plan)
    with pytest.raises(ValueError, match="rows, the plan"):
        tree_attention(q[1:], q[1:], q[1:], plan)
    with pytest.raises(ValueError, match="choose one of auto, reference, torch, triton, flash"):
        tree_attention(q, q, q, plan, backend="trition")
    with pytest.raises(ValueError, match=r"got scale 0\.0; expected a number above 0"):
        tree_attention(q, q, q, plan, scale=0.0)


@pytest.fixture
def flash_attn(monkeypatch):
    """A stand-in of flash-attn's signature, which needs a GPU: every sequence by itself, in torch."""

    def varlen(
        q, k, v, starts, starts_k, longest, longest_k, *, softmax_scale, causal, softcap, window_size, deterministic
    ):
        assert causal and deterministic and starts is starts_k and longest == longest_k == int(starts.diff().max())
        assert starts.dtype == torch.int32
        outs = []
        for a, b in pairwise(starts.tolist()):
            plan = pack([Tree([RolloutTokens(0, np.arange(b - a + 1), np.where(np.arange(b - a + 1) < b - a, -1, 0))])])
            window = None if window_size == (-1, -1) else window_size[0] + 1
            outs.append(reference.tree_attention(q[a:b], k[a:b], v[a:b], plan, softmax_scale, softcap, window))
        return torch.cat(outs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen, __spec__=True))
    monkeypatch.delitem(sys.modules, "igpo_kernels.tree_attention.flash_path", raising=False)


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_through_flash_attn(flash_attn, window):
    plan = comb(30, 0, trees=3)
    q, k = torch.randn(plan.n_tokens, 4, 8), torch.randn(plan.n_tokens, 2, 8)
    ours, exact = (
        tree_attention(q, k, k, plan, softcap=3.0, window=window, backend=backend) for backend in ("flash", "reference")
    )
    torch.testing.assert_close(ours, exact)


def test_flash_attn_refuses_trees(flash_attn):
    plan = comb(30, 3)
    q = torch.zeros(plan.n_tokens, 4, 8)
    with pytest.raises(ValueError, match="without branches or sharing"):
        tree_attention(q, q, q, plan, backend="flash")


def test_automatic_takes_flash_attn_for_sequences_on_a_gpu_only(flash_attn, monkeypatch, caplog):
    from igpo_kernels.tree_attention import _automatic

    module = sys.modules[_automatic.__module__]
    half = torch.zeros(4, 2, 8, dtype=torch.bfloat16)
    sequences, tree = comb(30, 0), comb(30, 3)
    assert _automatic(half, half, half, sequences) == "torch"
    monkeypatch.setattr(module, "resolve", lambda *_: "triton")
    sequences.cache.clear()
    with caplog.at_level("INFO"):
        assert [_automatic(half, half, half, plan) for plan in (sequences, sequences, tree)] == [
            "flash",
            "flash",
            "triton",
        ]
    assert caplog.messages == [
        f"tree_attention: {name} for a plan of {plan.n_tokens} tokens"
        for name, plan in (("flash", sequences), ("triton", tree))
    ]
    full = half.float()
    assert _automatic(full, full, full, sequences) == "triton"
