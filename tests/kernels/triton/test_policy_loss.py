"""policy_loss on Triton against its definition in float64: every metric, every setting, ragged and strided inputs."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igpo_kernels import LossSettings, policy_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("poison")

from igpo_kernels.policy_loss import triton_path  # noqa: E402
from igpo_kernels.triton_variants import Config, config_for  # noqa: E402

SETTINGS = {
    "plain": LossSettings(),
    "everything": LossSettings(clip_high=0.28, dual_clip=1.5, kl=0.3, entropy=0.2, importance="token"),
    "mask": LossSettings(kl=0.1, importance="token", importance_mode="mask", importance_cap=1.3),
    "sequence weights": LossSettings(entropy=0.1, importance="sequence", importance_cap=1.5),
    "sequence mask": LossSettings(importance="sequence", importance_mode="mask", importance_cap=1.1),
    "gspo": LossSettings(ratio="sequence", clip_low=0.03, clip_high=0.04, kl=0.2, entropy=0.1, dual_clip=1.2),
    "gspo and token weights": LossSettings(ratio="sequence", clip_low=0.05, importance="token"),
    "gspo and token mask": LossSettings(
        ratio="sequence", importance="token", importance_mode="mask", importance_cap=1.1
    ),
    "gspo and sequence weights": LossSettings(ratio="sequence", importance="sequence"),
    "turn": LossSettings(ratio="turn", clip_low=0.03, clip_high=0.04, kl=0.2, entropy=0.1, dual_clip=1.2),
    "turn and sequence mask": LossSettings(
        ratio="turn", importance="sequence", importance_mode="mask", importance_cap=1.5, importance_floor=0.6
    ),
    "turn and geometric weights": LossSettings(ratio="turn", clip_low=0.05, importance="geometric", importance_cap=1.1),
    "geometric mask": LossSettings(
        importance="geometric", importance_mode="mask", importance_cap=1.05, importance_floor=0.95
    ),
    "token band": LossSettings(importance="token", importance_cap=1.2, importance_floor=0.8, dual_clip=1.5),
    "turn and token band": LossSettings(
        ratio="turn", importance="token", importance_mode="mask", importance_cap=1.2, importance_floor=0.8
    ),
    "unbiased kl": LossSettings(kl=0.3, unbiased_kl=True, dual_clip=1.5),
    "cispo": LossSettings(surrogate="cispo", kl=0.2, entropy=0.1, importance="token"),
    "cispo, masked turns, unbiased kl": LossSettings(
        surrogate="cispo", ratio="turn", clip_low=0.05, kl=0.3, unbiased_kl=True, importance="token",
        importance_mode="mask", importance_cap=1.2, importance_floor=0.8,
    ),
    "sapo": LossSettings(surrogate="sapo", sapo_temperature_pos=2.0, kl=0.2, unbiased_kl=True),
    "sapo of rollouts": LossSettings(surrogate="sapo", ratio="sequence", kl=0.2, unbiased_kl=True),
    "vespo": LossSettings(surrogate="vespo", ratio="sequence", kl=0.2, unbiased_kl=True, importance="token"),
    "vespo of turns, masked rollouts": LossSettings(
        surrogate="vespo", ratio="turn", vespo_k_neg=1.0, importance="sequence", importance_mode="mask",
        importance_cap=1.5, importance_floor=0.6,
    ),
}  # fmt: skip


def make(m, seed=0, sequences=5):
    g = torch.Generator().manual_seed(seed)
    randn = lambda scale=1.0: scale * torch.randn(m, generator=g, dtype=torch.float64)  # noqa: E731
    logp = randn() - 2
    weights = torch.rand(m, generator=g, dtype=torch.float64) * (torch.rand(m, generator=g) > 0.2)
    case = dict(
        logp=logp, old_logp=logp + randn(0.3), advantages=randn(), weights=weights, engine_logp=logp + randn(0.3),
        ref_logp=logp + randn(0.5), entropy=randn().abs(), sequence=torch.randint(0, sequences, (m,), generator=g),
    )  # fmt: skip
    turn = torch.randint(0, 3, (m,), generator=g)
    case |= dict(segment=3 * case["sequence"] + turn, clip_scale=1 + 0.3 * randn().tanh())
    return case | {name: below_m(case[name]) for name in ("segment", "sequence")}


def below_m(numbers):
    """Numbers as they are, gaps included, unless one is not below their count."""
    fit = not len(numbers) or int(numbers.max()) < len(numbers)
    return numbers if fit else numbers.unique(return_inverse=True)[1]


def run(case, setting, backend, dtype, device="cpu", without=(), layout=lambda x: x):
    given_ = {k: x.to(device, dtype if x.is_floating_point() else x.dtype) for k, x in case.items()}
    given_ = {k: None if k in without else layout(x) for k, x in given_.items()}
    leaves = [given_[k].requires_grad_() for k in ("logp", "entropy") if given_.get(k) is not None]
    loss, metrics = policy_loss(**given_, settings=setting, backend=backend)
    grads = torch.autograd.grad(loss * 1.7, leaves, allow_unused=True)
    out = {**metrics, "loss": loss.detach(), **dict(zip(("d_logp", "d_entropy"), grads, strict=False))}
    return {k: v.double().cpu() for k, v in out.items() if v is not None}


def check(case, setting, device="cpu", dtype=torch.float32, **options):
    """Rule of error 3: at most twice what plain torch errs in the same dtype, and rounding."""
    case = {k: x.to(dtype).double() if x.is_floating_point() else x for k, x in case.items()}
    exact = run(case, setting, "reference", torch.float64, **options)
    plain = run(case, setting, "reference", dtype, **options)
    ours = run(case, setting, "triton", dtype, device, **options)
    for name, e in exact.items():
        if name == "d_entropy" and not setting.entropy and name not in ours:
            continue
        added = len(case["logp"]) if e.ndim == 0 else 0
        tolerance = 1e-6 * (1 + added**0.5 + float(e.abs().max() if e.numel() else 0))
        error, allowed = (ours[name] - e).abs(), 2 * (plain[name] - e).abs()
        assert error.shape == e.shape
        assert not error.numel() or error.max() <= allowed.max() + tolerance, (name, error.max(), allowed.max())


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles a program, at lengths the interpreter can do."""
    table = {
        "policy_loss": {"BLOCK": 64, "PROGRAMS": 3, "COLUMNS": 2},
        "policy_loss_gap": {"BLOCK": 16},
        "policy_loss_segment": {"BLOCK": 16},
        "policy_loss_finish": {"BLOCK": 2},
        "policy_loss_scale": {"BLOCK": 64, "PROGRAMS": 3},
    }
    monkeypatch.setattr(triton_path, "config_for", lambda kernel, *_: Config(table[kernel], 1, 1))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_equals_its_definition(name, device):
    check(make(150), SETTINGS[name], device)


