"""What a pass scores beside the rollouts' own tokens: answers after each prefix, and what would have been without a
turn's response (the counterfactual that its gain is compared with)."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from igpo_fast.types import Baseline, Batch, Question, Rollout
from igpo_kernels import Branch, Fork

Forks = Mapping[int, Sequence[Fork]]
"""Forks by a rollout's number in the batch."""
REAL, MASKED = 0, 1
"""``Fork.answer`` with ``baseline=masked``: the next turn after its own response, and after the masked one."""


class Lent(NamedTuple):
    """Responses that turns of other questions may be given."""

    owners: np.ndarray
    """Id of the question of each: text [n]."""
    responses: Sequence[np.ndarray]
    """Tokens of each: int32 [m]."""


NONE_LENT = Lent(np.zeros(0, str), ())


class Values(NamedTuple):
    """The values of a rollout's prefixes, and what they are compared with."""

    values: np.ndarray
    """v_t: float64 [T]."""
    baselines: np.ndarray | None = None
    """b_t of turns 1 .. T-1: float64 [T-1], NaN where there is none; None is the value before."""


@dataclass(frozen=True)
class Scoring:
    """The scored tokens of a run's packs.

    A fork goes on otherwise after a turn t = 1 .. T-1 (``Fork.turn``), in the same packed pass:

    - ``random`` (IG-Search, arXiv 2604.15148): the response that a call for another question of the batch got, then
      each answer; ``samples`` times.
    - ``masked`` (InfoPO, arXiv 2603.00656): ``masked_response``, then the rollout's own next turn. The turn after its
      own response is a fork that coincides with the rollout, so it adds no token.
    """

    branches_of: Callable[[Question], Sequence[Branch]]
    """The answers that are forced after each prefix of a question's rollouts; none if nothing is scored by answers."""
    answer_tokens: int = 0
    """Most tokens that the answers of a question take after one prefix."""
    baseline: Baseline = "previous"
    samples: int = 1
    """``random``: responses per turn."""
    longest_response: int = 0
    """``random``: most tokens of a response that is taken; longer ones are not, so that packs have a bound."""
    masked_response: np.ndarray | None = None
    """``masked``: what replaces a response, int32 [m]."""
    seed: int = 0

    @property
    def needs_batch(self) -> bool:
        """Whether a group's forks depend on other groups."""
        return self.baseline == "random"

    @property
    def response_tokens(self) -> int:
        """Most tokens of what replaces a response."""
        return self.longest_response if self.masked_response is None else len(self.masked_response)

    def most_tokens(self, max_turns: int, decision_tokens: int) -> int:
        """Most packed tokens that scoring adds to a rollout.

        Args:
            max_turns: turns of the longest rollout.
            decision_tokens: its decision tokens.
        """
        searching = max_turns - 1
        added = max_turns * self.answer_tokens
        if self.baseline == "random":
            added += searching * self.samples * (self.response_tokens + self.answer_tokens)
        elif self.baseline == "masked":
            added += searching * self.response_tokens + decision_tokens
        return added

    def forks(self, batch: Batch) -> Forks:
        """The forks of every rollout that has any. Random ones depend on the batch's questions and step alone, not on
        packs or on which groups finished first."""
        lent = self._lent(batch) if self.baseline == "random" else NONE_LENT
        found = {}
        for i, rollout in enumerate(batch.rollouts):
            key = [self.seed, batch.step, zlib.crc32(rollout.question.id.encode()), rollout.index]
            if forks := self.forks_of(rollout, lent, key):
                found[i] = forks
        return found

    def _lent(self, batch: Batch) -> Lent:
        """What the batch's calls brought, each response once per question."""
        found = {
            (rollout.question.id, turn.response_ids.tobytes()): turn.response_ids
            for rollout in batch.rollouts
            for turn in rollout.turns[:-1]
            if turn.found and len(turn.response_ids) <= self.longest_response
        }
        return Lent(np.array([owner for owner, _ in found]), list(found.values()))

    def forks_of(self, rollout: Rollout, lent: Lent, key: Sequence[int]) -> list[Fork]:
        """The forks of one rollout.

        Args:
            lent: ``random``: the responses to draw from; those of the rollout's own question are left out.
            key: ``random``: seed of the draws, whole numbers of at least 0.
        """
        if self.baseline == "masked":
            return self._masked(rollout)
        return self._random(rollout, lent, key) if self.baseline == "random" else []

    def _random(self, rollout: Rollout, lent: Lent, key: Sequence[int]) -> list[Fork]:
        others = np.flatnonzero(lent.owners != rollout.question.id) if lent.responses else np.zeros(0, np.int64)
        if not len(others):
            return []
        draw = np.random.default_rng(key)
        branches = self.branches_of(rollout.question)
        made = []
        for t, end in _turn_ends(rollout):
            if not rollout.turns[t - 1].calls:
                continue
            chosen = draw.choice(others, self.samples, replace=len(others) < self.samples)
            for sample, place in enumerate(chosen):
                response = lent.responses[place]
                for answer, branch in enumerate(branches):
                    ids = np.concatenate([response, branch.ids[: branch.stop]])
                    start, stop = len(response) + branch.start, len(response) + branch.stop
                    made.append(Fork(end, ids, start, stop, t, sample * len(branches) + answer))
        return made

    def _masked(self, rollout: Rollout) -> list[Fork]:
        """The next turn after the response, and, where a call got one, after the masked one."""
        made = []
        for t, end in _turn_ends(rollout):
            following, turn = rollout.turns[t].ids, rollout.turns[t - 1]
            sides = [(REAL, turn.response_ids)]
            if turn.calls and len(turn.response_ids):
                sides.append((MASKED, self.masked_response))
            for kind, response in sides:
                ids = np.concatenate([response, following])
                made.append(Fork(end, ids, len(response), len(ids), t, kind))
        return made

    def values(
        self,
        turns: int,
        answers: np.ndarray | None,
        forks: np.ndarray | None,
        value_of: Callable[[np.ndarray], np.ndarray],
    ) -> Values:
        """The values of a rollout of ``turns`` turns, from the mean log-probabilities of what was scored.

        Args:
            answers: of each accepted answer after each prefix: float64 [answers, T]; None if none was, and the values
                are then NaN, but with ``masked``, which needs none.
            forks: float64 [``Fork.answer``, up to T], NaN where there is no fork; None if none was.
            value_of: log-probabilities [n, turns] to a value per turn, as ``gains.values_of`` does.
        """
        if answers is None and self.baseline != "masked":
            return Values(np.full(turns, np.nan))
        if self.baseline == "previous":
            return Values(value_of(answers))
        if self.baseline == "none":
            return Values(value_of(answers), np.zeros(turns - 1))
        compared = np.full((self.samples * len(answers) if self.baseline == "random" else 2, turns), np.nan)
        if forks is not None:
            compared[: len(forks), : forks.shape[1]] = forks
        if self.baseline == "masked":
            return Values(value_of(compared[[REAL]]), value_of(compared[[MASKED]])[1:])
        samples = compared.reshape(self.samples, len(answers), turns)
        return Values(value_of(answers), np.mean([value_of(sample) for sample in samples], axis=0)[1:])

    def separate_tokens(self, batch: Batch) -> int:
        """Tokens that separate passes would read for what is scored: each prefix with each answer, and each fork but
        the rollouts' own turns, which their own pass reads."""
        total = 0
        forks = self.forks(batch)
        for i, rollout in enumerate(batch.rollouts):
            answers = [branch.stop - 1 for branch in self.branches_of(rollout.question)]
            total += len(answers) * int(rollout.boundaries.sum()) + len(rollout.boundaries) * sum(answers)
            others = (f for f in forks.get(i, ()) if self.baseline != "masked" or f.answer == MASKED)
            total += sum(fork.at + fork.stop - 1 for fork in others)
        return total


def _turn_ends(rollout: Rollout) -> list[tuple[int, int]]:
    """Each turn 1 .. T-1 and the number of tokens up to its own last."""
    lengths = [len(rollout.prompt_ids)]
    for turn in rollout.turns[:-1]:
        lengths += [len(turn.ids), len(turn.response_ids)]
    return list(enumerate(np.cumsum(lengths)[1::2].tolist(), start=1))
