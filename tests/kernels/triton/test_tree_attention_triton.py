"""The Triton kernels of tree attention against the dense-mask definition in float64, forward and gradients.

Blocks are 16 x 16 here, so that small trees have full, masked and skipped ones; every output starts as NaN.
"""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from igpo_kernels import Branch, RolloutTokens, Tree, pack, tree_attention
from igpo_kernels.recompute import keep_attention
from igpo_kernels.tree_attention import ROWS, triton_kernels, triton_path
from igpo_kernels.triton_variants import Config
from tests.kernels.test_plan import plan_of
from tests.kernels.test_tree_attention import comb, rows_and_all
from tests.kernels.triton.conftest import Poison

pytestmark = pytest.mark.usefixtures("bf16_dots")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("out", "dq", "dk", "dv")


def set_blocks(patch, rows=16, keys=16, tma=1):
    config = Config({"BLOCK_M": rows, "BLOCK_N": keys, "TMA": tma}, 4, 1)
    deltas = Config({"BLOCK_M": 16}, 4, 1)
    patch.setattr(triton_path.Launch, "config", lambda self, part: deltas if part == "deltas" else config)


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        set_blocks(patch)
        yield


def case_of(plan, q_heads=2, kv_heads=1, d=16, seed=0):
    """q, k, v and the upstream gradient, in float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(plan.n_tokens, heads, d) for heads in (q_heads, kv_heads, kv_heads, q_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]


def run(case, plan, dtype, backend, **options):
    *leaves, upstream = (x.to(dtype) for x in case)
    leaves = [x.requires_grad_() for x in leaves]
    out = tree_attention(*leaves, plan, backend=backend, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([None, 5]), st.sampled_from([0.0, 5.0]))
def test_rows_alone(seed, window, softcap):
    plan = plan_of(seed)[-1]
    for chosen in ROWS:
        if not len(getattr(plan, chosen)):
            continue
        with Poison():
            ours, exact = rows_and_all(
                plan, "triton", chosen, 2, 1, torch.float32, DEVICE, window=window, softcap=softcap
            )
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=2e-5)


def test_only_tiles_that_hold_the_rows_are_computed(monkeypatch):
    """Answers of 6 tokens at two of 200 tokens' turns: of 14 tiles those 1 or 2 that each is in."""
    tree = Tree([rollout(0, range(200), [100, 200])], [Branch(np.arange(90, 96), 2, 6)])
    plan, grids, visits = pack([tree]), [], triton_path.Launch.visits

    def counted(self, *args, **how):
        found = visits(self, *args, **how)
        grids.append(found[0][0] // self.kv_heads)
        return found

    monkeypatch.setattr(triton_path.Launch, "visits", counted)
    set_blocks(monkeypatch, rows=32)
    for rows in (None, "rows_without_gradient"):
        q, k, v, _ = (x.float() for x in case_of(plan))
        q = q if rows is None else q[plan.tensor(rows, DEVICE)]
        tree_attention(q, k, v, plan, backend="triton", rows=rows)
    tiles = {int(row) // 16 for row in plan.rows_without_gradient}
    assert grids == [14, len(tiles)] and len(tiles) < 5


def test_a_recomputed_function_takes_the_output_that_it_gave(monkeypatch):
    plan, launches, forward = plan_of(7)[-1], [], triton_path._forward
    monkeypatch.setattr(triton_path, "_forward", lambda *args: launches.append(1) or forward(*args))
    case = case_of(plan)
    expected = run(case, plan, torch.float32, "triton")
    *leaves, upstream = (x.float() for x in case)
    leaves = [x.requires_grad_() for x in leaves]
    out = checkpoint(
        lambda *x: tree_attention(*x, plan, backend="triton").sin(), *leaves, use_reentrant=False,
        context_fn=keep_attention,
    )  # fmt: skip
    found = torch.autograd.grad(out, leaves, upstream / expected[0].cos())
    torch.testing.assert_close(found, tuple(expected[1:]), rtol=1e-5, atol=1e-5)
    assert len(launches) == 2


def check(plan, dtype=torch.float32, options=None, **sizes):
    """Rule of error 3: no more than twice what plain torch errs in the same dtype."""
    case, options = case_of(plan, **sizes), options or {}
    with Poison():
        ours = run(case, plan, dtype, "triton", **options)
    exact = run(case, plan, torch.float64, "reference", **options)
    plain = run(case, plan, dtype, "reference", **options)
    for name, e, o, p in zip(NAMES, exact, ours, plain, strict=True):
        assert o.dtype == dtype
        allowed = 2 * (p.double() - e).abs().max() + 1e-5
        assert (o.double() - e).abs().max() <= allowed, name


def rollout(index, ids, boundaries=()):
    ids = np.asarray(ids)
    return RolloutTokens(index, ids, np.where(np.arange(len(ids)) < 1, -1, 0), np.array(boundaries, np.int64))


ANSWERS = [Branch(np.arange(90, 96), 2, 6), Branch(np.arange(80, 83), 0, 3)]
TREES = {
    "one token": [Tree([rollout(0, [1])])],
    "several trees of one token": [Tree([rollout(i, [1])]) for i in range(19)],
    "no branches": [Tree([rollout(0, range(45))]), Tree([rollout(1, range(7))])],
    "answers at the very start and end": [Tree([rollout(0, range(37), [1, 37])], ANSWERS)],
    "one a prefix of another": [Tree([rollout(0, range(50), [3, 20, 41]), rollout(1, range(20), [3, 20])], ANSWERS)],
    "two turns shared": [
        Tree([rollout(i, [*range(24), *range(100 * i, 100 * i + 18)], [4, 14, 24, 42]) for i in range(1, 4)], ANSWERS)
    ],
    "deep": [
        Tree([rollout(i, [*range(9 * i), *[100 + i] * 9], [9 * i, 9 * i + 9]) for i in range(1, 6)], ANSWERS)
    ],
}  # fmt: skip


@pytest.mark.parametrize("trees", TREES.values(), ids=TREES.keys())
def test_trees(trees):
    check(pack(trees))


@pytest.mark.parametrize("tokens", [20, 21, 22, 23])
def test_lengths(tokens):
    """Rows of statistics and numbers of the mask are padded to 16 bytes."""
    plan = pack([Tree([rollout(0, range(tokens + 1))])])
    assert plan.n_tokens == tokens
    check(plan, options={"window": 7}, q_heads=4, kv_heads=2)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1), (6, 2), (7, 1), (8, 1)]), st.sampled_from([None, 1, 5]))