@pytest.mark.parametrize("m", [1, 63, 64, 65, 192, 500])
@pytest.mark.parametrize("name", ["plain", "everything", "turn and sequence mask"])
def test_lengths_around_a_tile(name, m, device):
    check(make(m), SETTINGS[name], device)


@pytest.mark.parametrize("m", [1024, 5000])
def test_shipped_tiles(m, device, monkeypatch):
    monkeypatch.setattr(triton_path, "config_for", config_for)
    check(make(m), SETTINGS["everything"], device)
    check(make(m), SETTINGS["gspo and sequence weights"], device)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 400), seed=st.integers(0, 999), sequences=st.integers(1, 40),
    name=st.sampled_from(list(SETTINGS)), without=st.sets(st.sampled_from(["old_logp", "clip_scale"])),
)  # fmt: skip
def test_ragged_lengths(m, seed, sequences, name, without, device):
    check(make(m, seed, sequences), SETTINGS[name], device, without=without)


OPTIONAL = ("old_logp", "clip_scale", "engine_logp", "ref_logp", "entropy", "segment", "sequence")


@pytest.mark.parametrize("without", [s for k in (1, 7) for s in itertools.combinations(OPTIONAL, k)], ids="-".join)
def test_absent_inputs(without, device):
    check(make(77), LossSettings(dual_clip=2.0), device, without=without)


def test_no_pairs(device):
    empty = {k: x[:0] for k, x in make(3).items()}
    for setting in SETTINGS.values():
        check(empty, setting, device)


def test_all_weights_zero(device):
    case = make(50)
    case["weights"] = torch.zeros_like(case["weights"])
    check(case, SETTINGS["everything"], device)


@pytest.mark.parametrize("layout", [
    lambda x: torch.stack([x, torch.full_like(x, -7)], 1)[:, 0],
    lambda x: x.repeat_interleave(3)[::3],
], ids=["column", "every third"])  # fmt: skip
def test_strided_inputs(layout, device):
    assert not layout(make(300)["logp"]).is_contiguous()
    check(make(300), SETTINGS["everything"], device, layout=layout)
    check(make(300), SETTINGS["gspo"], device, layout=layout)
    check(make(300, sequences=60), SETTINGS["turn and sequence mask"], device, layout=layout)  # some are masked


