"""The shims against the formulas of the trainers they stand in for, in plain torch."""

import math

import pytest
import torch

from igpo_kernels.compat import LigerFusedLinearGRPOLoss, fused_linear_grpo, linear_cross_entropy

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
    one_process = torch.distributed.ProcessGroup(0, 1)
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


def trl_loss(logp, old, ref, mask, a, loss_type, level, low, high, beta, corrected, is_ratio, items, longest):
    """TRL 1.16's ``_compute_loss``, of one process and one micro-batch."""
    log_ratio = logp - old
    if level == "sequence":
        log_ratio = ((log_ratio * mask).sum(-1) / mask.sum(-1))[:, None]
    ratio = log_ratio.exp()
    if loss_type == "cispo":
        each = -ratio.clamp(max=high).detach() * a * logp
    elif loss_type == "sapo":
        t = torch.where(a > 0, torch.tensor(0.8).double(), torch.tensor(1.3).double())
        each = -torch.sigmoid(t * (ratio - 1)) * 4 / t * a
    elif loss_type == "vespo":
        log_w = ((logp - old).detach() * mask).sum(-1, keepdim=True)
        log_w = log_w if is_ratio is None else log_w + is_ratio.log().sum(-1, keepdim=True)
        k, rate = (torch.where(a >= 0, *(torch.tensor(x).double() for x in pair)) for pair in ((2.0, 2.5), (3.0, 1.5)))
        each = -(rate + k * log_w - rate * log_w.exp()).exp() * a * logp
    else:
        each = -torch.min(ratio * a, ratio.clamp(1 - low, 1 + high) * a)
    if is_ratio is not None and loss_type != "vespo":
        each = each * is_ratio
    kl = (ref - logp).exp() - (ref - logp) - 1
    each = each + beta * (kl * ratio if corrected else kl)
    total = (each * mask).sum()
    if loss_type in ("grpo", "sapo"):
        return ((each * mask).sum(-1) / mask.sum(-1)).mean()
    divisor = {"bnpo": mask.sum(), "dr_grpo": len(mask) * longest, "luspo": len(mask)}
    return total / divisor.get(loss_type, items)


