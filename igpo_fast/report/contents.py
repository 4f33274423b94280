"""What a page holds of its rollouts, and what went wrong in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any
from unicodedata import category

import numpy as np

from igpo_fast.report.choice import Group, Shown
from igpo_fast.types import INVALID, Normalisation, Rollout, Turn
from igpo_fast.update.rewards import exact_match, f1_score, normalise_answer

INEXACT = "no exact match"
FAILURES = {
    "malformed": "a turn that is neither a call nor an answer",
    "tokens": "cut by the limit of tokens",
    "turns": "out of turns",
    "no answer": "no answer",
    INEXACT: "the answer is no exact match, and no accepted one stood in what was found",
    f"{INEXACT} though found": "the answer is no exact match, although an accepted one stood in what was found",
    "found nothing": "a call found nothing",
    "failed call": "a call failed",
    "teaches nothing": "all advantages of the group are 0",
}
"""Kinds of failures and what they mean; a rollout may have several."""


class Contents:
    """What the page holds of its rollouts.

    Args:
        decode: token ids to text, to show turns token by token; None shows them as they were written.
    """

    def __init__(self, normalisation: Normalisation, decode: Callable[[list[int]], str] | None = None):
        self._normalisation = normalisation
        self._normalise = lru_cache(maxsize=1 << 12)(partial(normalise_answer, normalisation=normalisation))
        self._decode = decode and lru_cache(maxsize=1 << 16)(lambda ids: decode(list(ids)))

    def index(self, groups: Iterable[Group]) -> list[dict[str, Any]]:
        """What the list, the filters and the groups side by side need: an object per rollout.

        F1 and EM of evaluation rollouts are computed here, for their records have none.
        """
        return [self._entry(one, group) for group in groups for one in group]

    def _entry(self, one: Shown, group: Group) -> dict[str, Any]:
        rollout, credit, question = one.rollout, one.credit, one.rollout.question
        f1, em = (credit.f1, credit.em) if credit else self._scores(rollout)
        earned = {}
        if credit:
            earned = {"values": credit.values, "gains": credit.gains, "advantages": credit.advantages}
            if credit.baselines is not None:
                earned["baselines"] = credit.baselines
        return {
            "key": one.key,
            "group": group[0].key,
            "kind": "eval" if one.kind == "eval" else "train",
            "step": one.step,
            "index": rollout.index,
            "id": question.id,
            "question": question.question,
            "dataset": question.dataset,
            "answers": question.answers,
            **({} if question.truth is None else {"truth": question.truth}),
            "answer": rollout.answer,
            "f1": f1,
            "em": em,
            "outcome": credit and credit.outcome,
            "rewards": dict(rollout.rewards),
            "failures": list(self._failures(rollout, em, group)),
            "tokens": rollout.decision_tokens,
            "turns": [[turn.action, turn.argument] for turn in rollout.turns],
            **earned,
        }

    def _scores(self, rollout: Rollout) -> tuple[float | None, float | None]:
        """F1 and EM; None without ground truth."""
        truth = rollout.question.ground_truth
        if not truth:
            return None, None
        return tuple(score(rollout.answer, truth, self._normalisation) for score in (f1_score, exact_match))

    def _failures(self, rollout: Rollout, em: float | None, group: Group) -> Iterator[str]:
        """Keys of ``FAILURES``."""
        *before, last = rollout.turns
        cut = last.action == INVALID and rollout.truncated == "tokens"
        if any(turn.action == INVALID for turn in (before if cut else rollout.turns)):
            yield "malformed"
        if rollout.truncated:
            yield rollout.truncated
        if rollout.answer is None:
            yield "no answer"
        elif em == 0:
            right = rollout.question.ground_truth
            stood = any(self.stands(turn.response, right) for turn in rollout.turns if turn.found)
            yield f"{INEXACT} though found" if stood else INEXACT
        if any(turn.calls and not turn.found and not turn.failed for turn in before):
            yield "found nothing"
        if any(turn.failed for turn in before):
            yield "failed call"
        credits = [one.credit for one in group]
        if all(credit is not None and not np.nan_to_num(credit.advantages).any() for credit in credits):
            yield "teaches nothing"

    def stands(self, text: str, answers: Sequence[str]) -> bool:
        """Whether one of ``answers`` stands in ``text``, word for word."""
        said = f" {self._normalise(text)} "
        return any(f" {answer} " in said for answer in filter(None, map(self._normalise, answers)))

    def marks(self, text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
        """Where ``answers`` stand in ``text``, word for word: ascending ranges of its characters, the longest answer
        where several begin."""
        if not self.stands(text, answers):
            return []
        words = list(self._words(text))
        wanted = sorted((self._normalise(answer).split() for answer in answers), key=len, reverse=True)
        found, now = [], 0
        while now < len(words):
            here = (answer for answer in wanted if [word for word, *_ in words[now : now + len(answer)]] == answer)
            if length := len(next(here, ())):
                found.append((words[now][1], words[now + length - 1][2]))
            now += length or 1
        return found

    def _words(self, text: str) -> Iterator[tuple[str, int, int]]:
        """The words of the normalised ``text``, and where each stands in ``text`` itself."""
        apart = {char: self._normalise(f"x{char}x") for char in {*text, " "}}
        dropped = {char for char, found in apart.items() if found == "xx"}
        ends = {char for char, found in apart.items() if " " in found}  # between words, or a word of its own
        start = end = 0
        for place, char in enumerate(text + " "):
            mark = category(char).startswith("M")
            if end > start and (not mark if text[start] in ends else char in ends):
                # After another word, an article is one, and nothing is left of it where articles are dropped.
                yield from ((word, start, end) for word in self._normalise(f"x {text[start:end]}").split()[1:])
                start = end
            if char not in dropped and apart[char] != "x x":
                start, end = start if end > start else place, place + 1

    def detail(self, group: Group) -> dict[str, Any]:
        """What one opened rollout needs besides, for a group: the prompt, and by ``Shown.key`` the turns."""
        prompt, right = group[0].rollout.prompt_ids.tolist(), group[0].rollout.question.ground_truth
        return {
            "prompt": self._decode(tuple(prompt)) if self._decode else None,
            "rollouts": {one.key: [self._turn(turn, right) for turn in one.rollout.turns] for one in group},
        }

    def _turn(self, turn: Turn, right: Sequence[str]) -> dict[str, Any]:
        said = pieces(self._decode, turn.ids.tolist()) if self._decode else [turn.text]
        return {
            "said": said,
            **({"logp": turn.logp.round(4)} if self._decode else {}),
            "response": turn.response,
            "marks": self.marks(turn.response, right),
            "passages": turn.passages,
            "found": turn.found,
            "failed": turn.failed,
        }


def pieces(decode: Callable[[tuple[int, ...]], str], ids: Sequence[int]) -> list[str]:
    """The text of each token; joined they are the text of all.

    Each is what its token adds to the text of the one before. A token that ends inside a character has none: the one
    that completes the character shows it.
    """
    texts, start, end = [], 0, 0
    for now in range(1, len(ids) + 1):
        before, text = decode(tuple(ids[start:end])), decode(tuple(ids[start:now]))
        if text.endswith("\ufffd") and now < len(ids):
            texts.append("")
        else:
            texts.append(text[len(before) :])
            start, end = end, now
    return texts
