"""The compile-only gate: every shipped Triton configuration, for every architecture, without a device.

    python -m igpo_kernels.inspect [--op policy_loss] [--arch sm_90] [--jobs 2] [--new] [--write]

One line per variant: registers, bytes of local memory outside loops and in them, instructions of the hot loop and of
the longest one (see `assembly`), shared memory, whether it can be built ahead of time, and its faults. The last line is
``N variants, M hold``; the exit code is 0 only if all do. A variant holds if

- no loop touches local memory, and what is outside loops moves at most LOCAL_BYTES (head sizes over 128 may spill),
- ptxas reports no serialized wgmma,
- its shared memory is within the chip's limit for one block,
- with a dot of bf16 or fp16: sm_90's PTX has wgmma, sm_100's tcgen05, gfx942's assembly mfma,
- with a dot of fp32: no TF32,
- declared ahead-of-time: it asks for no scratch memory, which only the JIT launcher hands out.

``holds.json`` keeps what the compiler said of the variants that hold, for each release of Triton, by a key of all that
the compiler reads (`key`). ``--new`` compiles only variants that it lacks; ``--write`` adds what was compiled and drops
what no longer ships, of the release that runs.

Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import io
import json
import multiprocessing
import re
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from inspect import getsource
from pathlib import Path

import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from igpo_kernels import assembly
from igpo_kernels.aot.library import settle
from igpo_kernels.triton_variants import Config, Variant

HOLDS = Path(__file__).with_name("holds.json")
"""Facts of the variants that hold, by release of Triton and key."""

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_BYTES = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
LOCAL_BYTES = 512
"""Most bytes of local memory that a thread may move once per program: with 256 threads 128 KiB, about twice what a
program of attention reads and writes of its own tile."""
TENSOR_COLUMNS = 512
"""Tensor memory of a Blackwell multiprocessor."""
MATRIX_INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
MARKS = ("mma.sync", "wgmma", "tcgen05", "mfma", "tf32", "xf32")


@dataclass(frozen=True)
class Facts:
    """What the compiler made of a program. Bytes, except registers per thread, columns of tensor memory and, of loops,
    instructions; ``local``, ``looped`` and loops as in `assembly.Profile`. ``marks`` are those of MARKS in its
    assembly, and ``serialized`` if ptxas said so."""

    registers: int
    local: int
    looped: int
    hot_loop: int
    outer_loop: int
    shared: int
    scratch: int
    tensor_columns: int
    marks: tuple[str, ...]


@dataclass(frozen=True)
class Report:
    """What the gate says of a variant, which holds if ``faults`` is empty; without facts it did not compile."""

    name: tuple[str, ...]
    facts: Facts | None = None
    ahead_of_time: bool = False
    work: str = ""
    """Instructions of the hot loop for a unit of work (`Variant.work`)."""
    faults: tuple[str, ...] = ()


@functools.cache
def shipped() -> list[Variant]:
    """The variants of every op that has a ``triton_path``."""
    paths = sorted(Path(__file__).parent.glob("*/triton_path.py"))
    modules = (importlib.import_module(f"igpo_kernels.{path.parent.name}.triton_path") for path in paths)
    return [variant for module in modules for variant in module.variants()]


def source_of(variant: Variant) -> ASTSource:
    """What Triton compiles."""
    fn = variant.fn
    signature = {name: "constexpr" for name in variant.constexprs}
    attributes = {}
    for name, kind in variant.signature.items():
        signature[name], _, divisor = kind.partition(":")
        if divisor:
            attributes[(fn.arg_names.index(name),)] = [["tt.divisibility", int(divisor)]]
    signature = {name: signature[name] for name in fn.arg_names}
    return ASTSource(fn, signature, dict(variant.constexprs), attributes)


def options_of(variant: Variant) -> dict:
    return Config({}, variant.num_warps, variant.num_stages).options()


def key(variant: Variant) -> str:
    """A hash of all that decides `Facts`: the source of the kernel and of what it calls, constants, types, options,
    target, the releases of Triton and ptxas, and the code that measures. Variants of one key are one program.

    A key holds on every machine: of Triton's build it has the release only, for wheels differ by Python version.
    """
    settle()
    parts = (
        triton.__version__, _target_key(variant.arch), source_of(variant).hash(), sorted(options_of(variant).items()),
        sorted(get_cache_invalidating_env_vars().items()), _measuring(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


@functools.cache
def _measuring() -> str:
    return "".join(map(getsource, (compile_variant, measure, assembly))) + repr(MARKS)


@functools.cache
def _target_key(arch: str) -> str:
    return make_backend(TARGETS[arch]).hash()


def compile_variant(variant: Variant) -> tuple[triton.compiler.CompiledKernel, str]:
    """The compiled kernel, and what ptxas printed (empty on AMD)."""
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope(), triton.knobs.nvidia.scope():
        # A fresh cache, so that ptxas runs: what it says is not cached.
        triton.knobs.cache.dir = cache
        triton.knobs.nvidia.dump_ptxas_log = True
        with contextlib.redirect_stdout(said):
            kernel = triton.compile(source_of(variant), target=TARGETS[variant.arch], options=options_of(variant))
    return kernel, said.getvalue()


def measure(variant: Variant) -> Facts:
    """Compile a variant.

    Raises:
        Exception: whatever the compiler raises.
    """
    kernel, log = compile_variant(variant)
    nvidia = variant.arch.startswith("sm_")
    code = kernel.asm["ptx" if nvidia else "amdgcn"]
    if nvidia:
        registers = max(map(int, re.findall(r"Used (\d+) registers", log)))
        profile = assembly.profile(assembly.disassemble(kernel.asm["cubin"]), assembly.NVIDIA)
    else:
        registers = max(map(int, re.findall(r"\.vgpr_count:\s*(\d+)", code)))
        profile = assembly.profile(code, assembly.AMD)
    metadata = kernel.metadata._asdict()  # scratch and tensor memory: not of every backend
    marks = [mark for mark in MARKS if mark in code] + ["serialized"] * ("serialized" in log)
    return Facts(
        registers, **asdict(profile), shared=metadata["shared"], scratch=metadata.get("global_scratch_size", 0),
        tensor_columns=metadata.get("tmem_size") or 0, marks=tuple(marks),
    )  # fmt: skip


def report(variant: Variant, facts: Facts | str) -> Report:
    """Hold a variant to the gate; ``facts`` that are a text are a compiler's error."""
    name = (variant.op, variant.kernel, variant.arch, variant.dtype, variant.shape_class)
    if isinstance(facts, str):
        return Report(name, faults=(f"does not compile: {facts}",))
    faults = []
    if facts.looped and not variant.may_spill:
        faults.append(f"spills {facts.looped} bytes in loops")
    if facts.local > LOCAL_BYTES and not variant.may_spill:
        faults.append(f"spills {facts.local} bytes once per program > {LOCAL_BYTES}")
    if "serialized" in facts.marks:
        faults.append("wgmma serialized")
    if facts.shared > SHARED_BYTES[variant.arch]:
        faults.append(f"shared memory {facts.shared} > {SHARED_BYTES[variant.arch]}")
    if facts.tensor_columns > TENSOR_COLUMNS:
        faults.append(f"tensor memory {facts.tensor_columns} > {TENSOR_COLUMNS} columns")
    if variant.has_dot and variant.dtype != "fp32" and MATRIX_INSTRUCTION[variant.arch] not in facts.marks:
        faults.append(f"no {MATRIX_INSTRUCTION[variant.arch]}")
    if variant.has_dot and variant.dtype == "fp32" and {"tf32", "xf32"} & set(facts.marks):
        faults.append("TF32")
    if variant.ahead_of_time and facts.scratch:
        faults.append(f"{facts.scratch} bytes of scratch: not ahead of time")
    ahead = variant.ahead_of_time and not facts.scratch
    units, of = variant.work
    return Report(name, facts, ahead, of and f"{facts.hot_loop / units:.0f} / {of}", tuple(faults))


