"""Compile the shipped kernels ahead of time, and write the sources of libigpo_kernels; CMakeLists.txt calls it.

    python -m igpo_kernels.aot --out DIR [--arch sm_90 ...] [--op policy_loss ...] [--jobs 2]

Needs no GPU, and a process without TRITON_INTERPRET.
"""

import argparse
import os
import sys
from pathlib import Path

import triton

from igpo_kernels.aot.build import ARCHITECTURES, build


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m igpo_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; made if missing")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES, help="default: all")
    parser.add_argument("--op", nargs="+", default=(), help="only these ops, or parts of them: OP/DTYPE/CLASS")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        print(f"igpo_kernels.aot: {build(args.out, args.arch, args.op, args.jobs)}")
    except ValueError as error:
        print(f"igpo_kernels.aot: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
