"""The offline tuner: times candidate configurations on this machine's GPU and writes the tables.

    python -m igpo_kernels.tune [--op policy_loss] [--kernel NAME] [--shape-class large] [--dtype bf16]
                                [--seconds 120] [--out FOLDER] [--dry-run]

Needs a GPU. A filter given twice takes both. Coordinate descent from the committed configuration tries the other
values of one constant at a time, until none helps or the kernel's seconds are over. A candidate is timed if `inspect`
lets the first variant built from it pass, and taken if it lets all pass and the candidate is at least 2 % faster than
the committed one. A training step tunes nothing: it only looks tables up.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import triton

from igpo_kernels.inspect import check
from igpo_kernels.triton_variants import TABLES, Tunable, arch_of, table

FILTERS = ("op", "kernel", "shape-class", "dtype")
GAIN = 0.98
"""A new configuration is taken if its time is at most this share of the old one's."""


def candidates(space: Mapping[str, Sequence[int]], taken: Sequence[dict]) -> Iterator[dict[str, int]]:
    """Entries that differ in one constant from the last entry of ``taken`` (to which the caller appends), each once,
    until a round over the constants yields no new one."""
    tried, start = list(taken), None
    while start != taken[-1]:
        start = taken[-1]
        for name, values in space.items():
            for value in values:
                entry = {**taken[-1], name: value}
                if entry not in tried:
                    tried.append(entry)
                    yield entry


def tune(
    tunable: Tunable,
    arch: str,
    passes: Callable[[int | None], bool],
    milliseconds: Callable[[], float],
    seconds: float = math.inf,
) -> tuple[dict[str, int], float, float]:
    """Leave the best entry in the table; returns it, its time and the committed entry's.

    Args:
        passes: whether the first ``n`` variants (None: all) built from the table as it is may ship.
        milliseconds: times the configuration in the table as it is.
        seconds: time after which no further candidate is begun.
    """
    end = time.monotonic() + seconds
    entries = table(tunable.kernel)[arch][tunable.shape_class]
    taken = [entries[tunable.dtype]]
    before = fastest = milliseconds()
    for entry in candidates(tunable.space, taken):
        if time.monotonic() > end:
            break
        entries[tunable.dtype] = entry
        if passes(1) and (took := milliseconds()) < min(fastest, GAIN * before) and passes(None):
            taken.append(entry)
            fastest = took
    entries[tunable.dtype] = taken[-1]
    return taken[-1], fastest, before


def render(entries: dict) -> str:
    """A table as JSON, one line per configuration."""
    archs = []
    for arch, classes in entries.items():
        lines = [
            f"    {json.dumps(shape_class)}: {{\n"
            + ",\n".join(f"      {json.dumps(dtype)}: {json.dumps(entry)}" for dtype, entry in dtypes.items())
            + "\n    }"
            for shape_class, dtypes in classes.items()
        ]
        archs.append(f"  {json.dumps(arch)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


def tunables() -> Iterator[tuple[str, object, Tunable]]:
    """(op, its triton_path, a tunable) for every tunable of every op."""
    for path in sorted(Path(__file__).parent.glob("*/triton_path.py")):
        module = importlib.import_module(f"igpo_kernels.{path.parent.name}.triton_path")
        for tunable in getattr(module, "tunables", lambda: ())():
            yield path.parent.name, module, tunable


def passes_gate(module, tunable: Tunable, arch: str, most: int | None = None) -> bool:
    """Whether the variants (the first ``most``) of this kernel, architecture, class and dtype, built from the tables as
    they are, pass `inspect`."""
    wanted = (tunable.kernel, arch, tunable.dtype, tunable.shape_class)
    built = [v for v in module.variants() if (v.kernel, v.arch, v.dtype, v.shape_class.split("/")[0]) == wanted]
    return bool(built) and not any(check(variant).faults for variant in built[:most])


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m igpo_kernels.tune", description=__doc__.splitlines()[0])
    for option in FILTERS:
        parser.add_argument(f"--{option}", action="append", help=f"only this {option.replace('-', ' ')}")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each kernel, shape class and dtype")
    parser.add_argument("--out", type=Path, default=TABLES, help="folder of the tables to write")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    return parser.parse_args(argv)


def wanted(args: argparse.Namespace) -> Iterator[tuple[object, Tunable]]:
    """(triton_path, tunable) of each tunable that the filters leave."""
    for op, module, tunable in tunables():
        names = (op, tunable.kernel, tunable.shape_class, tunable.dtype)
        taken = (getattr(args, option.replace("-", "_")) for option in FILTERS)
        if all(only is None or name in only for name, only in zip(names, taken, strict=True)):
            yield module, tunable


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if not torch.cuda.is_available():
        print("igpo_kernels.tune: no GPU is visible; run it on the machine to tune for", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    arch = arch_of(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for module, tunable in wanted(args):
        run = tunable.workload(device)
        best, after, before = tune(
            tunable.on(processors),
            arch,
            functools.partial(passes_gate, module, tunable, arch),
            functools.partial(triton.testing.do_bench, run, return_mode="median"),
            args.seconds,
        )
        what = f"{tunable.kernel} {arch} {tunable.shape_class} {tunable.dtype}"
        print(f"{what}: {before:.4f} -> {after:.4f} ms {best}", flush=True)
        if not args.dry_run:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{tunable.kernel}.json").write_text(render(table(tunable.kernel)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
