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
| workspace | test_never_more_than_the_workspace, test_backward_chunks_are_whole_tiles_and_wide |
| spills, TF32, wgmma | the gate, test_inspect.py |
"""

import ast
import inspect
from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from igpo_kernels import Pairs, linear_logprob, linear_policy_loss, workspace
from igpo_kernels.linear_logprob import triton_kernels, triton_path
from igpo_kernels.workspace import GPU_BYTES
from tests.kernels.test_linear_logprob import (
    NAMES,
    beyond_results,
    check_barred,
    check_int32,
    check_saved_weight,
    check_z_loss,
    make,
    run,
)
from tests.kernels.triton.conftest import Poison

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("bf16_dots", "fused")
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
    temperature = options.get("temperature", 1.0)
    logit = (case[0] @ case[1].T).abs().max() / temperature
    upstream = float(2 * case[-2].abs().sum() + case[-1].abs().sum())
    # So do onehot and p, which a product then multiplies: with one word in the vocabulary they must cancel.
    times = {"dhidden": float(case[1].abs().max() / temperature), "dweight": float(case[0].abs().max() / temperature)}
    for name, e, o, p in zip(NAMES, exact, ours, plain, strict=False):
        rounding = 2e-6 * (1 + e.abs().max()) + 1e-7 * (3 + logit) * upstream * max(1.0, times.get(name, 1.0))
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
    with Poison():
        logp, entropy = linear_logprob(hidden, weight, none, none, entropy=True, backend="triton")
        assert logp.shape == entropy.shape == (0,)
        gradients = torch.autograd.grad(logp.sum() + entropy.sum(), (hidden, weight))
    assert all(g.eq(0).all() for g in gradients)


def test_all_negative_logits_keep_their_mass():
    check(make(5, 8, 300, 9, shift=-200.0))


@pytest.mark.parametrize("vocab", [300, 256])
def test_large_logits_keep_their_digits(vocab):
    # Logits of about -3000 that float32 holds exactly: what rounds is what the kernels do with them.
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.ones(7, 16), torch.randint(-4, 5, (vocab, 16), generator=g) / 8
    hidden[:, 0], weight[:, 0] = 1000, -3
    labels, d = torch.randint(0, vocab, (7,), generator=g), torch.randn(2, 7, generator=g)
    exact, ours = (
        run(on_device((hidden, weight, None, torch.arange(7), labels, *d)), dtype, backend)
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "triton"))
    )
    for name, e, o in zip(NAMES, exact, ours, strict=False):
        torch.testing.assert_close(o.double(), e, rtol=0, atol=3e-6 * float(1 + e.abs().max()), msg=name)


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(temperature):
    check(make(9, 8, 200, 12), temperature=temperature)


def test_a_row_without_any_token_is_nan():
    hidden, weight = torch.randn(3, 8, device=DEVICE), torch.randn(200, 8, device=DEVICE)
    barred = torch.full((200,), -torch.inf, device=DEVICE)
    logp, entropy = linear_logprob(
        hidden, weight, torch.arange(3, device=DEVICE), bias=barred, entropy=True, backend="triton"
    )
    assert logp.isnan().all() and entropy.isnan().all()


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
    labels, upstream = torch.arange(24, device=DEVICE)[::2], torch.randn(12, 2, device=DEVICE)[:, 0]
    got, want = (
        torch.autograd.grad(linear_logprob(hidden, weight, labels, backend=b), (hidden, weight), upstream)
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(got, want)


def test_what_is_launched_is_what_the_gate_compiles(monkeypatch):
    # Pointers divisible by 16 bytes, strides and hidden size by 16: here nothing that is given is.
    wide, weight, biases = (torch.randn(n, device=DEVICE) for n in ((60, 29), (300, 20), 301))
    leaves = [wide[:50, 3:23], weight, biases[1:]]
    assert not any(triton_path.aligned(x) for x in leaves[:2]) and leaves[2].data_ptr() % 16
    labels, upstream = torch.randint(0, 300, (51,), device=DEVICE)[1:], torch.randn(51, device=DEVICE)[1:]
    assert labels.data_ptr() % 16 and upstream.data_ptr() % 16

    def gradients(backend):
        x = [leaf.detach().requires_grad_() for leaf in leaves]
        out = linear_logprob(*x[:2], labels, bias=x[2], entropy=True, logsumexp=True, backend=backend)
        return torch.autograd.grad(out, x, [upstream] * 3)

    launched = set()
    for table, fn in triton_path.KERNELS.items():
        spy = Launches(table, fn, launched)
        monkeypatch.setattr(triton_kernels, fn.__name__, spy)
    monkeypatch.setattr(workspace, "CPU_BYTES", 90 << 10)  # several blocks of rows
    got = gradients("triton")
    assert launched == set(triton_path.KERNELS)
    torch.testing.assert_close(got, gradients("reference"), rtol=1e-4, atol=1e-4)


class Launches:
    def __init__(self, table, fn, launched):
        self.table, self.fn, self.launched = table, fn, launched

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.launched.add(self.table)
            for name, value in zip(self.fn.arg_names, arguments, strict=False):
                if isinstance(value, torch.Tensor):
                    assert value.data_ptr() % 16 == 0, name
                elif name == "n_hidden" or name.endswith("stride"):
                    assert value % 16 == 0, name
            assert isinstance(arguments[0], torch.Tensor) != constants.get("TMA", 0)
            self.fn[grid](*arguments, **constants)

        return launch


@pytest.mark.parametrize("barred", [slice(0, 2100), slice(100, 2200), slice(7, 8)])
def test_barred_tokens(barred):
    check_barred("triton", barred, DEVICE)


def test_int32_indices():
    check_int32("triton", DEVICE)


def test_z_loss():
    check_z_loss("triton", DEVICE)


def test_the_backward_takes_the_saved_weight():
    check_saved_weight("triton", DEVICE)


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


@pytest.mark.skipif(DEVICE != "cpu", reason="what cuBLAS takes blurs the peak")
@pytest.mark.parametrize("size, dtype, kilobytes", [
    (1024, torch.float32, 1300), (1024, torch.bfloat16, 1024),
    (8192, torch.float32, 2048), (8192, torch.bfloat16, 2048),
])  # fmt: skip
def test_never_more_than_the_workspace(monkeypatch, size, dtype, kilobytes):
    # Neither kernels nor products allocate (but a CPU multiplies float32 copies): they are left out.
    for fn in triton_path.KERNELS.values():
        monkeypatch.setattr(triton_kernels, fn.__name__, defaultdict(lambda: lambda *_, **__: None))
    monkeypatch.setattr(triton_path, "product", lambda a, b, out, accumulate=False: out)
    monkeypatch.setattr(workspace, "CPU_BYTES", kilobytes << 10)
    hidden, weight = torch.zeros(1500, size, dtype=dtype, requires_grad=True), torch.zeros(5000, size, dtype=dtype)
    made, chunks = [], triton_path.Head.backward_chunks
    monkeypatch.setattr(triton_path.Head, "backward_chunks", lambda *a: made.append(chunks(*a)) or made[-1])
    taken = beyond_results("triton", hidden, weight, entropy=True)
    assert all(kilobytes * 0.55 < part / 1024 <= kilobytes for part in taken), taken
    assert 3 * made[0][0] < len(hidden)


def test_blocks_of_rows_and_vocabulary_give_the_same(monkeypatch):
    case = make(100, 64, 1000, 100, bias=False)
    case = on_device((*(x.bfloat16() for x in case[:2]), *case[2:]))
    whole = run(case, torch.bfloat16, "triton")
    monkeypatch.setattr(triton_path, "workspace_bytes", lambda device: 100 << 10)
    for name, a, b in zip(NAMES, run(case, torch.bfloat16, "triton"), whole, strict=False):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2, msg=name)


@pytest.mark.parametrize(
    ("hidden_size", "rows", "vocab"),
    [(1024, 64, 32_000), (4096, 8192, 151_936), (8192, 300_000, 262_144), (64, 2_000_000, 400_000)],
)
def test_backward_chunks_are_whole_tiles_and_wide(hidden_size, rows, vocab):
    hidden, weight = (torch.empty(1, hidden_size, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    head = triton_path.Head.of(hidden, weight, None, 1.0, 0.0, rows)
    of_all = torch.empty(2 * rows, hidden_size, dtype=torch.bfloat16, device="meta")
    height, width = head.backward_chunks(of_all, rows, vocab, GPU_BYTES)
    assert height % 16 == 0 or height == rows
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
def test_a_cuda_graph_captures_known_pairs():
    hidden, weight, _, rows, labels, *_ = make(30, 64, 300, 120, bias=False)
    hidden, weight = (x.to(DEVICE, torch.bfloat16).requires_grad_() for x in (hidden, weight))
    pairs, ones = Pairs(labels.numpy(), rows.numpy()), torch.ones(120, device=DEVICE)

    def step():
        logp, entropy = linear_logprob(hidden, weight, pairs, entropy=True, backend="triton")
        loss, _ = linear_policy_loss(hidden, weight, pairs, None, None, ones, ones, backend="triton")
        return torch.autograd.grad(logp.sum() + entropy.sum() + loss, (hidden, weight))

    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.testing.assert_close(captured, step())


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
