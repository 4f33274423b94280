"""What a page holds of its rollouts, and what went wrong in each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from igpo_fast.report.choice import Group, Shown
from igpo_fast.types import INVALID, Normalisation, Rollout, Turn
from igpo_fast.update.rewards import exact_match, f1_score, normalise_answer

FAILURES = {
    "malformed": "a turn that is neither a call nor an answer",
    "tokens": "cut by the limit of tokens",
    "turns": "out of turns",
    "no answer": "no answer",
    "wrong": "not an accepted answer, and none stood in what was found",
    "wrong though found": "not an accepted answer, although one stood in what was found",
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
            yield "wrong though found" if self._stood(rollout) else "wrong"
        if any(turn.calls and not turn.found and not turn.failed for turn in before):
            yield "found nothing"
        if any(turn.failed for turn in before):
            yield "failed call"
        credits = [one.credit for one in group]
        if all(credit is not None and not np.nan_to_num(credit.advantages).any() for credit in credits):
            yield "teaches nothing"

    def _stood(self, rollout: Rollout) -> bool:
        """Whether an accepted answer stands in what was found, word for word."""
        said = [f" {normalise_answer(turn.response, self._normalisation)} " for turn in rollout.turns if turn.found]
        right = [normalise_answer(answer, self._normalisation) for answer in rollout.question.ground_truth]
        return any(f" {answer} " in text for answer in filter(None, right) for text in said)

    def detail(self, group: Group) -> dict[str, Any]:
        """What one opened rollout needs besides, for a group: the prompt, and by ``Shown.key`` the turns."""
        prompt = group[0].rollout.prompt_ids.tolist()
        return {
            "prompt": self._decode(tuple(prompt)) if self._decode else None,
            "rollouts": {one.key: [self._turn(turn) for turn in one.rollout.turns] for one in group},
        }

    def _turn(self, turn: Turn) -> dict[str, Any]:
        said = pieces(self._decode, turn.ids.tolist()) if self._decode else [turn.text]
        return {
            "said": said,
            **({"logp": turn.logp.round(4)} if self._decode else {}),
            "response": turn.response,
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
