"""tree_attention on trunks and on combs of answers, against the attention that others would use.

    sdpa_flash, sdpa_cudnn, varlen, flash_attn   packs whose trees are single sequences
    sdpa_mask        a dense mask
    flex             FlexAttention with the plan's mask_mod
    trunk_only       ours on the trunks alone: what training pays anyway

TFLOP/s count the visible (query, key) pairs, whatever a side visits: 4 Hq D a pair forward, 2.5 times that backward.
"""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.peers import imported, left_out
from bench.timing import DEVICE
from igpo_kernels import Branch, RolloutTokens, Tree, pack, tree_attention
from igpo_kernels.tree_attention.blocks import visible_area
from igpo_kernels.tree_attention.reference import visible

# trunk tokens, turns, answer tokens, rollouts a group, groups
SHAPES = {
    "trunk-2k": (2048, 0, 0, 1, 1),
    "comb-2k-8x16": (2048, 8, 16, 1, 1),
    "group-1k-4x8-g4": (1024, 4, 8, 4, 1),
}
FULL = {
    "trunk-32k": (32_768, 0, 0, 1, 1),
    "trunks-8x4k": (4096, 0, 0, 1, 8),
    "comb-8k-16x24": (8192, 16, 24, 1, 1),
    "combs-4x8k-16x24": (8192, 16, 24, 1, 4),
    "comb-32k-16x24": (32_768, 16, 24, 1, 1),
    "comb-64k-64x64": (65_536, 64, 64, 1, 1),
    "combs-32x1k-4x4": (1024, 4, 4, 1, 32),
    "groups-2x8k-16x24-g4": (8192, 16, 24, 4, 2),
    "group-2k-8x16-g16": (2048, 8, 16, 16, 1),
}
HEADS = {"qwen2.5-7b": (28, 4, 128)} if DEVICE == "cuda" else {"small": (8, 4, 64)}
"""Query heads, key heads, head size."""
PROMPT = 256
DENSE = 24_576
"""Tokens up to which a dense mask is tried."""
AGREE = dict(atol=5e-2, rtol=5e-2) if DEVICE == "cuda" else dict(atol=1e-4, rtol=1e-3)


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        chosen = FULL if metafunc.config.getoption("--full") and DEVICE == "cuda" else SHAPES
        metafunc.parametrize("shape", chosen.values(), ids=chosen.keys())
        metafunc.parametrize("heads", HEADS.values(), ids=HEADS.keys())


def plan_of(trunk, turns, answer, group, groups):
    """Groups whose rollouts share a prompt, an answer forced after each of ``turns`` prefixes."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 1000, min(PROMPT, trunk // 4))
    boundaries = np.linspace(len(prompt), trunk, turns).astype(np.int64) if turns else np.zeros(0, np.int64)
    branches = [Branch(rng.integers(0, 1000, answer + 1), 1, answer + 1)] if turns else []
    trees = []
    for _ in range(groups):
        rollouts = []
        for index in range(group):
            ids = np.concatenate([prompt, rng.integers(0, 1000, trunk - len(prompt) + 1)])
            turn = np.full(len(ids), -1)
            turn[-1] = 0  # the last token is a label: trunk tokens are fed
            rollouts.append(RolloutTokens(index, ids, turn, boundaries))
        trees.append(Tree(rollouts, branches))
    return pack(trees)


def heads_first(x):
    """[N, heads, D] -> [1, heads, N, D]."""
    return x.transpose(0, 1)[None]


def peers(plan, mask):
    """Ways to the same output, ``(q, k, v) -> out`` of [N, heads, D]."""
    starts = np.append(np.unique(plan.tree_start), plan.n_tokens)
    longest = int(np.diff(starts).max())

    def by_sdpa(backend, **options):
        def run(q, k, v):
            with sdpa_kernel(backend):
                out = sdpa(*map(heads_first, (q, k, v)), enable_gqa=True, **options)
            return out[0].transpose(0, 1)

        return run

    found = {}
    if plan.is_sequences and len(starts) == 2:
        found["sdpa_flash"] = by_sdpa(SDPBackend.FLASH_ATTENTION, is_causal=True)
        if DEVICE == "cuda":
            found["sdpa_cudnn"] = by_sdpa(SDPBackend.CUDNN_ATTENTION, is_causal=True)
    if plan.is_sequences and DEVICE == "cuda":
        offsets = torch.from_numpy(starts.astype(np.int32)).to(DEVICE)
        lengths = offsets, offsets, longest, longest
        if varlen := imported("varlen", "torch.nn.attention.varlen"):
            wide = lambda q, x: x.repeat_interleave(q.shape[1] // x.shape[1], 1)  # noqa: E731
            found["varlen"] = lambda q, k, v: varlen.varlen_attn(q, wide(q, k), wide(q, v), *lengths, is_causal=True)
        if flash := imported("flash_attn", "flash_attn"):
            found["flash_attn"] = lambda q, k, v: flash.flash_attn_varlen_func(q, k, v, *lengths, causal=True)
    if mask is not None:
        found["sdpa_mask"] = by_sdpa([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH], attn_mask=mask)
    if DEVICE == "cuda":
        found["flex"] = by_flex(plan)
    else:
        left_out["flex"] = "its backward needs a GPU"
    return found


def by_flex(plan):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    end = plan.tensor("subtree_end", DEVICE)
    n = plan.n_tokens
    seen = create_block_mask(lambda b, h, q, k: (k <= q) & (q < end[k]), None, None, n, n, device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*map(heads_first, (q, k, v)), block_mask=seen, enable_gqa=True)[0].transpose(0, 1)


def tensors(plan, heads):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q_heads, kv_heads, d = heads
    torch.manual_seed(0)
    return [torch.randn(plan.n_tokens, h, d, device=DEVICE, dtype=dtype) for h in (q_heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(shape, heads, direction, compare):
    plan, trunk = plan_of(*shape), plan_of(shape[0], 0, 0, *shape[3:])
    mask = visible(plan, None, DEVICE)[None, None] if plan.n_tokens <= DENSE else None
    qkv, trunk_qkv = tensors(plan, heads), tensors(trunk, heads)

    def forward(way, inputs):
        return lambda: way(*inputs)

    def backward(way, inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = None

        def run():
            nonlocal out
            out = way(*leaves) if out is None else out
            return torch.autograd.grad(out, leaves, inputs[0], retain_graph=True)

        return run

    of = forward if direction == "forward" else backward
    sides = {"ours": of(lambda q, k, v: tree_attention(q, k, v, plan), qkv)}
    if shape[1]:
        trunk_only = of(lambda q, k, v: tree_attention(q, k, v, trunk), trunk_qkv)
        sides["trunk_only"] = lambda: (trunk_only(), None)[1]  # another result: not to be compared
    sides |= {name: of(way, qkv) for name, way in peers(plan, mask).items()}
    area = visible_area(plan)
    names = ("trunk", "turns", "answer", "group", "groups")
    compare(
        "attention",
        {
            "pass": direction, **dict(zip((*names, "Hq", "Hkv", "D"), (*shape, *heads), strict=True)),
            "tokens": plan.n_tokens, "visible_share_added": round(area / visible_area(trunk) - 1, 4),
        },
        sides,
        rounds=20 if DEVICE == "cuda" else 5,
        flops=(4 if direction == "forward" else 10) * heads[0] * heads[2] * area,
        agree=AGREE,
    )  # fmt: skip
