"""The offline tuner: times candidate configurations on this machine's GPU.

    python -m igpo_kernels.tune [--op policy_loss] [--kernel NAME] [--shape-class large] [--dtype bf16]
                                [--shortlisted] [--most 8] [--seconds 120] [--jobs 12] --out FOLDER
    python -m igpo_kernels.tune --adopt FOLDER/tables.json
    python -m igpo_kernels.tune --measure

Needs a GPU, but for the last two. A filter given twice takes both. Candidates are those of shortlist.json, then rounds
of those that differ in one constant from the fastest so far, until a round brings nothing or the kernel's seconds are
over; ``--shortlisted`` tries the shortlist alone. Processes compile a round's candidates ahead, into Triton's cache,
and ask `inspect` about each: what the gate would say is noted beside a candidate and bars none.

A candidate counts if its results are the committed configuration's, up to rounding, and it is at least 2 % faster. One
that raises, or hangs, or gives other results, is noted and the next is tried. FOLDER/tune.jsonl gets a line when a
candidate begins and one with what came of it, FOLDER/tables.json the entries that won; a tuner that was killed goes on
behind the last candidate that it began, if it is given the same FOLDER and ``--run NAME``. ``--adopt`` puts such
entries into the committed tables, ``--measure`` writes what this Triton makes of the shortlist into shortlist.json. A
training step tunes nothing: it only looks tables up.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch
import triton

from igpo_kernels.aot.library import settle
from igpo_kernels.inspect import report, try_measure
from igpo_kernels.poison import Poison
from igpo_kernels.triton_variants import TABLES, Tunable, Variant, arch_of, table

FILTERS = ("op", "kernel", "shape-class", "dtype")
SHORTLIST = Path(__file__).with_name("shortlist.json")
"""Candidates chosen without a GPU, a line each: kernel, arch, shape_class, dtype, entry, what the compiler said, and a
name if some belong together."""
GAIN = 0.98
"""A new configuration is taken if its time is at most this share of the old one's."""
TOLERANCE = {"bf16": 5e-2, "fp16": 1e-2, "fp32": 1e-3}
"""Largest `difference` from the committed configuration's results that rounding explains."""
CANDIDATE_SECONDS = 30
"""Seconds after which a candidate counts as hung: the process ends, its line says that it began."""
COMPILE_SECONDS = 120
"""Seconds that a candidate's compilation ahead is waited for."""
LOST = 3
"""Exit code where a candidate left the device unusable; the next process goes on behind it."""


def shortlist() -> list[dict]:
    return json.loads(SHORTLIST.read_text())


def neighbours(space: Mapping[str, Sequence[int]], entry: dict) -> list[dict]:
    """Entries that differ from ``entry`` in one constant."""
    return [{**entry, name: value} for name, values in space.items() for value in values if value != entry[name]]


def tune(
    tunable: Tunable,
    arch: str,
    attempt: Callable[[dict], float],
    first: Sequence[dict] = (),
    search: bool = True,
    seconds: float = math.inf,
    ahead: Callable[[Iterable[dict]], None] = lambda entries: None,
) -> tuple[dict[str, int], float, float]:
    """Leave the best entry in the table; returns it, its time and the committed entry's.

    Args:
        attempt: milliseconds of an entry, which it may put in the table; infinite if it does not count.
        first: entries to try first; with ``search`` rounds of the fastest one's `neighbours` follow, until none is new.
        seconds: time after which no further candidate is begun.
        ahead: is told of each round's entries before they are tried.
    """
    end = time.monotonic() + seconds
    entries = table(tunable.kernel)[arch][tunable.shape_class]
    best = entries[tunable.dtype]
    before = fastest = attempt(best)
    tried, found = [best], [entry for entry in first if entry != best]
    if search and not found:
        found = neighbours(tunable.space, best)
    while (new := [entry for entry in found if entry not in tried]) and math.isfinite(before):
        ahead(new)
        for entry in new:
            if time.monotonic() > end:
                break
            tried.append(entry)
            if (took := attempt(entry)) < min(fastest, GAIN * before):
                best, fastest = entry, took
        else:
            found = neighbours(tunable.space, best) if search else []
            continue
        break
    entries[tunable.dtype] = best
    return best, fastest, before


