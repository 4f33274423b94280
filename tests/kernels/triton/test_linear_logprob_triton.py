"""The Triton LM head against full logits in float64, forward and gradients; every output starts as NaN.

Which of kernels.md's traps is shown where (the rest do not touch this op):

| trap | test |
| --- | --- |
| phantom vocabulary mass, V no multiple of the tile | test_ragged_shapes, test_many_tiles |
| maximum initialised with 0 | test_all_negative_logits_keep_their_mass |
| strided upstream gradients; non-contiguous inputs | test_strided_upstream_and_inputs |
| repeated rows assigned instead of accumulated | test_repeated_rows_and_cells_accumulate |
| dW accumulated in bf16 across chunks | test_row_blocks_add_up_in_float32 |
| int32 overflow past 2^31 elements | test_offsets_are_64_bit; gpu: test_more_than_2_31_elements |
| a length as constexpr; autotune keyed on a length | test_a_new_length_compiles_nothing |
| tokens on grid.y | test_grids_have_one_dimension |
| workspace | test_workspace_bounds_every_allocation, test_backward_blocks_fit_a_gpus_workspace |
| spills, TF32, wgmma | the gate, test_inspect.py |
"""

import ast
import inspect

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from igpo_kernels import linear_logprob
from igpo_kernels.linear_logprob import triton_kernels, triton_path
from igpo_kernels.workspace import GPU_BYTES
from tests.allocations import LargestTensor
from tests.kernels.test_linear_logprob import make, run
from tests.kernels.triton.conftest import Poison

NAMES = ("logp", "entropy", "dhidden", "dweight", "dbias")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("bf16_dots")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_device(case):
    return tuple(x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in case)


def check(case, dtype=torch.float32, **options):
    """Rule of error 3: no more than twice what plain torch errs in the same dtype, and a rounding of the largest."""
    case = (*(None if x is None else x.to(DEVICE, dtype).double() for x in case[:3]), *(x.to(DEVICE) for x in case[3:]))
    exact = run(case, torch.float64, "reference", **options)
    with Poison():
        ours = run(case, dtype, "triton", **options)
    plain = run(case, dtype, "reference", **options)
    # A label's logit and its row's are summed apart: they agree to a rounding of the largest logit.
    logit = (case[0] @ case[1].T).abs().max() / options.get("temperature", 1.0)
    upstream = float(case[-2].abs().sum() + case[-1].abs().sum())
    for name, e, o, p in zip(NAMES, exact, ours, plain, strict=False):
        rounding = 2e-6 * (1 + e.abs().max()) + 1e-7 * (3 + logit) * upstream
        if dtype != torch.float32 and name.startswith("d"):
            rounding += torch.finfo(dtype).eps * e.abs().max()
        assert (o.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + rounding, name
    return ours


@settings(max_examples=30, deadline=None, phases=[Phase.explicit, Phase.generate])  # shrinking takes minutes
@given(
    n=st.integers(1, 40), h=st.integers(1, 70), v=st.integers(1, 140), m=st.integers(1, 90), seed=st.integers(0, 999),
    softcap=st.sampled_from([0.0, 3.0]), temperature=st.sampled_from([0.5, 1.0, 1.7]), bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_ragged_shapes(n, h, v, m, seed, softcap, temperature, bias, dtype):
    check(make(n, h, v, m, seed, bias), dtype, softcap=softcap, temperature=temperature)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, dict(softcap=5.0, temperature=0.7)])
def test_many_tiles(dtype, options):
    # 2 x 3 tiles of the large class, more than the programs: some walk two.
    check(make(190, 136, 700, 260), dtype, **options)


def test_one_token():
    check(make(1, 8, 1100, 1), torch.bfloat16)


def test_no_pairs():
    hidden, weight = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (3, 20))
    none = torch.zeros(0, dtype=torch.long, device=DEVICE)
    logp, entropy = linear_logprob(hidden, weight, none, none, entropy=True, backend="triton")
    assert logp.shape == entropy.shape == (0,)
    gradients = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert all(g.eq(0).all() for g in gradients)


def test_all_negative_logits_keep_their_mass():
    check(make(5, 8, 300, 9, shift=-200.0))


def test_large_logits_do_not_overflow():
    case = make(5, 8, 300, 9)
    check((case[0] * 60, case[1] * 60, *case[2:]))


