"""Does a gain tell success? Rank correlation of a turn's information gain with what the turn changed, by Monte Carlo.

    python bench/credit.py RUN [--prefixes 200] [--samples 16] [--step N] [--seed 0] [section.key=value ...]
    python bench/credit.py --table

Draws turns of a step's rollouts. From the prefix before a turn and from the one after it, response included, the policy
that sampled the turn goes on ``--samples`` times at temperature 1; the difference of the mean F1 is what the turn
changed. Appends a row with every point to bench/results/credit.jsonl: Spearman's rank correlation of the change with

    gain        the information gain
    gated       the same, 0 below the run's gate (algorithm.ig_gate), as training takes it
    advantage   IGPO's advantage of the turn, by the run's settings
    outcome     the outcome normalised in the group, which GRPO gives to every turn: the yardstick

and the mean change by gain and by turn number; intervals by bootstrap over rollouts. By default the step is the newest
one that a checkpoint's weights have sampled.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench.timing import ROOT, circumstances
from igpo_fast.config import load
from igpo_fast.engines.base import Sampling
from igpo_fast.jsonl import json_line
from igpo_fast.rollouts.batch import RolloutLoop
from igpo_fast.rollouts.rollout import Agent, run_rollout
from igpo_fast.rollouts.tools.base import close
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.setup import Setup, set_up
from igpo_fast.types import Group, Rollout
from igpo_fast.update.advantages import credit_rollouts, recipe_of
from igpo_fast.update.gains import values_of
from igpo_fast.update.packs import answer_values
from igpo_fast.update.policy import Policy
from igpo_fast.update.rewards import f1_score
from igpo_fast.update.scoring import Scoring
from igpo_kernels import LossSettings

ROWS = ROOT / "bench/results/credit.jsonl"
CONTINUED = -2
"""Step number in the continuations' sampling keys: noise of their own (evaluation's is -1)."""
RESAMPLES = 2000
EDGES = (-0.5, -0.02, 0.02, 0.5)
"""Gains between two of these are taken together, in the unit of the basis."""

Prefix = tuple[int, int]
"""A rollout's number and the turns that it begins with."""


@dataclass(frozen=True)
class Points:
    """One entry per drawn turn."""

    rollout: np.ndarray
    """The turn's rollout: int64 [n]."""
    turn: np.ndarray
    """Its number there, from 1: int64 [n]."""
    credits: Mapping[str, np.ndarray]
    """What it is given: float64 [n] by name, ``gain`` among them."""
    change: np.ndarray
    """Mean F1 from after the turn less that from before it: float64 [n]."""
    halves: np.ndarray
    """The same from each half of the continuations: float64 [2, n]."""


def draw_turns(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Prefix]:
    """At most ``count`` turns that have a response, as (rollout, turn from 1), in order."""
    turns = [(i, t) for i, rollout in enumerate(rollouts) for t in range(1, len(rollout.turns))]
    chosen = np.random.default_rng(seed).permutation(len(turns))[:count]
    return [turns[place] for place in sorted(chosen)]


def success(
    agent: Agent, rollouts: Sequence[Rollout], prefixes: Iterable[Prefix], samples: int, normalisation: str
) -> dict[Prefix, np.ndarray]:
    """F1 of each continuation from each prefix: float64 [samples]. The draws depend on the agent's seed, the question,
    the rollout's index, the prefix and the sample alone."""
    places = asyncio.Semaphore(agent.concurrency)
    todo = sorted(set(prefixes))

    async def one(prefix: Prefix, sample: int) -> float:
        rollout, turns = rollouts[prefix[0]], prefix[1]
        index = (rollout.index * agent.limits.max_turns + turns) * samples + sample
        async with places:
            made = await run_rollout(agent, rollout.question, CONTINUED, index, begun=rollout.turns[:turns])
        return f1_score(made.answer, rollout.question.ground_truth, normalisation)

    async def everything() -> list[float]:
        try:
            return await asyncio.gather(*(one(prefix, sample) for prefix in todo for sample in range(samples)))
        finally:
            await close(agent.tools, agent.engine)

    with asyncio.Runner(loop_factory=RolloutLoop) as runner:
        found = np.array(runner.run(everything())).reshape(len(todo), samples)
    return dict(zip(todo, found, strict=True))


