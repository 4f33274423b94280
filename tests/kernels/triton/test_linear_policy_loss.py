"""linear_policy_loss on Triton against its definition in float64: values, every gradient, chunks, refusals."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igpo_kernels import LossSettings, linear_policy_loss, policy_loss
from tests.allocations import peak_bytes
from tests.kernels import magnitudes

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison", "fused")

from igpo_kernels.linear_policy_loss import triton_path  # noqa: E402
from igpo_kernels.policy_loss import triton_path as loss_path  # noqa: E402
from igpo_kernels.triton_variants import Config  # noqa: E402

FULL = LossSettings(clip_high=0.28, dual_clip=1.5, kl=0.3, entropy=0.2)
TOKEN = LossSettings(kl=0.1, importance="token", importance_cap=1.3)
MASK = LossSettings(entropy=0.1, importance="token", importance_mode="mask", importance_cap=1.3)
BAND = LossSettings(importance="token", importance_cap=1.3, importance_floor=0.7)

CISPO = LossSettings(surrogate="cispo", kl=0.2, unbiased_kl=True, importance="token")
SAPO = LossSettings(surrogate="sapo", sapo_temperature_neg=2.0, entropy=0.1)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of the vocabulary and several blocks of a row's pairs, at shapes the interpreter can do."""
    table = {
        "linear_policy_loss": {"BLOCK": 32, "PAIRS": 4},
        "policy_loss_finish": {"BLOCK": 16},
        "policy_loss_scale": {"BLOCK": 256, "PROGRAMS": 3},
    }
    config_for = lambda kernel, *_: Config(table[kernel], 1, 1)  # noqa: E731
    monkeypatch.setattr(triton_path, "config_for", config_for)
    monkeypatch.setattr(loss_path, "config_for", config_for)


def make(n, h, v, m, seed=0, shift=0.0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    weights = torch.rand(m, generator=g, dtype=torch.float64) * (torch.rand(m, generator=g) > 0.2)
    pairs = dict(
        old_logp=randn(m) - 3, advantages=randn(m), weights=weights, engine_logp=randn(m), ref_logp=randn(m) - 3
    )
    leaves = dict(hidden=randn(n, h) * scale / h**0.5, weight=randn(v, h), bias=randn(v) + shift)
    rows, labels = torch.randint(0, n, (m,), generator=g), torch.randint(0, v, (m,), generator=g)
    pairs["clip_scale"] = 3 * torch.rand(m, generator=g, dtype=torch.float64)
    return leaves, dict(labels=labels, rows=rows), pairs


def run(case, setting, backend, dtype, device="cpu", without=(), upstream=1.7, layout=lambda x: x, **options):
    leaves, ids, pairs = case
    leaves = {k: layout(x.to(device, dtype)).requires_grad_() for k, x in leaves.items() if k not in without}
    ids = {k: layout(x.to(device)) for k, x in ids.items()}
    wide = torch.promote_types(dtype, torch.float32)
    pairs = {k: None if k in without else layout(x.to(device, wide)) for k, x in pairs.items()}
    op = (lambda *_, backend, **more: plain_torch(**more)) if backend == "plain" else linear_policy_loss
    loss, metrics = op(**leaves, **ids, **pairs, settings=setting, backend=backend, **options)
    grads = torch.autograd.grad(loss * upstream, leaves.values())
    out = {**metrics, "loss": loss.detach(), **{f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}}
    return {k: v.detach().double().cpu() for k, v in out.items()}


def plain_torch(hidden, weight, labels, rows, settings, bias=None, temperature=1.0, softcap=0.0, **pairs):
    """The definition with logits in the inputs' dtype, as torch's linear layer gives them."""
    z = torch.nn.functional.linear(hidden[rows], weight, bias).float()
    z = (softcap * (z / softcap).tanh() if softcap else z) / temperature
    log_p = z.log_softmax(1)
    logp, entropy = log_p.gather(1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)
    loss, metrics = policy_loss(logp, **pairs, settings=settings, entropy=entropy, backend="reference")
    return loss, {**metrics, "logp": logp.detach()}


def check(case, setting=FULL, device="cpu", dtype=torch.float32, **options):
    case = ({k: x.to(dtype).double() for k, x in case[0].items()}, *case[1:])
    exact = run(case, setting, "reference", torch.float64, **options)
    plain = run(case, setting, "plain", dtype, **options)
    ours = run(case, setting, "triton", dtype, device, **options)
    assert ours.keys() == exact.keys()
    without = options.get("without", ())
    leaves, pairs = ({k: x for k, x in part.items() if k not in without} for part in (case[0], case[2]))
    pairs.setdefault("old_logp", None)
    more = {k: options[k] for k in ("temperature", "softcap") if k in options}
    slopes = magnitudes.of_head_gradients(leaves, **case[1], pairs=pairs, settings=setting, **more)
    for name, e in exact.items():
        tolerance = 2e-6 * (1 + float(e.abs().max())) * (1 + len(case[1]["rows"]) ** 0.5)
        tolerance += 5e-7 * slopes * name.startswith("d_")
        error, allowed = (ours[name] - e).abs().max(), 2 * (plain[name] - e).abs().max()
        assert error <= allowed + tolerance, (name, float(error), float(allowed))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=st.tuples(*(st.integers(1, most) for most in (30, 17, 100, 60, 999))),
    full=st.booleans(), softcap=st.sampled_from([0.0, 2.0]), temperature=st.sampled_from([0.7, 1.0, 1.3]),
    without=st.sets(st.sampled_from(["bias", "old_logp", "engine_logp", "clip_scale"])),
)  # fmt: skip
def test_ragged_shapes(case, full, softcap, temperature, without, device):
    without = without if full else without | {"ref_logp"}
    check(
        make(*case), FULL if full else LossSettings(), device, softcap=softcap, temperature=temperature, without=without
    )


