"""tree_attention on trunks and on combs of answers, against the attention that other code would use.

    sdpa_flash, sdpa_cudnn   packs of one sequence, or of several as long: a batch
    varlen, flash_attn       packs whose trees are single sequences
    sdpa_mask        a dense mask: SDPA's efficient backend, on a CPU its flash backend
    sdpa_fa3, sdpa_fa4   the same packs as sdpa_flash, through torch's registry of newer kernels
    flex, flex_flash FlexAttention with the plan's mask_mod, by its Triton kernel and by FlashAttention 4; on a CPU
                     forward alone
    trunk_only       ours on the trunks alone: the cost that training has anyway

Peers without grouped queries get keys and values of every query head, expanded before the clock runs; summing their
gradients over the group is not timed either.

TFLOP/s count visible (query, key) pairs, whatever a side visits: 4 Hq D per pair forward, 2.5 times that backward.
"""

import inspect
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from bench.peers import imported, left_out
from bench.timing import DEVICE
from igpo_kernels import Branch, RolloutTokens, Tree, pack, tree_attention
from igpo_kernels.tree_attention.blocks import visible_area
from igpo_kernels.tree_attention.flex_path import block_mask
from igpo_kernels.tree_attention.reference import visible

# trunk tokens, turns, answer tokens, rollouts per group, groups
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
LONG = {"trunk-256k": (262_144, 0, 0, 1, 1)}
ROUNDS = {"trunk-256k": 3}
"""Rounds where a call takes seconds."""
FLEX_ON = ("trunk-32k", "comb-8k-16x24")
"""Shapes for FlexAttention, which compiles anew for each, for half a minute."""


class Heads(NamedTuple):
    queries: int
    keys: int
    size: int
    softcap: float = 0.0
    window: int | None = None


HEADS = {"qwen2.5-7b": Heads(28, 4, 128)} if DEVICE == "cuda" else {"small": Heads(8, 4, 64)}
OTHERS = {
    "llama3.2-1b": Heads(32, 8, 64),
    "mistral-7b": Heads(32, 8, 128, window=4096),
    "gemma-7b": Heads(16, 16, 256),
    "gemma2-9b": Heads(16, 8, 256, softcap=50.0, window=4096),
}
OTHERS_ON = ("trunk-32k", "trunks-8x4k", "comb-8k-16x24")
PROMPT = 256
DENSE = 24_576
"""Most tokens for which a dense mask is tried."""
AGREE = 2e-2 if DEVICE == "cuda" else 1e-4


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        full = metafunc.config.getoption("--full") and DEVICE == "cuda"
        shapes, heads = ({**FULL, **LONG}, {**HEADS, **OTHERS}) if full else (SHAPES, HEADS)
        pairs = [*product(SHAPES, HEADS)]
        if full:  # what takes longest comes last
            pairs = [*product(FULL, HEADS), *product(OTHERS_ON, OTHERS), *product(LONG, HEADS)]
        if metafunc.function is test_flex and full:
            pairs = [*product(FLEX_ON, HEADS)]
        if metafunc.function is test_newer_flash:
            pairs = [pair for pair in pairs if pair[0].startswith("trunk")][: 2 if full else 1]
        values = [(shapes[shape], heads[name]) for shape, name in pairs]
        metafunc.parametrize(("shape", "heads"), values, ids=["-".join(pair) for pair in pairs])


def plan_of(trunk, turns, answer, group, groups):
    """A pack of groups whose rollouts share a prompt, with an answer forced after each of ``turns`` prefixes."""
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


def heads_first(x, batch=1):
    """[batch * n, heads, D] -> [batch, heads, n, D]."""
    return x.unflatten(0, (batch, -1)).transpose(1, 2)


def by_sdpa(backend, batch=1, **options):
    def run(q, k, v):
        with sdpa_kernel(backend):
            out = sdpa(*(heads_first(x, batch) for x in (q, k, v)), **options)
        return out.transpose(1, 2).flatten(0, 1)

    return run


