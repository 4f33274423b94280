"""The attention bench's peers compute what ours does; how far results may differ."""

import pytest
import torch

from bench import test_attention as attention
from bench.comparison import hold
from igpo_kernels import tree_attention
from igpo_kernels.tree_attention.reference import visible

pytestmark = pytest.mark.skipif(attention.DEVICE != "cpu", reason="the bench itself compares them on a GPU")
TREES = {"trunk": (40, 0, 0, 1, 1), "trunks": (20, 0, 0, 1, 3), "comb": (40, 3, 4, 1, 1)}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("shape", "names"), [
    ("trunk", {"sdpa_flash", "sdpa_mask"}), ("trunks", {"sdpa_flash", "sdpa_mask"}), ("comb", {"sdpa_mask"}),
])  # fmt: skip
def test_peers_equal_ours(shape, names, window):
    plan, heads = attention.plan_of(*TREES[shape]), attention.Heads(4, 2, 16, window=window)
    ways, wide = attention.peers(plan, heads, visible(plan, window, "cpu")[None, None])
    assert set(ways) == names - ({"sdpa_flash"} if window else set()) and wide == {"sdpa_mask"}
    q, k, v = attention.tensors(plan, heads)
    ours = tree_attention(q, k, v, plan, window=window)
    for name, way in ways.items():
        keys = [x.repeat_interleave(2, 1) for x in (k, v)] if name in wide else (k, v)
        hold(way(q, *keys), ours, 1e-5)


def by_causal(q, k, v, starts, starts_k, longest, longest_k, is_causal=False): ...


def by_window(q, k, v, starts, starts_k, longest, longest_k, *, window_size=(-1, -1)): ...


def by_window_grouped(q, k, v, starts, starts_k, longest, longest_k, *, window_size=(-1, -1), enable_gqa=False): ...


def test_varlen_is_called_as_each_torch_spells_it():
    of = attention.varlen_options
    assert of(by_causal, -1) == ({"is_causal": True}, False) and of(by_causal, 6) == (None, False)
    assert of(by_window, 6) == ({"window_size": (6, 0)}, False)
    assert of(by_window_grouped, -1) == ({"window_size": (-1, 0), "enable_gqa": True}, True)


@pytest.mark.parametrize("fault, seen", [
    (lambda x: 0 * x, True), (lambda x: x.roll(1, 0), True), (lambda x: x.index_fill(0, torch.tensor([3]), 0.0), True),
    (lambda x: x * float("nan"), True), (lambda x: x[:-1], True), (lambda x: 1.001 * x, False),
])  # fmt: skip
def test_small_gradients_are_held_to_their_own_size(fault, seen):
    gradient = 1e-6 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
    if seen:
        with pytest.raises(AssertionError, match="result 1"):
            hold((gradient, fault(gradient)), (gradient, gradient), 5e-2)
    else:
        hold((gradient, fault(gradient)), (gradient, gradient), 5e-2)
