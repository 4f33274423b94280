"""Pairs that the host knows: grouped by hand, and the LM head's ops with them as with tensors, without a sort or a
wait."""

import collections
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from igpo_kernels import Branch, LossSettings, Pairs, RolloutTokens, Tree, linear_logprob, linear_policy_loss, pack
from igpo_kernels.pairs import Cells, Rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="counts what a CPU runs; test_a_cuda_graph_captures_known_pairs")
WAITS = {"sort", "unique", "unique_consecutive", "_unique2", "nonzero", "item", "_local_scalar_dense", "searchsorted"}


class Ops(TorchDispatchMode):
    """Counts the ATen ops of a block by name."""

    def __enter__(self):
        self.seen = collections.Counter()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name.removeprefix("aten::")] += 1
        return func(*args, **(kwargs or {}))


def make(n=7, h=5, v=40, m=30, seed=0):
    g = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(*shape, generator=g).to(DEVICE).requires_grad_() for shape in ((n, h), (v, h))]
    labels, rows = torch.randint(0, min(v, 6), (m,), generator=g), torch.randint(0, n, (m,), generator=g)
    return leaves, labels.to(DEVICE), rows.to(DEVICE)


def by_hand(labels, rows):
    """The fields of ``Cells``, from dictionaries."""
    order = sorted(range(len(labels)), key=lambda pair: (rows[pair], labels[pair], pair))
    of_row, of_cell = collections.defaultdict(list), collections.defaultdict(list)
    for pair in order:
        of_row[rows[pair]].append(pair)
        of_cell[rows[pair], labels[pair]].append(pair)
    ends = lambda groups: np.cumsum([0, *map(len, groups.values())]).tolist()  # noqa: E731
    distinct, cells = list(of_row), list(of_cell)
    return dict(
        labels=labels, rows=rows, distinct=distinct, order=order, offsets=ends(of_row), cell_offsets=ends(of_cell),
        row=[distinct.index(row) for row, _ in cells], label=[label for _, label in cells],
        of_pair=[cells.index(cell) for cell in zip(rows, labels, strict=True)],
        row_of_pair=[distinct.index(row) for row in rows],
    )  # fmt: skip


def lists(group):
    return {name: x.tolist() for name, x in vars(group).items() if name != "one_to_one"}


@settings(max_examples=50)
@given(pairs=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4)), max_size=25))
def test_groups_are_those_by_hand(pairs):
    labels, rows = [label for label, _ in pairs], [row for _, row in pairs]
    want, known = by_hand(labels, rows), Pairs(labels, rows).on("cpu")
    assert lists(known) == want
    tensors = [torch.tensor(x, dtype=torch.long) for x in (labels, rows)]
    assert lists(Cells.sort(*tensors, 6)) == want
    assert lists(Rows.sort(*tensors, 6)) == {name: want[name] for name in lists(Rows.sort(*tensors, 6))}
    assert known.one_to_one == (rows == sorted(set(rows)))
    in_order = by_hand(labels, list(range(len(rows))))
    assert lists(Pairs(labels).on("cpu")) == lists(Cells.in_order(tensors[0])) == in_order


def test_tensors_are_copied_once_and_aligned_as_kernels_are_compiled():
    pairs = Pairs([3, 1, 3], [0, 0, 0])
    cells = pairs.on("cpu")
    assert pairs.on(torch.device("cpu")) is cells
    tensors = [x for x in vars(cells).values() if isinstance(x, torch.Tensor)]
    assert len({x.untyped_storage().data_ptr() for x in tensors}) == 1
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in tensors)
    assert not pickle.loads(pickle.dumps(pairs)).cache


def logprob(leaves, backend, labels, rows=None, **options):
    out = linear_logprob(*leaves, labels, rows, entropy=True, logsumexp=True, backend=backend, **options)
    weights = torch.linspace(-1, 1, len(labels), device=DEVICE)
    return out, sum((x * weights.roll(i)).sum() for i, x in enumerate(out))


