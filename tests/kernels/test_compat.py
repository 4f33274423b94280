"""The shims against the formulas of the trainers they stand in for, in plain torch."""

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
    torch.testing.assert_close(logp, plain_logp(hidden, weight, ids, 0.7))
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1))
    torch.testing.assert_close(
        linear_cross_entropy(hidden, weight, ids, reduction="mean")[0], plain_logp(hidden, weight, ids).mean()
    )
    with pytest.raises(ValueError, match="split over processes"):
        linear_cross_entropy(hidden, weight, ids, dist_process_group=object())
    with pytest.raises(ValueError, match="choose none, mean or sum"):
        linear_cross_entropy(hidden, weight, ids, reduction="avg")


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