def results(tunable: Tunable, device: torch.device) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """The call to time, and copies of what it gives for inputs that are the same at every call of this function. Memory
    that the kernel leaves unwritten holds NaN."""
    torch.manual_seed(0)
    run = tunable.workload(device)
    with Poison():
        found = run()
    return run, [x.detach().clone() for x in ([found] if isinstance(found, torch.Tensor) else found)]


def difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Largest difference of an entry, as a share of its row's largest entry (of its own size in tensors of one
    dimension); infinite for NaN or other shapes."""
    if [x.shape for x in found] != [x.shape for x in expected]:
        return math.inf
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        got, want = got.float(), want.float()
        size = want.abs().amax(-1, keepdim=True) if want.ndim > 1 else want.abs()
        small = 1e-2 * torch.linalg.vector_norm(want) / max(1, want.numel()) ** 0.5
        share = float(((got - want).abs() / (size + small + torch.finfo(torch.float32).tiny)).max())
        worst = max(worst, math.inf if math.isnan(share) else share)
    return worst


class Tuner:
    """Tries candidates of one architecture and writes down what comes of each.

    Args:
        out: folder of tune.jsonl and tables.json. What they say of this run holds: its candidates are not begun again,
            its winners are put into the tables.
        run: name of the run. milliseconds: times a call.
    """

    def __init__(self, out: Path, arch: str, device: torch.device, pool=None, run: str = "", milliseconds=None):
        out.mkdir(parents=True, exist_ok=True)
        self.rows, self.tables, self.arch, self.device = out / "tune.jsonl", out / "tables.json", arch, device
        self.pool, self.compiled, self.run = pool, {}, run
        self.milliseconds = milliseconds or functools.partial(
            triton.testing.do_bench, warmup=10, rep=60, return_mode="median"
        )
        lines = self.rows.read_text().splitlines() if self.rows.exists() else []
        known = [row for row in map(json.loads, lines) if row["run"] == run]
        self.begun = {json.dumps(row["candidate"]) for row in known if "candidate" in row}
        self.won = json.loads(self.tables.read_text()) if known and self.tables.exists() else {}
        merge(self.won)

    def write(self, **row: object) -> None:
        with self.rows.open("a") as file:
            file.write(json.dumps({"run": self.run, **row}) + "\n")

    def tune(self, op: str, tunable: Tunable, first: Sequence[dict], search: bool, seconds: float) -> None:
        """Tune one kernel, class and dtype, and keep its winner."""
        name = (tunable.kernel, self.arch, tunable.shape_class, tunable.dtype)
        expected: list[torch.Tensor] | None = None
        entries = table(tunable.kernel)[self.arch][tunable.shape_class]

        def attempt(entry: dict) -> float:
            nonlocal expected
            candidate, committed = [*name, entry], expected is None
            if not committed and json.dumps(candidate) in self.begun:
                return math.inf
            self.write(candidate=candidate, begun=True)
            row, before = {}, entries[tunable.dtype]
            try:
                row = self.said(json.dumps(candidate))
                faulthandler.dump_traceback_later(CANDIDATE_SECONDS, exit=True)
                entries[tunable.dtype] = entry
                run, found = results(tunable, self.device)
                expected = found if committed else expected
                row["difference"] = difference(found, expected)
                if row["difference"] > TOLERANCE[tunable.dtype]:
                    row["error"] = "other results than the committed configuration's"
                else:
                    row["ms"] = self.milliseconds(run)
            except Exception as error:  # what the compiler, the launch or the device raises: the next may run
                row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            finally:
                faulthandler.cancel_dump_traceback_later()
                entries[tunable.dtype] = before
            self.write(candidate=candidate, committed=committed, **row)
            if "error" in row and lost(self.device):
                print(f"igpo_kernels.tune: the device is lost after {candidate}", file=sys.stderr)
                if self.pool:
                    self.pool.shutdown(wait=False, cancel_futures=True)  # what is left, the next process compiles
                sys.exit(LOST)
            return row.get("ms", math.inf)

        ahead = functools.partial(self.compile, op, name)
        best, after, before = tune(tunable, self.arch, attempt, first, search, seconds, ahead)
        if after < before:
            place = self.won.setdefault(name[0], {}).setdefault(name[1], {}).setdefault(name[2], {})
            place[name[3]] = best
            replace(self.tables, json.dumps(self.won, indent=1))
        print(f"{' '.join(name)}: {before:.4f} -> {after:.4f} ms {best}", flush=True)

    def compile(self, op: str, name: Sequence[str], entries: Iterable[dict]) -> None:
        """Begin to compile entries in other processes, each once."""
        for entry in entries if self.pool else ():
            if (key := json.dumps([*name, entry])) in self.compiled or key in self.begun:
                continue
            try:
                self.compiled[key] = self.pool.submit(compile_ahead, op, *name, entry)
            except BrokenProcessPool as error:  # a compiler that crashed took the pool with it
                print(f"igpo_kernels.tune: nothing is compiled ahead any more: {error}", file=sys.stderr)
                self.pool = None
                return

    def said(self, key: str) -> dict:
        """What the compiler and the gate said of a candidate, once it is compiled; without a word of theirs it is
        compiled where it is launched."""
        try:
            return self.compiled.pop(key).result(COMPILE_SECONDS) if key in self.compiled else {}
        except Exception as error:  # the launch will tell
            return {"ahead": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def replace(path: Path, text: str) -> None:
    """Write a file that is whole whenever it is read."""
    path.with_suffix(".new").write_text(text)
    os.replace(path.with_suffix(".new"), path)


def lost(device: torch.device) -> bool:
    """Whether an error made the device unusable for this process."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def built(module, kernel: str, arch: str, shape_class: str, dtype: str) -> list[Variant]:
    """Variants of one kernel, architecture, class and dtype, built from the tables as they are."""
    wanted = (kernel, arch, dtype, shape_class)
    return [v for v in module.variants() if (v.kernel, v.arch, v.dtype, v.shape_class.split("/")[0]) == wanted]


