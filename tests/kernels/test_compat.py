"""The shims against the formulas of the trainers they stand in for, in plain torch."""

from types import SimpleNamespace

import pytest
import torch

from igpo_kernels.compat import fused_linear_grpo, linear_cross_entropy

B, T, H, V = 3, 5, 8, 17


def inputs(seed=0):
    g = torch.Generator().manual_seed(seed)
    randn = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.randint(0, V, (B, T), generator=g)
    return randn(B, T, H).requires_grad_(), randn(V, H).requires_grad_(), ids, mask, randn(B, T)


def plain_logp(hidden, weight, ids, temperature=1.0):
    return (hidden @ weight.T / temperature).log_softmax(-1).gather(-1, ids[..., None])[..., 0]


def test_verls_linear_cross_entropy():
    hidden, weight, ids, *_ = inputs()
    logp, entropy = linear_cross_entropy(hidden, weight, ids, 0.7, "none")
    log_p = (hidden @ weight.T / 0.7).log_softmax(-1)
    torch.testing.assert_close(logp, plain_logp(hidden, weight, ids, 0.7).flatten())  # [tokens], as verl's
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1).flatten())
    mean = plain_logp(hidden, weight, ids).mean()
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, ids, reduction="Mean")[0], mean)
    one_process = SimpleNamespace(size=lambda: 1)
    alone = linear_cross_entropy(hidden, weight, ids, 1.0, "MEAN", one_process)[0]
    torch.testing.assert_close(alone, mean)
    with pytest.raises(ValueError, match="choose none, mean or sum"):
        linear_cross_entropy(hidden, weight, ids, reduction="avg")


def test_a_label_of_minus_100_is_left_out():
    hidden, weight, ids, *_ = inputs()
    some = ids.clone()
    some[0, 1] = -100
    kept = some != -100
    logp, entropy = linear_cross_entropy(hidden, weight, some)
    expected = plain_logp(hidden, weight, ids) * kept
    torch.testing.assert_close(logp, expected.flatten())
    torch.testing.assert_close(entropy, linear_cross_entropy(hidden, weight, ids)[1])
    for reduction, whole in (("sum", expected.sum()), ("mean", expected.sum() / 14)):
        found = linear_cross_entropy(hidden, weight, some, reduction=reduction)[0]
        torch.testing.assert_close(found, whole)
        gradients = (torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (found, whole))
        torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="label -1 of pair 1"):
        linear_cross_entropy(hidden, weight, some.where(kept, -1))


