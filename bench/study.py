"""The comparisons behind docs/study.md and the README: their commands, rows and tables.

    python bench/study.py [study tables ...] [--jobs 2]     # trains what is missing (igpo-fast compare), adds rows
    python bench/study.py --table [study]

Runs are in runs/NAME, where compare.html is the page about them; rows in bench/results/NAME.jsonl, of which the newest
of a variant and seed counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from igpo_fast.config import PRESETS

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "igpo_fast"]
COMPARISONS = {
    "study": f"--config configs/quickstart.yaml --algorithms {','.join(PRESETS)},rloo,ppo,grpo --seeds 301-304",
    "tables": "--config configs/tables.yaml --algorithms robust,grpo --seeds 401-403 eval.every=10",
}
"""Name -> arguments of ``igpo-fast compare``."""
LEARNED, STALLED = 0.5, 0.15
"""A run has learned from the first evaluation with at least this F1; one that ends below the other has stalled."""


def results(name: str) -> Path:
    return ROOT / f"bench/results/{name}.jsonl"


def rows_of(name: str) -> list[dict]:
    """The newest row of each variant and seed, without those of runs with settings of their own."""
    lines = results(name).read_text().splitlines() if results(name).exists() else []
    rows = [row for row in map(json.loads, lines) if not row["overrides"]]
    return list({(variant_of(row), row["seed"]): row for row in rows}.values())


def variant_of(row: dict) -> str:
    return row["variant"] if "variant" in row else row["algorithm"]


def compare(
    name: str, arguments: Sequence[str], jobs: int = 2, more: Callable[[dict, Path], dict] = lambda row, run: {}
) -> list[dict]:
    """Train what is missing of a comparison in runs/NAME, and keep the rows of runs that have none of this commit.

    Args:
        arguments: of ``igpo-fast compare``.
        more: what a row has besides, from compare.jsonl's row and the run's folder.
    Returns:
        ``rows_of`` it.
    """
    folder = ROOT / "runs" / name
    given = ["--dir", str(folder), "--jobs", str(jobs), *arguments]
    subprocess.run([*CLI, "compare", *given], check=True, cwd=ROOT)
    kept = {(variant_of(row), row["seed"]): row.get("commit") for row in rows_of(name)}
    for row in map(json.loads, (folder / "compare.jsonl").read_text().splitlines()):
        key = row["variant"], row["seed"]
        if row["finished"] and (key not in kept or kept[key] != row.get("commit")):
            about = {"bench": name, "date": date.today().isoformat(), "overrides": []}
            about |= row | more(row, folder / f"{row['variant']}-{row['seed']}")
            with open(results(name), "a") as file:
                file.write(json.dumps(about) + "\n")
    return rows_of(name)


def table(rows: list[dict]) -> str:
    """The rows per variant, in Markdown."""
    lines = [
        "| variant | final F1, seed by seed | mean | steps to F1 0.5 | stalls | collapsed groups | turns | "
        "tokens per step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    variants = {}
    for row in rows:
        variants.setdefault(variant_of(row), []).append(row)
    final = lambda row: row["eval/f1"][-1]  # noqa: E731
    for variant, found in sorted(variants.items(), key=lambda item: -statistics.fmean(map(final, item[1]))):
        found.sort(key=lambda row: row["seed"])
        mean = lambda key, found=found: statistics.fmean(row[key] for row in found)  # noqa: E731
        lines.append(
            f"| `{variant}` | {' '.join(f'{final(row):.3f}'.lstrip('0') for row in found)} | "
            f"{statistics.fmean(map(final, found)):.3f} | {' '.join(learned_at(row) for row in found)} | "
            f"{sum(final(row) < STALLED for row in found)} of {len(found)} | {mean('group/collapsed'):.0%} | "
            f"{mean('turns'):.1f} | {mean('tokens/packed'):,.0f} |"
        )
    return "\n".join(lines)


def learned_at(row: dict) -> str:
    """The step of the first evaluation at which the run has learned; a dash if there is none."""
    return next((str(s) for s, f1 in zip(row["steps"], row["eval/f1"], strict=True) if f1 >= LEARNED), "-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(COMPARISONS)}; all if none is given")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    args = parser.parse_args()
    for name in args.names or COMPARISONS:
        print(table(rows_of(name) if args.table else compare(name, shlex.split(COMPARISONS[name]), args.jobs)))


if __name__ == "__main__":
    main()