def compile_ahead(op: str, kernel: str, arch: str, shape_class: str, dtype: str, entry: dict) -> dict:
    """Compile what a candidate would launch into Triton's cache; returns what the compiler and the gate say of it."""
    from igpo_kernels.aot.build import compile_variant

    settle()
    module = importlib.import_module(f"igpo_kernels.{op}.triton_path")
    table(kernel)[arch][shape_class][dtype] = entry
    variants = built(module, kernel, arch, shape_class, dtype)
    compile_variant(variants[0])
    return said_of(variants[0])


def said_of(variant: Variant) -> dict:
    """Registers, bytes and the gate's faults."""
    facts = try_measure(variant)
    numbers = {} if isinstance(facts, str) else {k: v for k, v in asdict(facts).items() if k != "marks"}
    return {**numbers, "gate": list(report(variant, facts).faults)}


def measure_shortlist() -> None:
    """Write what this Triton makes of each candidate into the shortlist."""
    modules = {tunable.kernel: module for _, module, tunable in tunables()}
    rows = []
    for row in shortlist():
        place = (row["kernel"], row["arch"], row["shape_class"], row["dtype"])
        kernel, arch, shape_class, dtype = place
        entries = table(kernel)[arch][shape_class]
        before, entries[dtype] = entries[dtype], row["entry"]
        said = said_of(built(modules[kernel], *place)[0])
        entries[dtype] = before
        rows.append({**row, "triton": triton.__version__, **said})
    SHORTLIST.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def merge(found: Mapping) -> None:
    """Put ``{kernel: {arch: {shape_class: {dtype: entry}}}}`` into the tables of this process."""
    for kernel, archs in found.items():
        for arch, classes in archs.items():
            for shape_class, dtypes in classes.items():
                table(kernel)[arch][shape_class].update(dtypes)


