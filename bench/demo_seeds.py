"""The quickstart's learning per seed: IGPO and GRPO from the same warm starts.

    python bench/demo_seeds.py [--seeds 101 102 103] [--algorithms igpo grpo] [section.key=value ...]

Trains each seed with each algorithm (two processes at a time), then evaluates the trained policy once more with a
search that finds nothing. Prints a table, exits with 1 unless every igpo run meets the bars, and appends a row per run
to bench/results/demo_seeds.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.table import Table

from igpo_fast.run.display import sparkline

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
CLI = [sys.executable, "-m", "igpo_fast"]
START, END, WITHOUT_SEARCH = 0.15, 0.50, 0.10
"""Bars for eval F1: at most this before training, at least this after it, at most this without search."""


def run(seed: int, algorithm: str, folder: Path, overrides: list[str]) -> dict:
    """Train and evaluate one seed; returns its row."""
    out = folder / f"{algorithm}-{seed}"
    rows = trained(out, [f"train.seed={seed}", f"algorithm.name={algorithm}", *overrides])
    blind = subprocess.run(
        [*CLI, "eval", str(out), "--no-search", "--json"], check=True, capture_output=True, text=True, env=environment()
    )
    return {
        **about("demo_seeds"),
        "algorithm": algorithm,
        "seed": seed,
        "overrides": overrides,
        **curve(rows),
        "without_search/f1": round(json.loads(blind.stdout)["eval/f1"], 4),
    }


def curve(rows: list[dict]) -> dict:
    """What a result row says of a run's metrics."""
    evals, steps = [row for row in rows if "eval/f1" in row], rows[1:]
    mean = lambda key: round(sum(row[key] for row in steps) / len(steps), 3)  # noqa: E731
    return {
        "steps": [row["step"] for row in evals],
        "eval/f1": [round(row["eval/f1"], 4) for row in evals],
        "eval/f1_se": [round(row["eval/f1_se"], 4) for row in evals],
        "eval/turns": [round(row["eval/turns"], 2) for row in evals],
        "group/collapsed": mean("group/collapsed"),
        "step_seconds": mean("time/step"),
    }


def trained(out: Path, settings: list[str], config: Path = QUICKSTART) -> list[dict]:
    """Train ``config`` with ``settings`` into ``out``, its output beside it; returns the rows of its metrics."""
    file = ["--config", str(config), f"run.dir={out}"]
    with open(out.with_name(f"{out.name}.log"), "w") as log:
        subprocess.run([*CLI, "train", *file, *settings], check=True, stdout=log, stderr=log, env=environment())
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def environment() -> dict[str, str]:
    """One thread per run."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def about(bench: str) -> dict:
    """What a result row begins with."""
    return {
        "bench": bench,
        "date": date.today().isoformat(),
        "commit": commit(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def commit() -> str:
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()


def passes(row: dict) -> bool:
    first, *_, last = row["eval/f1"]
    return first <= START and last >= END and row["without_search/f1"] <= WITHOUT_SEARCH


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--algorithms", nargs="+", default=["igpo", "grpo"])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"), help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=ROOT / "bench/results/demo_seeds.jsonl")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for igpo-fast train")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    console = Console(width=None if sys.stdout.isatty() else 120)
    jobs = [(algorithm, seed) for algorithm in args.algorithms for seed in args.seeds]
    rows = []
    with ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda job: run(job[1], job[0], args.runs, args.overrides), jobs):
            rows.append(row)
            console.print(f"{row['algorithm']} {row['seed']}: eval F1 {row['eval/f1'][0]} -> {row['eval/f1'][-1]}")
            with open(args.results, "a") as file:
                file.write(json.dumps(row) + "\n")
    table = Table(title="quickstart, sampled F1 on held-out worlds")
    for column in ("algorithm", "seed", "first", "last", "s.e.", "curve", "without search", "collapsed", "s/step", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["algorithm"], str(row["seed"]), f"{row['eval/f1'][0]:.3f}", f"{row['eval/f1'][-1]:.3f}",
            f"{row['eval/f1_se'][-1]:.3f}", sparkline(row["eval/f1"], 0, 1), f"{row['without_search/f1']:.3f}",
            f"{row['group/collapsed']:.2f}", f"{row['step_seconds']:.2f}", "ok" if passes(row) else "below the bars",
        )  # fmt: skip
    console.print(table)
    failed = [row["seed"] for row in rows if row["algorithm"] == "igpo" and not passes(row)]
    bars = f"first <= {START}, last >= {END}, without search <= {WITHOUT_SEARCH}"
    console.print(f"igpo below the bars ({bars}): {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
