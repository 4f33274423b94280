"""Draws what information gain costs, from the newest rows of bench/results/peers_cpu.jsonl:
``python docs/cost.py > docs/cost.svg``."""

import json
from pathlib import Path

from igpo_fast.report.chart import Chart, Line, draw

ROWS = Path(__file__).parents[1] / "bench/results/peers_cpu.jsonl"
SWEEPS = {"turns": "turns per rollout", "rollouts": "rollouts per group", "answers": "accepted answers"}
SIDES = {"ours": "one pass", "igpo_kv_reuse": "KV reuse", "igpo_full_logits": "full logits"}


def times(rows: list[dict], sweep: str) -> dict[str, dict[int, float]]:
    """By side and value: the time of an update over that of the outcome-only one, medians of the newest rows."""
    found: dict[str, dict[int, float]] = {side: {} for side in SIDES}
    for row in rows:
        if not row["bench"].startswith("cost/") or row["shape"]["sweep"] != sweep:
            continue
        value, side = row["shape"][sweep], row["peer"]
        if side == "outcome_only":
            found["ours"][value] = 1 / row["ratio"]
        elif side in found:
            found[side][value] = row["ratio"]
    for side in SIDES:
        if side != "ours":  # their ratio is to ours
            found[side] = {value: ratio * found["ours"][value] for value, ratio in found[side].items()}
    return found


def main() -> None:
    rows = [row for line in ROWS.read_text().splitlines() if "ratio" in (row := json.loads(line))]
    charts = []
    for sweep, words in SWEEPS.items():
        found = {side: sorted(values.items()) for side, values in times(rows, sweep).items()}
        lines = [Line(SIDES[side], *zip(*points, strict=True), dots=True) for side, points in found.items() if points]
        charts.append(Chart("update / outcome-only update", lines, x_label=words))
    print(draw(charts, columns=3, width=320, height=240))


if __name__ == "__main__":
    main()