def test_a_certain_label_keeps_its_gradient():
    # p -> 1: onehot - p cancels, and must not be rounded to bf16 before it does.
    case = make(6, 8, 40, 6, bias=False)
    labels = (case[0] @ case[1].T).argmax(1)
    check((case[0] * 3, case[1], None, torch.arange(6), labels, case[5], case[6] * 0), torch.bfloat16)


def test_repeated_rows_and_cells_accumulate():
    hidden, weight = (torch.randn(n, 8, device=DEVICE) for n in (3, 20))
    hidden.requires_grad_()
    rows, labels = torch.tensor([1, 1, 1, 2], device=DEVICE), torch.tensor([4, 7, 4, 4], device=DEVICE)
    upstream = torch.tensor([1.0, 2.0, 3.0, 0.0], device=DEVICE)
    grad = lambda at: torch.autograd.grad(  # noqa: E731
        linear_logprob(hidden, weight, labels[at], rows[at], backend="triton"), hidden, upstream[at]
    )[0]
    torch.testing.assert_close(grad([0, 1, 2, 3]), grad([0]) + grad([1]) + grad([2]))


def test_strided_upstream_and_inputs():
    hidden, weight = torch.randn(8, 12, device=DEVICE).T, torch.randn(16, 37, device=DEVICE).T[:, ::2]
    hidden.requires_grad_(), weight.requires_grad_()
    labels, upstream = torch.arange(12, device=DEVICE), torch.randn(12, 2, device=DEVICE)[:, 0]
    got, want = (
        torch.autograd.grad(linear_logprob(hidden, weight, labels, backend=b), (hidden, weight), upstream)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want)


