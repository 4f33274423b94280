"""Every preset from the same hard starts: the rows and tables of docs/study.md.

    python bench/study.py [--variants robust grpo ...] [--seeds 301 302 303 304] [--jobs 2]
    python bench/study.py --table
    python bench/study.py --config configs/tables.yaml --variants robust grpo --seeds 401 402 403

Trains the quickstart, or another configuration, once per variant and seed; runs whose row is in
bench/results/study.jsonl (of configs/tables.yaml: tables.jsonl) are not repeated. A variant is a preset, or an
algorithm with the preset ``robust``. The warm starts are hard ones: the quickstart's policy finds one answer in thirty.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.demo_seeds import QUICKSTART, ROOT, about, trained
from igpo_fast.config import PRESETS

LEARNED, STALLED = 0.5, 0.15
"""A run has learned from the first evaluation with at least this F1; one that ends below the other has stalled."""
SEEDS = (301, 302, 303, 304)
OTHERS = ("grpo", "rloo", "ppo")


def settings_of(variant: str) -> list[str]:
    return [f"algorithm.preset={variant}"] if variant in PRESETS else [f"algorithm.name={variant}"]


def name_of(config: Path) -> str:
    """The name of a configuration's study: of its rows, their file and the folder of its runs."""
    return "study" if config.resolve() == QUICKSTART else config.stem


def run(variant: str, seed: int, config: Path, folder: Path, overrides: list[str]) -> dict:
    """Train one run; returns its row."""
    out = folder / f"{variant}-{seed}"
    settings = [f"run.cache={folder / 'cache'}", f"train.seed={seed}", "eval.every=10"]
    rows = trained(out, [*settings, *settings_of(variant), *overrides], config)
    evals, steps = [row for row in rows if "eval/f1" in row], rows[1:]
    mean = lambda key: statistics.fmean(row[key] for row in steps)  # noqa: E731
    return {
        **about(name_of(config)),
        "variant": variant,
        "seed": seed,
        "overrides": overrides,
        "steps": [row["step"] for row in evals],
        "eval/f1": [round(row["eval/f1"], 4) for row in evals],
        "eval/f1_se": round(evals[-1]["eval/f1_se"], 4),
        "turns": round(evals[-1]["eval/turns"], 2),
        "group/collapsed": round(mean("group/collapsed"), 3),
        "tokens/packed": round(mean("tokens/packed")),
        "tokens/scored": round(mean("tokens/scored")),
        "time/train": round(mean("time/train"), 2),
    }


def learned_at(row: dict) -> int | None:
    """The step of the first evaluation at which the run has learned."""
    return next((step for step, f1 in zip(row["steps"], row["eval/f1"], strict=True) if f1 >= LEARNED), None)


def table(rows: list[dict]) -> str:
    """The rows per variant, in Markdown."""
    lines = [
        "| variant | final F1, seed by seed | mean | steps to F1 0.5 | stalls | collapsed groups | turns | "
        "tokens per step |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    variants = {}
    for row in rows:
        variants.setdefault(row["variant"], []).append(row)
    final = lambda row: row["eval/f1"][-1]  # noqa: E731
    for variant, found in sorted(variants.items(), key=lambda item: -statistics.fmean(map(final, item[1]))):
        found.sort(key=lambda row: row["seed"])
        mean = lambda key, found=found: statistics.fmean(row[key] for row in found)  # noqa: E731
        lines.append(
            f"| `{variant}` | {' '.join(f'{final(row):.3f}'.lstrip('0') for row in found)} | "
            f"{statistics.fmean(map(final, found)):.3f} | {' '.join(str(learned_at(row) or '-') for row in found)} | "
            f"{sum(final(row) < STALLED for row in found)} of {len(found)} | {mean('group/collapsed'):.0%} | "
            f"{mean('turns'):.1f} | {mean('tokens/packed'):,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=QUICKSTART)
    parser.add_argument("--variants", nargs="+", default=[*PRESETS, *OTHERS])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--runs", type=Path, help="folder of the run folders; runs/NAME unless given")
    parser.add_argument("--results", type=Path, help="file of the rows; bench/results/NAME.jsonl unless given")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for igpo-fast train")
    args = parser.parse_args()
    args.runs = args.runs or Path("runs") / name_of(args.config)
    args.results = args.results or ROOT / f"bench/results/{name_of(args.config)}.jsonl"
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(row["variant"], row["seed"], tuple(row["overrides"])) for row in rows}
    jobs = [(v, s) for s in args.seeds for v in args.variants if (v, s, tuple(args.overrides)) not in done]
    if not args.table:
        args.runs.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            for row in pool.map(lambda job: run(*job, args.config, args.runs, args.overrides), jobs):
                rows.append(row)
                print(f"{row['variant']} {row['seed']}: F1 {row['eval/f1'][0]} -> {row['eval/f1'][-1]}", flush=True)
                with open(args.results, "a") as file:
                    file.write(json.dumps(row) + "\n")
    print(table([row for row in rows if row["overrides"] == args.overrides]))


if __name__ == "__main__":
    main()
