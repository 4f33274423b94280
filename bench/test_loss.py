"""The clipped loss: LM head to loss and gradients against three bare products, and from log-probabilities."""

import importlib.util

import torch

from bench.test_logprob import bare_products, inputs, plain, pytest_generate_tests, rounds  # noqa: F401
from igpo_kernels import LossSettings, linear_policy_loss, policy_loss


def test_loss_from_the_lm_head(shape, compare):
    hidden, weight, labels = inputs(shape)
    _, three_products = bare_products(hidden, weight)
    m = len(labels)
    advantages = torch.randn(m, device=hidden.device)
    weights = torch.full((m,), 1 / m, device=hidden.device)
    with torch.no_grad():
        old = torch.cat([plain(h, weight, ids) for h, ids in zip(hidden.split(64), labels.split(64), strict=True)])
    old = old + 0.1 * torch.randn(m, device=hidden.device)

    def gradients(loss):
        return torch.autograd.grad(loss, (hidden, weight))

    def ours():
        return gradients(linear_policy_loss(hidden, weight, labels, None, old, advantages, weights)[0])

    def torch_eager():
        return gradients(policy_loss(plain(hidden, weight, labels), old, advantages, weights)[0])

    sides = {"ours": ours, "matmul": three_products}
    if m * len(weight) * 4 * 4 < 8e9:
        sides["torch"] = torch_eager
        for a, b in zip(ours(), torch_eager(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-2)
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        liger = LigerFusedLinearGRPOLoss(beta=0.0, loss_type="dapo", temperature=1.0)
        mask = torch.ones(m, 1, device=hidden.device)
        sides["liger"] = lambda: gradients(
            liger(hidden[:, None], weight, labels[:, None], mask, advantages, old_per_token_logps=old[:, None])[0]
        )
    compare("loss", {"from": "lm_head", **dict(zip("MHV", shape, strict=True))}, sides, rounds(shape))


def test_loss_from_logprobs(shape, compare):
    m = 1 << (24 if torch.cuda.is_available() else 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logp, old, advantages, weights = torch.randn(4, m, device=device).unbind()
    logp.requires_grad_()
    copy = torch.empty(4, m, device=device)
    source = torch.randn(4, m, device=device)

    def run(backend):
        return lambda: torch.autograd.grad(
            policy_loss(logp, old, advantages, weights, LossSettings(), backend=backend)[0], logp
        )

    sides = {"ours": run("auto"), "reference": run("reference"), "copy": lambda: copy.copy_(source)}
    compare("loss", {"from": "logprobs", "M": m}, sides, rounds=9)