ALL = ["grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
SHAPE = dict(
    sapo_temperature_pos=0.8, sapo_temperature_neg=1.3, vespo_k_pos=2.0, vespo_k_neg=2.5, vespo_lambda_pos=3.0,
    vespo_lambda_neg=1.5,
)  # fmt: skip


def gradients_of(loss, *leaves):
    return loss.detach(), *torch.autograd.grad(loss, leaves, retain_graph=True)


@pytest.mark.parametrize("ratio_of", [None, "token", "sequence"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ALL)
def test_trls_losses(loss_type, level, ratio_of):
    hidden, weight, ids, mask, a = inputs(5)
    hidden, weight, a = (x.detach().double() for x in (hidden, weight, a))
    hidden.requires_grad_(), weight.requires_grad_()
    noise = 0.5 * torch.randn(3, B, T, generator=torch.Generator().manual_seed(6)).double()
    logp = plain_logp(hidden, weight, ids, 1.3)
    old, ref, engine = (logp.detach() + x for x in noise)
    is_ratio = None if ratio_of is None else (0.5 * engine * mask).exp()[:, : 1 if ratio_of == "sequence" else T]
    a = a[:, :1].expand(B, T) if level == "sequence" and loss_type != "cispo" else a  # TRL spreads them over tokens
    corrected = ratio_of is not None and not (loss_type == "vespo" and level == "sequence")
    high = 1.1 if loss_type == "cispo" else 0.15
    expected = trl_loss(
        logp, old, ref, mask, a, loss_type, level, 0.1, high, 0.1, corrected, is_ratio, 17.0, 9
    )  # fmt: skip
    loss, _ = fused_linear_grpo(
        hidden, weight, ids, mask, a, old, ref, beta=0.1, epsilon_low=0.1, epsilon_high=high, loss_type=loss_type,
        importance_sampling_level=level, max_completion_length=9, temperature=1.3, use_bias_correction_kl=corrected,
        vllm_is_ratio=is_ratio, num_items_in_batch=torch.tensor(17), **SHAPE,
    )  # fmt: skip
    for ours, theirs in zip(gradients_of(loss, hidden, weight), gradients_of(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("beta, corrected", [(0.0, False), (0.1, True)])
@pytest.mark.parametrize("loss_type, level", [*((x, "token") for x in ALL if x != "luspo"), ("grpo", "sequence"),
                                              ("luspo", "sequence")])  # fmt: skip
def test_ligers_own_module(loss_type, level, beta, corrected):
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    hidden, weight, ids, mask, a = inputs(7)
    if loss_type == "luspo":
        mask = torch.ones_like(mask)  # Liger counts padding where it adds a KL
    bias = torch.linspace(-1, 1, V).requires_grad_()
    logp = ((hidden @ weight.T + bias) / 0.9).log_softmax(-1).gather(-1, ids[..., None])[..., 0].detach()
    noise = 0.5 * torch.randn(3, B, T, generator=torch.Generator().manual_seed(8))
    old, ref, is_ratio = logp + noise[0], logp + noise[1], (0.3 * noise[2] * mask).exp()
    options = dict(
        beta=beta, compiled=False, use_ref_model=beta > 0, chunk_size=2, epsilon_low=0.1, loss_type=loss_type,
        epsilon_high=1.1 if loss_type == "cispo" else 0.15, importance_sampling_level=level, temperature=0.9,
        max_completion_length=9, delta=1.4 if loss_type == "grpo" else None, use_bias_correction_kl=corrected, **SHAPE,
    )  # fmt: skip
    results = []
    for module in (LigerFusedLinearGRPOLoss, liger.LigerFusedLinearGRPOLoss):
        loss, metrics = module(**options)(
            hidden, weight, ids, mask, a[:, 0], bias, ref if beta else None, old, vllm_is_ratio=is_ratio,
            num_items_in_batch=torch.tensor(17),
        )  # fmt: skip
        results.append((*gradients_of(loss, hidden, weight, bias), *metrics))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)


def test_ligers_references():
    hidden, weight, ids, mask, a = inputs(9)
    module = LigerFusedLinearGRPOLoss(beta=0.2, loss_type="grpo", temperature=0.7)
    other = weight.detach().flip(0)
    ref = plain_logp(hidden, other, ids, 0.7).detach()
    given = module(hidden, weight, ids, mask, a[:, 0], ref_per_token_logps=ref)
    made = module(hidden, weight, ids, mask, a[:, 0], ref_input=hidden, ref_weight=other)
    torch.testing.assert_close(made, given)
    with pytest.raises(
        ValueError, match=r"^Liger.*: beta=0.2 needs a reference; give ref_per_token_logps, or ref_input and"
    ):
        module(hidden, weight, ids, mask, a[:, 0], ref_input=hidden)
    none = LigerFusedLinearGRPOLoss(beta=0.2, use_ref_model=False)(hidden, weight, ids, mask, a[:, 0])
    assert float(none[1][0]) == 0 and float(given[1][0]) > 0.1


def test_items_of_all_processes_are_shared_out(monkeypatch):
    hidden, weight, ids, mask, a = inputs()
    run = lambda **more: fused_linear_grpo(hidden, weight, ids, mask, a, loss_type="dapo", **more)[0]  # noqa: E731
    alone = run(num_items_in_batch=44)
    torch.testing.assert_close(run() * 11, alone * 44)  # of these 15 tokens 11 are trained
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        torch.testing.assert_close(run(num_items_in_batch=44), 4 * alone)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.mul_(5))
        torch.testing.assert_close(run(), 4 / 5 * alone * 44 / 11)
    finally:
        torch.distributed.destroy_process_group()


def test_an_entropy_bonus_and_a_soft_cap():
    hidden, weight, ids, mask, a = inputs(4)
    log_p = (2 * (hidden @ weight.T / 2).tanh()).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    logp = log_p.gather(-1, ids[..., None])[..., 0]
    for level in ("token", "sequence"):
        expected = ((-a[:, :1] * (logp - logp.detach()).exp() - 0.3 * entropy) * mask).sum() / mask.sum()
        loss, means = fused_linear_grpo(
            hidden, weight, ids, mask, a[:, 0], loss_type="bnpo", importance_sampling_level=level, entropy_coef=0.3,
            softcap=2.0,
        )  # fmt: skip
        torch.testing.assert_close(means["entropy"], (entropy * mask).sum().detach() / mask.sum())
        for ours, theirs in zip(gradients_of(loss, weight), gradients_of(expected, weight), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrong, message", [
    (dict(importance_sampling_level="turn"), "importance_sampling_level='turn'; choose token or sequence"),
    (dict(mask=None), "mask is None; give a tensor"),
    (dict(advantages=[1.0, 2.0, 3.0]), r"advantages is a list; give a tensor: torch.as_tensor\(advantages\)"),
    (dict(beta=0.1), "beta=0.1 needs ref_logp="),
    (dict(beta=None), "beta must be a finite number, got None"),
    (dict(epsilon_high=math.nan), "epsilon_high must be a finite number, got nan"),
    (dict(delta="1"), "delta must be a finite number, got '1'"),
    (dict(mask=torch.ones(3, 5, device="meta")), "mask on meta, hidden on cpu; move them to one device"),
    (dict(vllm_is_ratio=torch.ones(2, 5)), r"vllm_is_ratio \(2, 5\); give \[3\] or \[3, 5\]"),
])  # fmt: skip
def test_options_that_mean_nothing_are_refused(wrong, message):
    hidden, weight, ids, mask, advantages = inputs()
    with pytest.raises(ValueError, match=f"^fused_linear_grpo: {message}"):
        fused_linear_grpo(**dict(hidden=hidden, weight=weight, ids=ids, mask=mask, advantages=advantages) | wrong)


def test_an_upper_clip_of_none_is_the_lower_ones():
    hidden, weight, ids, mask, a = inputs(3)
    old = plain_logp(hidden, weight, ids).detach() - torch.linspace(-0.7, 1.9, B * T).view(B, T)
    run = lambda **clip: fused_linear_grpo(hidden, weight, ids, mask, a, old, **clip)[0]  # noqa: E731
    assert torch.equal(run(epsilon_low=0.4, epsilon_high=None), run(epsilon_low=0.4, epsilon_high=0.4))
    assert not torch.equal(run(epsilon_low=0.4, epsilon_high=None), run(epsilon_low=0.4, epsilon_high=0.2))


def test_sequences_without_trained_tokens_have_no_number():
    hidden, weight, ids, mask, a = inputs()
    one = torch.zeros_like(mask)
    one[2, 3] = 1  # a token of the third sequence, and one pair
    of_token, of_sequence = (
        fused_linear_grpo(hidden, weight, ids, one, a, importance_sampling_level=level)[0]
        for level in ("token", "sequence")
    )
    torch.testing.assert_close(of_sequence, of_token)


def test_ligers_arguments_by_place_and_its_attributes():
    liger = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss").LigerFusedLinearGRPOLoss
    given = (
        0.1, False, False, 2, 0.3, 0.4, "bnpo", 7, "sequence", 0.8, 1.3, 0.9, 2.0, True, 2.1, 3.1, 2.9, 2.2
    )  # fmt: skip
    ours, theirs = LigerFusedLinearGRPOLoss(*given), liger(*given)
    public = lambda x: {name: value for name, value in vars(x).items() if name[0] != "_" and name != "training"}  # noqa: E731
    assert public(theirs) == {name: getattr(ours, name) for name in public(theirs)}
    assert tuple(public(theirs).values()) == given
    default = LigerFusedLinearGRPOLoss()
    assert public(liger()) == {name: getattr(default, name) for name in public(theirs)}
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        LigerFusedLinearGRPOLoss(epsilon=0.2)


def test_ligers_attributes_decide():
    hidden, weight, ids, mask, a = inputs()
    module = LigerFusedLinearGRPOLoss(beta=0.0, temperature=0.5)
    module.temperature, module.loss_type = 0.9, "grpo"
    expected = LigerFusedLinearGRPOLoss(beta=0.0, temperature=0.9, loss_type="grpo")
    assert torch.equal(module(hidden, weight, ids, mask, a[:, 0])[0], expected(hidden, weight, ids, mask, a[:, 0])[0])


@pytest.mark.parametrize("wrong, message", [
    (dict(reduction=None), "reduction=None; choose none, mean or sum"),
    (dict(labels=[1]), r"labels is a list; give a tensor: torch.as_tensor\(labels\)"),
])  # fmt: skip
def test_verls_arguments_that_mean_nothing_are_refused(wrong, message):
    hidden, weight, ids, *_ = inputs()
    with pytest.raises(ValueError, match=f"^linear_cross_entropy: {message}$"):
        linear_cross_entropy(**dict(hidden=hidden, weight=weight, labels=ids) | wrong)
