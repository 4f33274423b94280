"""Rollouts of recorded lengths over random tokens: what benches of whole training steps read.

    python -m bench.recorded RUN --step N --output bench/lengths/NAME.json

records the lengths of a run's rollouts: numbers alone, of prompts, turns, responses and of the answers that are forced
after every prefix. bench/lengths/musique.json was made so, from real questions and passages.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.timing import circumstances
from igpo_fast.types import REWARD, Group, Question, Rollout, Turn
from igpo_kernels import Branch

LENGTHS = Path(__file__).parent / "lengths"


@dataclass(frozen=True)
class Lengths:
    """One question's rollouts, in tokens.

    >>> Lengths(10, ((2, 3),), (((4, 20), (5, 0)),)).totals
    [39]
    """

    prompt: int
    answers: tuple[tuple[int, int], ...]
    """Of each accepted answer its wrapper's opening and its own tokens."""
    rollouts: tuple[tuple[tuple[int, int], ...], ...]
    """Of each rollout its turns: the policy's tokens and those of the response, 0 after the last."""

    @property
    def totals(self) -> list[int]:
        """All tokens of each rollout."""
        return [self.prompt + sum(map(sum, turns)) for turns in self.rollouts]

    def equal(self) -> Lengths:
        """All rollouts as long as the one of middle length."""
        middle = sorted(self.rollouts, key=lambda turns: sum(map(sum, turns)))[len(self.rollouts) // 2]
        return replace(self, rollouts=(middle,) * len(self.rollouts))


class Recorded(NamedTuple):
    """Groups of rollouts, and the answers to force by the question's id."""

    groups: tuple[Group, ...]
    branches: dict[str, tuple[Branch, ...]]

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]

    @property
    def decision_tokens(self) -> int:
        return sum(rollout.decision_tokens for rollout in self.rollouts)


def read(name: str, totals: tuple[int, int] | None = None) -> list[Lengths]:
    """The groups of ``lengths/NAME.json``; ``totals`` keeps those with a mean length within."""
    groups = json.loads((LENGTHS / f"{name}.json").read_text())["groups"]
    found = [
        Lengths(
            group["prompt"],
            tuple(map(tuple, group["answers"])),
            tuple(tuple(map(tuple, turns)) for turns in group["rollouts"]),
        )
        for group in groups
    ]
    return [group for group in found if not totals or totals[0] <= np.mean(group.totals) <= totals[1]]


def recorded(lengths: Sequence[Lengths], vocab: int, *, own_prompts: bool = False, seed: int = 0) -> Recorded:
    """Rollouts of these lengths over random tokens, with random outcomes in [0, 1).

    Rollouts of a question share its prompt and nothing else, though real ones often share a first turn, too.

    Args:
        own_prompts: every rollout has another prompt, as long.
    """
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(1, vocab - 2, n).astype(np.int32)  # noqa: E731 (the last two are tags, steps.py)
    groups, branches = [], {}
    for number, group in enumerate(lengths):
        question = Question(str(number), f"w{number}", ("any",))
        wrapper = draw(max(opening for opening, _ in group.answers))  # accepted answers share it
        branches[question.id] = tuple(
            Branch(np.concatenate([wrapper[:opening], draw(own)]), opening, opening + own)
            for opening, own in group.answers
        )
        prompt, rollouts = draw(group.prompt), []
        for index, turns in enumerate(group.rollouts):
            made = tuple(Turn(draw(own), np.zeros(own, np.float32), "", (), draw(others)) for own, others in turns)
            own = draw(group.prompt) if own_prompts else prompt
            rollouts.append(Rollout(question, index, own, made, rewards={REWARD: float(rng.random())}))
        groups.append(Group(question, tuple(rollouts)))
    return Recorded(tuple(groups), branches)


def record(run: Path, step: int) -> list[Lengths]:
    """The lengths of the rollouts of a run's step, and of the answers that its algorithm forces."""
    from igpo_fast.run.checkpoint import RunFolder
    from igpo_fast.setup import set_up

    folder = RunFolder(run)
    newest = sorted(folder.checkpoints.iterdir())[-1]
    branches_of = set_up(folder.config, weights=str(newest)).scoring.branches_of
    groups: dict[str, list[Rollout]] = {}
    for rollout, _ in folder.read_rollouts(f"step_{step:06d}"):
        groups.setdefault(rollout.question.id, []).append(rollout)
    return [
        Lengths(
            len(rollouts[0].prompt_ids),
            tuple((branch.start, branch.stop - branch.start) for branch in branches_of(rollouts[0].question)),
            tuple(tuple((len(t.ids), len(t.response_ids)) for t in rollout.turns) for rollout in rollouts),
        )
        for rollouts in groups.values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--step", type=int, default=1, help="whose rollouts")
    parser.add_argument("--how", default="", help="how the run was made, kept with the numbers")
    parser.add_argument("--output", type=Path, required=True, help="a file of lengths")
    asked = parser.parse_args()
    groups = record(asked.run, asked.step)
    about = {name: value for name, value in circumstances().items() if name in ("date", "commit")}
    lines = ",\n".join(json.dumps(asdict(group)) for group in groups)
    asked.output.write_text(
        f'{{"how": {json.dumps(asked.how)}, "made": {json.dumps(about)}, "groups": [\n{lines}\n]}}\n'
    )
    totals = [total for group in groups for total in group.totals]
    print(f"{len(groups)} groups, {len(totals)} rollouts of {min(totals)} to {max(totals)} tokens")


if __name__ == "__main__":
    main()
