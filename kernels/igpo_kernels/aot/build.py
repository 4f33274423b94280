"""Compile the shipped variants without a device, and write the sources of libigpo_kernels.

A variant is compiled by launching it, on a device that is not there and with arguments of its types: Triton then makes
the very key that a launch on the real device makes, so that the loader can answer it.
"""

from __future__ import annotations

import functools
import multiprocessing
import re
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from igpo_kernels.aot.embed import write
from igpo_kernels.aot.library import compiler, settle, sources, target_key
from igpo_kernels.inspect import TARGETS, shipped
from igpo_kernels.triton_variants import DTYPES, Config, Variant

ARCHITECTURES = tuple(arch for arch in TARGETS if arch.startswith("sm_"))
POINTEES = {
    **DTYPES, "fp64": torch.float64, "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8,
    "u8": torch.uint8, "i1": torch.bool,
}  # fmt: skip
BYTES = {"i64": 8, "fp64": 8, "i32": 4, "fp32": 4, "i16": 2, "fp16": 2, "bf16": 2, "i8": 1, "i1": 1, "tensormap": 128}
DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[([\d, ]+)\]>")
# Later Tritons pass one more flag with a descriptor that is lowered to a pointer.
FLAGS = [name for name in ("padding", "round_f32_to_tf32") if name in TensorDescriptor.__dataclass_fields__]


class AbsentDevice:
    """Triton's driver for a GPU that is not there: it answers what a launch asks before it compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_device(self) -> int:
        return self.target.arch  # Triton keeps kernels by device: each target is one

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def argument(kind: str):
    """A value that a launch takes for ``kind`` (see Variant.signature)."""
    kind, _, divisor = kind.partition(":")
    if kind.startswith("*"):
        return torch.empty(32, dtype=POINTEES[kind[1:]])[0 if divisor else 1 :]
    if descriptor := DESCRIPTOR.fullmatch(kind):
        block = [int(n) for n in descriptor[2].split(",")]
        return TensorDescriptor.from_tensor(torch.empty(block, dtype=POINTEES[descriptor[1]]), block)
    if kind.startswith("i"):
        return {"i32": 1 << 20, "i64": 1 << 40}[kind] + (0 if divisor else 1)
    return 0.5


def compile_variant(variant: Variant) -> CompiledKernel:
    """The kernel as a launch on the variant's architecture would compile it, from Triton's cache if it is there.

    Raises:
        ValueError: arguments of the declared types give a launch with other types, so no launch would find the variant.
    """
    driver.set_active(AbsentDevice(TARGETS[variant.arch]))
    options = Config(variant.constexprs, variant.num_warps, variant.num_stages).launch()
    values = {name: argument(kind) for name, kind in variant.signature.items()}
    kernel = variant.fn.run(grid=(1,), warmup=True, **values, **options)
    declared = {name: kind.replace(", ", ",") for name, kind in variant.signature.items()}
    if (launched := signature_of(kernel)) != declared:
        name = next(name for name in variant.fn.arg_names if launched.get(name) != declared.get(name))
        raise ValueError(
            f"{variant.kernel} {variant.arch} {variant.dtype} {variant.shape_class}: {name} is declared "
            f"{declared.get(name)}, a launch gives {launched.get(name)}; correct its triton_path.variants()"
        )
    return kernel


def signature_of(kernel: CompiledKernel) -> dict[str, str]:
    """The compiled kernel's signature, in the convention of Variant.signature."""
    found = {}
    for i, (name, kind) in enumerate(kernel.src.signature.items()):
        if kind != "constexpr":
            divisors = [value for key, value in kernel.src.attrs.get((i,), ()) if key == "tt.divisibility"]
            found[name] = ":".join([kind.replace(", ", ","), *map(str, divisors)])
    return found


def parameters_of(kernel: CompiledKernel) -> list[dict]:
    """Parameters of cuLaunchKernel, in order: descriptors in their parts, scratch memory last.

    Raises:
        ValueError: the PTX has other parameters.
    """
    maps = iter(kernel.metadata.tensordesc_meta or ())
    found = []

    def add(name, kind, divisor=1, tensor_map=None):
        size = 8 if kind.startswith("*") else BYTES[kind]
        found.append(dict(name=name, type=kind, size=size, divisor=int(divisor or 1), tensor_map=tensor_map))

    for name, kind in signature_of(kernel).items():
        kind, _, divisor = kind.partition(":")
        descriptor = DESCRIPTOR.fullmatch(kind)
        if not descriptor:
            add(name, kind, divisor)
            continue
        axes = range(descriptor[2].count(",") + 1)
        if kernel.metadata.tensordesc_meta:
            add(name, "tensormap", 64, tensor_map_of(next(maps)))
        else:  # without TMA the frontend passes what it needs, and then the backend the rest of a descriptor
            add(name, f"*{descriptor[1]}", 16)
            for part in ("shape", "stride"):
                for axis in axes:
                    add(f"{name}.{part}[{axis}]", "i64")
            for flag in FLAGS:
                add(f"{name}.{flag}", "i1")
        for part, integer in (("shape", "i32"), ("stride", "i64")):
            for axis in axes:
                add(f"{name}.{part}[{axis}]", integer)
    for scratch in ("global_scratch", "profile_scratch"):
        add(scratch, "*i8")
    if [p["size"] for p in found] != (sizes := parameter_sizes(kernel.asm["ptx"])):
        raise ValueError(f"{kernel.name}: parameters of {sizes} bytes, expected {found}; report this Triton version")
    return found


