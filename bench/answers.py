"""How well a gain tells that a turn found the answer, where a question has several accepted ones.

    python bench/answers.py NAME RUN [RUN ...]
    python bench/answers.py --table

Scores a run's rollouts again, under its newest checkpoint, and takes the questions with several accepted answers. A
turn has found the answer if its response is the first that shows an accepted one; turns after it do not count. The AUC
is the probability that such a turn gains more than one without, half if both gain the same. One row for all runs
together goes to bench/results/answers.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.timing import ROOT, circumstances
from igpo_fast.jsonl import json_line
from igpo_fast.report.contents import Contents
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.score import Scorer, load_scorer
from igpo_fast.trajectories import Record, read_records
from igpo_fast.types import Group
from igpo_fast.update.gains import information_gain, values_of
from igpo_fast.update.packs import answer_values

ROWS = ROOT / "bench/results/answers.jsonl"
ANSWERS = ("first", "max", "mean", "sum")
RESAMPLES = 2000
WHICH = {"any": "an accepted answer", "first": "the first answer", "other": "others, not the first"}
"""What the turns that have found an answer show."""


class Found(NamedTuple):
    """A turn's gain by each of ``ANSWERS``, and whether its response shows the first answer, and any; its question."""

    gains: tuple[float, ...]
    first: bool
    any: bool
    question: str


def turns_of(scorer: Scorer, records: Sequence[Record], shows: Contents) -> Iterator[Found]:
    """The turns of the records up to the one that finds an answer."""
    rollouts = [scorer.tokenise(record, number).rollout for number, record in enumerate(records)]
    groups = [Group(rollout.question, (rollout,)) for rollout in rollouts]
    logps: list[np.ndarray] = []

    def keep(logp: np.ndarray) -> np.ndarray:
        logps.append(logp)
        return logp[0]

    answer_values(scorer.policy, groups, scorer.scoring, keep, scorer.token_budget)
    for record, logp in zip(records, logps, strict=True):
        gains = zip(*(information_gain(values_of(logp, "prob", of))[0] for of in ANSWERS), strict=True)
        right = record.question.answers
        for turn, gained in zip(record.row["turns"], gains, strict=False):
            stands = [shows.stands(turn["response"], [answer]) for answer in right]
            yield Found(gained, stands[0], any(stands), record.question.question)
            if any(stands):
                break


def auc(gains: np.ndarray, found: np.ndarray) -> float:
    """The probability that a turn that found gains more than one that did not, from (N,) gains and booleans."""
    yes, no = int(found.sum()), int((~found).sum())
    return float((rankdata(gains)[found].sum() - yes * (yes + 1) / 2) / (yes * no)) if yes and no else float("nan")


def measure(turns: Sequence[Found]) -> dict[str, dict]:
    """Which turns found -> their number, the mean gain of turns without, and by each of ``ANSWERS`` the AUC with its
    95 % interval (bootstrap over questions) and the mean gain of turns that found; nothing where
    there are no turns to compare."""
    gains = np.array([turn.gains for turn in turns])
    of = np.unique([turn.question for turn in turns], return_inverse=True)[1]
    without = np.array([not turn.any for turn in turns])
    kinds = {"any": ~without, "first": np.array([turn.first for turn in turns])}
    kinds["other"] = kinds["any"] & ~kinds["first"]
    rng, members = np.random.default_rng(0), [np.flatnonzero(of == question) for question in range(of.max() + 1)]
    found = {}
    for kind, shown in kinds.items():
        if not (shown.any() and without.any()):
            continue
        used, found[kind] = shown | without, {"turns": int(shown.sum())}
        drawn = [
            np.concatenate([members[q] for q in rng.integers(len(members), size=len(members))])
            for _ in range(RESAMPLES)
        ]
        for column, name in enumerate(ANSWERS):
            again = [auc(gains[these, column], shown[these]) for these in (draw[used[draw]] for draw in drawn)]
            low, high = np.nanpercentile(again, [2.5, 97.5])
            found[kind][name] = {
                "auc": round(auc(gains[used, column], shown[used]), 3),
                "interval": [round(low, 3), round(high, 3)],
                "gain": round(float(gains[shown, column].mean()), 4),
                "gain_without": round(float(gains[without, column].mean()), 4),
            }
    return found


def table(rows: Sequence[dict]) -> str:
    """The newest row of each name, in Markdown."""
    lines = ["| responses show | turns | " + " | ".join(f"`{name}`" for name in ANSWERS) + " |"]
    lines.append("| --- | --- |" + " --- |" * len(ANSWERS))
    for row in {row["name"]: row for row in rows}.values():
        for kind, what in WHICH.items():
            if not (its := row["found"].get(kind)):
                continue
            cells = [f"{its[n]['auc']:.2f} ({its[n]['interval'][0]:.2f} to {its[n]['interval'][1]:.2f}); "
                     f"{its[n]['gain']:+.3f}" for n in ANSWERS]  # fmt: skip
            lines.append(f"| {what} | {its['turns']} | {' | '.join(cells)} |")
        if not (its := row["found"].get("any")):
            continue
        cells = [f"{its[name]['gain_without']:+.3f}" for name in ANSWERS]
        lines.append(f"| none | {row['turns'] - its['turns']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="what the row is called")
    parser.add_argument("runs", nargs="*", type=Path, help="run folders")
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    args = parser.parse_args()
    if not args.table:
        if not args.runs:
            parser.error("give NAME and run folders, or --table")
        turns = []
        for path in args.runs:
            config = RunFolder(path).config
            options = dict(
                dialect=config.rollout.dialect, wrapper=config.algorithm.wrapper, basis="prob", answers="max"
            )
            scorer = load_scorer(str(path), temperature=config.rollout.temperature, **options)
            files = sorted((path / "rollouts").glob("*.jsonl"))
            records = [record for file in files for record in read_records(file)]
            records = [record for record in records if len(record.question.answers) > 1]
            turns += turns_of(scorer, records, Contents(config.algorithm.f1_normalisation))
            print(f"{path}: {len(records)} rollouts, {len(turns)} turns so far", flush=True)
        if not turns:
            parser.error("no question of these runs has several accepted answers, and a response")
        row = {"bench": "answers", **circumstances(), "name": args.name, "turns": len(turns),
               "questions": len({turn.question for turn in turns}), "found": measure(turns)}  # fmt: skip
        with open(ROWS, "ab") as file:
            file.write(json_line(row))
    print(table([json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []))


if __name__ == "__main__":
    main()
