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

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from igpo_fast.compare.statistics import area, summarise
from igpo_fast.config import PRESETS

ROOT = Path(__file__).parents[1]
CLI = [sys.executable, "-m", "igpo_fast"]
QUICKSTART = "--config configs/quickstart.yaml"
FAST = "train.lr=6e-4 train.warmup_steps=0"
"""The best cell of the grid for IGPO and for GRPO, by two seeds (docs/study.md)."""
TUNED = "train.lr=6e-4 train.warmup_steps=10"
"""The second best, level with it in final F1, in which fewer runs stall."""
SHORT = f"{QUICKSTART} train.steps=60 eval.every=10"
ALGORITHMS = "igpo,ig_only,rloo,reinforce_pp,gspo,dr_grpo,grpo"
ABLATIONS = {
    "log_prob": "basis=log_prob", "joint": "pool=joint", "turn_index": "pool=turn_index", "raw": "pool=raw",
    "centred": "ig_center=true", "no_gate": "ig_gate=0", "no_floor": "ig_min_std=1e-6", "no_sum": "accumulate=none",
}  # fmt: skip
GAMMAS = {f"gamma_{gamma}": f"gamma={gamma}" for gamma in (0.5, 0.8, 0.9)}
EASIER = {f"hops-{first}-{last}": f"world.min_hops={first} world.max_hops={last}" for first, last in ((1, 2), (2, 3))}
LARGE = "model.hidden_size=256 model.layers=3 train.lr=3e-4 train.warmup_steps=10"
"""Of a model twice as wide, with half the learning rate."""


GRID = [("1.5e-4", 10), ("3e-4", 10), ("6e-4", 0), ("6e-4", 10), ("6e-4", 30), ("1.2e-3", 10)]
"""Learning rates, and steps of warm-up: first the rate was varied, then the warm-up at the best."""


def tuning() -> str:
    """IGPO and GRPO in every cell of the grid, named like ``igpo_6e-4_0``."""
    cells = [
        (f"{algorithm}_{lr}_{steps}", algorithm, lr, steps) for algorithm in ("igpo", "grpo") for lr, steps in GRID
    ]
    own = [f"--for {name}:train.lr={lr} --for {name}:train.warmup_steps={steps}" for name, _, lr, steps in cells]
    return f"--algorithms {','.join(f'{name}={algorithm}' for name, algorithm, *_ in cells)} {' '.join(own)}"


def variants(algorithms: str, settings: dict[str, str]) -> str:
    """Algorithms, and IGPO under further names, each with a ``key=value`` of section ``algorithm``."""
    names = ",".join(f"{name}=igpo" for name in settings)
    own = " ".join(f"--for {name}:algorithm.{setting}" for name, setting in settings.items())
    return f"--algorithms {names},{algorithms} {own}"


