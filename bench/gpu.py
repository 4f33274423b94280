"""All work for a machine with a GPU, in stages that end within ten minutes each, the most valuable numbers first.

    python bench/gpu.py [STAGE ...] [--out build/gpu] [--wheels FOLDER] [--dry]

Stages: quick, attention, tune, rest, scoring; all in this order without one. Each is a list of steps with limits of
their own (bench/README.md says what each minute is for). A step that fails, hangs or outlasts its limit does not stop
the next; one whose process died goes on behind the test or the candidate that killed it while its time lasts.

Uses the Python that runs it: torch, triton, transformers, pytest, pytest-benchmark, pytest-xdist and hypothesis;
nothing else of the trainer. Packages that it lacks (and peers) may lie in --wheels, pure Python, unpacked for the run.
A library of compiled kernels in build/aot (`make aot`) is used if it fits; which, and why not, is said. --out gets six
files, written as results come: stages.jsonl (machine, steps), tests.jsonl (a line as a test begins and ends),
rows.jsonl (bench rows), tune.jsonl (candidates), tables.json (configurations that won, for `python -m
igpo_kernels.tune --adopt`), log.txt. The exit code is 1 if a step failed.

--dry goes through the same steps on a machine without a GPU, up to each test's first launch (bench/pretend.py).
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[1]
STAGE_SECONDS = 540
"""Most that the limits of a stage may add up to: one command on such a machine may take 600 s."""
GRACE = 10
"""Seconds of a step's limit for it to end by itself once interrupted."""
SLACK = 5
"""How many times longer a step may take in a dry run, on two cores instead of sixteen."""
HUNG = 60
"""Seconds after which a test counts as hung; longer where one compiles for other compilers, or runs for minutes."""
FILES = ("stages.jsonl", "tests.jsonl", "rows.jsonl", "tune.jsonl", "tables.json", "log.txt")
SHOWN = 8
"""Failures that a step prints."""
FIRST = ("trunk-32k", "comb-8k-16x24", "combs-4x8k-16x24", "trunks-8x4k")
"""Attention shapes of the stage ``attention``, with the heads of Qwen2.5-7B."""
HOST = (
    "test_inspect", "test_tune", "(test_traps and not 2_to_the_31)", "pipelined", "unspecialised", "ahead_of_time",
    "in_the_interpreter",
)  # fmt: skip
"""Tests of the Triton folder that no GPU takes part in."""
CHECKED = (
    "test_tree_attention_shipped.py::test_on_a_gpu[bfloat16-128-plain]",
    "test_linear_logprob_triton.py::test_repeated_rows_and_cells_accumulate",
    "test_linear_policy_loss.py::test_rows_with_many_pairs_and_shared_labels",
)
"""A test of each kernel around the tensor cores, and of the row kernel, for compute-sanitizer."""
OURS = "attention_|tile_|row_loss"
"""Kernels that it watches."""


class Step(NamedTuple):
    name: str
    seconds: int
    """Limit, GRACE included."""
    command: list[str]
    """Arguments of ``python -m``, or a program of its own (see ``tool``)."""
    tool: str = ""
    """Program in front of Python, if it is there."""
    environment: tuple[tuple[str, str], ...] = ()


