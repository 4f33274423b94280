"""Prints the tables of README.md and docs/measured.md from the newest rows: ``python -m bench.table``.

pytest bench/ -k "peers or step" --full --results FILE      makes such rows
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
FILES = ("peers_cpu", "step_cpu", "lm_head_cpu")
SIDES = {
    "outcome_only": "outcome-only (our GRPO)",
    "ours": "**IGPO, one pass**",
    "recomputed": "IGPO, one pass, gradient checkpointing",
    "two_passes": "IGPO, two passes",
    "small_packs": "IGPO, two passes over packs of a rollout",
    "igpo_trainer": "IGPO in TRL's trainer (`IGPOTrainer`)",
    "trl": "TRL's `GRPOTrainer`, no gains",
    "igpo_kv_reuse": "`GRPOTrainer` + values by KV reuse",
    "igpo_full_logits": "`GRPOTrainer` + a full-logit pass per prefix",
}
SHAPES = {
    "musique": "16 rollouts",
    "equal_lengths": "8 rollouts of one length",
    "own_prompts": "8 rollouts, a prompt each",
    "large": "8 rollouts, H 512 x 8 layers",
}


def read() -> list[dict]:
    """All rows, oldest first."""
    found = []
    for name in FILES:
        file = RESULTS / f"{name}.jsonl"
        found += map(json.loads, file.read_text().splitlines()) if file.exists() else []
    return found


def newest(rows: Iterable[dict], bench: str) -> dict[str, dict]:
    """The newest row of a bench for each of its recorded lengths."""
    return {row["shape"]["lengths"]: row for row in rows if row.get("bench") == bench and "lengths" in row["shape"]}


def peers(rows: Sequence[dict], lengths: str) -> str:
    """A step of every side on one shape: decision tokens per second, seconds, peak memory, and its time over ours."""
    lines = [
        "| a step | decision tokens/s | s | times IGPO's | peak GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = {side: row for side in SIDES if (row := newest(rows, f"peers/{side}").get(lengths))}
    if not found:
        return ""
    ours = next(row for side, row in reversed(found.items()))["ours"]
    for side, words in SIDES.items():
        if side not in found and side != "ours":
            continue
        row = found.get(side)
        figures, ratio = (row["peers"][side], _ratio(row)) if row else (ours, "1")
        speed, seconds, peak = figures["tokens_per_s"], figures["median"] / 1e3, figures["peak_bytes"] / 1e9
        lines.append(f"| {words} | {speed:,.0f} | {seconds:.1f} | {ratio} | {peak:.2f} |")
    return "\n".join(lines)


def shapes(rows: Sequence[dict]) -> str:
    """Ours beside TRL on every shape."""
    lines = [
        "| shape | decision tokens/s, IGPO and TRL | TRL's time / IGPO's | peak GB, IGPO and TRL | IGPO with gradient "
        "checkpointing: TRL's time / IGPO's, peak GB |",
        "| --- | --- | --- | --- | --- |",
    ]
    trl, again = newest(rows, "peers/trl"), newest(rows, "peers/recomputed")
    for lengths, words in SHAPES.items():
        if not (row := trl.get(lengths)):
            continue
        ours, theirs = row["ours"], row["peers"]["trl"]
        cells = [words, f"{ours['tokens_per_s']:,.0f}, {theirs['tokens_per_s']:,.0f}", _ratio(row)]
        cells.append(f"{ours['peak_bytes'] / 1e9:.2f}, {theirs['peak_bytes'] / 1e9:.2f}")
        if less := again.get(lengths):
            cells.append(f"{row['ratio'] / less['ratio']:.2f}, {less['peers']['recomputed']['peak_bytes'] / 1e9:.2f}")
        else:
            cells.append("")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def bars(rows: Sequence[dict]) -> str:
    """IGPO's step beside the outcome-only one: the median over rounds, the least and the most, and the bar."""
    lines = ["| shape | IGPO / outcome-only | bar: 1 + 1.25 x branch tokens / trunk tokens |", "| --- | --- | --- |"]
    for lengths, row in newest(rows, "step/igpo_vs_grpo").items():
        low, high = sorted(1 / ratio for ratio in row["ratio_spread"])
        measured = f"{1 / row['ratio']:.3f} ({low:.2f}-{high:.2f})"
        lines.append(f"| {SHAPES[lengths]} | {measured} | {row['shape']['bar']:.3f} |")
    return "\n".join(lines)


def head(rows: Sequence[dict]) -> str:
    """The fused loss beside torch's own."""
    found = {}
    for row in rows:
        if row.get("bench", "").endswith("/linear_cross_entropy") and "ratio" in row:
            found[row["bench"], json.dumps(row["shape"])] = row
    lines = ["| LM head | shape | linear_cross_entropy / ours |", "| --- | --- | --- |"]
    for row in found.values():
        shape = ", ".join(f"{key} {value}" for key, value in row["shape"].items())
        lines.append(f"| {row['bench'].split('/')[0]} | {shape} | {_ratio(row)} |")
    return "\n".join(lines)


def _ratio(row: dict) -> str:
    low, high = row["ratio_spread"]
    return f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    rows = read()
    for part in (peers(rows, "musique"), shapes(rows), bars(rows), head(rows)):
        print(part, end="\n\n")


if __name__ == "__main__":
    main()
