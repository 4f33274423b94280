"""Outcomes: F1 and exact match of the final answer, or what was said of the rollout."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from igpo_fast.types import OF_ANSWERS, REWARD, Group, Normalisation, Rollout
from igpo_fast.words import nfc, spaced

_WIDE = "、。〃・·〈〉《》「」『』【】〔〕〖〗！＂＃％＆＇（）＊，－．／：；？＠［＼］＿｛｝～｟｠｡｢｣､･"
_PUNCTUATION = string.punctuation + _WIDE
"""ASCII punctuation, and that of Chinese and Japanese."""
_TO_SPACES = str.maketrans(_PUNCTUATION, " " * len(_PUNCTUATION))
_DROPPED = str.maketrans("", "", _PUNCTUATION)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_CLOSED = {"yes", "no", "noanswer"}


def normalise_answer(text: str, normalisation: Normalisation = "igpo") -> str:
    """Lower-cased words joined by single spaces; characters of scripts without spaces are words.

    ``igpo`` turns ASCII, Chinese and Japanese punctuation into spaces; ``squad`` and ``hotpot`` drop it ("1,000" is
    "1000"), and the articles a, an, the. A text of only these ("The The", "?") is just lower-cased, so that it still
    differs from an empty answer.
    """
    lowered = nfc(text).lower()
    if normalisation == "igpo":
        words = spaced(lowered.translate(_TO_SPACES)).split()
    else:
        words = spaced(_ARTICLES.sub(" ", lowered.translate(_DROPPED))).split()
    return " ".join(words) or lowered.strip()


def f1_score(prediction: str | None, answers: Sequence[str], normalisation: Normalisation = "igpo") -> float:
    """F1 of the bags of words against the best accepted answer: in [0, 1]; 0 for None.

    As in SQuAD, bags count repeated words, so saying a word twice costs precision (the IGPO authors' code compares sets
    of words). HotpotQA's rule: yes, no and noanswer share words with nothing but themselves ("yes they are" does not
    answer "yes").
    """
    if prediction is None:
        return 0.0
    said = normalise_answer(prediction, normalisation)
    predicted = Counter(said.split())
    best = 0.0
    for answer in answers:
        right = normalise_answer(answer, normalisation)
        if normalisation == "hotpot" and said != right and (said in _CLOSED or right in _CLOSED):
            continue
        accepted = Counter(right.split())
        common = (predicted & accepted).total()
        if common:
            best = max(best, 2 * common / (predicted.total() + accepted.total()))
    return best


def exact_match(prediction: str | None, answers: Sequence[str], normalisation: Normalisation = "igpo") -> float:
    """1.0 if the normalised prediction equals an accepted answer, else 0.0; 0.0 for None."""
    if prediction is None:
        return 0.0
    predicted = normalise_answer(prediction, normalisation)
    return float(any(predicted == normalise_answer(answer, normalisation) for answer in answers))


def outcome(rollout: Rollout, kind: str, normalisation: Normalisation, format_penalty: float) -> float:
    """Reward of the last turn: F1 or EM of the answer, ``format_penalty`` without a well-formed one; or, of any other
    ``kind``, the rollout's own ``reward``."""
    if kind not in OF_ANSWERS:
        return rollout.rewards[REWARD]
    if rollout.answer is None:
        return format_penalty
    score = f1_score if kind == "f1" else exact_match
    return score(rollout.answer, rollout.question.answers, normalisation)


def rewards_of(rollouts: Iterable[Rollout]) -> dict[str, list[float]]:
    """The numbers in ``Rollout.rewards`` by their names, of the rollouts that have them."""
    found: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, number in rollout.rewards.items():
            found.setdefault(name, []).append(number)
    return found


def with_majority(group: Group, normalisation: Normalisation = "igpo") -> Group:
    """The group with its most frequent final answer as the accepted one, in place of the ground truth, which its
    question keeps as ``truth``.

    Answers are counted normalised, empty ones not; of equally frequent ones the first to reach the count in the
    rollouts' order wins, in the words of the first rollout that gave it. A group without answers accepts none.
    """
    counts: Counter[str] = Counter()
    words: dict[str, str] = {}
    best = ""
    for rollout in group.rollouts:
        said = normalise_answer(rollout.answer or "", normalisation)
        if said:
            words.setdefault(said, rollout.answer.strip())
            counts[said] += 1
            best = said if counts[said] > counts[best] else best
    accepted = (words[best],) if best else ()
    question = replace(group.question, answers=accepted, truth=group.question.ground_truth)
    return Group(question, tuple(replace(rollout, question=question) for rollout in group.rollouts))


def agreement(group: Group, normalisation: Normalisation = "igpo") -> float:
    """Share of a group's rollouts whose answer is an accepted one."""
    accepted = group.question.answers
    return sum(exact_match(r.answer, accepted, normalisation) for r in group.rollouts) / len(group.rollouts)