def peers(plan, heads, mask):
    """Implementations of the same output, ``(q, k, v) -> out`` of [N, heads, D], and the names of those that need keys
    and values of every query head."""
    starts = np.append(np.unique(plan.tree_start), plan.n_tokens)
    lengths, window = np.diff(starts), heads.window
    found, wide = {}, set()
    if plan.is_sequences and len(set(lengths)) == 1 and not heads.softcap and window is None:
        causal = dict(batch=len(lengths), is_causal=True, enable_gqa=True)
        found["sdpa_flash"] = by_sdpa(SDPBackend.FLASH_ATTENTION, **causal)
        if DEVICE == "cuda":
            found["sdpa_cudnn"] = by_sdpa(SDPBackend.CUDNN_ATTENTION, **causal)
    if plan.is_sequences and DEVICE == "cuda":
        offsets = torch.from_numpy(starts.astype(np.int32)).to(DEVICE)
        of = offsets, offsets, int(lengths.max()), int(lengths.max())
        back = -1 if window is None else window - 1
        if not heads.softcap and (varlen := imported("varlen", "torch.nn.attention.varlen")):
            options, grouped = varlen_options(varlen.varlen_attn, back)
            if options is None:
                left_out["varlen with a window"] = "this torch's takes none"
            else:
                found["varlen"] = lambda q, k, v: varlen.varlen_attn(q, k, v, *of, **options)
                wide |= set() if grouped else {"varlen"}
        if flash := imported("flash_attn", "flash_attn"):
            found["flash_attn"] = lambda q, k, v: flash.flash_attn_varlen_func(
                q, k, v, *of, causal=True, window_size=(back, -1 if window is None else 0), softcap=heads.softcap
            )
    if mask is not None and not heads.softcap:
        backend = SDPBackend.EFFICIENT_ATTENTION if DEVICE == "cuda" else SDPBackend.FLASH_ATTENTION
        found["sdpa_mask"] = by_sdpa(backend, attn_mask=mask)
        wide.add("sdpa_mask")
    return found, wide


def varlen_options(varlen_attn, back):
    """Causal attention to ``back`` keys back (-1: all) as this torch spells it, None where it has no window; whether
    it takes grouped queries."""
    takes = inspect.signature(varlen_attn).parameters
    grouped = {"enable_gqa": True} if "enable_gqa" in takes else {}
    if "window_size" in takes:
        return {"window_size": (back, 0), **grouped}, bool(grouped)
    return ({"is_causal": True, **grouped} if back < 0 else None), bool(grouped)


def by_flex(plan, heads, kernel=None):
    """FlexAttention, compiled at its first call; ``kernel``: its BACKEND option."""
    from torch.nn.attention.flex_attention import flex_attention

    cap = heads.softcap
    capped = (lambda score, b, h, q, k: cap * torch.tanh(score / cap)) if cap else None
    compiled = torch.compile(flex_attention, dynamic=False)

    def run(q, k, v):
        options = dict(block_mask=block_mask(plan, heads.window, DEVICE), score_mod=capped, enable_gqa=True)
        if kernel:
            options["kernel_options"] = {"BACKEND": kernel}
        return compiled(*map(heads_first, (q, k, v)), **options)[0].transpose(0, 1)

    return run


def tensors(plan, heads):
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    torch.manual_seed(0)
    shapes = [(plan.n_tokens, h, heads.size) for h in (heads.queries, heads.keys, heads.keys)]
    return [torch.randn(shape, device=DEVICE, dtype=dtype) for shape in shapes]


def forward(way, inputs):
    return lambda: way(*inputs)