def parameter_sizes(ptx: str) -> list[int]:
    """Bytes of each parameter of the entry point."""
    declared = re.search(r"\.entry\s+\w+\s*\((.*?)\)", ptx, re.DOTALL)[1]
    kinds = re.findall(r"\.param (?:\.align \d+ )?\.[a-z](\d+)[^,\[]*(?:\[(\d+)\])?", declared)
    return [int(bits) // 8 * int(count or 1) for bits, count in kinds]


def tensor_map_of(meta: dict) -> dict:
    """The igpo_kernels_tensor_map of a descriptor that Triton describes by ``meta``."""
    return dict(
        rank=len(meta["block_size"]), box=meta["block_size"][::-1], element_bytes=meta["elem_size"],
        data_type=TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]], swizzle=meta["swizzle"],
    )  # fmt: skip


def entry_of(variant: Variant, kernel: CompiledKernel) -> dict:
    """A kernel's entry in the library's manifest; ``key`` and ``file`` are its place in Triton's cache."""
    metadata = next(Path(path) for name, path in kernel.metadata_group.items() if name.endswith(".json"))
    return dict(
        op=variant.op, kernel=variant.kernel, arch=variant.arch, dtype=variant.dtype, shape_class=variant.shape_class,
        symbol=kernel.name, constexprs={k: variant.constexprs[k] for k in sorted(variant.constexprs)},
        num_warps=kernel.metadata.num_warps, threads=32 * kernel.metadata.num_warps, shared=kernel.metadata.shared,
        parameters=parameters_of(kernel), key=metadata.parent.name, file=metadata.stem, metadata=metadata.read_text(),
        cubin=str(metadata.with_suffix(".cubin")),
    )  # fmt: skip


@functools.cache
def variants() -> list[Variant]:
    settle()
    return shipped()


def build_variant(index: int, cache: str) -> tuple[dict | None, bool]:
    """(entry of a variant, None if it needs scratch memory; whether it was compiled now), by its number: a variant's
    function does not travel between processes."""
    compiled = []
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.listener = lambda *, cache_hit, **_: compiled.append(not cache_hit)
    kernel = compile_variant(variants()[index])
    scratch = kernel.metadata.global_scratch_size or kernel.metadata.profile_scratch_size
    return None if scratch else entry_of(variants()[index], kernel), any(compiled)


def build(out: Path, archs: Sequence[str], ops: Sequence[str] = (), jobs: int = 1) -> str:
    """Compile the variants of ``ops`` (default: all) for ``archs`` and write the library's sources to ``out``.

    ``out/cache`` keeps the compiled kernels under Triton's keys, so only changed ones are compiled again.

    Args:
        ops: each an op, or a part of one: ``tree_attention/bf16``, ``tree_attention/bf16/d64``.
    Raises:
        ValueError: an op without variants, or a variant that is not launched as it declares.
    Returns:
        One line: how many.
    """
    start = time.monotonic()
    can = {
        i: f"{v.op}/{v.dtype}/{v.shape_class}/" for i, v in enumerate(variants()) if v.ahead_of_time and v.arch in archs
    }
    if unknown := [op for op in ops if not any(name.startswith(f"{op}/") for name in can.values())]:
        known = ", ".join(sorted({v.op for v in variants()}))
        raise ValueError(
            f"no kernels of {', '.join(unknown)} for {', '.join(archs)}; ops are {known}, parts OP/DTYPE/CLASS"
        )
    chosen = [i for i, name in can.items() if not ops or name.startswith(tuple(f"{op}/" for op in ops))]
    one = functools.partial(build_variant, cache=str((out / "cache").resolve()))
    if jobs == 1:
        results = list(map(one, chosen))
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            results = list(pool.map(one, chosen))
    entries = [entry for entry, _ in results if entry]
    manifest = {**compiler(), "sources": sources(), "targets": {arch: target_key(arch) for arch in archs}}
    write(out, manifest, entries)
    size = sum(Path(entry["cubin"]).stat().st_size for entry in entries)
    compiled = sum(new for _, new in results)
    return (
        f"{len(entries)} kernels for {', '.join(archs)}, {size / 1e6:.1f} MB: {compiled} compiled, "
        f"{len(results) - len(entries)} left out for scratch memory, {time.monotonic() - start:.0f} s"
    )