@pytest.mark.parametrize("setting", [CISPO, SAPO], ids=["cispo", "sapo"])
def test_other_surrogates(setting, device):
    check(make(7, 5, 40, 12), setting, device)


def test_rows_with_many_pairs_and_shared_labels(device):
    leaves, ids, pairs = make(3, 5, 40, 50)
    for labels in (1, 7):
        check((leaves, {**ids, "labels": ids["labels"] % labels}, pairs), device=device)


@pytest.mark.parametrize("setting", [TOKEN, MASK, BAND], ids=["truncate", "mask", "band"])
def test_importance_weights_of_tokens(setting, device):
    check(make(6, 6, 40, 16), setting, device)
    check(make(6, 6, 40, 16), setting, device, without=("old_logp",))


def test_a_pair_of_weight_0_adds_nothing(device):
    leaves, ids, pairs = make(3, 4, 40, 12)
    junk = pairs["weights"] == 0
    values = dict(old_logp=-1e4, advantages=-torch.inf, ref_logp=1e4, engine_logp=torch.nan, clip_scale=torch.nan)
    bad = {k: torch.where(junk, value, pairs[k]) for k, value in values.items()}
    kept = {k: x[~junk] for k, x in pairs.items()}, {k: x[~junk] for k, x in ids.items()}
    assert 0 < junk.sum() < 12
    for dtype, setting in ((torch.float32, TOKEN), (torch.float16, FULL)):
        found = run((leaves, ids, {**pairs, **bad}), setting, "triton", dtype, device)
        expected = run((leaves, kept[1], kept[0]), setting, "triton", dtype, device)
        found["logp"] = found["logp"][~junk]
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=1e-3, atol=1e-3 * float(x.abs().max()))


def test_a_nan_scale_is_not_hidden(device):
    leaves, ids, pairs = make(3, 4, 40, 12)
    pairs["weights"] += 0.1
    pairs["clip_scale"][5] = torch.nan
    out = run((leaves, ids, pairs), LossSettings(), "triton", torch.float32, device)
    assert out["loss"].isnan() and out["d_hidden"][ids["rows"][5]].isnan().any()


def test_no_pairs_give_zero_gradients(device):
    out = run(make(4, 5, 40, 0), FULL, "triton", torch.float32, device)
    assert all(not x.isnan().any() and not x.any() for x in out.values())


@pytest.mark.parametrize("v", [1, 31, 32, 33, 1025])
def test_vocabularies_beside_a_tile_have_no_phantom_mass(v, device):
    check(make(6, 4, v, 9, shift=-200.0), device=device)


def test_large_logits_do_not_overflow(device):
    check(make(5, 4, 70, 9, scale=1000.0), LossSettings(entropy=0.2), device, without=("old_logp", "ref_logp"))


def test_large_logits_keep_their_digits(device):
    # Logits of about -3000 that float32 holds exactly: what rounds is what the kernel does with them.
    leaves, ids, pairs = make(5, 16, 70, 9)
    leaves["hidden"][:], leaves["weight"][:] = 1, (leaves["weight"] * 8).round() / 8
    leaves["hidden"][:, 0], leaves["weight"][:, 0] = 1000, -3
    case, without = (leaves, ids, pairs), ("bias", "old_logp", "ref_logp")
    setting = LossSettings(entropy=0.2)
    exact = run(case, setting, "reference", torch.float64, without=without)
    ours = run(case, setting, "triton", torch.float32, device, without=without)
    for name in ("logp", "entropy", "d_hidden", "d_weight"):
        e = exact[name]
        assert (ours[name] - e).abs().max() <= 3e-6 * (1 + e.abs().max()), name


