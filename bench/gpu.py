"""All work for a machine with a GPU: native tests, benches at model shapes, tuning.

    python bench/gpu.py [tests] [bench] [tune] [--out build/gpu] [--wheels FOLDER] [--limit 600]

Uses the Python that runs it: torch, triton, transformers, pytest, pytest-benchmark and hypothesis; nothing else of the
trainer. Packages that it lacks (and peers) may lie in --wheels, pure Python, unpacked for the run. The folder --out
gets a log per stage, gpu.jsonl (bench rows) and tables/ (tuned configurations, which replace nothing by themselves). A
stage that fails or outlasts its limit does not stop the next; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIMITS = {"tests": 900, "bench": 1200, "tune": 1500}
"""Seconds per stage."""
TUNING_SECONDS = 30
GRACE = 15
"""Seconds for a stage to report its progress once interrupted."""
SHOWN = 12
"""Lines printed from a log's end."""


def commands(out: Path) -> dict[str, list[str]]:
    pytest = ["pytest", "-p", "no:cacheprovider"]
    dtypes = ["--dtype=bf16", "--dtype=fp32"]  # dtypes of training, and of losses and advantages
    return {
        "tests": [*pytest, "tests/kernels", "tests/parity", "-m", "not slow", "--durations=10"],
        "bench": [*pytest, "bench", "--full", "--results", str(out / "gpu.jsonl")],
        "tune": ["igpo_kernels.tune", *dtypes, f"--seconds={TUNING_SECONDS}", f"--out={out / 'tables'}"],
    }


def run(module: list[str], log: Path, limit: float, environment: dict[str, str]) -> str | None:
    """Run ``python -m module...`` in a session of its own; returns a description of its failure, or none."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *module], cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(limit)
            return f"exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            return f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(LIMITS)}; all without one")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder of logs, rows and tables")
    parser.add_argument("--wheels", type=Path, help="folder of pure-Python wheels to use")
    parser.add_argument("--limit", type=float, help="seconds per stage")
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(LIMITS):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(LIMITS)}")
    if not torch.cuda.is_available():
        print("bench/gpu.py: no CUDA device is visible; run it on a machine with one", file=sys.stderr)
        return 2
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as site:
        for wheel in sorted(args.wheels.glob("*.whl")) if args.wheels else ():
            zipfile.ZipFile(wheel).extractall(site)
        paths = [str(ROOT), str(ROOT / "kernels"), site, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment.pop("TRITON_INTERPRET", None)
        for stage, module in commands(out).items():
            if args.stages and stage not in args.stages:
                continue
            start, log = time.monotonic(), out / f"{stage}.log"
            fault = run(module, log, args.limit or LIMITS[stage], environment)
            failed += [stage] if fault else []
            print(*log.read_text(errors="replace").splitlines()[-SHOWN:], sep="\n")
            print(f"{stage}: {fault or 'ok'} in {time.monotonic() - start:.0f} s; {log}", flush=True)
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
