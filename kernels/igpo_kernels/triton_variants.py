"""Committed configurations of the Triton kernels, by table, and the variants that ship.

``configs/<kernel>.json`` holds ``{arch: {shape_class: {dtype: {"num_warps": 8, "num_stages": 3, "BLOCK_M": 128}}}}``;
every other name is a constexpr of the kernel. `tune` writes these tables, `inspect`
compiles every entry, a training step only looks one up.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).with_name("configs")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Config:
    """Block sizes and launch numbers of a kernel: ``kernel[grid](*arguments, **config.launch())``."""

    constants: Mapping[str, int]
    num_warps: int
    num_stages: int

    def __getitem__(self, name: str) -> int:
        return self.constants[name]

    def options(self) -> dict[str, Any]:
        """Compiler options. Contraction to FMA is pinned: its default is a knob of the Triton version."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def launch(self) -> dict[str, Any]:
        return {**self.constants, **self.options()}


@dataclass(frozen=True)
class Variant:
    """One kernel as it ships, enough to compile it without a device.

    ``signature`` gives every argument that is not in ``constexprs`` its Triton type, in the convention of
    triton.tools.compile: ``"*bf16:16"`` is a pointer aligned to 16 bytes, ``"i32:16"`` an integer divisible by 16,
    ``"tensordesc<bf16[128,64]>"`` a host tensor descriptor.
    """

    op: str
    kernel: str
    arch: str
    dtype: str
    shape_class: str
    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    has_dot: bool = False
    ahead_of_time: bool = True
    may_spill: bool = False
    """Whether any local memory is allowed: it is then listed, and no fault."""
    work: tuple[float, str] = (1, "")
    """What an iteration of the hot loop does, as a number of units that `inspect` counts its instructions for:
    ``(2, "64 keys")``; no unit where configurations are not compared."""


@dataclass(frozen=True)
class Tunable:
    """A kernel's constants that `tune` may vary, and the call that it times; an op's ``triton_path.tunables()`` yields
    them.

    ``space`` maps every constant of the table, num_warps and num_stages included, to the values to try; values of the
    names in ``a_processor`` are counts per multiprocessor. ``workload`` makes inputs on a device (the same after the
    same seed) and returns the call to time, which looks its configuration up as always and returns what the kernel
    decides, a tensor or several.
    """

    kernel: str
    shape_class: str
    dtype: str
    space: Mapping[str, Sequence[int]]
    workload: Callable[[torch.device], Callable[[], object]]
    a_processor: tuple[str, ...] = ()

    def on(self, processors: int) -> Tunable:
        """The tunable with counts for a GPU of ``processors`` multiprocessors."""
        counts = {name: [count * processors for count in self.space[name]] for name in self.a_processor}
        return replace(self, space={**self.space, **counts}, a_processor=())


def config_for(kernel: str, arch: str, shape_class: str, dtype: str) -> Config:
    """The committed configuration of ``kernel``.

    Raises:
        KeyError: the table has no such entry.
    """
    try:
        entry = dict(table(kernel)[arch][shape_class][dtype])
    except KeyError:
        raise KeyError(f"{kernel}: configs/{kernel}.json has no entry {arch}/{shape_class}/{dtype}") from None
    num_warps, num_stages = entry.pop("num_warps"), entry.pop("num_stages")
    return Config(entry, num_warps, num_stages)


def configs(kernel: str) -> Iterator[tuple[str, str, str, Config]]:
    """Every ``(arch, shape_class, dtype, config)`` of a kernel's table."""
    for arch, classes in table(kernel).items():
        for shape_class, dtypes in classes.items():
            for dtype in dtypes:
                yield arch, shape_class, dtype, config_for(kernel, arch, shape_class, dtype)


@functools.cache
def table(kernel: str) -> dict:
    return json.loads((TABLES / f"{kernel}.json").read_text())


@functools.cache
def arch_name(device: torch.device) -> str:
    """A GPU's name in the tables (``sm_90``, ``gfx942``, ...), even if they have no entry for it."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def arch_of(device: torch.device) -> str:
    """The architecture whose tables ``device`` uses; a CPU (Triton's interpreter) uses sm_90's.

    Every op calls it before a launch, so IGPO_KERNELS_AOT takes effect here.

    Raises:
        ValueError: a device without tables, or a CPU without the interpreter; a library in IGPO_KERNELS_AOT that was
            built for another.
    """
    if device.type == "cpu":
        if not runs_on_cpu():
            raise ValueError(
                "igpo_kernels: Triton kernels run on GPUs, got tensors on the CPU; pass backend='auto' or 'torch' "
                "(TRITON_INTERPRET=1 runs them in Triton's interpreter)"
            )
        return "sm_90"
    arch = arch_name(device)
    if arch not in ARCHITECTURES:
        raise ValueError(
            f"igpo_kernels: no Triton configurations for {arch}, only for {', '.join(ARCHITECTURES)}; "
            "pass backend='torch'"
        )
    load_ahead_of_time(arch)
    return arch


def runs_on_cpu() -> bool:
    """Whether Triton takes CPU tensors: in its interpreter, or under a driver that is no GPU's."""
    try:
        from triton import knobs
        from triton.backends.driver import GPUDriver
        from triton.runtime.driver import driver

        return knobs.runtime.interpret or not isinstance(driver.active, GPUDriver)
    except (ImportError, RuntimeError):  # no Triton, or no driver
        return False


@functools.cache
def load_ahead_of_time(arch: str) -> None:
    """Load the library of compiled kernels that IGPO_KERNELS_AOT names, if it is set; once per architecture."""
    if path := os.environ.get("IGPO_KERNELS_AOT"):
        importlib.import_module("igpo_kernels.aot").load(path, arch)