def policy_loss(leaves, backend, labels, rows=None):
    old, advantages, weights = (
        torch.linspace(a, b, len(labels), device=DEVICE) for a, b in ((-4, -3), (-1, 1), (0.1, 1))
    )
    loss, sums = linear_policy_loss(
        *leaves, labels, rows, old, advantages, weights, LossSettings(entropy=0.1), backend=backend
    )
    return tuple(sums.values()), loss


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", [logprob, policy_loss])
@pytest.mark.parametrize("repeated", [True, False])
def test_known_pairs_give_the_bits_that_tensors_give(op, backend, repeated):
    if backend == "triton":
        pytest.importorskip("triton")
    leaves, labels, rows = make()
    if not repeated:
        labels, rows = labels[: len(leaves[0])], None
    out, loss = op(leaves, backend, labels, rows)
    pairs = Pairs(labels.cpu().numpy(), None if rows is None else rows.cpu().numpy())
    known, known_loss = op(leaves, backend, pairs)
    got = [*known, known_loss, *torch.autograd.grad(known_loss, leaves)]
    for a, b in zip(got, [*out, loss, *torch.autograd.grad(loss, leaves)], strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def no_kernels(monkeypatch):
    """Triton launches nothing: what the interpreter copies is no op of ours."""
    pytest.importorskip("triton")
    from igpo_kernels.linear_logprob import triton_kernels
    from igpo_kernels.linear_logprob import triton_path as logprob_path
    from igpo_kernels.linear_policy_loss import triton_path as fused_path
    from igpo_kernels.policy_loss import triton_path as loss_path

    kernels = [(triton_kernels, fn.__name__) for fn in logprob_path.KERNELS.values()]
    kernels += [(fused_path, "row_loss_kernel")]
    kernels += [(loss_path, f"policy_loss_{name}_kernel") for name in ("finish", "scale")]
    for owner, name in kernels:
        monkeypatch.setattr(owner, name, collections.defaultdict(lambda: lambda *_, **__: None))


@ON_CPU
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", [logprob, policy_loss])
def test_known_pairs_are_neither_sorted_nor_waited_for(op, backend, no_kernels):
    leaves, labels, rows = make()
    pairs = Pairs(labels.numpy(), rows.numpy())
    op(leaves, backend, pairs)  # makes the copies
    with Ops() as forward:
        _, loss = op(leaves, backend, pairs)
    with Ops() as backward:
        torch.autograd.grad(loss, leaves)
    if (op, backend) == (policy_loss, "torch"):
        del backward.seen["_local_scalar_dense"]  # on a CPU alone: whether the upstream gradient is 1
    assert not WAITS & (set(forward.seen) | set(backward.seen))
    with Ops() as forward:
        op(leaves, "triton", labels, rows)
    assert {"sort", "unique_consecutive", "_local_scalar_dense"} <= set(forward.seen)  # what tensors need would show


FREE = {"empty", "new_empty", "slice", "select", "view", "t", "permute", "detach", "alias", "unbind", "linspace"}
"""Ops without a launch, and the inputs' own."""


@ON_CPU
@pytest.mark.parametrize("op, most", [(logprob, 11), (policy_loss, 8)])
def test_few_ops_are_launched_with_known_pairs(op, most, no_kernels):
    leaves, labels, rows = make(h=16)
    pairs = Pairs(labels.numpy(), rows.numpy())
    run = {logprob: lambda: linear_logprob(*leaves, pairs, entropy=True, logsumexp=True, backend="triton"),
           policy_loss: lambda: policy_loss(leaves, "triton", pairs)}[op]  # fmt: skip
    run()
    with Ops() as ops:
        run()
    launched = {name: count for name, count in ops.seen.items() if name not in FREE}
    assert sum(launched.values()) <= most, launched


def plan_of_two_rollouts():
    rollouts = [
        RolloutTokens(i, np.array([5, 6, last, 8]), np.array([-1, -1, 0, 1]), np.array([2, 3]))
        for i, last in enumerate((7, 7))
    ]
    return pack([Tree(rollouts, [Branch(np.array([8, 9]), 1, 2)])])


def test_a_plan_groups_its_pairs_once_per_part():
    plan = plan_of_two_rollouts()
    part = slice(0, plan.n_decisions)
    pairs = plan.pairs(part)
    assert plan.pairs(slice(None, plan.n_decisions)) is pairs is not plan.pairs()
    assert pairs.label.tolist() == plan.label[part].tolist() and pairs.row.tolist() == plan.row[part].tolist()
    assert len(plan.pairs()) == plan.n_pairs


def test_known_pairs_are_read_only_copies():
    label, row = np.array([7, 9]), np.array([1, 0])
    pairs = Pairs(label, row)
    label[0] = 8
    assert pairs.label.tolist() == [7, 9] and pairs.on("cpu").labels.tolist() == [7, 9]
    for array in (pairs.label, pairs.row, Pairs(label).row):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 3


@pytest.mark.parametrize("part, what", [(3, "a int"), (None, "None")])
def test_a_part_is_a_slice(part, what):
    with pytest.raises(ValueError, match=f"^TreePlan.pairs: part is {what}; give a slice$"):
        plan_of_two_rollouts().pairs(part)


BAD = {
    "labels are float64": dict(label=[0.5]),
    "labels are int64 .* from -1; give one row of whole numbers of at least 0": dict(label=[0, -1]),
    "rows are int64 .* from -2": dict(label=[0], row=[-2]),
    "2 labels for 1 rows; give one of each per pair": dict(label=[0, 1], row=[0]),
}


@pytest.mark.parametrize("match", BAD)
def test_bad_pairs_are_refused(match):
    with pytest.raises(ValueError, match=f"^Pairs: {match}"):
        Pairs(**BAD[match])


@pytest.mark.parametrize("match, labels, rows, more", [
    ("label 7 of pair 1 is not in 0 .. 6", [6, 7], [0, 1], {}),
    ("row 3 of pair 0 is not in 0 .. 2", [6, 5], [3, 1], {}),
    ("rows beside Pairs, which hold rows; leave one out", [1], [1], dict(rows=torch.zeros(1, dtype=torch.long))),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_refused(match, labels, rows, more):
    hidden, weight = torch.zeros(3, 4), torch.zeros(7, 4)
    with pytest.raises(ValueError, match=f"^linear_logprob: {match}$"):
        linear_logprob(hidden, weight, Pairs(labels, rows), **more)