def try_measure(variant: Variant) -> Facts | str:
    """`measure`, or the first line of what the compiler raised."""
    try:
        return measure(variant)
    except Exception as error:  # whatever a compiler raises, the gate reports
        while error.__cause__:  # Triton shows the source first, and the reason below it
            error = error.__cause__
        return str(error).strip().splitlines()[0]


def check(variant: Variant) -> Report:
    """Compile a variant and hold it to the gate; a compiler's error is a fault, too."""
    return report(variant, try_measure(variant))


def measure_shipped(index: int) -> Facts | str:
    """By number: a variant's function does not travel between processes."""
    return try_measure(shipped()[index])


def check_all(keys: Mapping[int, str], jobs: int = 1, known: Mapping[str, Facts] | None = None) -> list[tuple]:
    """(key, facts, report) of shipped variants, given their keys by number. Each program is compiled once, and none
    whose facts are ``known``."""
    found = dict(known or {})
    missing = {key: i for i, key in keys.items() if key not in found}
    if jobs == 1 or len(missing) < 2:
        found.update(zip(missing, told(map(measure_shipped, missing.values()), len(missing)), strict=True))
    else:
        with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
            measured = pool.map(measure_shipped, missing.values())
            found.update(zip(missing, told(measured, len(missing)), strict=True))
    return [(key, found[key], report(shipped()[i], found[key])) for i, key in keys.items()]


