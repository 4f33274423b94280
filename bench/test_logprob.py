"""linear_logprob against the bare product of the same shape, plain torch, torch.compile and the public kernels.

Ratios are peer / ours: above 1 we are faster. ``logprob/matmul`` is the floor of the forward (one product) and of the
backward (three: logits again, dhidden, dweight).
"""

import importlib.util

import torch

from igpo_kernels import linear_logprob

SHAPES = {"m512-h512-v32k": (512, 512, 32_768)}
FULL_CPU = {"m4096-h1024-v152k": (4096, 1024, 151_936)}
FULL_GPU = {
    "m8k-h4096-v128k": (8192, 4096, 128_256),
    "m8k-h4096-v262k": (8192, 4096, 262_144),
    "m64k-h2048-v152k": (65_536, 2048, 151_936),
    "m1k-h8192-v32k": (1024, 8192, 32_768),
}
PANEL = 16_384
"""Columns of the bare product made at a time, so that its result does not fill the memory."""


def pytest_generate_tests(metafunc):
    full = metafunc.config.getoption("--full")
    chosen = SHAPES if not full else FULL_GPU if torch.cuda.is_available() else FULL_CPU
    metafunc.parametrize("shape", chosen.values(), ids=chosen.keys())


def rounds(shape):
    """Enough for a median; two where a round takes minutes."""
    return 2 if not torch.cuda.is_available() and shape in FULL_CPU.values() else 3


def inputs(shape):
    m, h, v = shape
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(m, h, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(v, h, device=device, dtype=dtype) * 0.02).requires_grad_()
    return hidden, weight, torch.randint(0, v, (m,), device=device)


def bare_products(hidden, weight):
    """One product of the op's shape, and the three of its backward, in panels of the vocabulary."""
    hidden, weight = hidden.detach(), weight.detach()
    m, v = len(hidden), len(weight)
    z = hidden.new_empty(m, min(v, PANEL))
    d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
    panels = [slice(c, min(c + PANEL, v)) for c in range(0, v, PANEL)]

    def forward():
        for c in panels:
            torch.mm(hidden, weight[c].T, out=z[:, : c.stop - c.start])

    def backward():
        for c in panels:
            part = z[:, : c.stop - c.start]
            torch.mm(hidden, weight[c].T, out=part)
            d_hidden.addmm_(part, weight[c])
            d_weight[c].addmm_(part.T, hidden)

    return forward, backward


def plain(hidden, weight, labels):
    return (hidden @ weight.T).float().log_softmax(-1).gather(1, labels[:, None])[:, 0]


def peers(hidden, weight, labels):
    """Public implementations of the same function that are importable here and fit in memory."""
    found = {}
    if len(labels) * len(weight) * 4 * 4 < 8e9:
        found["torch"] = lambda: plain(hidden, weight, labels)
        compiled = torch.compile(plain)
        found["torch_compile"] = lambda: compiled(hidden, weight, labels)
    if hidden.is_cuda and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

        found["liger"] = lambda: -Liger.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "none")[0]
    if hidden.is_cuda and importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        found["cut_cross_entropy"] = lambda: -linear_cross_entropy(hidden, weight, labels, reduction="none")
    if hidden.is_cuda and importlib.util.find_spec("verl"):
        from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy as verl_op

        found["verl"] = lambda: verl_op(hidden, weight, labels, 1.0, "none")[0]
    return found


def test_logprob_forward(shape, compare):
    hidden, weight, labels = inputs(shape)
    forward, _ = bare_products(hidden, weight)
    sides = {"ours": lambda: linear_logprob(hidden, weight, labels), "matmul": forward}
    with torch.no_grad():
        torch.testing.assert_close(
            linear_logprob(hidden[:64], weight, labels[:64]), plain(hidden[:64], weight, labels[:64]),
            atol=5e-2 if hidden.is_cuda else 1e-3, rtol=1e-3,
        )  # fmt: skip
    compare(
        "logprob",
        {"pass": "forward", **dict(zip("MHV", shape, strict=True))},
        {**sides, **peers(hidden, weight, labels)},
    )


def test_logprob_backward(shape, compare):
    hidden, weight, labels = inputs(shape)
    _, backward = bare_products(hidden, weight)
    g = torch.randn(len(labels), device=hidden.device)

    def of(logp):
        return lambda: torch.autograd.grad(logp, (hidden, weight), g.to(logp.dtype), retain_graph=True)

    sides = {"ours": of(linear_logprob(hidden, weight, labels)), "matmul": backward}
    sides |= {name: of(side()) for name, side in peers(hidden, weight, labels).items()}
    compare("logprob", {"pass": "backward", **dict(zip("MHV", shape, strict=True))}, sides, rounds(shape))
