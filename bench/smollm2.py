"""A real model on real questions: IGPO and GRPO from the same warm starts, the rows and the table of docs/study.md.

    python examples/convert_smollm2.py models/smollm2-135m
    python bench/smollm2.py [--data data/nq] [--model models/smollm2-135m] [--seeds 401 402 403] [section.key=value ...]
    python bench/smollm2.py --table

``--data`` is a folder with questions.jsonl and corpus.jsonl (docs/study.md says where Natural Questions with passages
come from). Makes the demonstrations of the warm start, then trains configs/smollm2-nq.yaml seed by seed, one run at a
time. Runs whose row is in bench/results/smollm2_nq.jsonl are not repeated, and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.demo_seeds import ROOT, about, curve, environment, trained

ROWS = ROOT / "bench/results/smollm2_nq.jsonl"
CONFIG = ROOT / "configs/smollm2-nq.yaml"
SEEDS, ALGORITHMS = (401, 402, 403), ("igpo", "grpo")


def run(seed: int, algorithm: str, folder: Path, files: list[str], overrides: list[str]) -> dict:
    """Train one run; returns its row."""
    settings = [*files, f"run.cache={folder / 'cache'}", f"train.seed={seed}", f"algorithm.name={algorithm}"]
    rows = trained(folder / f"{algorithm}-{seed}", [*settings, *overrides], CONFIG)
    steps = rows[1:]
    return {
        **about("smollm2_nq"),
        "algorithm": algorithm,
        "seed": seed,
        "overrides": overrides,
        **curve(rows),
        "train/f1": [round(row["reward/f1"], 3) for row in steps],
        "turns/format_error": [round(row["turns/format_error"], 3) for row in steps],
        "tokens/packed": round(statistics.fmean(row["tokens/packed"] for row in steps)),
        "time/rollout": round(statistics.fmean(row["time/rollout"] for row in steps), 1),
        "time/train": round(statistics.fmean(row["time/train"] for row in steps), 1),
    }


def table(rows: list[dict]) -> str:
    """The rows per algorithm, in Markdown."""
    lines = [
        "| algorithm | seed | held-out F1, first and last | rollouts' F1, first and last 5 steps | collapsed groups |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (row["algorithm"], row["seed"])):
        f1, error, trained_f1 = row["eval/f1"], row["eval/f1_se"], row["train/f1"]
        first, last = statistics.fmean(trained_f1[:5]), statistics.fmean(trained_f1[-5:])
        lines.append(
            f"| `{row['algorithm']}` | {row['seed']} | {f1[0]:.2f} -> {f1[-1]:.2f} (s.e. {error[-1]:.2f}) | "
            f"{first:.2f} -> {last:.2f} | {row['group/collapsed']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("IGPO_DATA", "data/nq")))
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--algorithms", nargs="+", default=ALGORITHMS)
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2-nq"), help="folder of the run folders")
    parser.add_argument("--results", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for igpo-fast train")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    done = {(row["algorithm"], row["seed"], tuple(row["overrides"])) for row in rows}
    jobs = [(s, a) for s in args.seeds for a in args.algorithms if (a, s, tuple(args.overrides)) not in done]
    if jobs and not args.table:
        files = [f"model.path={args.model}", f"data.train={args.data}/questions.jsonl"]
        files += [f"data.corpus={args.data}/corpus.jsonl", f"rollout.system_file={CONFIG.with_suffix('.txt')}"]
        given = args.runs / "demonstrations.jsonl"
        make = [sys.executable, ROOT / "bench/nq_demonstrations.py", "--config", CONFIG, given, *files]
        subprocess.run([*make, *args.overrides], check=True, env=environment())
        files.append(f"sft.demonstrations={given}")
    for seed, algorithm in [] if args.table else jobs:
        row = run(seed, algorithm, args.runs, files, args.overrides)
        rows.append(row)
        print(f"{algorithm} {seed}: F1 {row['eval/f1'][0]} -> {row['eval/f1'][-1]}", flush=True)
        with open(args.results, "a") as file:
            file.write(json.dumps(row) + "\n")
    print(table([row for row in rows if row["overrides"] == args.overrides]))


if __name__ == "__main__":
    main()