def told(results: Iterable, total: int, every: int = 50) -> Iterable:
    """``results``, with a line to stderr on each ``every``-th: a full gate takes many minutes."""
    for count, result in enumerate(results, 1):
        if count % every == 0:
            print(f"compiled {count} of {total}", file=sys.stderr, flush=True)
        yield result


def read_holds() -> dict[str, Facts]:
    """Facts by key, of this release of Triton; none where there is no file."""
    table = _table().get(triton.__version__, {})
    return {key: Facts(**{**facts, "marks": tuple(facts["marks"])}) for key, facts in table.items()}


def write_holds(known: Mapping[str, Facts], checked: Sequence[tuple]) -> None:
    """Write what is ``known`` and what was checked (see `check_all`), without what has a fault or ships no more; what
    was written under other releases of Triton stays."""
    failing = {key for key, _, report in checked if report.faults}
    facts = {**known, **{key: facts for key, facts, _ in checked}}
    keys = dict.fromkeys(key(variant) for variant in shipped())
    kept = {k: asdict(facts[k]) for k in keys if k in facts and k not in failing}
    table = dict(sorted({**_table(), triton.__version__: kept}.items()))
    releases = (
        f"{json.dumps(release)}: {{\n"
        + ",\n".join(f"{json.dumps(k)}: {json.dumps(row)}" for k, row in rows.items())
        + "\n}"
        for release, rows in table.items()
    )
    HOLDS.write_text("{\n" + ",\n".join(releases) + "\n}\n")


def _table() -> dict[str, dict]:
    return json.loads(HOLDS.read_text()) if HOLDS.exists() else {}


HEADS = (
    "op", "kernel", "arch", "dtype", "class", "regs", "local", "looped", "loop", "outer", "work", "shared", "AOT",
    "holds",
)  # fmt: skip


def lines(reports: list[Report]) -> Iterable[str]:
    """The table."""
    cells = []
    for r in reports:
        f = r.facts
        counts = (f.registers, f.local, f.looped, f.hot_loop, f.outer_loop, r.work, f.shared) if f else ("-",) * 7
        ahead = "yes" if r.ahead_of_time else "no"
        cells.append((*r.name, *(str(count) or "-" for count in counts), ahead, "; ".join(r.faults) or "yes"))
    widths = [max(map(len, column)) for column in zip(HEADS, *cells, strict=True)]
    for row in (HEADS, *cells):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m igpo_kernels.inspect", description=__doc__.splitlines()[0])
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--arch", choices=TARGETS, help="only this architecture")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--new", action="store_true", help=f"compile only what {HOLDS.name} lacks")
    parser.add_argument("--write", action="store_true", help=f"keep what holds in {HOLDS.name}")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    known = read_holds()
    chosen = {i: key(v) for i, v in enumerate(shipped()) if args.op in (None, v.op) and args.arch in (None, v.arch)}
    checked = check_all(chosen, args.jobs, known if args.new else {})
    if args.write:
        write_holds(known, checked)
    reports = [report for _, _, report in checked]
    print("\n".join(lines(reports)))
    print(f"{len(reports)} variants, {sum(not r.faults for r in reports)} hold")
    return 0 if reports and not any(r.faults for r in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