def test_random_trees(seed, heads, window):
    q_heads, kv_heads = heads
    check(plan_of(seed)[-1], options={"window": window}, q_heads=q_heads, kv_heads=kv_heads, seed=seed % 97)


@pytest.mark.parametrize("window", [None, 6])
def test_softcapped(window):
    check(comb(50, 4, trees=2), options={"softcap": 5.0, "window": window, "scale": 0.7})


@pytest.mark.parametrize("d", [16, 24, 64, 96, 128, 192, 256])
def test_head_dims(d):
    check(comb(33, 3), d=d)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_plain_torch(dtype):
    check(comb(60, 4), dtype)


@pytest.mark.parametrize(("rows", "keys"), [(32, 16), (16, 32)])
def test_pointers_and_blocks_of_other_shapes(monkeypatch, rows, keys):
    set_blocks(monkeypatch, rows, keys, tma=0)
    check(comb(70, 5), options={"window": 20}, q_heads=3)


def test_large_scores_keep_their_mass():
    plan = comb(40, 3)
    case = case_of(plan)
    case[0] *= 300
    exact, ours = (
        run(case, plan, torch.float64 if b == "reference" else torch.float32, b) for b in ("reference", "triton")
    )
    for name, e, o in zip(NAMES, exact, ours, strict=True):
        assert (o.double() - e).abs().max() <= 1e-3 * e.abs().max() + 1e-3, name


def test_strided_inputs_and_upstream():
    """Heads before tokens, as some models lay them out, and gradients that are views."""
    plan = comb(40, 3)
    case = case_of(plan, q_heads=4, kv_heads=2)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in case]
    strided[3] = case[3].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in strided)
    for name, a, b in zip(NAMES, *(run(c, plan, torch.float32, "triton") for c in (case, strided)), strict=True):
        assert torch.equal(a, b), name


