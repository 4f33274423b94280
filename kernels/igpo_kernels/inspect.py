"""The compile-only gate: every shipped Triton configuration, for every architecture, without a device.

    python -m igpo_kernels.inspect [--op policy_loss] [--arch sm_90] [--jobs 2]

One line per variant: registers, spilled bytes, shared memory, whether it can be built ahead of time, and its faults.
The last line is ``N variants, M hold``; the exit code is 0 only if all do. A variant holds if

- ptxas reports 0 spill stores and loads (gfx942: .vgpr_spill_count 0; head sizes over 128 may spill) and no
  serialized wgmma,
- its shared memory is within the chip's limit for one block,
- with a dot of bf16 or fp16: sm_90's PTX has wgmma, sm_100's tcgen05, gfx942's assembly mfma,
- with a dot of fp32: no TF32,
- declared ahead-of-time: it asks for no scratch memory, which only the JIT launcher hands out.

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import io
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from igpo_kernels.triton_variants import Config, Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
TENSOR_COLUMNS = 512
"""Tensor memory of a Blackwell multiprocessor."""
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@dataclass(frozen=True)
class Report:
    """The compiler's figures for a variant, which holds if ``faults`` is empty. In bytes; registers are per thread."""

    name: tuple[str, ...]
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    ahead_of_time: bool = False
    faults: tuple[str, ...] = ()


@functools.cache
def shipped() -> list[Variant]:
    """The variants of every op that has a ``triton_path``."""
    paths = sorted(Path(__file__).parent.glob("*/triton_path.py"))
    modules = (importlib.import_module(f"igpo_kernels.{path.parent.name}.triton_path") for path in paths)
    return [variant for module in modules for variant in module.variants()]


def compile_variant(variant: Variant) -> tuple[triton.compiler.CompiledKernel, str]:
    """The compiled kernel, and the output of ptxas (empty on AMD)."""
    fn = variant.fn
    signature = {name: "constexpr" for name in variant.constexprs}
    attributes = {}
    for name, kind in variant.signature.items():
        signature[name], _, divisor = kind.partition(":")
        if divisor:
            attributes[(fn.arg_names.index(name),)] = [["tt.divisibility", int(divisor)]]
    signature = {name: signature[name] for name in fn.arg_names}
    source = ASTSource(fn, signature, dict(variant.constexprs), attributes)
    options = Config({}, variant.num_warps, variant.num_stages).options()
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        # A fresh cache, so that ptxas runs: what it says is not cached.
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(said):
            kernel = triton.compile(source, target=TARGETS[variant.arch], options=options)
    return kernel, said.getvalue()


def check(variant: Variant) -> Report:
    """Compile a variant and check it against the gate; a compiler's error is a fault, too."""
    name = (variant.op, variant.kernel, variant.arch, variant.dtype, variant.shape_class)
    try:
        kernel, log = compile_variant(variant)
    except Exception as error:  # whatever a compiler raises, the gate reports
        while error.__cause__:  # Triton shows the source first, and the reason below it
            error = error.__cause__
        return Report(name, faults=(f"does not compile: {str(error).strip().splitlines()[0]}",))
    nvidia = variant.arch.startswith("sm_")
    code = kernel.asm["ptx" if nvidia else "amdgcn"]
    if nvidia:
        spilled = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))
        registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
    else:
        spilled = 4 * max(map(int, re.findall(r"\.vgpr_spill_count:\s*(\d+)", code)))
        registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", code)))
    metadata = kernel.metadata._asdict()  # scratch and tensor memory: not every backend has them
    shared, scratch = metadata["shared"], metadata.get("global_scratch_size", 0)
    tensor_columns = metadata.get("tmem_size") or 0
    faults = []
    if spilled and not variant.may_spill:
        faults.append(f"spills {spilled} bytes")
    if "serialized" in log:
        faults.append("wgmma serialized")
    if shared > SHARED_BYTES[variant.arch]:
        faults.append(f"shared memory {shared} > {SHARED_BYTES[variant.arch]}")
    if tensor_columns > TENSOR_COLUMNS:
        faults.append(f"tensor memory {tensor_columns} > {TENSOR_COLUMNS} columns")
    if variant.has_dot and variant.dtype != "fp32" and MATRIX_INSTRUCTION[variant.arch] not in code:
        faults.append(f"no {MATRIX_INSTRUCTION[variant.arch]}")
    if variant.has_dot and variant.dtype == "fp32" and re.search(r"tf32|xf32", code):
        faults.append("TF32")
    if variant.ahead_of_time and scratch:
        faults.append(f"{scratch} bytes of scratch: not ahead of time")
    ahead = variant.ahead_of_time and not scratch
    return Report(name, registers, spilled, shared, ahead, tuple(faults))


def check_shipped(index: int) -> Report:
    """Check the variant of that number: a variant's function cannot be sent to another process."""
    return check(shipped()[index])


def check_all(indices: Iterable[int], jobs: int = 1) -> list[Report]:
    """Reports of shipped variants, by number. Variants that differ only in the name of their class are compiled
    once."""
    programs = {i: repr(replace(shipped()[i], shape_class="")) for i in indices}
    one_of = {program: i for i, program in programs.items()}
    if jobs == 1:
        reports = list(map(check_shipped, one_of.values()))
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            reports = list(pool.map(check_shipped, one_of.values()))
    found = dict(zip(one_of, reports, strict=True))
    return [
        replace(found[program], name=(*found[program].name[:-1], shipped()[i].shape_class))
        for i, program in programs.items()
    ]


def lines(reports: list[Report]) -> Iterable[str]:
    """The table."""
    heads = ("op", "kernel", "arch", "dtype", "class", "regs", "spill", "shared", "AOT", "holds")
    cells = [
        (*r.name, str(r.registers), str(r.spilled), str(r.shared), "yes" if r.ahead_of_time else "no",
         "; ".join(r.faults) or "yes")
        for r in reports
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    for row in (heads, *cells):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m igpo_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--arch", choices=TARGETS, help="only this architecture")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    chosen = [i for i, v in enumerate(shipped()) if args.op in (None, v.op) and args.arch in (None, v.arch)]
    reports = check_all(chosen, args.jobs)
    print("\n".join(lines(reports)))
    print(f"{len(reports)} variants, {sum(not r.faults for r in reports)} hold")
    return 0 if reports and not any(r.faults for r in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
