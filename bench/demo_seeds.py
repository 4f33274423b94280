"""The quickstart's learning per seed: IGPO and GRPO from the same warm starts.

    python bench/demo_seeds.py

Compares them on seeds 101 to 103 (runs/demo_seeds), evaluates each trained policy once more with a search that finds
nothing, and exits with 1 unless every igpo run meets the bars. Rows: bench/results/demo_seeds.jsonl.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.study import CLI, compare, variant_of
from igpo_fast.run.display import sparkline

ARGUMENTS = "--config configs/quickstart.yaml --algorithms igpo,grpo --seeds 101-103 eval.every=30"
START, END, WITHOUT_SEARCH = 0.15, 0.50, 0.10
"""Bars for eval F1: at most this before training, at least this after it, at most this without search."""


def without_search(row: dict, run: Path) -> dict:
    found = subprocess.run(
        [*CLI, "eval", str(run), "--no-search", "--json"], check=True, capture_output=True, text=True
    )
    return {"without_search/f1": round(json.loads(found.stdout)["eval/f1"], 4)}


def passes(row: dict) -> bool:
    first, *_, last = row["eval/f1"]
    return first <= START and last >= END and row["without_search/f1"] <= WITHOUT_SEARCH


def main() -> int:
    rows = compare("demo_seeds", ARGUMENTS.split(), more=without_search)
    for row in rows:
        f1 = row["eval/f1"]
        print(
            f"{variant_of(row)} {row['seed']}: F1 {f1[0]:.3f} -> {f1[-1]:.3f}  {sparkline(f1, 0, 1)}  without search "
            f"{row['without_search/f1']:.3f}  collapsed groups {row['group/collapsed']:.0%}  "
            f"{row['step_seconds']:.2f} s per step"
        )
    failed = [row["seed"] for row in rows if variant_of(row) == "igpo" and not passes(row)]
    bars = f"first <= {START}, last >= {END}, without search <= {WITHOUT_SEARCH}"
    print(f"igpo below the bars ({bars}): {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