def test_heads_past_2_to_the_31_elements(monkeypatch):
    """Head-major tensors: three heads 2^30 numbers apart, of which only the first few are ever touched. They begin 2^31
    numbers into memory, so that an offset that wraps around reads zeros."""
    set_blocks(monkeypatch, tma=0)
    plan = comb(20, 2)
    case = [x.half() for x in case_of(plan, q_heads=3, kv_heads=3)]
    n, apart = plan.n_tokens * 16, 1 << 30
    memory = torch.empty(4 * apart + 4 * n, dtype=torch.half, device=DEVICE)
    far = [memory.as_strided(x.shape, (16, apart, 1), 2 * apart + i * n).copy_(x) for i, x in enumerate(case)]
    for name, a, b in zip(NAMES, *(run(c, plan, torch.half, "triton") for c in (case, far)), strict=True):
        assert torch.equal(a, b), name


def test_expanded_gradients_are_no_tensor_maps(monkeypatch):
    """The gradient of a sum over heads is one head's, seen as many; descriptors need each at an address of its own."""
    strides, sources = [], triton_path.Launch.sources
    monkeypatch.setattr(
        triton_path.Launch,
        "sources",
        lambda self, tma, rows, *tensors: (
            strides.extend(s for x in tensors for s in x.stride()) or sources(self, tma, rows, *tensors)
        ),
    )
    plan = comb(20, 2)
    q, k, v, upstream = (x.float() for x in case_of(plan))
    results = []
    for gradient in (upstream[:, :1].expand(q.shape), upstream[:, :1].repeat(1, 2, 1)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        results.append(torch.autograd.grad(tree_attention(*leaves, plan, backend="triton"), leaves, gradient))
    assert all(map(torch.equal, *results)) and strides and 0 not in strides


def test_backward_repeats_bitwise():
    plan = comb(45, 4)
    case = case_of(plan, q_heads=4, kv_heads=2)
    for a, b in zip(*(run(case, plan, torch.float32, "triton") for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def test_one_launch_forward_three_backward(monkeypatch):
    launched = []
    for name in ("attention_forward", "attention_deltas", "attention_backward_q", "attention_backward_kv"):
        kernel = getattr(triton_kernels, name)
        counted = type(
            "Counted", (), {"__getitem__": lambda _, grid, k=kernel, n=name: launched.append(n) or k[grid]}
        )()
        monkeypatch.setattr(triton_kernels, name, counted)
    plan = comb(30, 3)
    run(case_of(plan), plan, torch.float32, "triton")
    assert launched == ["attention_forward", "attention_deltas", "attention_backward_q", "attention_backward_kv"]


@pytest.mark.parametrize("mutant", ["subtree_end", "position_ids"])
def test_a_wrong_mask_is_seen(mutant):
    """The comparison fails where a kernel is given a mask that is off by one."""
    plan = comb(50, 4)
    off = dataclasses.replace(plan, **{mutant: getattr(plan, mutant) + (np.arange(plan.n_tokens) > 20)})
    case, options = case_of(plan), {"window": 9}
    exact = run(case, plan, torch.float64, "reference", **options)
    wrong = run(case, off, torch.float32, "triton", **options)
    assert (wrong[0].double() - exact[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("sizes", "dtype", "message"), [
    ((2, 1, 300), torch.float32, "heads of up to 256"),
    ((17, 1, 16), torch.float32, "up to 16 query heads per key head"),
    ((2, 1, 16), torch.float64, "takes torch.bfloat16"),
])  # fmt: skip
def test_what_the_kernels_do_not_take_is_refused(sizes, dtype, message):
    plan = comb(10, 2)
    heads, kv_heads, d = sizes
    q, kv = (torch.zeros(plan.n_tokens, n, d, dtype=dtype) for n in (heads, kv_heads))
    with pytest.raises(ValueError, match=message):
        tree_attention(q, kv, kv, plan, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_plan_comes_to_the_device_without_a_wait():
    """So the second forward of a pass in parts is launched while the first one runs."""
    plan = plan_of(7)[-1]
    q, k, v, _ = (x.float() for x in case_of(plan))
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = plan.tensor("rows_without_gradient", DEVICE)
        out = tree_attention(q[rows], k, v, plan, backend="triton", rows="rows_without_gradient")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(out, tree_attention(q, k, v, plan, backend="triton")[rows])