def test_half_precision_inputs(device):
    check(make(300), SETTINGS["everything"], device, dtype=torch.bfloat16)
    check(make(300), SETTINGS["gspo"], device, dtype=torch.float16)


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name, setting", [
    *((name, "everything") for name in
      ("logp", "old_logp", "advantages", "clip_scale", "ref_logp", "entropy", "engine_logp")),
    ("engine_logp", "mask"), ("engine_logp", "token band"),
])  # fmt: skip
def test_nan_is_never_hidden(name, setting, backend, device):
    case = make(200)
    case["weights"] += 0.1
    case[name][123] = float("nan")
    out = run(case, SETTINGS[setting], backend, torch.float32, device)
    assert out["loss"].isnan()
    if name in ("logp", "old_logp"):
        assert out["ratio"].isnan() and out["ratio_max"].isnan() and out["d_logp"][123].isnan()
    assert out["d_logp"].isnan().sum() <= 1


def test_twice_is_bitwise_equal(device):
    for name in ("everything", "turn and sequence mask"):
        first, second = (run(make(400), SETTINGS[name], "triton", torch.float32, device) for _ in range(2))
        assert all(torch.equal(first[k], second[k]) for k in first)


class Counted:
    """A kernel that writes its launches down."""

    def __init__(self, name, launches):
        self.kernel, self.name, self.launches = getattr(triton_path, name), name, launches

    def __getitem__(self, grid):
        self.launches.append(self.name)
        return self.kernel[grid]


def test_one_launch_forward_and_one_backward(device, monkeypatch):
    launches = []
    for name in [name for name in dir(triton_path) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_path, name, Counted(name, launches))
    run(make(300), SETTINGS["everything"], "triton", torch.float32, device)
    assert launches == ["policy_loss_kernel", "policy_loss_scale_kernel"]


def test_the_last_program_leaves_the_counter_at_zero(device):
    # Of three programs and of one; were it left, no program of the next launch would be the last.
    for m in (400, 5, 400):
        check(make(m), SETTINGS["plain"], device)
        assert triton_path.counter_of(torch.device(device)).tolist() == [0]


def test_streams_and_launches_in_a_graph_have_counters_of_their_own(monkeypatch):
    stream, capturing = SimpleNamespace(cuda_stream=7), SimpleNamespace(value=False)
    monkeypatch.setattr(triton_path, "_counter", lambda device, stream: f"stream {stream}")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing.value)
    made = []
    monkeypatch.setattr(torch, "zeros", lambda *_, **more: made.append(more["device"]) or f"graph {len(made)}")
    counter = lambda: triton_path.counter_of(torch.device("cuda", 1))  # noqa: E731
    assert [counter(), counter()] == ["stream 7"] * 2
    stream.cuda_stream = 8
    assert counter() == "stream 8"
    capturing.value = True
    assert [counter(), counter()] == ["graph 1", "graph 2"] and made == [torch.device("cuda", 1)] * 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_two_streams_and_a_graph_at_once():
    case = {k: x.cuda().float() for k, x in make(200_000).items() if k in ("logp", "old_logp", "advantages", "weights")}
    call = lambda: policy_loss(**case, settings=LossSettings(), backend="triton")  # noqa: E731
    expected, streams = float(call()[0]), [torch.cuda.Stream() for _ in range(2)]
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(streams[0]):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        of_graph = call()[0]
    losses = []
    for _ in range(50):
        graph.replay()
        for stream in streams:
            with torch.cuda.stream(stream):
                losses.append(call()[0])
    torch.cuda.synchronize()
    assert {float(loss) for loss in [*losses, of_graph]} == {expected}