@pytest.mark.parametrize("delta", [0.9, 1.05, 1.15, 1.2, 1.5, 4.0])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_delta_is_trls_bound_of_the_ratio(delta, advantage):
    hidden, weight, ids, mask, _ = inputs(3)
    logp = plain_logp(hidden, weight, ids)
    old = (logp - torch.linspace(-0.7, 1.9, B * T).view(B, T)).detach()
    ratio = (logp - old).exp()
    each = -torch.min(ratio.clamp(max=delta) * advantage, ratio.clamp(0.8, 1.2) * advantage)
    expected = (each * mask).sum() / mask.sum()
    loss, _ = fused_linear_grpo(
        hidden, weight, ids, mask, torch.full((B,), advantage), old, delta=delta, loss_type="bnpo"
    )
    torch.testing.assert_close(loss, expected)
    ours, theirs = (torch.autograd.grad(x, hidden)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_delta_below_the_lower_clip_is_refused():
    hidden, weight, ids, mask, advantages = inputs()
    with pytest.raises(ValueError, match=r"^fused_linear_grpo: delta is 0.7; give at least 1 - epsilon_low, 0.8$"):
        fused_linear_grpo(hidden, weight, ids, mask, advantages, delta=0.7)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo"])
def test_a_fraction_of_a_mask_weighs(loss_type):
    hidden, weight, ids, mask, advantages = inputs()
    mask = mask * torch.linspace(0.2, 1, T)
    each = -advantages * (plain_logp(hidden, weight, ids) - plain_logp(hidden, weight, ids).detach()).exp()
    expected = {
        "grpo": ((each * mask).sum(1) / mask.sum(1).clamp(min=1)).mean(),
        "bnpo": (each * mask).sum() / mask.sum(),
        "dr_grpo": (each * mask).sum() / (B * T),
    }[loss_type]
    torch.testing.assert_close(
        fused_linear_grpo(hidden, weight, ids, mask, advantages, loss_type=loss_type)[0], expected
    )


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
def test_no_tokens_lose_nothing(loss_type):
    empty = torch.zeros(2, 0)
    loss, _ = fused_linear_grpo(
        torch.zeros(2, 0, H), torch.zeros(V, H), empty.long(), empty, empty, loss_type=loss_type
    )
    assert float(loss) == 0


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("per_token", [False, True])
def test_grpo_losses(loss_type, per_token):
    hidden, weight, ids, mask, advantages = inputs(1)
    advantages = advantages if per_token else advantages[:, 0]
    logp = plain_logp(hidden, weight, ids, 1.3)
    noise = torch.randn(B, T, generator=torch.Generator().manual_seed(2)) * 0.4
    old, ref = (logp + noise).detach(), (logp - noise).detach()
    a = advantages if per_token else advantages[:, None]
    ratio = (logp - old).exp()
    each = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.28) * a)
    d = ref - logp
    each = each + 0.1 * (d.exp() - d - 1)
    expected = {
        "grpo": ((each * mask).sum(1) / mask.sum(1)).mean(),
        "bnpo": (each * mask).sum() / mask.sum(),
        "dapo": (each * mask).sum() / mask.sum(),
        "dr_grpo": (each * mask).sum() / (B * 9),
    }[loss_type]
    loss, metrics = fused_linear_grpo(
        hidden, weight, ids, mask, advantages, old, ref, beta=0.1, epsilon_high=0.28, loss_type=loss_type,
        max_completion_length=9, temperature=1.3,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, weight)), torch.autograd.grad(expected, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(metrics["kl"], ((d.exp() - d - 1) * mask).sum().detach() / mask.sum())


def test_wrong_advantages_are_never_broadcast():
    hidden, weight, ids, mask, advantages = inputs()
    with pytest.raises(ValueError, match=r"give \[3\] or \[3, 5\]"):
        fused_linear_grpo(hidden, weight, ids, mask, advantages[:1])
    with pytest.raises(ValueError, match="loss_type"):
        fused_linear_grpo(hidden, weight, ids, mask, advantages, loss_type="ppo")


@pytest.mark.parametrize("name, cut, message", [
    ("hidden", lambda x: torch.cat([x, x[:, :1]], 1), r"hidden \(3, 6, 8\) for ids \(3, 5\); give the states"),
    ("hidden", lambda x: x.flatten(0, 1), r"hidden \(15, 8\) for ids \(3, 5\)"),
    ("mask", lambda x: x[:, :1], r"mask \(3, 1\); give \[3, 5\]"),
    ("mask", lambda x: x[0], r"mask \(5,\); give \[3, 5\]"),
    ("old_logp", lambda x: x[:, 0], r"old_logp \(3,\); give \[3, 5\]"),
    ("ref_logp", lambda x: x[:, :, None], r"ref_logp \(3, 5, 1\); give \[3, 5\]"),
    ("ids", lambda x: x.flatten(), r"ids \(15,\); give \[B, T\]"),
])  # fmt: skip
def test_shapes_that_differ_from_the_ids_are_refused(name, cut, message):
    hidden, weight, ids, mask, advantages = inputs()
    given = dict(hidden=hidden, ids=ids, mask=mask, old_logp=advantages, ref_logp=advantages)
    given[name] = cut(given[name])
    with pytest.raises(ValueError, match=f"^fused_linear_grpo: {message}"):
        fused_linear_grpo(weight=weight, advantages=advantages, **given)