def changes(scores: Mapping[Prefix, np.ndarray], turns: Sequence[Prefix], part: slice = slice(None)) -> np.ndarray:
    """What each turn changed in the mean score, by ``part`` of the samples: float64 [turns]."""
    return np.array([scores[i, t][part].mean() - scores[i, t - 1][part].mean() for i, t in turns])


def rank_correlation(x: np.ndarray, y: np.ndarray, owners: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Spearman's rank correlation and its 95 % interval, by a bootstrap over ``owners``, whose points stay together."""
    rng, groups = np.random.default_rng(seed), [np.flatnonzero(owners == owner) for owner in np.unique(owners)]
    draws = (np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))]) for _ in range(RESAMPLES))
    found = [spearman(x[draw], y[draw]) for draw in draws]
    return spearman(x, y), *np.nanpercentile(found, (2.5, 97.5)).tolist()


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation; NaN where all of one are equal."""
    return pearson(rankdata(x), rankdata(y))


def pearson(x: Sequence[float], y: Sequence[float]) -> float:
    """The correlation of the numbers themselves, in which large ones count; NaN where all of one are equal."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else float("nan")


def measure(setup: Setup, rollouts: Sequence[Rollout], step: int, prefixes: int, samples: int, seed: int) -> Points:
    """Gains, outcomes and changes of drawn turns; ``rollouts`` are the step's whole groups, one after the other."""
    config = setup.config
    groups = [Group(question, tuple(of)) for question, of in groupby(rollouts, lambda rollout: rollout.question)]
    of_step = recipe_of(config.algorithm, config.train.steps).at(step)
    recipe = replace(of_step, algorithm="igpo", baseline="previous")
    policy = Policy(setup.lm, config.rollout.temperature, LossSettings(), config.model.kernels)
    scoring = Scoring(lambda question: setup.agent.dialect.branches(question)[: recipe.scored_answers])
    value_of = partial(values_of, basis=recipe.basis, answers=recipe.answers)
    values = answer_values(policy, groups, scoring, value_of, config.train.token_budget)
    advantages = [credit.advantages for credit in credit_rollouts(groups, values, recipe)]
    outcomes = [credit.advantages for credit in credit_rollouts(groups, None, replace(recipe, algorithm="grpo"))]
    turns = draw_turns(rollouts, prefixes, seed)
    gain = np.array([np.diff(values[i].values)[t - 1] for i, t in turns])
    agent = replace(setup.agent, sampling=Sampling(temperature=1.0), seed=seed, outcome=None)
    ends = [end for i, t in turns for end in ((i, t - 1), (i, t))]
    scores = success(agent, rollouts, ends, samples, config.algorithm.f1_normalisation)
    return Points(
        rollout=np.array([i for i, _ in turns]),
        turn=np.array([t for _, t in turns]),
        credits={
            "gain": gain,
            "gated": np.where(np.abs(gain) < recipe.gate, 0.0, gain),
            "advantage": np.array([advantages[i][t - 1] for i, t in turns]),
            "outcome": np.array([outcomes[i][t - 1] for i, t in turns]),
        },
        change=changes(scores, turns),
        halves=np.array([changes(scores, turns, slice(half, None, 2)) for half in (0, 1)]),
    )


def summary(points: Points) -> dict:
    """What a row says of the points."""
    places = np.searchsorted(EDGES, points.credits["gain"])
    names = [f"{low} to {high}".strip() for low, high in pairwise(("", *EDGES, ""))]
    return {
        "spearman": {
            name: [round(x, 3) for x in rank_correlation(credit, points.change, points.rollout)]
            for name, credit in points.credits.items()
        },
        "halves": round(spearman(*points.halves), 3),
        "by_gain": {name: _part(points, places == i) for i, name in enumerate(names) if (places == i).any()},
        "by_turn": {str(turn): _part(points, points.turn == turn) for turn in np.unique(points.turn).tolist()},
        "points": {
            "rollout": points.rollout.tolist(),
            "turn": points.turn.tolist(),
            **{name: credit.round(4).tolist() for name, credit in points.credits.items()},
            "change": points.change.round(4).tolist(),
        },
    }


def _part(points: Points, part: np.ndarray) -> dict[str, float]:
    """Of some points their number, mean gain and change, the latter's standard error, and rank correlations; what does
    not exist is left out."""
    gain, change = points.credits["gain"][part], points.change[part]
    error = change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else float("nan")
    figures = {"gain": gain.mean(), "change": change.mean(), "change_se": error}
    figures |= {f"spearman/{name}": spearman(credit[part], change) for name, credit in points.credits.items()}
    return {"turns": len(change), **{name: round(float(x), 4) for name, x in figures.items() if np.isfinite(x)}}