def test_the_loss_may_be_changed_in_place(device):
    logp = torch.zeros(4, device=device, requires_grad=True)
    one = torch.ones(4, device=device)
    loss, _ = policy_loss(logp, None, one, one, backend="triton")
    loss /= 2
    loss.backward()
    assert logp.grad.tolist() == [-0.5] * 4


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_pair_of_weight_0_adds_nothing(name, backend, device):
    case, junk = make(60), torch.arange(60) % 3 == 1
    case["weights"] = torch.where(junk, 0.0, case["weights"] + 0.1)
    bad = {k: x.clone() for k, x in case.items()}
    junk_of = dict(old_logp=-1e4, engine_logp=float("nan"), clip_scale=float("nan"), ref_logp=1e4)
    for k, value in (dict(logp=-1.0, advantages=-1.0) | junk_of).items():
        bad[k][junk] = value
    bad["entropy"][junk] = float("inf")
    expected = run({k: x[~junk] for k, x in case.items()}, SETTINGS[name], "reference", torch.float64)
    for key, found in run(bad, SETTINGS[name], backend, torch.float32, device).items():
        if key in ("d_logp", "d_entropy"):
            assert not found[junk].any()
            found = found[~junk]
        torch.testing.assert_close(found, expected[key], rtol=2e-5, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_clipped_ratio_may_overflow(backend, device):
    # Ratio exp(1e4): clipped to 1.2, of no advantage, bounded by 3; all constants, so without gradient.
    pairs = dict(logp=[0.0] * 3, old_logp=[-1e4] * 3, advantages=[1.0, 0.0, -1.0], weights=[1.0] * 3)
    case = {k: torch.tensor(x, dtype=torch.float64) for k, x in pairs.items()}
    out = run(case, LossSettings(dual_clip=3.0), backend, torch.float32, device)
    assert float(out["loss"]) == pytest.approx(-1.2 + 0 + 3) and not out["d_logp"].any()
    assert out["ratio"].isinf()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("surrogate, loss, slopes", [("sapo", -4 + 4 / 1.05, [0, 0]), ("cispo", 0, [-1.2, 1.2])])
def test_a_bounded_ratio_may_overflow(surrogate, loss, slopes, backend, device):
    pairs = dict(logp=[0.0] * 2, old_logp=[-1e4] * 2, advantages=[1.0, -1.0], weights=[1.0] * 2)
    case = {k: torch.tensor(x, dtype=torch.float64) for k, x in pairs.items()}
    out = run(case, LossSettings(surrogate=surrogate), backend, torch.float32, device)
    assert float(out["loss"]) == pytest.approx(loss, abs=1e-6)
    assert out["d_logp"].tolist() == pytest.approx([1.7 * x for x in slopes])


def test_a_ratio_of_no_advantage_may_overflow(device):
    zero = torch.zeros(1, dtype=torch.float64)
    case = dict(logp=zero, old_logp=zero - 1e4, advantages=zero, weights=zero + 1)
    for backend in ("triton", "reference"):
        out = run(case, LossSettings(), backend, torch.float32, device)
        assert not out["loss"].any() and not out["d_logp"].any()


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("setting, name", [("turn", "segment"), ("sequence weights", "sequence")])
def test_numbers_out_of_range_are_refused(setting, name, backend, device):
    case = make(4)
    for number in (-1, 4, 10**12):
        case[name] = torch.tensor([0, 0, 1, number])
        with pytest.raises(ValueError, match=f"{name} holds {number}; number {name}s from 0"):
            run(case, SETTINGS[setting], backend, torch.float32, device)


@pytest.mark.parametrize("name", ["plain", "everything", "turn"])
def test_a_scale_of_1_changes_no_bit(name, device):
    case = make(300) | {"clip_scale": torch.ones(300, dtype=torch.float64)}
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        scaled, plain = (
            run(case, SETTINGS[name], backend, dtype, device, without=without) for without in ((), ("clip_scale",))
        )
        assert 20 < plain["clipped"] < 280
        assert all(torch.equal(scaled[k], plain[k]) for k in plain)


def test_the_gradient_is_handed_out_once(device):
    logp = torch.tensor([-1.0, -2.0], device=device, requires_grad=True)
    one = torch.ones(2, device=device)
    loss, _ = policy_loss(logp, None, one, one, backend="triton")
    loss.backward(retain_graph=True)
    assert logp.grad.tolist() == [-1, -1]
    with pytest.raises(RuntimeError, match=r"policy_loss: a second backward; .* call policy_loss again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
@pytest.mark.parametrize("n", [0, 5, 400])
def test_scaling_in_place(n, factor, dtype, device):
    x = torch.linspace(-3, 3, n, device=device).to(dtype)
    expected = (x.float() * torch.tensor(factor)).to(dtype)
    out = triton_path.scale_(x, torch.tensor(factor, device=device))
    assert out is x
    torch.testing.assert_close(x, expected)


def test_double_precision_is_refused():
    x = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="computes in float32"):
        policy_loss(x, None, x, x, backend="triton")
