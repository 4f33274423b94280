"""Kernels that must not pass the gate, one for each criterion; prints their faults as JSON.

Run without TRITON_INTERPRET.
"""

import json

import triton
import triton.language as tl

from igpo_kernels.inspect import TARGETS, check
from igpo_kernels.triton_variants import Variant


@triton.jit
def normalise(x_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(x_ptr + at, x / tl.sum(x, 0))


@triton.jit
def accumulate(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x, least = tl.load(x_ptr + at), tl.load(y_ptr + at)
    for i in range(n):
        x = x * tl.load(y_ptr + i * BLOCK + at) + least
        least = tl.minimum(least, tl.max(x, 0))
    tl.store(x_ptr + at, x + least)


@triton.jit
def multiply(a_ptr, b_ptr, c_ptr, n, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    rows, inner, columns = tl.arange(0, M)[:, None], tl.arange(0, K), tl.arange(0, N)[None, :]
    acc = tl.zeros([M, N], tl.float32)
    for start in range(0, n, K):
        a = tl.load(a_ptr + rows * n + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner[:, None]) * N + columns)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    tl.store(c_ptr + rows * N + columns, acc)


@triton.jit
def describe(x_ptr, n, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [n, BLOCK], [BLOCK, 1], [BLOCK, BLOCK])
    x.store([0, 0], x.load([BLOCK, 0]))


@triton.jit
def broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([BLOCK + BLOCK // 2], tl.float32))


def product(arch, dtype, tile, precision="ieee", num_stages=2):
    signature = {"a_ptr": f"*{dtype}:16", "b_ptr": f"*{dtype}:16", "c_ptr": "*fp32:16", "n": "i32:16"}
    constexprs = {**dict(zip("MNK", tile, strict=True)), "PRECISION": precision}
    return Variant(
        "test", "multiply", arch, dtype, "any", multiply, signature, constexprs, num_stages=num_stages, has_dot=True
    )


def wide(arch, block):
    return Variant("test", "normalise", arch, "fp32", "any", normalise, {"x_ptr": "*fp32:16"}, {"BLOCK": block}, 1)


def looped(arch, block):
    signature = {"x_ptr": "*fp32:16", "y_ptr": "*fp32:16", "n": "i32"}
    return Variant("test", "accumulate", arch, "fp32", "any", accumulate, signature, {"BLOCK": block}, 1)


CASES = {
    **{f"holds {arch}": wide(arch, 1024) for arch in ("sm_80", "sm_100")},
    **{f"spills {arch}": wide(arch, 16384) for arch in ("sm_80", "sm_100")},
    **{f"holds loop {arch}": looped(arch, 1024) for arch in ("sm_90", "gfx942")},
    "spills in a loop sm_90": looped("sm_90", 8192),
    "spills in a loop gfx942": looped("gfx942", 16384),
    **{f"holds product {arch}": product(arch, "bf16", (128, 128, 64)) for arch in TARGETS},
    "holds ieee": product("sm_80", "fp32", (32, 32, 16)),
    "tf32": product("sm_80", "fp32", (32, 32, 16), "tf32"),
    "no wgmma": product("sm_90", "bf16", (16, 32, 32)),
    "no tcgen05": product("sm_100", "bf16", (16, 32, 32)),
    "shared": product("sm_90", "bf16", (128, 128, 128), num_stages=5),
    "scratch": Variant(
        "test", "describe", "sm_90", "fp32", "any", describe, {"x_ptr": "*fp32:16", "n": "i32"}, {"BLOCK": 32}
    ),
    "broken": Variant("test", "broken", "sm_90", "fp32", "any", broken, {"x_ptr": "*fp32:16"}, {"BLOCK": 64}),
}

if __name__ == "__main__":
    print(json.dumps({name: check(variant).faults for name, variant in CASES.items()}))
