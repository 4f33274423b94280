"""How many groups teach nothing before training: whose outcomes are all equal, and whose advantages are all 0.

    python bench/collapse.py NAME [--config FILE] [--questions 64] [section.key=value ...]
    python bench/collapse.py --table

Samples a group per question from the start of a run (its warm start, or its model), as the run's first step would, and
appends a row to bench/results/collapse.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.timing import ROOT, circumstances
from igpo_fast.config import load
from igpo_fast.data.load import question_order
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.setup import Setup, set_up
from igpo_fast.types import Group, Question
from igpo_fast.update.advantages import collapsed, credit_rollouts, recipe_of, reward_metrics
from igpo_fast.update.gains import values_of
from igpo_fast.update.packs import answer_values
from igpo_fast.update.policy import Policy
from igpo_kernels import LossSettings

ROWS = ROOT / "bench/results/collapse.jsonl"
KEYS = ("group/collapsed_outcome", "group/collapsed", "reward/f1", "reward/ig_abs", "reward/ig_zero", "turns/mean",
        "turns/format_error")  # fmt: skip


def sample(setup: Setup, questions: Sequence[Question]) -> tuple[Group, ...]:
    """The groups that a run's first step samples for these questions."""
    setup.agent.engine.load_weights(setup.lm.state_dict().items())
    return rollout_groups(setup.agent, questions, setup.config.rollout.group_size, 1)


def measure(setup: Setup, groups: Sequence[Group]) -> dict[str, float]:
    """Metrics of the groups under the run's algorithm, with gains; ``ungated`` without its gate, ``alike`` the share of
    groups whose rollouts are all the same, token for token."""
    config = setup.config
    recipe = recipe_of(config.algorithm).at(1)
    policy = Policy(setup.lm, config.rollout.temperature, LossSettings(), config.model.kernels)
    value_of = partial(values_of, basis=recipe.basis, answers=recipe.answers)
    values = answer_values(policy, groups, setup.scoring, value_of, config.train.token_budget)
    credits = credit_rollouts(groups, values, recipe)
    found = reward_metrics(groups, credits, recipe.gate)
    return {
        **{key: round(found[key], 4) for key in KEYS},
        "ungated": round(collapsed(groups, credit_rollouts(groups, values, replace(recipe, gate=0.0))), 4),
        "alike": float(np.mean([len({rollout.ids.tobytes() for rollout in group.rollouts}) == 1 for group in groups])),
    }


def table(rows: Sequence[dict]) -> str:
    """The newest row of each name, in Markdown."""
    lines = [
        "| start | groups | F1 | outcomes all equal | advantages all 0, with gains | and without the gate | "
        "rollouts all the same |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in {row["name"]: row for row in rows}.values():
        shares = (row["group/collapsed_outcome"], row["group/collapsed"], row["ungated"], row["alike"])
        cells = " | ".join(f"{share:.0%}" for share in shares)
        groups = f"{row['groups']} x {row['group_size']}"
        lines.append(f"| {row['name']} | {groups} | {row['reward/f1']:.3f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="what the row is called")
    parser.add_argument("--config", type=Path, default=ROOT / "configs/quickstart.yaml")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--results", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="only print the table of the rows that there are")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for igpo-fast train")
    args = parser.parse_intermixed_args()
    if args.name and not args.table:
        setup = set_up(load(args.config, args.overrides))
        train, config = setup.data.train, setup.config
        groups = sample(setup, [train[i] for i in question_order(len(train), args.questions, 0, config.train.seed)])
        row = {
            "bench": "collapse",
            **circumstances(),
            "name": args.name,
            "groups": len(groups),
            "group_size": config.rollout.group_size,
            "seed": config.train.seed,
            "gate": config.algorithm.ig_gate,
            "overrides": [given for given in args.overrides if "/" not in given],  # paths are this machine's
            **measure(setup, groups),
        }
        with open(args.results, "a") as file:
            file.write(json.dumps(row) + "\n")
    print(table([json.loads(line) for line in args.results.read_text().splitlines()]))


if __name__ == "__main__":
    main()
