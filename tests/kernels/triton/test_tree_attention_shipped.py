"""What ships of tree attention: the tables' own configurations on a GPU, one of them in the interpreter, and what the
compiler makes of them."""

import json
import re

import pytest
import torch

pytest.importorskip("triton")

from igpo_kernels.tree_attention.blocks import block_lists
from igpo_kernels.tree_attention.triton_path import shape_class, variants
from igpo_kernels.triton_variants import config_for
from tests.kernels.test_tree_attention import comb
from tests.kernels.triton.test_inspect import compiled
from tests.kernels.triton.test_tree_attention_triton import NAMES, case_of, check, run

pytestmark = pytest.mark.usefixtures("bf16_dots")
FEATURES = {
    "plain": {}, "windowed": {"window": 700}, "capped": {"softcap": 5.0},
    "capped_windowed": {"softcap": 5.0, "window": 700},
}  # fmt: skip
HALF = [(dtype, d, f) for dtype in ("bfloat16", "float16") for d in (64, 96, 128, 192, 256) for f in FEATURES]
GROUPS = (1, 4, 7, 8, 16)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "d", "features"), [*HALF, ("float32", 64, "plain"), ("float32", 128, "windowed")])
def test_on_a_gpu(dtype, d, features):
    """Two groupings of heads a configuration, all of them over the head sizes."""
    dtype, options = getattr(torch, dtype), FEATURES[features]
    number = list(FEATURES).index(features) + d // 32
    for turn in range(2):
        group = GROUPS[(number + 2 * turn) % len(GROUPS)]
        plan = comb(1500 + 700 * turn + d, 5 + group, 24, trees=1 + turn)
        check(plan, dtype, options, q_heads=2 * group, kv_heads=2, d=d)
    case = case_of(plan, q_heads=2 * group, kv_heads=2, d=d)
    for name, a, b in zip(NAMES, *(run(case, plan, dtype, "triton", **options) for _ in range(2)), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(("d", "options"), [
    (64, {"softcap": 5.0, "window": 60}), (64, {}), (128, {"window": 250}), (128, {"softcap": 5.0}),
], ids=["d64-capped", "d64", "d128", "d128-capped"])  # fmt: skip
def test_in_the_interpreter(d, options):
    """Every class of sm_90's widest tiles, with masked blocks and, but within a short window, full ones. In float16:
    the interpreter cuts float32 down to bfloat16 instead of rounding it."""
    plan = comb(290, 3)
    for part, by_key in (("forward", False), ("backward_q", False), ("backward_kv", True)):
        config = config_for(f"tree_attention_{part}", "sm_90", shape_class(d, "softcap" in options), "fp16")
        queries = config["BLOCK_M"] if by_key else config["BLOCK_M"] // 2
        lists = block_lists(plan, options.get("window"), queries, config["BLOCK_N"], by_key=by_key)
        full = [column for row in range(len(lists.order)) for column in lists.columns(row, masked=False)]
        assert full or options.get("window") == 60, part
    check(plan, torch.float16, options, d=d)


def test_every_pair_of_features_is_compiled_ahead_of_time():
    found = {
        (v.kernel, v.constexprs["CAPPED"], v.constexprs["WINDOWED"])
        for v in variants()
        if (v.arch, v.dtype) == ("sm_90", "bf16") and "/128/" in v.shape_class and v.has_dot
    }
    assert len(found) == 3 * 4


COMPILE = """
import json
from igpo_kernels.inspect import compile_variant
from igpo_kernels.tree_attention.triton_path import variants

parts = ("forward", "backward_q", "backward_kv")
made = {v.kernel.removeprefix("tree_attention_"): v for v in variants()
        if (v.arch, v.dtype, v.shape_class) == ("sm_90", "bf16", "d128/128/plain")}
print(json.dumps({
    "ttgir": {part: [made[part].num_stages, compile_variant(made[part])[0].asm["ttgir"]] for part in parts},
    "lengths": [
        [v.kernel, name] for v in made.values() for name, kind in v.signature.items()
        if kind == "i32" and not {p.name: p.do_not_specialize for p in v.fn.params}[name]
    ],
}))
"""


@pytest.fixture(scope="module")
def made():
    run = compiled("-c", COMPILE)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", ["forward", "backward_q", "backward_kv"])
def test_the_loop_over_full_blocks_is_pipelined(part, made):
    """As many buffers of its two operands as stages, and no loads from the lists, divisions or waits for either."""
    stages, ttgir = made["ttgir"][part]
    full, masked = re.findall(r"scf\.for(?:(?!scf\.for).)*?scf\.yield", ttgir, re.DOTALL)
    assert not re.search(r"tt\.load|divsi|remsi|<1xi32|async_copy", full)
    assert len(re.findall(rf"local_alloc : \(\) -> !ttg\.memdesc<{stages}x\d+x1x128xbf16", ttgir)) == 4
    assert "tma_copy" in full and "tma_copy" in masked


def test_what_is_declared_unspecialised_is(made):
    """Else a launch with 1 or a multiple of 16 would miss the library of compiled kernels, or compile anew."""
    assert made["lengths"] == []