def apply_named(name: str, arch: str) -> int:
    """Put the shortlist's entries of a name into the tables of this process; returns how many.

    Raises:
        ValueError: the shortlist has none.
    """
    found = [row for row in shortlist() if (row.get("name"), row["arch"]) == (name, arch)]
    if not found:
        known = ", ".join(sorted({row["name"] for row in shortlist() if "name" in row}))
        raise ValueError(f"{SHORTLIST.name} has no entries {name!r} for {arch}; names are {known}")
    for row in found:
        table(row["kernel"])[arch][row["shape_class"]][row["dtype"]] = row["entry"]
    return len(found)


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


def adopt(file: Path) -> None:
    """Put the entries of a tables.json into the committed tables."""
    found = json.loads(file.read_text())
    merge(found)
    for kernel in found:
        replace(TABLES / f"{kernel}.json", render(table(kernel)))
    print(f"{', '.join(found) or 'nothing'} adopted; run `make gate`")


def tunables() -> Iterator[tuple[str, object, Tunable]]:
    """(op, its triton_path, a tunable) for every tunable of every op."""
    for path in sorted(Path(__file__).parent.glob("*/triton_path.py")):
        module = importlib.import_module(f"igpo_kernels.{path.parent.name}.triton_path")
        for tunable in getattr(module, "tunables", lambda: ())():
            yield path.parent.name, module, tunable


def parsed(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m igpo_kernels.tune", description=__doc__.splitlines()[0])
    for option in FILTERS:
        parser.add_argument(f"--{option}", action="append", help=f"only this {option.replace('-', ' ')}")
    parser.add_argument("--shortlisted", action="store_true", help="only what shortlist.json names, no search")
    parser.add_argument("--most", type=int, help="candidates of the shortlist for each kernel, class and dtype")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for each kernel, shape class and dtype")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 4), help="processes that compile")
    parser.add_argument("--out", type=Path, help="folder of tune.jsonl and tables.json")
    parser.add_argument("--run", default="", help="name of this run; one that was killed goes on under its name")
    parser.add_argument("--adopt", type=Path, metavar="FILE", help="put a tables.json into the committed tables")
    parser.add_argument("--measure", action="store_true", help="compile the shortlist and note what the compiler said")
    args = parser.parse_args(argv)
    if not (args.out or args.adopt or args.measure):
        parser.error("give --out FOLDER to tune, or --adopt FILE, or --measure")
    return args


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, Tunable]]:
    """(op, tunable) of each tunable that the filters leave."""
    for op, _, tunable in tunables():
        names = (op, tunable.kernel, tunable.shape_class, tunable.dtype)
        taken = (getattr(args, option.replace("-", "_")) for option in FILTERS)
        if all(only is None or name in only for name, only in zip(names, taken, strict=True)):
            yield op, tunable


def main(argv: list[str] | None = None) -> int:
    args = parsed(argv)
    if args.adopt:
        return adopt(args.adopt)
    if args.measure:
        return measure_shortlist()
    if not torch.cuda.is_available():
        print("igpo_kernels.tune: no GPU is visible; run it on the machine to tune for", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    arch = arch_of(device)
    settle()
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    listed: dict[tuple, list[dict]] = {}
    for row in shortlist():
        listed.setdefault((row["kernel"], row["arch"], row["shape_class"], row["dtype"]), []).append(row["entry"])
    todo = []
    for op, tunable in wanted(args):
        name = (tunable.kernel, arch, tunable.shape_class, tunable.dtype)
        if name in listed or not args.shortlisted:
            todo.append((op, tunable.on(processors), name, listed.get(name, [])[: args.most]))
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        tuner = Tuner(args.out, arch, device, pool, args.run)
        for op, tunable, name, first in todo:  # in the order in which they will be needed
            committed = table(tunable.kernel)[arch][tunable.shape_class][tunable.dtype]
            tuner.compile(op, name, [entry for entry in first if entry != committed])
        for op, tunable, _, first in todo:
            tuner.tune(op, tunable, first, not args.shortlisted, args.seconds)
        for key in list(tuner.compiled):  # where the committed configuration itself did not run
            tuner.write(candidate=json.loads(key), untried=True, **tuner.said(key))
        tuner.write(end=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