def stages(out: Path, aot: Path | None = None, dry: bool = False, run: str = "") -> dict[str, list[Step]]:
    """Steps by stage, in order; ``run`` tells their lines from those of other runs in the same folder."""
    file = {name: str(out / name) for name in FILES}
    cores = os.cpu_count() or 1
    workers = max(2, min(12, cores - 4))  # the rest compile

    def pytest(step: str, *arguments: str, hung: int = HUNG) -> list[str]:
        return [
            "pytest", "-p", "no:cacheprovider", "-p", "bench.journal", *(["-p", "bench.pretend"] if dry else ()),
            "--journal", file["tests.jsonl"], "--step", step + run, "-rf", "--tb=short",
            "-o", f"faulthandler_timeout={hung * (SLACK if dry else 1)}", "-o", "faulthandler_exit_on_timeout=true",
            *arguments,
        ]  # fmt: skip

    def bench(name: str, seconds: int, *arguments: str, hung: int = HUNG) -> Step:
        return Step(name, seconds, pytest(name, *arguments, "--full", "--results", file["rows.jsonl"], hung=hung))

    def facts(*arguments: str) -> Step:
        library = ["--aot", str(aot)] if aot else []
        return Step("facts", 40, ["bench.facts", "--stages", file["stages.jsonl"], *library, *arguments])

    def check(tool: str) -> Step:
        tests = [f"tests/kernels/triton/{test}" for test in CHECKED]
        watch = f"compute-sanitizer --tool {tool} --error-exitcode 9 --print-limit 20 --kernel-regex kns={OURS}"
        # Tensors in allocations of their own, so that a read past one's end is seen.
        return Step(tool, 90, pytest(tool, *tests), watch, (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),))

    native = " and ".join(f"not {name}" for name in HOST)
    first = " or ".join(f"{shape}-qwen" for shape in FIRST)
    attention = "bench/test_attention.py"
    return {
        "quick": [
            facts("--rows", file["rows.jsonl"]),
            Step("native", 190, pytest(
                "native", "tests/kernels/triton", "tests/parity", "-m", "not slow and not aot", "-k", native,
                "-n", str(workers), "--dist", "worksteal",
            ), environment=(("IGPO_PRETEND_COMPILE", "0"),) if dry else ()),
            bench("head", 220, "bench/test_loss.py", "bench/test_logprob.py", "bench/test_advantages.py"),
            check("memcheck"),
        ],
        "attention": [
            facts(),
            bench("attention", 160, f"{attention}::test_attention", "-k", first),
            bench("attention, narrow tables", 140, f"{attention}::test_attention", "-k", first, "--table", "narrow"),
            bench("flex", 200, f"{attention}::test_flex", f"{attention}::test_newer_flash", hung=120),
        ],
        "tune": [
            facts(),
            Step("tune", 480, [
                "igpo_kernels.tune", "--shortlisted", "--out", str(out), "--jobs", str(max(2, cores - 2)), "--run", run,
                *(["--most", "2"] if dry else ()),
            ]),
        ],
        "rest": [
            facts(),
            bench("rest of attention", 500, f"{attention}::test_attention", "-k", f"not ({first})", hung=180),
        ],
        "scoring": [facts(), bench("scoring", 160, "bench/test_scoring.py", hung=120), check("initcheck")],
    }  # fmt: skip


def library() -> Path | None:
    """The library of compiled kernels that lies in build/aot: a file, for links do not travel."""
    found = [
        path for path in (ROOT / "build/aot").glob("libigpo_kernels.so*") if path.is_file() and not path.is_symlink()
    ]
    return found[0] if found else None


def lines(path: Path) -> Iterator[dict]:
    """JSON lines of a file; what a kill cut short is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def told(step: str, out: Path, run: str) -> list[dict]:
    """What a step has written of its tests or candidates."""
    if step == "tune":
        return [row for row in lines(out / "tune.jsonl") if row["run"] == run]
    return [row for row in lines(out / "tests.jsonl") if row["step"] == step + run]


def progress(rows: list[dict]) -> tuple[int, bool]:
    """Tests or candidates begun, and whether the step came to its end."""
    return sum("begun" in (row.get("outcome"), *row) for row in rows), any("end" in row for row in rows)


def take(step: Step, out: Path, environment: dict[str, str], dry: bool, run: str) -> str:
    """Run a step in a session of its own until it ends or its time is over; returns its fault, or an empty text.

    A process that died in the midst of a test or of a candidate is followed by one that leaves it out.
    """
    tool = step.tool.split()
    if tool and not shutil.which(tool[0]) and not dry:
        return f"left out: {tool[0]} is not there"
    plain = dry and step.command[0] != "pytest"  # pytest's workers pretend through a plugin
    command = [*([] if dry else tool), sys.executable, "-m", *(["bench.pretend"] if plain else ()), *step.command]
    seconds = step.seconds * (SLACK if dry else 1) - GRACE
    end = time.monotonic() + seconds
    before = 0
    while True:
        with (out / "log.txt").open("a") as log:
            log.write(f"\n===== {step.name}: {' '.join(command)}\n")
            log.flush()
            code = watched(command, end - time.monotonic(), log, {**environment, **dict(step.environment)})
        if code is None:
            return f"stopped after {seconds} s"
        begun, ended = progress(told(step.name, out, run))
        if code == 0 or ended or begun == before:
            return f"exit code {code}" if code else ""
        before = begun


def watched(command: list[str], seconds: float, log, environment: dict[str, str]) -> int | None:
    """The exit code of a command, None if it was stopped after ``seconds``; nothing of it lives on."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def hang(out: Path, environment: dict[str, str]) -> str:
    """What comes of a command that sleeps for an hour and does not mind SIGINT: it and its child are gone."""
    code = (
        "import signal, subprocess; signal.signal(2, signal.SIG_IGN); print(subprocess.Popen(['sleep', '3600']).wait())"
    )
    with (out / "log.txt").open("a") as log:
        stopped = watched([sys.executable, "-c", code], 3, log, environment) is None
    return "stopped, and its child with it" if stopped else "not stopped"


