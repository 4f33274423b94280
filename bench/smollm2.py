"""A real model on real questions: IGPO and GRPO from the same warm starts, the rows and the table of docs/study.md.

    python examples/convert_smollm2.py models/smollm2-135m
    python bench/smollm2.py [--data data/nq] [--model models/smollm2-135m]
    python bench/smollm2.py --table

``--data`` is a folder with questions.jsonl and corpus.jsonl (docs/study.md says where Natural Questions with passages
come from). Makes the demonstrations of the warm start, then compares the algorithms on configs/smollm2-nq.yaml in
runs/smollm2_nq, one run at a time; the same command goes on. Rows: bench/results/smollm2_nq.jsonl.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.study import ROOT, compare, rows_of, variant_of
from igpo_fast.run.checkpoint import RunFolder

NAME = "smollm2_nq"
CONFIG = ROOT / "configs/smollm2-nq.yaml"


def training(row: dict, run: Path) -> dict:
    """What the rollouts of each step earned, and what steps cost."""
    steps = RunFolder(run).read_metrics()[1:]
    seconds = {key: round(statistics.fmean(row[key] for row in steps), 1) for key in ("time/rollout", "time/train")}
    of_steps = {"train/f1": "reward/f1", "turns/format_error": "turns/format_error"}
    return {name: [round(row[key], 3) for row in steps] for name, key in of_steps.items()} | seconds


def table(rows: list[dict]) -> str:
    """The rows per algorithm, in Markdown."""
    lines = [
        "| algorithm | seed | held-out F1, first and last | rollouts' F1, first and last 5 steps | collapsed groups |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (variant_of(row), row["seed"])):
        f1, error, trained_f1 = row["eval/f1"], row["eval/f1_se"], row["train/f1"]
        first, last = statistics.fmean(trained_f1[:5]), statistics.fmean(trained_f1[-5:])
        lines.append(
            f"| `{variant_of(row)}` | {row['seed']} | {f1[0]:.2f} -> {f1[-1]:.2f} (s.e. {error[-1]:.2f}) | "
            f"{first:.2f} -> {last:.2f} | {row['group/collapsed']:.0%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("IGPO_DATA", "data/nq")))
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    args = parser.parse_args()
    if args.table:
        return print(table(rows_of(NAME)))
    data, given = args.data.resolve(), ROOT / "runs" / NAME / "demonstrations.jsonl"
    given.parent.mkdir(parents=True, exist_ok=True)
    files = [
        f"model.path={args.model.resolve()}",
        f"data.train={data}/questions.jsonl",
        f"data.corpus={data}/corpus.jsonl",
    ]
    files.append(f"rollout.system_file={CONFIG.with_suffix('.txt')}")
    make = [sys.executable, ROOT / "bench/nq_demonstrations.py", "--config", CONFIG, given, *files]
    subprocess.run(make, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    chosen = f"--config {CONFIG} --algorithms igpo,grpo --seeds 401-403 eval.every=0".split()
    print(table(compare(NAME, [*chosen, *files, f"sft.demonstrations={given}"], jobs=1, more=training)))


if __name__ == "__main__":
    main()
