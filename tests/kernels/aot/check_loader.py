"""Takes kernels from a library without a GPU: python check_loader.py libigpo_kernels.so

Every variant that the library has is launched as the build launched it, in an empty cache: nothing may be compiled.
Then the ops themselves run on a device that is not there (launches do nothing). Fails by assertion.
"""

import dataclasses
import logging
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.driver import driver

from igpo_kernels import (
    Branch,
    Normaliser,
    RolloutTokens,
    Tree,
    linear_logprob,
    linear_policy_loss,
    pack,
    policy_loss,
    tree_attention,
    turn_advantages,
)
from igpo_kernels.aot import Library, load
from igpo_kernels.aot.build import AbsentDevice, compile_variant, variants
from igpo_kernels.inspect import TARGETS
from igpo_kernels.turn_advantages import GAIN, OUTCOME

logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
compiled = []


class IdleDevice(AbsentDevice):
    """Takes launches and does nothing."""

    utils = SimpleNamespace(
        load_binary=lambda *_: (1, 1, 32, 0, 1024), get_device_properties=lambda _: {"max_shared_mem": 227 << 10}
    )

    def launcher_cls(self, source, metadata):
        return lambda *_: None


def refused(path, arch) -> str:
    try:
        load(path, arch)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{path} was taken for {arch}")


def count_compilations():
    add_stages = CUDABackend.add_stages

    def counting(self, stages, *arguments):
        compiled.append(self.target.arch)
        return add_stages(self, stages, *arguments)

    CUDABackend.add_stages = counting


def every_variant(library):
    """Everything in the library is served; what it has not is compiled."""
    has = {tuple(k[f] for f in ("kernel", "arch", "dtype", "shape_class")) for k in library.manifest["kernels"]}
    chosen = [v for v in variants() if (v.kernel, v.arch, v.dtype, v.shape_class) in has]
    assert len(chosen) == len(has) == len(library), (len(chosen), len(has), len(library))
    for variant, entry in zip(chosen, library.manifest["kernels"], strict=True):
        kernel = compile_variant(variant)
        assert (kernel.name, kernel.metadata.shared) == (entry["symbol"], entry["shared"])
        assert kernel.asm["cubin"][:4] == b"\x7fELF"
    served = library.served
    assert not compiled and served == len(library.keys), (compiled, served, len(library.keys))
    other = dataclasses.replace(chosen[-1], num_warps=1 if chosen[-1].num_warps > 1 else 2)
    compile_variant(other)
    assert len(compiled) == library.lacking == 1 and library.served == served
    print(f"{len(chosen)} variants launched, none compiled; one that the library lacks launched and compiled")


def a_wrong_declaration_is_refused():
    variant = next(v for v in variants() if v.kernel == "policy_loss_finish")
    wrong = dataclasses.replace(variant, signature={**variant.signature, "columns": "i32:16"})
    try:
        compile_variant(wrong)
    except ValueError as error:
        assert "columns is declared i32:16, a launch gives i32; correct its triton_path.variants()" in str(error), error
    else:
        raise AssertionError("a variant was built that no launch would find")


def linear_policy_loss_step(_):
    """Forward and backward; what launches leave unwritten is not looked at."""
    n, vocab = 48, 256
    x, weight = (torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True) for rows in (n, vocab))
    labels, one = torch.randint(0, vocab, (n,)), torch.ones(n)
    for old in (None, one):
        loss, _ = linear_policy_loss(x, weight, labels, torch.arange(n), old, one, one, backend="triton")
        loss.backward()


def policy_loss_step(_):
    old, one = torch.zeros(48), torch.ones(48)
    loss, _ = policy_loss(torch.zeros(48, requires_grad=True), old, one, one, backend="triton")
    loss.backward()