def summary(step: str, found: list[dict]) -> Iterator[str]:
    """What a step says on the terminal: how many tests or candidates came to what, and its first failures."""
    if step == "tune":
        rows = [row for row in found if "committed" in row]
        untried = [row for row in found if "untried" in row]
        timed = sum("ms" in row for row in rows)
        yield f"  {len(rows)} candidates, {timed} timed; {len(untried)} more compiled and not tried"
        for row in [row for row in (*untried, *rows) if row.get("error", row.get("ahead"))][:SHOWN]:
            yield f"  {row['candidate'][0]} {row['candidate'][-1]}: {row.get('error', row.get('ahead'))[:160]}"
        return
    rows = [row for row in found if "outcome" in row]
    counts = collections.Counter(row["outcome"] for row in rows)
    unfinished = {row["test"] for row in rows} - {row["test"] for row in rows if row["outcome"] != "begun"}
    if rows:
        del counts["begun"]
        yield "  " + ", ".join([*(f"{n} {what}" for what, n in counts.items()), f"{len(unfinished)} without an end"])
    for test in sorted(unfinished)[:SHOWN]:
        yield f"  begun and not ended: {test}"
    for row in [row for row in rows if row["outcome"] == "failed"][:SHOWN]:
        yield f"  failed: {row['test']}: {' '.join(row.get('why', '').split())[-200:]}"
    reasons = collections.Counter(
        row.get("why", "").removeprefix("Skipped: ") for row in rows if row["outcome"] == "skipped"
    )
    for why, n in reasons.most_common(SHOWN):
        yield f"  {n} skipped: {why[:160]}"


def figures(out: Path, done: int) -> Iterator[str]:
    """Bench rows behind the first ``done``, in words."""
    from bench.comparison import line

    for row in list(lines(out / "rows.jsonl"))[done:]:
        if "left_out" in row:
            yield from (f"  left out: {peer} ({why[:120]})" for peer, why in row["left_out"].items())
        elif "ours" in row:
            yield f"  {line(row)} {json.dumps(row['shape'])}"
        elif "ms" in row:
            yield f"  {row['bench']}: " + ", ".join(f"{row[u]} {u}" for u in ("TB/s", "TFLOP/s") if u in row)


def main(argv: list[str] | None = None) -> int:
    names = stages(Path())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(names)}; all without one")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu", help="folder of the six files")
    parser.add_argument("--wheels", type=Path, help="folder of pure-Python wheels to use")
    parser.add_argument("--dry", action="store_true", help="up to the first launches, on a machine without a GPU")
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(names):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    if not torch.cuda.is_available() and not args.dry:
        print("bench/gpu.py: no CUDA device is visible; run it on a machine with one, or with --dry", file=sys.stderr)
        return 2
    out, aot = args.out.resolve(), library()
    out.mkdir(parents=True, exist_ok=True)
    failed, table, now = [], [], time.strftime(" %Y-%m-%d %H:%M:%S")
    with tempfile.TemporaryDirectory() as site:
        for wheel in sorted(args.wheels.glob("*.whl")) if args.wheels else ():
            zipfile.ZipFile(wheel).extractall(site)
        paths = [str(ROOT), str(ROOT / "kernels"), site, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        environment.pop("TRITON_INTERPRET", None)
        environment.pop("IGPO_KERNELS_AOT", None)
        for stage, steps in stages(out, aot, args.dry, now).items():
            if args.stages and stage not in args.stages:
                continue
            for step in steps:
                start, rows = time.monotonic(), len(list(lines(out / "rows.jsonl")))
                fault = take(step, out, environment, args.dry, now)
                took = time.monotonic() - start
                failed += [f"{stage}/{step.name}"] if fault and not fault.startswith("left out") else []
                with (out / "stages.jsonl").open("a") as file:
                    row = {
                        "stage": stage,
                        "step": step.name,
                        "seconds": round(took, 1),
                        "limit": step.seconds,
                        "fault": fault,
                    }
                    file.write(json.dumps(row) + "\n")
                print(f"{stage}/{step.name}: {fault or 'ok'}, {took:.0f} of {step.seconds} s", flush=True)
                said = [*figures(out, rows), *summary(step.name, told(step.name, out, now))]
                print("".join(f"{text}\n" for text in said), end="", flush=True)
                counts = next((text for text in said if "without an end" in text or "candidates" in text), "")
                table.append((stage, step.name, f"{step.seconds}", f"{took:.0f}", fault or "ok", counts.strip()))
                if step.name == "facts":
                    known = [row["library"] for row in lines(out / "stages.jsonl") if "library" in row]
                    print(f"  library of compiled kernels: {known[-1] if known else 'unknown'}")
                    if known and known[-1].startswith("Launched" if args.dry else "used"):
                        environment["IGPO_KERNELS_AOT"] = str(aot)
        if args.dry:
            print(f"a step of 3 s that hangs: {hang(out, environment)}")
    heads = ("stage", "step", "limit s", "took s", "fault", "tests or candidates")
    widths = [max(map(len, column)) for column in zip(heads, *table, strict=True)]
    for row in (heads, *table):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