@pytest.mark.parametrize("temperature", [0.01, 100.0])
def test_extreme_temperatures(temperature, device):
    check(
        make(5, 8, 70, 9), LossSettings(entropy=0.2), device, temperature=temperature, without=("old_logp", "ref_logp")
    )


def test_a_row_without_any_token_is_nan(device):
    leaves, ids, pairs = make(3, 4, 40, 6)
    leaves["bias"][:] = -torch.inf
    out = run((leaves, ids, pairs), LossSettings(), "triton", torch.float32, device, without=("old_logp",))
    assert out["logp"].isnan().all() and out["loss"].isnan()


def test_a_token_barred_by_its_bias_leaves_no_nan(device):
    # -inf is what -1e4 comes to; the definition's entropy makes 0 * -inf of it.
    (leaves, ids, pairs), barred = make(6, 4, 70, 9), {}
    ids["labels"] %= 60
    for bias in (-1e4, -torch.inf):
        leaves["bias"][60:] = bias
        barred[bias] = run((leaves, ids, pairs), FULL, "triton", torch.float32, device)
    for name, expected in barred[-1e4].items():
        assert torch.equal(barred[-torch.inf][name], expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_plain_torch(dtype, device):
    check(make(40, 32, 100, 64), device=device, dtype=dtype)


def test_small_weights_survive_float16(device):
    # A weight of 1e-7 a pair, as in a batch of ten million tokens: d_logits in float16 would be 0.
    leaves, ids, pairs = make(40, 32, 100, 64)
    case = (leaves, ids, {**pairs, "weights": torch.full((64,), 1e-7, dtype=torch.float64)})
    case = ({k: x.half().double() for k, x in leaves.items()}, *case[1:])
    exact, ours = (
        run(case, LossSettings(), backend, dtype, at, without=("ref_logp",), upstream=2.0**22)
        for backend, dtype, at in (("reference", torch.float64, "cpu"), ("triton", torch.float16, device))
    )
    for name in ("d_hidden", "d_weight", "d_bias"):
        assert (ours[name] - exact[name]).abs().max() <= 4e-3 * exact[name].abs().max()


def test_chunks_add_up(monkeypatch, device):
    case = make(12, 6, 70, 30, 3)
    whole = run(case, FULL, "triton", torch.float32, device)
    for height in (1, 7):
        monkeypatch.setattr(triton_path, "chunk_rows", lambda *_, height=height: height)
        parts = run(case, FULL, "triton", torch.float32, device)
        for name in whole:
            torch.testing.assert_close(parts[name], whole[name], rtol=1e-5, atol=1e-5)


def test_weight_gradient_is_summed_in_float32_across_chunks(monkeypatch, device):
    # At probability 1/2 a weight of 256 gives -128, and eight of 1 give -1/2 each: in bfloat16 -128.5 is -128 again.
    monkeypatch.setattr(triton_path, "chunk_rows", lambda *_: 1)
    ones = torch.ones(9, device=device)
    weight = torch.zeros(2, 4, dtype=torch.bfloat16, device=device, requires_grad=True)
    hidden = torch.ones(9, 4, dtype=torch.bfloat16, device=device)
    weights = torch.tensor([256.0] + [1.0] * 8, device=device)
    labels = torch.zeros(9, dtype=torch.long, device=device)
    loss, _ = linear_policy_loss(hidden, weight, labels, None, None, ones, weights, backend="triton")
    loss.backward()
    assert weight.grad[0].tolist() == [-132] * 4


def test_strided_inputs(device):
    wide = lambda x: torch.stack([x, x + 1], -1)[..., 0]  # noqa: E731
    case = make(20, 6, 70, 50)
    assert not any(wide(x).is_contiguous() for part in case for x in part.values())
    a, b = (run(case, FULL, "triton", torch.float32, device, layout=layout) for layout in (lambda x: x, wide))
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_twice_is_bitwise_equal(device):
    first, second = (run(make(20, 6, 70, 50), FULL, "triton", torch.float32, device) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_a_frozen_head_gets_no_gradient(device):
    leaves, ids, pairs = make(20, 6, 70, 50)
    hidden = leaves["hidden"].float().to(device).requires_grad_()
    weight = leaves["weight"].float().to(device)
    ids = {k: x.to(device) for k, x in ids.items()}
    pairs = {k: pairs[k].float().to(device) for k in ("old_logp", "advantages", "weights")}
    ours, plain = (
        torch.autograd.grad(linear_policy_loss(hidden, weight, **ids, **pairs, backend=b)[0], hidden)[0]
        for b in ("triton", "reference")
    )
    torch.testing.assert_close(ours, plain)
    with torch.no_grad():
        value = linear_policy_loss(hidden, weight, **ids, **pairs, backend="triton")[0]
        torch.testing.assert_close(value, linear_policy_loss(hidden, weight, **ids, **pairs, backend="reference")[0])


@pytest.mark.parametrize("n, h, v, a_row", [(15, 16, 1000, 2), (15, 1024, 64, 1)])
def test_what_it_holds_beside_gradients_fits_the_workspace(n, h, v, a_row, monkeypatch):
    workspace, heights, chunk_rows = 1 << 14, [], triton_path.chunk_rows
    tiles = {"BLOCK": 1024, "PAIRS": 16}
    monkeypatch.setattr(triton_path, "config_for", lambda *_: Config(tiles, 1, 1))
    monkeypatch.setattr(triton_path, "workspace_bytes", lambda device: workspace)
    monkeypatch.setattr(triton_path, "chunk_rows", lambda *x: heights.append(chunk_rows(*x)) or heights[-1])
    leaves = [torch.randn(*shape, requires_grad=True) for shape in ((n, h), (v, h), (v,))]
    rows, one = torch.arange(n).repeat_interleave(a_row), torch.ones(n * a_row)

    def step():
        loss, sums = linear_policy_loss(*leaves[:2], rows % v, rows, None, one, one, bias=leaves[2], backend="triton")
        return *torch.autograd.grad(loss, leaves), sums["logp"]

    peak, out = peak_bytes(step)
    assert heights[0] * 3 <= n
    assert peak - sum(x.nbytes for x in out) <= workspace


def test_gradients_are_handed_out_once(device):
    hidden = torch.ones(2, 4, device=device, requires_grad=True)
    one = torch.ones(2, device=device)
    labels = torch.zeros(2, dtype=torch.long, device=device)
    loss, _ = linear_policy_loss(
        hidden, torch.zeros(3, 4, device=device), labels, None, None, one, one, backend="triton"
    )
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_policy_loss: a second backward; .* call linear_policy_loss again"):
        loss.backward()


def test_many_pairs_leave_half_of_the_workspace_to_logits():
    hidden = torch.empty(1, 2048, dtype=torch.bfloat16, device="meta")
    most = (1 << 29) // (4 * 151_936 + 6 * 2048)
    assert triton_path.chunk_rows(most, 1 << 30, 151_936, hidden, 132) == most
    assert triton_path.chunk_rows(most + 1, 1 << 30, 151_936, hidden, 132) < most


@pytest.mark.parametrize("most, count, height", [
    # 16 tiles in each row of tiles, 132 a wave: 8 rows of tiles are one wave, 9 to 16 two. Up to 12 rows, a second wave
    # costs more than the traffic of the weight's gradient that taller chunks save; 13 are about even, 16 save both.
    (1300, 13_000, 1024), (2100, 20_480, 2048), (1000, 900, 900), (100, 250, 84),
    # Two chunks of one wave each, rather than one of two waves and the rest.
    (1698, 1700, 896),
])  # fmt: skip
def test_chunks_fill_waves(most, count, height, monkeypatch):
    vocab, size, pairs = 151_936, 4096, 0
    row_bytes = 4 * vocab + 6 * size
    monkeypatch.setattr(triton_path, "workspace_bytes", lambda device: most * row_bytes + 4 * vocab)
    hidden = torch.empty(1, size, dtype=torch.bfloat16, device="meta")
    assert triton_path.chunk_rows(count, pairs, vocab, hidden, 132) == height


@pytest.mark.parametrize("hidden, weight", [("float64", "float64"), ("float32", "bfloat16")])
def test_dtypes_it_cannot_take_are_refused(hidden, weight):
    x, w = torch.zeros(2, 3, dtype=getattr(torch, hidden)), torch.zeros(4, 3, dtype=getattr(torch, weight))
    zero = torch.zeros(2)
    with pytest.raises(ValueError, match="of one dtype, bf16, fp16, fp32"):
        linear_policy_loss(x, w, torch.zeros(2, dtype=torch.long), None, None, zero, zero, backend="triton")