def tables(rows: Sequence[dict]) -> str:
    """In Markdown: the rows' rank correlations with their intervals, each followed by the correlation of the numbers;
    and the mean change by gain, with its standard error and the number of turns."""
    names = ("gain", "gated", "advantage", "outcome")
    ranges = list(dict.fromkeys(name for row in rows for name in row["by_gain"]))
    ranges.sort(key=lambda name: float(name.split("to")[0] or "-inf"))
    lines = [f"| run | F1 | {' | '.join(names)} | halves |", "| --- " * 7 + "|"]
    means = [f"| run | {' | '.join(ranges)} |", "| --- " * (len(ranges) + 1) + "|"]
    for row in sorted(rows, key=lambda row: (row["algorithm"] != "igpo", row["seed"], row["step"])):
        run = f"`{row['algorithm']}` {row['seed']}, step {row['step']}"
        change = row["points"]["change"]
        ranks = " | ".join(
            "{:.2f} ({:.2f} to {:.2f}); {:.2f}".format(*row["spearman"][name], pearson(row["points"][name], change))
            for name in names
        )
        lines.append(f"| {run} | {row['f1']:.2f} | {ranks} | {row['halves']:.2f} |")
        means.append(f"| {run} | {' | '.join(_mean(row['by_gain'].get(name)) for name in ranges)} |")
    return "\n".join([*lines, "", *means])


def _mean(part: dict | None) -> str:
    if part is None:
        return "-"
    error = f" ± {part['change_se']:.3f}" if "change_se" in part else ""
    return f"{part['change']:+.3f}{error} ({part['turns']})"


def chosen(run: RunFolder, step: int | None) -> tuple[int, int]:
    """The step whose rollouts are taken, and the checkpoint with the weights that sampled them, or the nearest."""
    saved = list(run.saved())
    own = [s + 1 for s in saved if (run.rollouts / f"step_{s + 1:06d}.jsonl").exists()]
    step = step or max(own, default=saved[-1])
    return step, min(saved, key=lambda s: abs(s - (step - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN")
    parser.add_argument("--prefixes", type=int, default=200, help="turns that are drawn")
    parser.add_argument("--samples", type=int, default=16, help="continuations per prefix")
    parser.add_argument("--step", type=int, help="whose rollouts are taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=ROWS)
    parser.add_argument("--table", action="store_true", help="only print the tables of the rows that there are")
    parser.add_argument("overrides", nargs="*", help="section.key=value, as for igpo-fast eval")
    args = parser.parse_intermixed_args()
    if args.table or not args.run:
        print(tables([json.loads(line) for line in args.results.read_text().splitlines()]))
        return
    run = RunFolder(args.run)
    step, checkpoint = chosen(run, args.step)
    setup = set_up(load(args.run / "config.yaml", args.overrides), weights=str(run.chosen(str(checkpoint))))
    setup.agent.engine.load_weights(setup.lm.state_dict().items())
    rollouts = [rollout for rollout, _ in run.read_rollouts(f"step_{step:06d}")]
    points = measure(setup, rollouts, step, args.prefixes, args.samples, args.seed)
    algorithm = setup.config.algorithm
    f1 = np.mean([f1_score(r.answer, r.question.ground_truth, algorithm.f1_normalisation) for r in rollouts])
    row = {
        "bench": "credit",
        **circumstances(),
        "algorithm": algorithm.name,
        "basis": algorithm.basis,
        "seed": setup.config.train.seed,
        "step": step,
        "checkpoint": checkpoint,
        "f1": round(float(f1), 4),
        "samples": args.samples,
        "overrides": args.overrides,
        **summary(points),
    }
    with open(args.results, "ab") as file:
        file.write(json_line(row))
    for name, (rho, low, high) in row["spearman"].items():
        print(f"{name:<10}{rho:+.2f} ({low:+.2f} to {high:+.2f})")
    print(f"halves    {row['halves']:+.2f}, the two halves of the continuations with each other")
    for part in ("by_gain", "by_turn"):
        for name, found in row[part].items():
            print(f"{part.removeprefix('by_')} {name}: {found}")


if __name__ == "__main__":
    main()
