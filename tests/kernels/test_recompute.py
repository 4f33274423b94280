"""keep_attention: a checkpointed function computes its attention once, whatever else happens to it."""

import importlib
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from igpo_kernels import recompute, tree_attention
from igpo_kernels.huggingface import keep_attention
from tests.kernels.test_tree_attention import comb

torch_path = importlib.import_module("igpo_kernels.tree_attention.torch_path")
PLAN = comb(20, 2)


@pytest.fixture
def computed(monkeypatch):
    """The number of queries of every attention that the torch path computes."""
    asked, forward = [], torch_path._forward
    monkeypatch.setattr(torch_path, "_forward", lambda q, *more: asked.append(len(q)) or forward(q, *more))
    return asked


def leaves(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(PLAN.n_tokens, 2, 8, generator=generator, requires_grad=True) for _ in "qkv"]


def layer(q, k, v, softcap=0.0, backend="torch"):
    """Two calls of attention, the second on what the first gave."""
    attend = lambda q: tree_attention(q, k, v, PLAN, softcap=softcap, backend=backend)  # noqa: E731
    return attend(attend(q).sin() + q).sin()


def kept(*given, **options):
    return checkpoint(layer, *given, use_reentrant=False, context_fn=keep_attention, **options)


def gradients(run, *given, **options):
    return torch.autograd.grad(run(*given, **options).square().sum(), given)


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attention_is_computed_once(softcap, computed):
    expected = gradients(layer, *leaves(), softcap=softcap)
    computed.clear()
    assert all(map(torch.equal, gradients(kept, *leaves(), softcap=softcap), expected))
    assert computed == [PLAN.n_tokens] * 2
    again = lambda *x, **options: checkpoint(layer, *x, use_reentrant=False, **options)  # noqa: E731
    assert all(map(torch.equal, gradients(again, *leaves(), softcap=softcap), expected))
    assert computed == [PLAN.n_tokens] * 6


def test_two_backwards_through_one_forward(computed):
    given = leaves()
    loss = kept(*given).square().sum()
    first, second = (torch.autograd.grad(loss, given, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second)) and len(computed) == 2


def test_forwards_before_their_backwards(computed):
    """As when the gradients of several packs are one sum."""
    packs = leaves(), leaves(1)
    losses = [kept(*given).square().sum() for given in packs]
    for loss, given in zip(losses, packs, strict=True):
        expected = gradients(layer, *given)
        assert all(map(torch.equal, torch.autograd.grad(loss, given), expected))
    assert len(computed) == 4 + 4


def test_a_function_inside_a_function():
    """The outer one runs again, and with it the inner one's forward."""
    twice = lambda *x: checkpoint(kept, *x, use_reentrant=False, context_fn=keep_attention)  # noqa: E731
    assert all(map(torch.equal, gradients(twice, *leaves()), gradients(layer, *leaves())))


def test_a_forward_that_fails_leaves_nothing_behind(computed):
    def fails(*given):
        layer(*given)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        checkpoint(fails, *leaves(), use_reentrant=False, context_fn=keep_attention)
    assert recompute._running.get() is None and len(computed) == 2


def test_nothing_stays_after_the_backward():
    runs, given = [], leaves()

    def contexts():
        made = keep_attention()
        runs.append(weakref.ref(made[1]))
        return made

    out = checkpoint(layer, *given, use_reentrant=False, context_fn=contexts)
    assert len(runs[0]()._kept) == 2
    torch.autograd.grad(out.sum(), given)
    del out
    assert runs[0]() is None
    with torch.no_grad():
        checkpoint(layer, *given, use_reentrant=False, context_fn=contexts)
    assert runs[1]() is None
    checkpoint(layer, *given, use_reentrant=False, context_fn=contexts)
    assert runs[2]() is None  # though no backward took the graph apart


def test_an_output_that_is_written_to_is_refused():
    """As without checkpointing; torch's own takes the changed values for the old ones."""

    def writes(*given):
        return layer(*given).sum() + tree_attention(*given, PLAN, backend="torch").mul_(2).sum()

    for run in (writes, lambda *x: checkpoint(writes, *x, use_reentrant=False, context_fn=keep_attention)):
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|written to in place"):
            gradients(run, *leaves())


def test_more_attentions_than_at_first_are_refused():
    calls = []

    def grows(*given):
        with torch.no_grad():
            for _ in calls:
                layer(*given)
        calls.append(1)
        return layer(*given)

    with pytest.raises(RuntimeError, match="computed more attentions than at first"):
        gradients(lambda *x: checkpoint(grows, *x, use_reentrant=False, context_fn=keep_attention), *leaves())


@pytest.mark.parametrize("where", ["outside", "around", "inside"])
def test_a_graph_without_breaks(where):
    """With checkpointing in no place, around the graph, and inside it."""
    expected = gradients(layer, *leaves())
    run = torch.compile(kept if where == "inside" else layer, backend="aot_eager", fullgraph=True)
    compiled = lambda *x: checkpoint(run, *x, use_reentrant=False, context_fn=keep_attention)  # noqa: E731
    assert all(map(torch.equal, gradients(compiled if where == "around" else run, *leaves()), expected))
