"""What the machine is, and what it can do at most: the first step of every stage of gpu.py.

    python -m bench.facts --stages FILE [--rows FILE] [--aot LIBRARY]

Appends a line of device, driver and versions to --stages, with what came of the library of compiled kernels: it is
``used`` if it fits this Python and this device and a first launch through it gives the definition's result. With --rows
it times the two ceilings, a copy and a matrix product in bf16, and appends a row for each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import torch

from bench.timing import circumstances

SMI = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
NAMED = (
    "numpy",
    "pytest",
    "pytest-benchmark",
    "pytest-xdist",
    "hypothesis",
    "liger-kernel",
    "quack-kernels",
    "flash-attn",
)
COPY_BYTES = 8 << 30
PRODUCT = 8192
"""Rows, columns and depth of the product."""


def smi() -> str:
    if not shutil.which("nvidia-smi"):
        return "no nvidia-smi"
    run = subprocess.run(["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"], capture_output=True, text=True)
    return (run.stdout or run.stderr).strip()


def versions() -> dict[str, str]:
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in distributions() if d.metadata["Name"]}
    return {name: found.get(name, "absent") for name in NAMED}


def library(path: Path | None) -> str:
    """``used``, or why the library is not."""
    if path is None:
        return "no library in build/aot"
    os.environ["IGPO_KERNELS_AOT"] = str(path)
    try:
        from igpo_kernels import policy_loss

        inputs = torch.rand(4, 5000, device="cuda")
        logp = inputs[0].clone().requires_grad_()
        found, expected = (
            torch.autograd.grad(policy_loss(logp, *inputs[1:], backend=name)[0], logp)[0]
            for name in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected)
    except Exception as error:  # whatever it is, the just-in-time compiler does without the library
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return "used"


def seconds(call, repeats: int = 10) -> list[float]:
    """Seconds of each repetition by the device's clock, after three that do not count."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats + 3)]
    for start, stop in marks:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 for start, stop in marks[3:]]


def ceilings() -> list[dict]:
    """Rows of a copy (bytes read and written per second) and of a product of random matrices."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    a, b = torch.randn(2, PRODUCT, PRODUCT, device="cuda", dtype=torch.bfloat16)
    rows = []
    for name, call, amount, unit in (
        ("copy", lambda: target.copy_(source), 2 * COPY_BYTES / 1e12, "TB/s"),
        ("matmul", lambda: a @ b, 2 * PRODUCT**3 / 1e12, "TFLOP/s"),
    ):
        median = statistics.median(seconds(call))
        rows.append(
            {"bench": f"ceiling/{name}", **circumstances(), "ms": 1e3 * median, unit: round(amount / median, 3)}
        )
    return rows


def append(path: Path, rows: list[dict]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.facts", description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=Path, required=True, help="append what the machine is")
    parser.add_argument("--rows", type=Path, help="time the ceilings and append their rows")
    parser.add_argument("--aot", type=Path, help="library of compiled kernels to try")
    args = parser.parse_args()
    about = circumstances()
    about |= {
        "smi": smi(),
        "python": sys.version.split()[0],
        "cores": os.cpu_count(),
        "versions": about["versions"] | versions(),
    }
    append(args.stages, [{"facts": about, "aot": str(args.aot), "library": library(args.aot)}])
    if args.rows:
        append(args.rows, ceilings())
    return 0


if __name__ == "__main__":
    sys.exit(main())
