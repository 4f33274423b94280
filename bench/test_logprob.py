"""linear_logprob against the bare product of the same shape, plain torch, torch.compile and the public kernels.

Ratios are peer / ours: above 1 we are faster. ``logprob/matmul`` is the floor of the forward (one product) and of the
backward (three: logits again, dhidden, dweight). TFLOP/s count those products, whatever a side really computes.
"""

import torch

from bench.comparison import hold
from bench.peers import logprobs, plain
from bench.timing import DEVICE
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
"""Columns per panel of the bare product, so that its result does not fill the memory."""
AGREE = 2e-2 if DEVICE == "cuda" else 1e-4


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full")
        chosen = SHAPES if not full else FULL_GPU if DEVICE == "cuda" else FULL_CPU
        metafunc.parametrize("shape", chosen.values(), ids=chosen.keys())


def rounds(shape) -> int:
    """Number of rounds: two if a round takes minutes."""
    return 10 if DEVICE == "cuda" else 2 if shape in FULL_CPU.values() else 5


def inputs(shape):
    m, h, v = shape
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(m, h, device=DEVICE, dtype=dtype, requires_grad=True)
    weight = (torch.randn(v, h, device=DEVICE, dtype=dtype) * 0.02).requires_grad_()
    return hidden, weight, torch.randint(0, v, (m,), device=DEVICE)


def sizes(shape) -> dict[str, int]:
    return dict(zip("MHV", shape, strict=True))


def product_flops(shape) -> float:
    m, h, v = shape
    return 2.0 * m * h * v


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


def test_logprob_forward(shape, compare):
    hidden, weight, labels = inputs(shape)
    forward, _ = bare_products(hidden, weight)
    ways = {"ours": linear_logprob, **logprobs(len(labels), len(weight))}
    with torch.no_grad():
        ours, want = linear_logprob(hidden[:64], weight, labels[:64]), plain(hidden[:64], weight, labels[:64])
    hold(ours, want, AGREE)
    compare(
        "logprob",
        {"pass": "forward", **sizes(shape)},
        {"matmul": forward, **{name: lambda way=way: way(hidden, weight, labels) for name, way in ways.items()}},
        rounds(shape),
        flops=product_flops(shape),
        agree=AGREE,
    )


def test_logprob_backward(shape, compare):
    hidden, weight, labels = inputs(shape)
    _, backward = bare_products(hidden, weight)
    g = torch.randn(len(labels), device=DEVICE)

    def of(way):
        logp = None

        def run():
            nonlocal logp
            logp = way(hidden, weight, labels) if logp is None else logp
            return torch.autograd.grad(logp, (hidden, weight), g.to(logp.dtype), retain_graph=True)

        return run

    ways = {"ours": linear_logprob, **logprobs(len(labels), len(weight))}
    compare(
        "logprob",
        {"pass": "backward", **sizes(shape)},
        {"matmul": backward, **{name: of(way) for name, way in ways.items()}},
        rounds(shape),
        flops=3 * product_flops(shape),
        agree=AGREE,
    )