def tree_attention_step(has):
    """A comb, with every head size and feature that the library has in bf16, by several head counts."""
    boundaries = np.array([10, 200, 300])
    trunk = RolloutTokens(0, np.arange(300), np.where(np.arange(300) < 1, -1, 0), boundaries)
    plan = pack([Tree([trunk], [Branch(np.arange(9), 3, 9)])])
    for _, size, features in (c.split("/") for kernel, dtype, c in has if (kernel, dtype) == ATTENTION):
        options = {"softcap": 50.0} if "capped" in features else {}
        options |= {"window": 100} if "windowed" in features else {}
        for heads, kv_heads in ((1, 1), (4, 2), (16, 4), (32, 32)):
            q, k, v = (
                torch.zeros(plan.n_tokens, h, int(size), dtype=torch.bfloat16, requires_grad=True)
                for h in (heads, kv_heads, kv_heads)
            )
            tree_attention(q, k, v, plan, backend="triton", **options).sum().backward()


def turn_advantages_step(has):
    """Every pool, over turns and over tokens, that the library has in float32."""
    offsets, kinds = torch.arange(0, 61, 5), torch.tensor([GAIN] * 4 + [OUTCOME], dtype=torch.int8).repeat(12)
    for feature in (c.split("/")[1] for kernel, dtype, c in has if (kernel, dtype) == ("turn_advantages", "fp32")):
        normaliser = Normaliser("separate" if feature == "tokens" else feature)
        tokens = {"token_offsets": torch.arange(61), "n_tokens": 60} if feature == "tokens" else {}
        turn_advantages(
            torch.zeros(60), kinds, offsets, torch.arange(0, 13, 4), 1.0, normaliser, backend="triton", **tokens
        )


def linear_logprob_step(_):
    for rows in (16, 128):
        x, weight = (torch.randn(k, 64, dtype=torch.bfloat16, requires_grad=True) for k in (rows, 256))
        for entropy in (False, True):
            out = linear_logprob(x, weight, torch.randint(0, 256, (rows,)), entropy=entropy, backend="triton")
            (sum(part.sum() for part in out) if entropy else out.sum()).backward()


ATTENTION = ("tree_attention_forward", "bf16")
STEPS = {
    "linear_logprob": ({"linear_logprob"}, linear_logprob_step),
    "linear_policy_loss": ({"linear_policy_loss", "policy_loss"}, linear_policy_loss_step),
    "policy_loss": ({"policy_loss"}, policy_loss_step),
    "tree_attention": ({"tree_attention"}, tree_attention_step),
    "turn_advantages": ({"turn_advantages"}, turn_advantages_step),
}
"""By op: the ops whose kernels it launches, and a call, given what the library has (kernel, dtype, class). On CPU
tensors the ops launch what they would on sm_90."""


def ops_themselves(library):
    driver.set_active(IdleDevice(TARGETS["sm_90"]))
    kernels = library.manifest["kernels"]
    has = [(k["kernel"], k["dtype"], k["shape_class"]) for k in kernels if k["arch"] == "sm_90"]
    ops = {kernel["op"] for kernel in kernels}
    for op, (needs, step) in STEPS.items():
        if needs <= ops:
            before = library.served, len(compiled)
            step(has)
            assert library.served > before[0] and len(compiled) == before[1], f"{op} compiled"
            print(f"{op}: {library.served - before[0]} kernels served, none compiled")


def main(path: str):
    triton.knobs.cache.dir = tempfile.mkdtemp()
    count_compilations()
    assert "not a shared library" in refused(__file__, "sm_90")
    assert "this device's gfx942" in refused(path, "gfx942")
    probe = Library(path)
    first, *_ = probe.manifest["targets"]
    library = load(path, first)
    assert load(path, first) is library
    every_variant(library)
    a_wrong_declaration_is_refused()
    if "sm_90" in library.manifest["targets"]:
        for fn in {id(variant.fn): variant.fn for variant in variants()}.values():
            fn.device_caches.clear()
        ops_themselves(library)


if __name__ == "__main__":
    main(sys.argv[1])