def test_rows_that_tma_cannot_address():
    case = on_device(make(12, 24, 70, 30))
    wide = torch.randn(12, 29, device=DEVICE, dtype=torch.bfloat16)
    hidden, weight = wide[:, 3:27], case[1].bfloat16()
    rows = torch.arange(12, device=DEVICE)
    got, want = (
        linear_logprob(h, weight, case[4][:12] % 70, rows, backend="triton") for h in (hidden, hidden.contiguous())
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_is_deterministic(dtype):
    case = on_device(make(30, 40, 300, 120))
    first, again = (run(case, dtype, "triton", softcap=2.0) for _ in range(2))
    for name, a, b in zip(NAMES, first, again, strict=True):
        assert torch.equal(a, b), name


def test_gradients_of_one_output_only():
    hidden, weight = (torch.randn(n, 8, device=DEVICE, requires_grad=True) for n in (5, 20))
    labels = torch.arange(5, device=DEVICE)
    for which in (0, 1):
        got, want = (
            torch.autograd.grad(
                linear_logprob(hidden, weight, labels, entropy=True, backend=b)[which].sum(), (hidden, weight)
            )
            for b in ("triton", "reference")
        )
        torch.testing.assert_close(got, want)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(5, 8, device=DEVICE, requires_grad=True), torch.randn(20, 8, device=DEVICE)
    linear_logprob(hidden, weight, torch.arange(5, device=DEVICE), backend="triton").sum().backward()
    assert hidden.grad is not None and weight.grad is None


def test_row_blocks_add_up_in_float32(monkeypatch):
    # 100 blocks each add 2^-10 to 0.5: a sum in bf16 would lose every one of them.
    n, small = 101, 2.0**-9
    hidden = torch.full((n, 8), small, dtype=torch.bfloat16, device=DEVICE)
    hidden[0] = 1
    weight = torch.zeros(2, 8, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    monkeypatch.setattr(triton_path.Head, "backward_chunks", lambda *_: (1, 256))
    labels = torch.zeros(n, dtype=torch.long, device=DEVICE)
    linear_logprob(hidden, weight, labels, backend="triton").sum().backward()
    assert weight.grad[0, 0].item() == pytest.approx(0.5 * (1 + 100 * small), rel=2**-8)


@pytest.mark.parametrize("megabytes", [1, 3])
def test_workspace_bounds_every_allocation(monkeypatch, megabytes):
    # Logits would be 8 MB, their gradient 4; blocks of rows and of vocabulary, as the workspace holds.
    case = make(500, 128, 4000, 500, bias=False)
    case = (*(x.bfloat16() for x in case[:2]), *case[2:])
    monkeypatch.setattr(triton_path, "workspace_bytes", lambda device: megabytes << 20)
    seen = LargestTensor()
    with seen:
        tight = run(on_device(case), torch.bfloat16, "triton")
    # dW (a gradient, float32 when rows come in blocks) is the largest tensor; CPU products make float32 copies of dz.
    assert seen.bytes <= max(4000 * 128 * 4, 2 * megabytes << 20)
    monkeypatch.undo()
    whole = run(on_device(case), torch.bfloat16, "triton")
    for name, a, b in zip(NAMES, tight, whole, strict=False):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize(
    ("hidden_size", "rows", "vocab"),
    [(1024, 64, 32_000), (4096, 8192, 151_936), (8192, 300_000, 262_144), (64, 2_000_000, 400_000)],
)
def test_backward_blocks_fit_a_gpus_workspace(monkeypatch, hidden_size, rows, vocab):
    monkeypatch.setattr(triton_path, "workspace_bytes", lambda device: GPU_BYTES)
    hidden, weight = (torch.empty(1, hidden_size, dtype=torch.bfloat16) for _ in range(2))
    head = triton_path.Head.of(hidden, weight, None, 1.0, 0.0, rows)
    height, width = head.backward_chunks(
        torch.empty(2 * rows, hidden_size, dtype=torch.bfloat16, device="meta"), rows, vocab
    )
    assert height * (hidden_size * 6 + width * 2) <= GPU_BYTES
    assert width % head.backward["BLOCK_VOCAB"] == 0 and width >= min(vocab, triton_path.LEAST_WIDTH // 2)


def test_mixed_dtypes_are_refused():
    hidden, weight = torch.zeros(3, 8), torch.zeros(7, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="one dtype"):
        linear_logprob(hidden, weight, torch.zeros(3, dtype=torch.long), backend="triton")
    with pytest.raises(ValueError, match="one dtype"):
        linear_logprob(hidden.double(), weight.double(), torch.zeros(3, dtype=torch.long), backend="triton")


def jitted():
    """The kernels' functions, as written."""
    tree = ast.parse(inspect.getsource(triton_kernels))
    return [f for f in tree.body if isinstance(f, ast.FunctionDef)]


def test_offsets_are_64_bit():
    """Whatever multiplies a row, tile or cell number by a stride is int64: widened, or loaded as such."""
    checked = 0
    for function in jitted():
        for node in ast.walk(function):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
                text = ast.unparse(node)
                if "stride" in text or text.endswith("* n_rows"):
                    checked += 1
                    # Cells' rows and labels are loaded from int64 tensors.
                    assert "to(tl.int64)" in text or function.name.startswith("cell_"), f"{function.name}: {text}"
    assert checked >= 6


def test_a_new_length_compiles_nothing():
    """Lengths are neither constexpr nor specialised on; n_hidden and strides are a model's."""
    launched = [f for f in jitted() if "do_not_specialize=LENGTHS" in ast.unparse(f.decorator_list[0])]
    assert len(launched) == len(triton_path.KERNELS)
    for function in launched:
        lengths = {a.arg for a in function.args.args if a.arg.startswith(("n_", "first_"))} - {"n_hidden"}
        assert lengths and lengths <= set(triton_kernels.LENGTHS)


def test_grids_have_one_dimension():
    calls = [n.func for n in ast.walk(ast.parse(inspect.getsource(triton_path))) if isinstance(n, ast.Call)]
    grids = [f.slice for f in calls if isinstance(f, ast.Subscript) and ast.unparse(f).startswith("kernels.")]
    assert len(grids) == len(triton_path.KERNELS)
    assert all(len(g.elts) == 1 if isinstance(g, ast.Tuple) else ast.unparse(g).startswith("self.grid(") for g in grids)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_more_than_2_31_elements():
    vocab, size = 2**19 + 300, 4096
    hidden = torch.randn(8, size, device=DEVICE, dtype=torch.bfloat16) / 64
    weight = torch.randn(vocab, size, device=DEVICE, dtype=torch.bfloat16)
    labels = torch.arange(vocab - 8, vocab, device=DEVICE)
    hidden.requires_grad_(), weight.requires_grad_()
    logp = linear_logprob(hidden, weight, labels, backend="triton")
    gradients = torch.autograd.grad(logp.sum(), (hidden, weight))
    z = (hidden @ weight.T).float()
    want = z.log_softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logp, want, rtol=0, atol=0.05)
    dz = torch.nn.functional.one_hot(labels, vocab) - z.softmax(1)
    torch.testing.assert_close(gradients[1][-300:], (dz[:, -300:].T @ hidden.float()).bfloat16(), rtol=0.02, atol=1e-3)
