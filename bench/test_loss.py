"""The clipped loss: LM head to loss and gradients against three bare products, and from log-probabilities against a
copy of as many bytes.

TFLOP/s count three products (logits, dhidden, dweight), whatever a side really does.
"""

import pytest
import torch

from bench.peers import compiled, liger_grpo, linear_cross_entropy, logits_fit, plain
from bench.test_logprob import (
    bare_products,
    inputs,
    product_flops,
    pytest_generate_tests,  # noqa: F401
    rounds,
    sizes,
)
from bench.timing import DEVICE
from igpo_kernels import linear_policy_loss, policy_loss

SEQUENCE = 1024
"""Tokens that share an advantage: Liger takes one per sequence."""
BYTES_A_TOKEN = 20
"""Bytes per token: four floats in, the gradient out."""


def eager(logp, *inputs):
    return policy_loss(logp, *inputs, backend="reference")


def test_loss_from_the_lm_head(shape, compare):
    hidden, weight, labels = inputs(shape)
    m, vocab = len(labels), len(weight)
    length = min(SEQUENCE, m)
    advantages = torch.randn(m // length, device=DEVICE)
    by_token = advantages.repeat_interleave(length)
    weights = torch.full((m,), 1 / m, device=DEVICE)
    with torch.no_grad():
        old = torch.cat([plain(h, weight, ids) for h, ids in zip(hidden.split(64), labels.split(64), strict=True)])
    # Ratios far from the clip's edge, where rounding decides whether a token has a gradient.
    old = old + 0.01 * torch.randn(m, device=DEVICE)
    losses = {"ours": lambda: linear_policy_loss(hidden, weight, labels, None, old, by_token, weights)[0]}
    if logits_fit(m, vocab):
        of_head = lambda h, w: eager(plain(h, w, labels), old, by_token, weights)[0]  # noqa: E731
        losses["torch"] = lambda: of_head(hidden, weight)
        if compiled(m, vocab):
            by_compiler = torch.compile(of_head, dynamic=False)
            losses["torch_compile"] = lambda: by_compiler(hidden, weight)
    if liger := liger_grpo(length):
        losses["liger"] = lambda: liger(hidden, weight, labels, old, advantages)
    ways = {name: lambda loss=loss: torch.autograd.grad(loss(), (hidden, weight)) for name, loss in losses.items()}
    if chunked := linear_cross_entropy():
        # Another loss of the same products, for torch has no clipped one: it is not compared.
        mean = lambda: chunked(hidden, weight, labels)  # noqa: E731
        ways["linear_cross_entropy"] = lambda: (torch.autograd.grad(mean(), (hidden, weight)), None)[1]
    compare(
        "loss",
        {"from": "lm_head", **sizes(shape)},
        {"matmul": bare_products(hidden, weight)[1], **ways},
        rounds(shape),
        flops=3 * product_flops(shape),
        agree=5e-2 if DEVICE == "cuda" else 1e-3,
    )


@pytest.mark.parametrize("tokens", [1 << 20, 1 << 24], ids=["1m", "16m"])
def test_loss_of_tokens(tokens, compare, request):
    if tokens > 1 << 20 and not request.config.getoption("--full"):
        pytest.skip("with --full")
    logp, old, advantages, weights = torch.randn(4, tokens, device=DEVICE).unbind()
    old = logp + 0.01 * old
    logp.requires_grad_()
    by_compiler = torch.compile(eager, dynamic=False)
    losses = {
        "ours": lambda: policy_loss(logp, old, advantages, weights)[0],
        "torch": lambda: eager(logp, old, advantages, weights)[0],
        "torch_compile": lambda: by_compiler(logp, old, advantages, weights)[0],
    }
    source = torch.randn(BYTES_A_TOKEN // 8, tokens, device=DEVICE)  # half the bytes are read, half written
    target = torch.empty_like(source)

    def copy():
        target.copy_(source)

    ways = {name: lambda loss=loss: torch.autograd.grad(loss(), logp)[0] for name, loss in losses.items()}
    compare(
        "loss",
        {"from": "logprobs", "M": tokens},
        {"copy": copy, **ways},
        rounds=20,
        calls=20 if DEVICE == "cuda" else 1,
        graph=True,
        agree=1e-4,
    )
