"""The offline tuner: times candidate configurations on this machine's GPU and writes the tables.

    python -m igpo_kernels.tune [--op policy_loss] [--kernel NAME] [--dtype bf16] [--dry-run]

Needs a GPU. A candidate is timed only if `inspect` lets every variant built from it pass; it replaces the committed
configuration if it is at least 2 % faster. Nothing is tuned in a training step: that only looks tables up.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton

from igpo_kernels.inspect import check
from igpo_kernels.triton_variants import TABLES, Tunable, arch_of, table

GAIN = 0.98
"""A new configuration takes at most this share of the old one's time."""


def candidates(tunable: Tunable) -> Iterator[dict[str, int]]:
    for values in itertools.product(*tunable.space.values()):
        yield dict(zip(tunable.space, values, strict=True))


def tune(
    tunable: Tunable, arch: str, passes: Callable[[], bool], milliseconds: Callable[[], float]
) -> tuple[dict[str, int], float, float]:
    """Leave the best entry in the table; returns it, its time and the committed entry's.

    Args:
        passes: whether what the table now says may ship. milliseconds: times what the table now says.
    """
    entries = table(tunable.kernel)[arch][tunable.shape_class]
    committed = best = entries[tunable.dtype]
    before = fastest = milliseconds()
    for entry in candidates(tunable):
        entries[tunable.dtype] = entry
        if entry == committed or not passes():
            continue
        time = milliseconds()
        if time < min(fastest, GAIN * before):
            best, fastest = entry, time
    entries[tunable.dtype] = best
    return best, fastest, before


def render(entries: dict) -> str:
    """A table as JSON, one line a configuration."""
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
    """(op, its triton_path, what it lets be tuned), for every op that lets anything be tuned."""
    for path in sorted(Path(__file__).parent.glob("*/triton_path.py")):
        module = importlib.import_module(f"igpo_kernels.{path.parent.name}.triton_path")
        for tunable in getattr(module, "tunables", lambda: ())():
            yield path.parent.name, module, tunable


def passes_gate(module, tunable: Tunable, arch: str) -> bool:
    """Every variant that the tables now give for this kernel, architecture, class and dtype passes `inspect`."""
    wanted = (tunable.kernel, arch, tunable.dtype, tunable.shape_class)
    built = [v for v in module.variants() if (v.kernel, v.arch, v.dtype, v.shape_class.split("/")[0]) == wanted]
    return bool(built) and not any(check(variant).faults for variant in built)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m igpo_kernels.tune", description=__doc__.splitlines()[0])
    for option in ("op", "kernel", "dtype"):
        parser.add_argument(f"--{option}", help=f"only this {option}")
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("igpo_kernels.tune: no GPU is visible; run it on the machine to tune for", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    arch = arch_of(device)
    for op, module, tunable in tunables():
        wanted = (args.op, op), (args.kernel, tunable.kernel), (args.dtype, tunable.dtype)
        if any(want not in (None, got) for want, got in wanted):
            continue
        run = tunable.workload(device)
        best, after, before = tune(
            tunable,
            arch,
            functools.partial(passes_gate, module, tunable, arch),
            functools.partial(triton.testing.do_bench, run, return_mode="median"),
        )
        print(f"{tunable.kernel} {arch} {tunable.shape_class} {tunable.dtype}: {before:.4f} -> {after:.4f} ms {best}")
        if not args.dry_run:
            (TABLES / f"{tunable.kernel}.json").write_text(render(table(tunable.kernel)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
