"""The clipped loss: hand-worked numbers, and the chunked LM-head op against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels import LossSettings, linear_policy_loss, policy_loss
from igpo_kernels.linear_policy_loss import torch_path


def loss_of(logp, old, advantages, weights, settings=None, **more):
    t = lambda x: None if x is None else torch.tensor(x, dtype=torch.float64)  # noqa: E731
    logp = t(logp).requires_grad_()
    if "sequence" in more:
        more["sequence"] = torch.tensor(more["sequence"])
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
        logp, [0.0] * 3, [1.0] * 3, [0.5, 0.5, 1.0], LossSettings(sequence_ratio=True), sequence=[0, 0, 1]
    )
    r = math.sqrt(1.1 * 1.21)
    assert loss == pytest.approx(-r - 1.2)
    assert grad == pytest.approx([-r * 0.5, -r * 0.5, 0.0])
    assert float(metrics["clipped"]) == 1


def test_weights_are_the_aggregation_and_zero_weight_counts_nowhere():
    loss, grad, metrics = loss_of([-1.0, -1.0], None, [1.0, 5.0], [0.25, 0.0])
    assert (loss, grad) == (pytest.approx(-0.25), pytest.approx([-0.25, 0.0]))
    assert float(metrics["tokens"]) == 1


def test_advantages_are_never_broadcast():
    with pytest.raises(ValueError, match=r"advantages is \(1,\), the pairs \(2,\)"):
        loss_of([-1.0, -1.0], None, [1.0], [1.0, 1.0])


@pytest.mark.parametrize(
    "settings_",
    [LossSettings(kl=1), LossSettings(entropy=1), LossSettings(importance="token"), LossSettings(sequence_ratio=True)],
)
def test_a_missing_input_is_named(settings_):
    with pytest.raises(ValueError, match=r"need (ref_logp|entropy|engine_logp|sequence)="):
        loss_of([-1.0], None, [1.0], [1.0], settings_)


def fused(case, settings_, dtype, backend, old, ref, temperature=1.0, softcap=0.0):
    g = torch.Generator().manual_seed(case[-1])
    n, h, v, m = case[:4]
    randn = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    leaves = [x.to(dtype).requires_grad_() for x in (randn(n, h), randn(v, h), randn(v))]
    rows, labels = torch.randint(0, n, (m,), generator=g), torch.randint(0, v, (m,), generator=g)
    old_logp, ref_logp, advantages = randn(m) - 2, randn(m) - 2, randn(m)
    weights = torch.rand(m, generator=g, dtype=torch.float64) * (torch.rand(m, generator=g) > 0.2)
    loss, metrics = linear_policy_loss(
        leaves[0], leaves[1], labels, rows, old_logp.to(dtype) if old else None, advantages.to(dtype),
        weights.to(dtype), settings_, bias=leaves[2], temperature=temperature, softcap=softcap,
        ref_logp=ref_logp.to(dtype) if ref else None, backend=backend,
    )  # fmt: skip
    grads = torch.autograd.grad(loss * 1.7, leaves)
    return {
        **{k: v.detach() for k, v in metrics.items()},
        "loss": loss.detach(),
        **dict(zip(("dh", "dw", "db"), grads, strict=True)),
    }


@settings(max_examples=30, deadline=None)
@given(
    case=st.tuples(st.integers(1, 30), st.integers(1, 17), st.integers(1, 50), st.integers(1, 60), st.integers(0, 999)),
    kl=st.sampled_from([0.0, 0.3]), entropy=st.sampled_from([0.0, 0.2]), old=st.booleans(),
    dual=st.sampled_from([None, 1.5]), softcap=st.sampled_from([0.0, 2.0]),
)  # fmt: skip
def test_fused_equals_its_definition(case, kl, entropy, old, dual, softcap):
    settings_ = LossSettings(kl=kl, entropy=entropy, dual_clip=dual)
    run = lambda dtype, backend: fused(case, settings_, dtype, backend, old, kl > 0, 1.3, softcap)  # noqa: E731
    exact, ours, plain = run(torch.float64, "reference"), run(torch.float32, "torch"), run(torch.float32, "reference")
    for name in exact:
        error = (ours[name].double() - exact[name]).abs().max()
        assert error <= 2 * (plain[name].double() - exact[name]).abs().max() + 1e-4 * (1 + exact[name].abs().max()), (
            name
        )


def test_chunks_add_up(monkeypatch):
    case, settings_ = (20, 6, 31, 50, 3), LossSettings(kl=0.1, entropy=0.1)
    whole = fused(case, settings_, torch.float64, "torch", True, True)
    monkeypatch.setattr(torch_path, "workspace_bytes", lambda device: 8 * (31 * 5 + 2 * 6) * 3)
    parts = fused(case, settings_, torch.float64, "torch", True, True)
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


@pytest.mark.parametrize("settings_", [LossSettings(sequence_ratio=True), LossSettings(importance="token")])
def test_what_needs_the_whole_sequence_is_refused(settings_):
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="needs the whole sequence first; use linear_logprob and policy_loss"):
        linear_policy_loss(
            x, x, torch.zeros(2, dtype=torch.long), None, None, torch.zeros(2), torch.zeros(2), settings_
        )
