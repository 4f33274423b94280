r"""Rollouts of recorded lengths over random tokens: what benches of whole training steps read.

    python -m bench.recorded --config configs/musique.yaml --output bench/lengths/musique.json model.vocab_size=16384 \
        search.top_k=3 search.max_passage_tokens=128 data.train=questions.jsonl data.corpus=corpus.jsonl

writes numbers alone: the tokens of prompts, turns, responses and of the answers that are forced after every prefix.
They are those of scripted rollouts: for every question of three hops or more, eight of the warm start's noisy
demonstrations, which search for its sub-questions, or by mistake for all of it, or stop early, with the tool, the
dialect and the tokenizer of the configuration. bench/lengths/musique.json is of 100 questions of MuSiQue and their
1,890 passages.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import numpy as np

from igpo_fast import sft
from igpo_fast.config import load
from igpo_fast.data.world import NOISY
from igpo_fast.demonstrations import PROMPT
from igpo_fast.setup import set_up
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


def record(config: str, settings: Sequence[str], rollouts: int, hops: int) -> list[Lengths]:
    """The lengths of noisy demonstrations of every question with ``hops`` hops or more."""
    setup = set_up(load(config, [*settings, "sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0"]))
    dialect, tools, most = setup.agent.dialect, setup.agent.tools, setup.config.rollout.max_tokens
    rng = random.Random("lengths")

    def written(question: Question) -> list[np.ndarray]:
        made = (sft.write(sft._from_steps([question], NOISY, rng), dialect, tools, most) for _ in range(rollouts))
        return [asyncio.run(one)[1] for one in made]

    return [
        lengths_of(written(question), setup.scoring.branches_of(question))
        for question in setup.data.train
        if (question.hops or 0) >= hops
    ]


def lengths_of(writers: Sequence[np.ndarray], branches: Sequence[Branch]) -> Lengths:
    """From the author of every token (demonstrations.py) of a question's rollouts."""
    rollouts = []
    for writer in writers:
        starts = np.flatnonzero(np.diff(writer, prepend=PROMPT) != 0)
        sizes = np.diff([*starts, len(writer)]).tolist()  # turns and responses by turns
        rollouts.append(tuple(zip_longest(sizes[::2], sizes[1::2], fillvalue=0)))
    prompt = int(np.argmax(writers[0] != PROMPT))
    return Lengths(prompt, tuple((b.start, b.stop - b.start) for b in branches), tuple(rollouts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a configuration with data of its own")
    parser.add_argument("--rollouts", type=int, default=8, help="per question")
    parser.add_argument("--hops", type=int, default=3, help="least hops of a question")
    parser.add_argument("--output", type=Path, required=True, help="a file of lengths")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as for igpo-fast train")
    asked = parser.parse_args()
    groups = record(asked.config, asked.settings, asked.rollouts, asked.hops)
    lines = ",\n".join(json.dumps(asdict(group)) for group in groups)
    asked.output.write_text(f'{{"groups": [\n{lines}\n]}}\n')
    totals = [total for group in groups for total in group.totals]
    print(f"{len(groups)} groups, {len(totals)} rollouts of {min(totals)} to {max(totals)} tokens")


if __name__ == "__main__":
    main()