COMPARISONS = {
    "tuning": f"{QUICKSTART} {tuning()} --seeds 101-102 eval.every=10",
    "headline": f"{QUICKSTART} --algorithms igpo,grpo --seeds 201-216 {FAST} eval.every=10",
    "warmed": f"{QUICKSTART} --algorithms igpo,grpo --seeds 201-216 {TUNED} eval.every=10",
    "quickstart": f"{QUICKSTART} --algorithms igpo,grpo --seeds 201-216 eval.every=10",
    "ablations": f"{SHORT} {variants(ALGORITHMS, ABLATIONS | GAMMAS)} --seeds 311-312 {TUNED}",
    **{name: f"{SHORT} {variants('igpo,grpo', GAMMAS)} --seeds 311-312 {TUNED} {of}" for name, of in EASIER.items()},
    **{
        f"large-{name}": f"{SHORT} --algorithms igpo,grpo --seeds 311-312 {LARGE} {of}"
        for name, of in {**EASIER, "hops-3-4": ""}.items()
    },
    "study": f"{QUICKSTART} --algorithms {','.join(PRESETS)},ppo,grpo --seeds 301-304",
    "tables": "--config configs/tables.yaml --algorithms robust,grpo --seeds 401-403 eval.every=10",
}
"""Name -> arguments of ``igpo-fast compare``."""
PAIRED = "headline", "warmed", "quickstart"
"""Comparisons of IGPO with GRPO on 16 seeds."""
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
    Raises:
        CalledProcessError: some run failed; the rows of the others are kept.
    """
    folder = ROOT / "runs" / name
    given = ["--dir", str(folder), "--jobs", str(jobs), f"run.cache={folder.parent / 'cache'}", *arguments]
    done = subprocess.run([*CLI, "compare", *given], cwd=ROOT)
    kept = {(variant_of(row), row["seed"]): row.get("commit") for row in rows_of(name)}
    made = folder / "compare.jsonl"
    for row in map(json.loads, made.read_text().splitlines() if made.exists() else []):
        key = row["variant"], row["seed"]
        if row["finished"] and (key not in kept or kept[key] != row.get("commit")):
            about = {"bench": name, "date": date.today().isoformat(), "overrides": []}
            about |= row | more(row, folder / f"{row['variant']}-{row['seed']}")
            with open(results(name), "a") as file:
                file.write(json.dumps(about) + "\n")
    done.check_returncode()
    return rows_of(name)


def table(rows: list[dict]) -> str:
    """The rows per variant, in Markdown."""
    lines = [
        "| variant | final F1, seed by seed | mean | F1 over the run | steps to F1 0.5 | stalls | collapsed groups | "
        "turns | tokens per step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
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
            f"{statistics.fmean(map(final, found)):.3f} | {statistics.fmean(map(over_the_run, found)):.3f} | "
            f"{' '.join(learned_at(row) for row in found)} | "
            f"{sum(final(row) < STALLED for row in found)} of {len(found)} | {mean('group/collapsed'):.0%} | "
            f"{mean('turns'):.1f} | {mean('tokens/packed'):,.0f} |"
        )
    return "\n".join(lines)


def ahead(rows: list[dict], baseline: str = "grpo") -> str:
    """What the statistics of pairs say (igpo_fast.compare), in Markdown: each variant's difference from the baseline,
    after some steps and over the run, and what either needed."""
    found = summarise([row for row in rows if row["finished"]], baseline, "eval/f1", LEARNED, STALLED)
    lines = [
        "| difference from `" + baseline + "` | mean | 95 % interval | p | ahead |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, curve in found["by_step"].items():
        for place in range(3, len(curve["x"]) - 1, 3):
            ends = curve["low"] and (curve["low"][place], curve["high"][place])
            lines.append(
                f"| `{name}`, F1 at step {curve['x'][place]:.0f} | {curve['mean'][place]:+.3f} | {_ends(ends)} | | |"
            )
        for what, key in (("F1 at equal", "score"), ("mean F1 over equal", "area")):
            for budget, pairs in found["pairs"][name].items():
                its = pairs[key]
                lines.append(
                    f"| `{name}`, {what} {budget} | {its['mean']:+.3f} | {_ends(its['interval'])} | {its['p']:.2g} | "
                    f"{its['ahead']} of {len(pairs['seeds'])} |"
                )
    lines += ["", "| | runs | final F1 | stalls | collapsed groups | reached F1 0.5 | steps to it | seconds | tokens |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]
    whole = lambda number: "-" if number is None else f"{number:,.0f}"  # noqa: E731
    for name, its in found["variants"].items():
        to, error = its["reached"], its["standard_error"]
        lines.append(
            f"| `{name}` | {its['runs']} | {its['mean']:.3f}{f' ± {error:.3f}' if error else ''} | {its['stalls']} | "
            f"{its['collapsed']:.0%} | {to['runs']} | "
            f"{whole(to['steps'])} | {whole(to['seconds'])} | {whole(to['tokens'])} |"
        )
    return "\n".join(lines)


def _ends(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else "{:+.3f} to {:+.3f}".format(*interval)


def over_the_run(row: dict) -> float:
    """The mean F1 over the steps: the area under the curve, over its length."""
    return area(*(np.array(row[key], float) for key in ("steps", "eval/f1")), row["steps"][0], row["steps"][-1])


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
        rows = rows_of(name) if args.table else compare(name, shlex.split(COMPARISONS[name]), args.jobs)
        print(name, table(rows), *[ahead(rows)] * (name in PAIRED), sep="\n\n")


if __name__ == "__main__":
    main()