def backward(way, inputs, group=1):
    """Gradients of ``way``'s output by itself; those of expanded keys and values are summed over ``group`` query heads
    in the first call, whose result is compared, and not in the others, which are timed."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = None

    def run():
        nonlocal out
        first, out = out is None, way(*leaves) if out is None else out
        d_q, *d_kv = torch.autograd.grad(out, leaves, inputs[0], retain_graph=True)
        if group == 1:
            return d_q, *d_kv
        return (d_q, *(x.unflatten(1, (-1, group)).float().sum(2) for x in d_kv)) if first else None

    return run


def run_sides(compare, direction, shape, heads, plan, ways, wide=(), rounds=20):
    """Time ``ways`` beside ours, and beside ours on the trunks alone where there are answers."""
    trunk = plan_of(shape[0], 0, 0, *shape[3:])
    q, k, v = tensors(plan, heads)
    options = {"softcap": heads.softcap, "window": heads.window}
    of = forward if direction == "forward" else backward
    sides = {"ours": of(lambda q, k, v: tree_attention(q, k, v, plan, **options), (q, k, v))}
    if shape[1]:
        trunk_only = of(lambda q, k, v: tree_attention(q, k, v, trunk, **options), tensors(trunk, heads))
        sides["trunk_only"] = lambda: (trunk_only(), None)[1]  # another result, so it is not compared
    group = heads.queries // heads.keys
    for name, way in ways.items():
        if name not in wide:
            sides[name] = of(way, (q, k, v))
            continue
        expanded = (q, *(x.repeat_interleave(group, 1) for x in (k, v)))
        sides[name] = forward(way, expanded) if direction == "forward" else backward(way, expanded, group)
    area = visible_area(plan, heads.window)
    names = ("trunk", "turns", "answer", "group", "groups")
    compare(
        "attention",
        {
            "pass": direction, **dict(zip((*names, "Hq", "Hkv", "D"), (*shape, *heads[:3]), strict=True)),
            **{name: value for name, value in options.items() if value}, "tokens": plan.n_tokens,
            "visible_share_added": round(area / visible_area(trunk, heads.window) - 1, 4),
        },
        sides,
        rounds=rounds if DEVICE == "cuda" else 5,
        flops=(4 if direction == "forward" else 10) * heads.queries * heads.size * area,
        agree=AGREE,
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_attention(shape, heads, direction, compare):
    plan = plan_of(*shape)
    mask = visible(plan, heads.window, DEVICE)[None, None] if plan.n_tokens <= DENSE else None
    rounds = next((ROUNDS[name] for name in ROUNDS if LONG[name] == shape), 20)
    run_sides(compare, direction, shape, heads, plan, *peers(plan, heads, mask), rounds)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_flex(shape, heads, direction, compare):
    if DEVICE == "cpu" and direction == "backward":
        pytest.skip("FlexAttention's backward needs a GPU")
    plan = plan_of(*shape)
    ways = {"flex": by_flex(plan, heads)}
    if imported("flex_flash", "flash_attn.cute"):
        ways["flex_flash"] = by_flex(plan, heads, "FLASH")
    run_sides(compare, direction, shape, heads, plan, ways)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("version", ["FA3", "FA4"])
def test_newer_flash(shape, heads, version, direction, compare):
    """FlashAttention 3 and 4 where torch's registry finds them; while active they are SDPA's flash backend."""
    from torch.nn import attention

    name = f"sdpa_{version.lower()}"
    if DEVICE == "cpu":
        left_out[name] = "needs a GPU"
        pytest.skip(left_out[name])
    try:
        attention.activate_flash_attention_impl(version)
    except Exception as error:  # absent, or not of this torch
        left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        pytest.skip(left_out[name])
    try:
        plan = plan_of(*shape)
        causal = dict(batch=shape[-1], is_causal=True, enable_gqa=True)
        ways = {name: by_sdpa(SDPBackend.FLASH_ATTENTION, **causal)}
        run_sides(compare, direction, shape, heads, plan, ways)
    finally:
        attention.restore_flash_attention_impl()
