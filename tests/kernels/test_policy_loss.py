"""The clipped loss: hand-worked numbers, and the chunked LM-head op against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels import LossSettings, linear_policy_loss, policy_loss
from igpo_kernels.linear_policy_loss import torch_path
from tests.allocations import peak_bytes
from tests.kernels import magnitudes


def loss_of(logp, old, advantages, weights, settings=None, **more):
    t = lambda x: None if x is None else torch.tensor(x, dtype=torch.float64)  # noqa: E731
    logp = t(logp).requires_grad_()
    for name in more.keys() & {"segment", "sequence"}:
        more[name] = torch.tensor(more[name])
    more = {k: v if isinstance(v, torch.Tensor) else t(v) for k, v in more.items()}
    loss, metrics = policy_loss(logp, t(old), t(advantages), t(weights), settings, **more)
    return float(loss.detach()), torch.autograd.grad(loss, logp)[0].tolist(), metrics


def test_clipping_by_hand():
    # Ratios 1.5, 1.5, 0.5, 0.5 with A = 1, -1, 1, -1; bounds 0.8 and 1.2; weights 1.
    old = [-1.0] * 4
    logp = [-1 + math.log(r) for r in (1.5, 1.5, 0.5, 0.5)]
    loss, grad, metrics = loss_of(logp, old, [1.0, -1.0, 1.0, -1.0], [1.0] * 4)
    # -1.2 (clipped), +1.5, -0.5, +0.8 (clipped); gradients are 0 where clipped, else -A * ratio.
    assert loss == pytest.approx(-1.2 + 1.5 - 0.5 + 0.8)
    assert grad == pytest.approx([0, 1.5, -0.5, 0])
    assert float(metrics["clipped"]) == 2 and float(metrics["tokens"]) == 4
    assert float(metrics["ratio"]) == pytest.approx(4.0) and float(metrics["ratio_max"]) == pytest.approx(1.5)


def test_asymmetric_clip_and_dual_clip():
    logp = [math.log(1.25), math.log(5.0)]
    loss, grad, _ = loss_of(logp, [0.0, 0.0], [1.0, -1.0], [1.0, 1.0], LossSettings(clip_high=0.28, dual_clip=3.0))
    assert loss == pytest.approx(-1.25 + 3.0)  # 1.25 < 1.28 is free; 5 is bounded by 3
    assert grad == pytest.approx([-1.25, 0])


def test_ratio_one_gives_the_policy_gradient():
    loss, grad, _ = loss_of([-1.0, -2.0], None, [0.5, -2.0], [0.25, 0.75])
    assert loss == pytest.approx(-0.5 * 0.25 + 2.0 * 0.75)
    assert grad == pytest.approx([-0.5 * 0.25, 2.0 * 0.75])


def test_k3_by_hand():
    # d = ref - logp = ln 2: k3 = 2 - ln 2 - 1; its slope in logp is 1 - 2.
    loss, grad, metrics = loss_of([-1.0], None, [0.0], [1.0], LossSettings(kl=0.1), ref_logp=[-1 + math.log(2)])
    assert loss == pytest.approx(0.1 * (1 - math.log(2)))
    assert grad == pytest.approx([-0.1])
    assert float(metrics["kl"]) == pytest.approx(1 - math.log(2))


def test_entropy_bonus_lowers_the_loss():
    entropy = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
    loss, _ = policy_loss(
        torch.tensor([-1.0], dtype=torch.float64, requires_grad=True), None, torch.zeros(1).double(),
        torch.tensor([2.0]).double(), LossSettings(entropy=0.1), entropy=entropy,
    )  # fmt: skip
    assert float(loss.detach()) == pytest.approx(-0.1 * 0.7 * 2)
    assert float(torch.autograd.grad(loss, entropy)[0]) == pytest.approx(-0.2)


@pytest.mark.parametrize("mode, expected", [("truncate", [2.0, 0.5]), ("mask", [0.0, 0.5])])
def test_importance_weights_by_hand(mode, expected):
    # pi_train / pi_engine = 3 and 0.5; capped at 2.
    settings_ = LossSettings(importance="token", importance_mode=mode, importance_cap=2.0)
    engine = [-1 - math.log(3), -1 - math.log(0.5)]
    _, grad, metrics = loss_of([-1.0, -1.0], None, [1.0, 1.0], [1.0, 1.0], settings_, engine_logp=engine)
    assert grad == pytest.approx([-w for w in expected])
    assert float(metrics["mismatch"]) == pytest.approx(math.log(3) + math.log(2))


def test_importance_of_a_sequence_is_the_product_of_its_tokens():
    settings_ = LossSettings(importance="sequence", importance_cap=10.0)
    engine = [-1 - math.log(3), -1 - math.log(0.5), -1 - math.log(0.2)]
    _, grad, _ = loss_of([-1.0] * 3, None, [1.0] * 3, [1.0] * 3, settings_, engine_logp=engine, sequence=[0, 0, 1])
    assert grad == pytest.approx([-1.5, -1.5, -0.2])


def test_gspo_ratio_is_the_geometric_mean_by_hand():
    # One sequence with log ratios ln 1.1 and ln 1.21: sqrt(1.1 * 1.21); a second one outside the clip.
    logp = [math.log(1.1), math.log(1.21), math.log(2.0)]
    loss, grad, metrics = loss_of(
        logp, [0.0] * 3, [1.0] * 3, [0.5, 0.5, 1.0], LossSettings(ratio="sequence"), segment=[0, 0, 1]
    )
    r = math.sqrt(1.1 * 1.21)
    assert loss == pytest.approx(-r - 1.2)
    assert grad == pytest.approx([-r * 0.5, -r * 0.5, 0.0])
    assert float(metrics["clipped"]) == 1


@pytest.mark.parametrize("mode", ["mask", "truncate"])
def test_gspo_drops_masked_tokens_from_its_mean_by_hand(mode):
    # The second token's weight, 3, is over the cap of 2. Masked, it is no part of the sequence: the ratio is the
    # first's, 1.1; without gradient for the second. Truncated, both are in the mean, with weights 1 and 2.
    settings_ = LossSettings(ratio="sequence", importance="token", importance_mode=mode)
    logp = [math.log(1.1), math.log(1.21)]
    loss, grad, _ = loss_of(
        logp, [0.0, 0.0], [1.0, 1.0], [0.5, 0.5], settings_, engine_logp=[0.0, -math.log(3)], segment=[0, 0]
    )
    r = math.sqrt(1.1 * 1.21)
    masked = (-0.5 * 1.1, [-0.5 * 1.1, 0.0])
    truncated = (-0.5 * 3 * r, [-0.5 * 3 * r / 2] * 2)
    expected = masked if mode == "mask" else truncated
    assert loss == pytest.approx(expected[0]) and grad == pytest.approx(expected[1])


def test_a_masked_token_has_no_gradient_even_where_its_ratio_overflows():
    for gspo in (False, True):
        settings_ = LossSettings(importance="token", importance_mode="mask", ratio="sequence" if gspo else "token")
        _, grad, _ = loss_of(
            [-1.0, -1.0], [-1.0, -1e4], [-1.0, -1.0], [1.0, 1.0], settings_, engine_logp=[-1.0, -2e4], segment=[0, 0]
        )
        assert grad == pytest.approx([1.0, 0.0])


def plain_loss(
    logp, old, engine, ref, advantages, weights, scale, turn, rollout, ratio, importance, mode, bounds, clip, surrogate,
    kl,
):  # fmt: skip
    """The loss pair by pair, from its formula; k3 is multiplied by the ratio."""
    (floor, cap), (low, high) = bounds, clip
    counted = [i for i in range(len(logp)) if weights[i] != 0]
    own = {"token": range(len(logp)), "turn": list(zip(rollout, turn, strict=True))}
    alike = lambda i, level: [j for j in counted if own.get(level, rollout)[i] == own.get(level, rollout)[j]]  # noqa: E731
    correction = dict.fromkeys(counted, 1.0)
    for i in counted if importance != "none" else ():
        gaps = [float(old[j] - engine[j]) for j in alike(i, importance)]
        w = math.exp(sum(gaps) / (len(gaps) if importance == "geometric" else 1))
        correction[i] = min(max(w, floor), cap) if mode == "truncate" else w * (floor <= w <= cap)
    total = 0.0
    for i in counted:
        mates, a = [j for j in alike(i, ratio) if correction[j] or ratio == "token"], float(advantages[i])
        r = torch.exp(sum((logp[j] - old[j] for j in mates), torch.zeros(())) / max(1, len(mates)))
        value = float(r.detach())
        bound = min(max(value, 1 - low * float(scale[i])), 1 + high * float(scale[i]))
        factor, t = correction[i], 1.0 if a > 0 else 1.05
        if surrogate == "clip":
            each = -r * a if -value * a >= -bound * a else -bound * a
        elif surrogate == "cispo":
            each = -bound * a * logp[i]
        elif surrogate == "sapo":
            each = -4 / t / (1 + torch.exp(-t * (r - 1))) * a
        else:
            w = math.exp(sum(float(logp[j].detach() - old[j]) for j in mates))
            w *= math.prod(correction[j] for j in mates) if importance == "token" else factor
            (k, rate), factor = (2.0, 3.0) if a >= 0 else (3.0, 2.0), factor != 0
            each = -(w**k) * math.exp(rate * (1 - w)) * a * logp[i]
            r = torch.exp(logp[i] - old[i])
        total = total + weights[i] * kl * r * (torch.exp(ref[i] - logp[i]) - (ref[i] - logp[i]) - 1)
        total = total + weights[i] * factor * each if factor else total
    return total


@settings(max_examples=90, deadline=None)
@given(
    seed=st.integers(0, 9999), ratio=st.sampled_from(["token", "turn", "sequence"]),
    importance=st.sampled_from(["none", "token", "sequence", "geometric"]), mode=st.sampled_from(["truncate", "mask"]),
    floor=st.sampled_from([0.0, 0.9]), cap=st.sampled_from([1.1, 1e3]), scaled=st.booleans(),
    surrogate=st.sampled_from(["clip", "cispo", "sapo", "vespo"]), kl=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_the_definition_is_its_formula(seed, ratio, importance, mode, floor, cap, scaled, surrogate, kl):
    g = torch.Generator().manual_seed(seed)
    m, clip, ratio = 12, (0.05, 0.08), "turn" if surrogate == "vespo" and ratio == "token" else ratio
    randn = lambda scale: scale * torch.randn(m, generator=g, dtype=torch.float64)  # noqa: E731
    rollout, turn = (torch.randint(0, n, (m,), generator=g) for n in (3, 2))
    old, advantages, weights = randn(1) - 2, randn(1), randn(1).abs() * (torch.rand(m, generator=g) > 0.2)
    logp, engine, ref = (old + randn(0.1)).requires_grad_(), old + randn(0.1), old + randn(0.5)
    scale = 1 + 0.5 * torch.rand(m, generator=g, dtype=torch.float64) if scaled else torch.ones(m)
    chosen = LossSettings(
        *clip, kl=kl, unbiased_kl=True, surrogate=surrogate, ratio=ratio, importance=importance, importance_mode=mode,
        importance_floor=floor, importance_cap=cap,
    )  # fmt: skip
    loss, _ = policy_loss(
        logp, old, advantages, weights, chosen, clip_scale=scale if scaled else None, engine_logp=engine, ref_logp=ref,
        segment=2 * rollout + turn if ratio == "turn" else rollout, sequence=rollout,
    )  # fmt: skip
    numbers = (x.tolist() for x in (turn, rollout))
    plain = plain_loss(
        logp, old, engine, ref, advantages, weights, scale, *numbers, ratio, importance, mode, (floor, cap), clip,
        surrogate, kl,
    )  # fmt: skip
    plain = plain + 0 * logp.sum()
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), abs=1e-12)
    if bool(weights.any()):
        expected = torch.autograd.grad(plain, logp)[0]
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], expected, rtol=1e-10, atol=1e-12)


EITHER = pytest.mark.parametrize("backend", ["reference", "triton"])


def exactly(logp, old, advantages, weights, settings_, backend, **more):
    """Loss, gradient and metrics of numbers; on Triton in float32."""
    dtype = torch.float32 if backend == "triton" else torch.float64
    t = lambda x: x if x is None else torch.tensor(x, dtype=torch.int64 if type(x[0]) is int else dtype)  # noqa: E731
    leaf = t(logp).requires_grad_()
    more = {name: t(x) for name, x in more.items()}
    loss, metrics = policy_loss(leaf, t(old), t(advantages), t(weights), settings_, backend=backend, **more)
    return float(loss.detach()), torch.autograd.grad(loss, leaf)[0].tolist(), metrics


@EITHER
def test_cispo_by_hand(backend):
    # Ratios 1.5, .5, 1.5, 1.1 with A = 1, -1, -1, 1 weigh 1.2, .8, 1.2, 1.1; the third is bounded, but not against its
    # advantage.
    logp, ratios = [-1.0, -2.0, -0.5, -1.0], [1.5, 0.5, 1.5, 1.1]
    old = [x - math.log(r) for x, r in zip(logp, ratios, strict=True)]
    chosen = LossSettings(surrogate="cispo")
    loss, gradient, metrics = exactly(logp, old, [1.0, -1.0, -1.0, 1.0], [1.0] * 4, chosen, backend)
    assert loss == pytest.approx(1.2 - 1.6 - 0.6 + 1.1, abs=1e-6)
    assert gradient == pytest.approx([-1.2, 0.8, 1.2, -1.1], abs=1e-6)
    assert float(metrics["clipped"]) == 2


@EITHER
def test_cispo_of_a_rollout_weighs_each_token_by_the_rollouts_ratio_by_hand(backend):
    # sqrt(1.1 * 1.21) = 1.1537 is bounded by 1.15; advantages differ, and each token keeps its own.
    chosen = LossSettings(surrogate="cispo", clip_high=0.15, ratio="sequence")
    logp, old = [-1.0, -2.0], [-1 - math.log(1.1), -2 - math.log(1.21)]
    loss, gradient, _ = exactly(logp, old, [1.0, -2.0], [1.0] * 2, chosen, backend, segment=[0, 0])
    assert gradient == pytest.approx([-1.15, 2.3], abs=1e-6) and loss == pytest.approx(1.15 - 4.6, abs=1e-6)


@EITHER
def test_sapo_by_hand(backend):
    # Ratios 1, 2 and .5: sigmoids of 0, 1 and 1.05 * -.5.
    logp, old = [-1.0] * 3, [-1.0, -1 - math.log(2), -1 - math.log(0.5)]
    loss, gradient, metrics = exactly(logp, old, [1.0, 1.0, -1.0], [1.0] * 3, LossSettings(surrogate="sapo"), backend)
    assert loss == pytest.approx(-2 - 2.9242343145 + 1.4159394555, abs=2e-6)
    assert gradient == pytest.approx([-1.0, -1.5728954659, 0.4670699372], abs=1e-6)
    assert float(metrics["clipped"]) == 0
    chosen = LossSettings(surrogate="sapo", sapo_temperature_pos=2.0)
    assert exactly(logp[:1], old[:1], [1.0], [1.0], chosen, backend)[:2] == (pytest.approx(-1.0), pytest.approx([-1.0]))


@EITHER
def test_vespo_by_hand(backend):
    # Ratios 1.2 and 1.25 make w = 1.5 and phi = w^2 e^(3 - 3w); the other rollout's w is .5 and phi w^3 e^(2 - 2w).
    chosen = LossSettings(surrogate="vespo", ratio="sequence")
    logp = [-1.0, -2.0, -3.0]
    old = [-1 - math.log(1.2), -2 - math.log(1.25), -3 - math.log(0.5)]
    run = lambda chosen, **more: exactly(  # noqa: E731
        logp, old, [1.0, 1.0, -1.0], [1.0] * 3, chosen, backend, segment=[0, 0, 1], **more
    )
    loss, gradient, metrics = run(chosen)
    assert loss == pytest.approx(3 * 0.5020428603 - 3 * 0.3397852286, abs=2e-6)
    assert gradient == pytest.approx([-0.5020428603, -0.5020428603, 0.3397852286], abs=1e-6)
    assert float(metrics["clipped"]) == 0 and float(metrics["ratio"]) == pytest.approx(3.5)
    # A weight of 2 against the engine, of a token or of the rollout: w = 3 and phi = 9 e^-6; no factor beside it.
    for level, gaps in (("token", [math.log(2), 0, 0]), ("sequence", [math.log(4), -math.log(2), 0])):
        weighed = LossSettings(surrogate="vespo", ratio="sequence", importance=level)
        more = dict(engine_logp=[x - gap for x, gap in zip(old, gaps, strict=True)], sequence=[0, 0, 1])
        assert run(weighed, **more)[1] == pytest.approx([-0.0223087696, -0.0223087696, 0.3397852286], abs=1e-6)


@EITHER
@pytest.mark.parametrize("log_ratios", [[30.0, -19.0], [-30.0, 21.0, 1.0]])
def test_vespo_bounds_what_it_adds_up_by_hand(log_ratios, backend):
    # Each log ratio is bounded by 20: both sums are 1.
    phi = math.exp(2) * math.exp(3 - 3 * math.e)
    chosen = LossSettings(surrogate="vespo", ratio="sequence")
    n = len(log_ratios)
    old = [-1 - x for x in log_ratios]
    _, gradient, _ = exactly([-1.0] * n, old, [1.0] * n, [1.0] * n, chosen, backend, segment=[0] * n)
    assert gradient == pytest.approx([-phi] * n, rel=1e-5)


@EITHER
def test_k3_times_the_ratio_by_hand(backend):
    # Ratio 1.5, d = ln 2: 1.5 (1 - ln 2); its slope in logp is 1.5 (1 - ln 2) + 1.5 (1 - 2).
    more = dict(ref_logp=[-1 + math.log(2)])
    chosen = LossSettings(kl=0.1, unbiased_kl=True)
    loss, gradient, metrics = exactly([-1.0], [-1 - math.log(1.5)], [0.0], [1.0], chosen, backend, **more)
    assert loss == pytest.approx(0.0460279229, abs=1e-7)
    assert gradient == pytest.approx([0.0460279229 - 0.15], abs=1e-7)
    assert float(metrics["kl"]) == pytest.approx(0.460279229, abs=1e-6)


SCALE = 1.1637384883  # of a normalised gain of 1.2247 with adaptive clipping of 0.3


@EITHER
@pytest.mark.parametrize("log_ratio, advantage, scale, loss, slope", [
    (0.0045, 1.0, None, -1.004, 0.0),
    (0.0045, 1.0, SCALE, -1.0045101402, -1.0045101402),  # within 1.004654954
    (0.0047, 1.0, SCALE, -1.0046549540, 0.0),
    (-0.0035, -1.0, None, 0.997, 0.0),
    (-0.0035, -1.0, SCALE, 0.9965087845, 0.0),
    (-0.0032, -1.0, SCALE, 0.9968051146, 0.9968051146),
    (0.0045, 1.0, 0.8362615117, -1.003345046, 0.0),
])  # fmt: skip
def test_a_scaled_clip_range_by_hand(log_ratio, advantage, scale, loss, slope, backend):
    chosen = LossSettings(clip_low=3e-3, clip_high=4e-3)
    more = {} if scale is None else {"clip_scale": [scale, 1.0]}
    found, gradient, metrics = exactly(
        [log_ratio - 1, 0.0], [-1.0, 0.0], [advantage, 0.0], [1.0, 1.0], chosen, backend, **more
    )
    assert found == pytest.approx(loss, abs=2e-7) and gradient == pytest.approx([slope, 0.0], abs=2e-7)
    assert float(metrics["clipped"]) == (slope == 0)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_the_lm_heads_loss_scales_the_clip_range_by_hand(backend):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 4, generator=g).requires_grad_(), torch.randn(9, 4, generator=g)
    labels, one = torch.tensor([3, 8]), torch.ones(2)
    chosen = LossSettings(clip_low=3e-3, clip_high=4e-3)
    run = lambda old, **more: linear_policy_loss(  # noqa: E731
        hidden, weight, labels, None, old, one, one, chosen, backend=backend, **more
    )
    old = run(None)[1]["logp"] - torch.tensor([0.0045, 0.0047])
    plain, scaled = run(old)[0], run(old, clip_scale=torch.tensor([SCALE, SCALE]))[0]
    assert float(plain.detach()) == pytest.approx(-1.004 - 1.004, abs=2e-6)
    assert float(scaled.detach()) == pytest.approx(-1.0045101402 - 1.0046549540, abs=2e-6)
    assert not torch.autograd.grad(plain, hidden)[0].any()
    first, second = torch.autograd.grad(scaled, hidden)[0].abs().sum(1)
    assert first > 0.1 and second == 0


@EITHER
@pytest.mark.parametrize("ratio, advantage, losses, slopes", [
    ("token", 1.0, [-1.0020020013, -1.004, -0.9940179641], [-1.0020020013, 0, -0.9940179641]),
    ("turn", 1.0, [-1.0030045045, -1.0030045045, -0.9940179641], [-1.0030045045, -1.0030045045, -0.9940179641]),
    ("turn", -1.0, [1.0030045045, 1.0030045045, 0.997], [1.0030045045, 1.0030045045, 0]),
    ("sequence", 1.0, [-1.0] * 3, [-1.0] * 3),
])  # fmt: skip
def test_ratios_of_turns_by_hand(ratio, advantage, losses, slopes, backend):
    # One rollout, turns of log ratios .002 .004 | -.006. A segment's tokens share its mean gradient.
    weights, chosen = [0.5, 0.25, 1.0], LossSettings(3e-3, 4e-3, ratio=ratio)
    segment = {"token": [0, 1, 2], "turn": [0, 0, 1], "sequence": [0, 0, 0]}[ratio]
    loss, gradient, _ = exactly(
        [0.002, 0.004, -0.006], [0.0] * 3, [advantage] * 3, weights, chosen, backend, segment=segment
    )
    assert loss == pytest.approx(sum(w * x for w, x in zip(weights, losses, strict=True)), abs=3e-7)
    mates = [[j for j in range(3) if segment[j] == s] for s in segment]
    expected = [sum(weights[j] * slopes[j] for j in js) / len(js) for js in mates]
    assert gradient == pytest.approx(expected, abs=3e-7)


# Log ratios of three rollouts to the engine: sums -.6, .05, -.04.
ENGINE = [-0.1, 1.5, -0.8, 0.0, -0.05, 0.02, -0.01, -0.01, 0.04]
TOKENS = [1.1051709181, 0.2231301601, 2.2255409285, 1, 1.0512710964, 0.9801986733, 1.0100501671, 1.0100501671,
          0.9607894392]  # fmt: skip
ALL, NONE = [0.5488116361] * 3 + [1.0512710964] * 2 + [0.9607894392] * 4, [0.0] * 9
MEANS = [0.8187307531] * 3 + [1.0253151205] * 2 + [0.9900498337] * 4


@EITHER
@pytest.mark.parametrize("given_, weights", [
    (dict(importance="token"), [min(w, 2.0) for w in TOKENS]),
    (dict(importance="token", importance_floor=0.5), [min(max(w, 0.5), 2.0) for w in TOKENS]),
    (dict(importance="token", importance_mode="mask", importance_floor=0.5), [TOKENS[0], 0, 0, *TOKENS[3:]]),
    (dict(importance="sequence"), ALL),
    (dict(importance="sequence", importance_floor=0.6), [0.6] * 3 + ALL[3:]),
    (dict(importance="sequence", importance_mode="mask", importance_floor=0.5), ALL),
    (dict(importance="sequence", importance_mode="mask", importance_floor=0.6), NONE[:3] + ALL[3:]),
    (dict(importance="sequence", importance_mode="mask", importance_cap=1.0), ALL[:3] + NONE[:2] + ALL[5:]),
    (dict(importance="geometric"), MEANS),
    (dict(importance="geometric", importance_mode="mask", importance_floor=0.99, importance_cap=1.03),
     NONE[:3] + MEANS[3:]),
])  # fmt: skip
def test_bounded_importance_weights_by_hand(given_, weights, backend):
    more = dict(engine_logp=ENGINE, sequence=[0] * 3 + [1] * 2 + [2] * 4)
    _, gradient, _ = exactly([0.0] * 9, None, [1.0] * 9, [1.0] * 9, LossSettings(**given_), backend, **more)
    assert gradient == pytest.approx([-w for w in weights], abs=2e-7)


@EITHER
def test_ratios_of_turns_with_weights_of_rollouts_by_hand(backend):
    # Rollout 0 has turns of log ratios .02 .04 | -.06 and weighs exp(.3); rollout 1's weight, exp(-.2), is masked.
    chosen = LossSettings(0.5, 0.5, ratio="turn", importance="sequence", importance_mode="mask", importance_floor=0.9)
    loss, gradient, _ = exactly(
        [0.02, 0.04, -0.06, 0.01], [0.0] * 4, [1.0] * 4, [1.0] * 4, chosen, backend,
        engine_logp=[-0.1, -0.1, -0.1, 0.2], segment=[0, 0, 1, 2], sequence=[0, 0, 0, 1],
    )  # fmt: skip
    first, second = math.exp(0.3 + 0.03), math.exp(0.3 - 0.06)
    assert loss == pytest.approx(-2 * first - second, rel=1e-6)
    assert gradient == pytest.approx([-first, -first, -second, 0], rel=1e-6)


def test_weights_are_the_aggregation_and_zero_weight_counts_nowhere():
    loss, grad, metrics = loss_of([-1.0, -1.0], None, [1.0, 5.0], [0.25, 0.0])
    assert (loss, grad) == (pytest.approx(-0.25), pytest.approx([-0.25, 0.0]))
    assert float(metrics["tokens"]) == 1


def test_advantages_are_never_broadcast():
    with pytest.raises(ValueError, match=r"advantages is \(1,\), the pairs \(2,\)"):
        loss_of([-1.0, -1.0], None, [1.0], [1.0, 1.0])


def test_more_than_one_dimension_is_refused():
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"policy_loss: logp is \(2, 3\); give one dimension: flatten\(\)"):
        policy_loss(x, None, x, x)


@pytest.mark.parametrize("wrong, message", [
    (dict(importance="seq"), "importance is 'seq'; choose one of none, token, sequence, geometric"),
    (dict(ratio="word"), "ratio is 'word'; choose one of token, turn, sequence"),
    (dict(importance_floor=2.5), "importance_floor must be from 0 to importance_cap, got 2.5"),
    (dict(importance_floor=-1), "importance_floor must be from 0 to importance_cap, got -1"),
    (dict(importance_mode="drop"), "importance_mode is 'drop'; choose one of truncate, mask"),
    (dict(dual_clip=0.5), "dual_clip must exceed 1, got 0.5"),
    (dict(importance_cap=0.0), "importance_cap must exceed 0, got 0.0"),
    (dict(surrogate="ppo"), "surrogate is 'ppo'; choose one of clip, cispo, sapo, vespo"),
    (dict(surrogate="vespo"), "surrogate=vespo weighs whole turns or rollouts; set ratio=turn or sequence"),
    (dict(surrogate="sapo", dual_clip=3.0), "dual_clip bounds surrogate=clip, not sapo; leave it None"),
    (dict(sapo_temperature_neg=0.0), "sapo_temperature_neg must exceed 0, got 0.0"),
    (dict(vespo_lambda_pos=-1.0), "vespo_lambda_pos must exceed 0, got -1.0"),
    (dict(clip_low=-1), "clip_low must be at least 0, got -1"),
    (dict(kl=math.nan), "kl must be a finite number, got nan"),
    (dict(kl=math.inf), "kl must be a finite number, got inf"),
    (dict(clip_low=None), "clip_low must be a finite number, got None"),
    (dict(clip_high="0.2"), "clip_high must be a finite number, got '0.2'"),
    (dict(dual_clip=torch.tensor([2.0, 3.0])), r"dual_clip must be a finite number, got a tensor \(2,\)"),
    (dict(entropy=True), "entropy must be a finite number, got True"),
    (dict(importance_cap=-math.inf), "importance_cap must be a finite number, got -inf"),
    (dict(unbiased_kl=1), "unbiased_kl must be True or False, got 1"),
    (dict(ratio=None), "ratio is None; choose one of token, turn, sequence"),
])  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong, message):
    with pytest.raises(ValueError, match=f"^LossSettings: {message}$"):
        LossSettings(**wrong)


def test_a_pair_of_weight_0_adds_nothing():
    # Were it there, the second pair's ratio would be exp(1e4) and the third's NaN; sequence 0's ratio is exp(0.1).
    old = [-1.1, -1e4, math.nan, -1.0]
    for settings_, more, ratio in (
        (LossSettings(), {}, math.exp(0.1)),
        (LossSettings(ratio="sequence"), {"segment": [0, 0, 0, 1]}, math.exp(0.1)),
    ):
        loss, grad, metrics = loss_of([-1.0] * 4, old, [1.0, -1.0, 1.0, 1.0], [0.5, 0.0, 0.0, 0.5], settings_, **more)
        assert loss == pytest.approx(-0.5 * ratio - 0.5)
        assert grad == pytest.approx([-0.5 * ratio, 0, 0, -0.5])
        assert float(metrics["ratio"]) == pytest.approx(ratio + 1) and float(metrics["tokens"]) == 2


@pytest.mark.parametrize("op", ["policy_loss", "linear_policy_loss"])
@pytest.mark.parametrize("wrong, message", [
    (dict(advantages=None), "advantages is None; give a tensor"),
    (dict(weights=None), "weights is None; give a tensor"),
    (dict(weights=[1.0, 1.0]), r"weights is a list; give a tensor: torch.as_tensor\(weights\)"),
    (dict(settings={"kl": 0.1}), "settings is a dict; give a LossSettings"),
    (dict(settings={}), "settings is a dict; give a LossSettings"),
    (dict(weights=torch.zeros(2, device="meta")), "weights on meta, (logp|hidden) on cpu; move them to one device"),
])  # fmt: skip
def test_what_is_no_input_is_named(op, wrong, message):
    x = torch.zeros(2)
    given_ = dict(old_logp=None, advantages=x, weights=x, settings=LossSettings()) | wrong
    head = dict(hidden=torch.zeros(2, 3), weight=torch.zeros(5, 3), labels=x.long(), rows=None)
    with pytest.raises(ValueError, match=f"^{op}: {message}$"):
        policy_loss(x, **given_) if op == "policy_loss" else linear_policy_loss(**head, **given_)


@pytest.mark.parametrize("name, settings_", [
    ("segment", LossSettings(ratio="turn")), ("sequence", LossSettings(importance="sequence")),
])  # fmt: skip
def test_numbers_of_segments_are_whole_and_below_the_number_of_pairs(name, settings_):
    x = torch.zeros(2)
    run = lambda number: policy_loss(x, x, x, x, settings_, engine_logp=x, **{name: number})  # noqa: E731
    run(torch.tensor([0, 1], dtype=torch.uint8))
    with pytest.raises(
        ValueError, match=f"^policy_loss: numbers of {name} must be integers, got torch.float32; .*long"
    ):
        run(x)
    with pytest.raises(ValueError, match=f"^policy_loss: {name} holds 2; number {name}s from 0 to below M, here 2: "):
        run(torch.tensor([0, 2]))


@pytest.mark.parametrize(
    "settings_",
    [
        LossSettings(kl=1), LossSettings(entropy=1), LossSettings(importance="token"), LossSettings(ratio="sequence"),
        LossSettings(ratio="turn"),
    ],
)  # fmt: skip
def test_a_missing_input_is_named(settings_):
    missing = "kl=1 needs ref_logp|entropy=1 needs entropy|importance='token' needs engine_logp"
    with pytest.raises(ValueError, match=rf"^policy_loss: ({missing}|ratio='(turn|sequence)' needs segment)=$"):
        loss_of([-1.0], None, [1.0], [1.0], settings_)


@pytest.mark.parametrize("importance", ["sequence", "geometric"])
def test_a_rollouts_weight_needs_its_number_beside_its_turns(importance):
    with pytest.raises(ValueError, match=f"importance='{importance}' needs sequence="):
        loss_of([-1.0], None, [1.0], [1.0], LossSettings(ratio="turn", importance=importance), segment=[0],
                engine_logp=[-1.0])  # fmt: skip


def fused(case, settings_, dtype, backend, old, ref, temperature=1.0, softcap=0.0, spread=1.0, scaled=False):
    g = torch.Generator().manual_seed(case[-1])
    n, h, v, m = case[:4]
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    leaves = [x.to(dtype).requires_grad_() for x in (randn(n, h), randn(v, h), spread * randn(v))]
    rows, labels = torch.randint(0, n, (m,), generator=g), torch.randint(0, v, (m,), generator=g)
    old_logp, ref_logp, engine_logp, advantages = randn(m) - 2, randn(m) - 2, randn(m) - 2, randn(m)
    weights = torch.rand(m, generator=g, dtype=torch.float64) * (torch.rand(m, generator=g) > 0.2)
    clip_scale = 4 * torch.rand(m, generator=g, dtype=torch.float64) if scaled else None
    loss, metrics = linear_policy_loss(
        leaves[0], leaves[1], labels, rows, old_logp.to(dtype) if old else None, advantages.to(dtype),
        weights.to(dtype), settings_, bias=leaves[2], temperature=temperature, softcap=softcap,
        clip_scale=clip_scale if clip_scale is None else clip_scale.to(dtype),
        ref_logp=ref_logp.to(dtype) if ref else None, engine_logp=engine_logp.to(dtype), backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(loss * 1.7, leaves)
    pairs = dict(old_logp=old_logp if old else None, ref_logp=ref_logp if ref else None)
    pairs |= dict(engine_logp=engine_logp, advantages=advantages, weights=weights, clip_scale=clip_scale)
    slopes = magnitudes.of_head_gradients(
        dict(zip(("hidden", "weight", "bias"), leaves, strict=True)), labels, rows, pairs, settings_,
        temperature=temperature, softcap=softcap,
    )  # fmt: skip
    return {
        "slopes": torch.tensor(slopes, dtype=torch.float64),
        **{k: v.detach() for k, v in metrics.items()},
        "loss": loss.detach(),
        **dict(zip(("dh", "dw", "db"), grads, strict=True)),
    }


@settings(max_examples=30, deadline=None)
@given(
    case=st.tuples(st.integers(1, 30), st.integers(1, 17), st.integers(1, 50), st.integers(1, 60), st.integers(0, 999)),
    kl=st.sampled_from([0.0, 0.3]), entropy=st.sampled_from([0.0, 0.2]), old=st.booleans(),
    dual=st.sampled_from([None, 1.5]), softcap=st.sampled_from([0.0, 2.0]),
    importance=st.sampled_from(["none", "token"]), scaled=st.booleans(),
    surrogate=st.sampled_from(["clip", "clip", "cispo", "sapo"]), unbiased=st.booleans(),
)  # fmt: skip
def test_fused_equals_its_definition(case, kl, entropy, old, dual, softcap, importance, scaled, surrogate, unbiased):
    settings_ = LossSettings(
        kl=kl, entropy=entropy, dual_clip=dual if surrogate == "clip" else None, importance=importance,
        importance_floor=0.5, surrogate=surrogate, unbiased_kl=unbiased,
    )  # fmt: skip
    run = lambda dtype, backend: fused(  # noqa: E731
        case, settings_, dtype, backend, old, kl > 0, 1.3, softcap, scaled=scaled
    )
    exact, ours, plain = run(torch.float64, "reference"), run(torch.float32, "torch"), run(torch.float32, "reference")
    slopes = float(exact["slopes"])
    for name in exact:
        error = (ours[name].double() - exact[name]).abs().max()
        rounding = 2e-6 * slopes if name in ("dh", "dw", "db") else 0
        allowed = 2 * (plain[name].double() - exact[name]).abs().max()
        assert error <= allowed + 1e-4 * (1 + exact[name].abs().max()) + rounding, name


def test_an_exact_gradient_of_0_is_rounding_of_its_terms():
    # With one token in the vocabulary nothing has a gradient; large slopes, each rounded, cancel.
    case = (1, 1, 1, 58, 971)
    found = fused(case, LossSettings(), torch.float32, "torch", True, False, 1.3)
    for name in ("dh", "dw", "db"):
        assert float(found[name].abs().max()) <= 2e-6 * float(found["slopes"]), name


@pytest.mark.parametrize(("entropy", "softcap"), [(0.0, 0.0), (0.1, 0.0), (0.0, 2.0)])
@pytest.mark.parametrize("temperature", [1.0, 1.3])
def test_chunks_and_panels_add_up(entropy, softcap, temperature, monkeypatch):
    case, settings_ = (20, 6, 31, 50, 3), LossSettings(kl=0.1, entropy=entropy)
    monkeypatch.setattr(torch_path, "chunk_shape", lambda *_: (3, 8))
    exact, parts = (
        fused(case, settings_, torch.float64, backend, True, True, temperature, softcap)
        for backend in ("reference", "torch")
    )
    for name in exact:
        torch.testing.assert_close(parts[name], exact[name])


@pytest.mark.parametrize("entropy", [0.0, 0.1])
def test_panels_whose_largest_logits_are_far_apart(entropy, monkeypatch):
    # e to the difference of two panels' largest is below what float32 holds, in either direction.
    case, settings_ = (9, 4, 31, 40, 5), LossSettings(entropy=entropy)
    monkeypatch.setattr(torch_path, "chunk_shape", lambda *_: (4, 4))
    run = lambda *how: fused(case, settings_, *how, False, False, spread=300.0)  # noqa: E731
    exact, ours = run(torch.float64, "reference"), run(torch.float32, "torch")
    for name in exact:
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("settings_, what", [
    (LossSettings(ratio="sequence"), "ratio='sequence' needs the whole sequence"),
    (LossSettings(ratio="turn"), "ratio='turn' needs the whole turn"),
    (LossSettings(importance="sequence"), "importance='sequence' needs the whole sequence"),
    (LossSettings(importance="geometric"), "importance='geometric' needs the whole sequence"),
])  # fmt: skip
def test_what_needs_whole_turns_or_rollouts_is_refused(settings_, what):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=f"^linear_policy_loss: {what} first; use linear_logprob and policy_loss$"):
        linear_policy_loss(
            x, x, torch.zeros(2, dtype=torch.long), None, None, torch.zeros(2), torch.zeros(2), settings_
        )


def training(n, h, v, a_row=2, dtype=torch.float32, backend="torch", frozen=(), **options):
    """A call that returns the loss, and the gradients of what is not frozen."""
    g = torch.Generator().manual_seed(0)
    leaves = {
        k: (torch.randn(*s, generator=g) / h**0.5).to(dtype)
        for k, s in (("hidden", (n, h)), ("weight", (v, h)), ("bias", (v,)))
    }
    wanted = [leaves[k].requires_grad_() for k in leaves if k not in frozen]
    rows, one = torch.arange(n).repeat_interleave(a_row), torch.ones(n * a_row)
    labels = torch.randint(0, v, rows.shape, generator=g)
    pairs = dict(old_logp=-2 * one, ref_logp=-2 * one, advantages=one, weights=one, rows=rows, labels=labels)
    pairs["clip_scale"] = one

    def run():
        loss, _ = linear_policy_loss(
            **leaves, **pairs, settings=LossSettings(kl=0.1, entropy=0.1), backend=backend, **options
        )
        return loss, torch.autograd.grad(loss, wanted) if loss.requires_grad else ()

    return run


@pytest.mark.parametrize("n, h, v, a_row, dtype, softcap", [
    (300, 16, 3000, 2, torch.float32, 0.0),
    (300, 16, 3000, 2, torch.float32, 2.0),
    (900, 2048, 64, 1, torch.float32, 0.0),
    (500, 512, 1500, 2, torch.bfloat16, 0.0),
    (900, 4, 50, 20, torch.float32, 0.0),
])  # fmt: skip
def test_what_it_holds_beside_gradients_fits_the_workspace(n, h, v, a_row, dtype, softcap, monkeypatch):
    workspace, shapes, chunk_shape = 2 << 20, [], torch_path.chunk_shape
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: workspace)
    monkeypatch.setattr(torch_path, "chunk_shape", lambda *x: shapes.append(chunk_shape(*x)) or shapes[-1])
    peak, (_, gradients) = peak_bytes(training(n, h, v, a_row, dtype, softcap=softcap))
    wide = 0 if dtype == torch.float32 else 4 * (v * h + v)  # the float32 gradients of weight and bias
    assert shapes[0][0] * 3 <= n
    assert peak - sum(g.nbytes for g in gradients) - wide <= workspace


def test_chunks_are_of_equal_height(monkeypatch):
    # A row of 32,768 logits, 4 x 1,024 temporaries, 2 x 512 states: 4 * (32768 + 4096 + 1024) + 2,048 + 320 bytes, of
    # which 64 MiB less 112 bytes per pair hold 435. 512 rows take two chunks, 1,300 three.
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: 64 << 20)
    hidden, weight = torch.empty(1, 512), torch.empty(32_768, 512)
    shapes = [torch_path.chunk_shape(hidden, weight, rows, rows, torch.float32) for rows in (0, 400, 512, 1300)]
    assert shapes == [(1, 1024), (400, 1024), (256, 1024), (434, 1024)]


@pytest.mark.parametrize("frozen", [("weight", "bias"), ("hidden",)])
def test_what_is_frozen_costs_no_gradient(frozen, monkeypatch):
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: 1 << 19)
    peak, (_, gradients) = peak_bytes(training(200, 512, 600, 1, frozen=frozen))
    assert peak - sum(g.nbytes for g in gradients) <= 1 << 19
    expected = training(200, 512, 600, 1, frozen=frozen, backend="reference")()
    for ours, theirs in zip(gradients, expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_without_gradients_none_is_made():
    run = training(200, 64, 3000)
    with torch.no_grad():
        peak, (loss, gradients) = peak_bytes(run)
    assert gradients == () and not loss.requires_grad
    torch.testing.assert_close(loss, run()[0].detach())
    with_gradients, _ = peak_bytes(run)
    assert peak <= with_gradients - 4 * 64 * 3200


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_gradients_are_handed_out_once(factor):
    hidden, weight = torch.ones(2, 3, requires_grad=True), torch.zeros(4, 3)
    one = torch.ones(2)
    loss, _ = linear_policy_loss(hidden, weight, torch.tensor([0, 1]), None, None, one, one)
    (loss * factor).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_policy_loss: a second backward; .* call linear_policy_loss again"):
        loss.backward()
