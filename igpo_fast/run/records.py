"""Records of rollouts/*.jsonl, written and read: a rollout and, if it was trained on, its rewards and advantages."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from igpo_fast.jsonl import finite
from igpo_fast.types import ANSWER, SEARCH, Action, Credit, Question, Rollout, Turn, answer_with, search_for

VERSION = 1
"""Version of records; increased when a key changes its meaning or is removed, not when one is added."""


def record_of(rollout: Rollout, credit: Credit | None = None) -> dict[str, Any]:
    """The JSON object of a rollout.

    ``values`` are v_0 .. v_{T-1}; a turn's ``value`` is the one after it and ``info_gain`` its increase, both null
    for the last turn. With ``baseline`` other than ``previous`` a turn also has what its value is compared with, as
    ``baseline``. Undefined numbers are null: all of these if the algorithm needs no values, and rewards and advantages
    of a rollout that was only evaluated.
    """
    question, unscored = rollout.question, [None] * len(rollout.turns)
    values = _numbers(credit.values) if credit else unscored
    gains = _numbers(credit.gains) if credit and len(credit.gains) else unscored[1:]
    advantages = _numbers(credit.advantages) if credit else unscored
    compared = [*_numbers(credit.baselines), None] if credit and credit.baselines is not None else None
    outcome, f1, em = _numbers([credit.outcome, credit.f1, credit.em]) if credit else [None] * 3
    return {
        "version": VERSION,
        "id": question.id,
        "question": question.question,
        "answers": list(question.answers),
        "corpus": question.corpus,
        "dataset": question.dataset,
        **({} if question.truth is None else {"truth": list(question.truth)}),
        "index": rollout.index,
        "answer": rollout.answer,
        "truncated": rollout.truncated,
        **({"rewards": dict(rollout.rewards)} if rollout.rewards else {}),
        "outcome": outcome,
        "f1": f1,
        "em": em,
        "values": values,
        "turns": [
            {
                "text": turn.text,
                "action": turn.action,
                "argument": turn.argument,
                "actions": [{"tool": action.tool, "arguments": dict(action.arguments)} for action in turn.actions],
                "call": turn.call,
                "response": turn.response,
                "passages": list(turn.passages),
                "found": turn.found,
                **({"failed": True} if turn.failed else {}),
                "tokens": len(turn.ids),
                "value": value,
                **({} if compared is None else {"baseline": compared[t]}),
                "info_gain": gain,
                "advantage": advantage,
                "ids": turn.ids.tolist(),
                "logp": _numbers(turn.logp),
                "response_ids": turn.response_ids.tolist(),
            }
            for t, (turn, value, gain, advantage) in enumerate(
                zip(rollout.turns, [*values[1:], None], [*gains, None], advantages, strict=True)
            )
        ],
        "prompt_ids": rollout.prompt_ids.tolist(),
    }


def rollout_of(record: Mapping[str, Any]) -> tuple[Rollout, Credit | None]:
    """The rollout of a record and its credit; None in their place if it was not scored.

    A null becomes NaN again, so ``record_of`` gives the same record. The question's ``hops`` and ``steps`` are not
    kept.

    Raises:
        ValueError: a record of a later version.
    """
    if record.get("version", VERSION) > VERSION:
        raise ValueError(f"a rollout record of version {record['version']}; this igpo-fast reads up to {VERSION}")
    truth = record.get("truth")
    question = Question(
        record["id"],
        record["question"],
        tuple(record["answers"]),
        corpus=record.get("corpus", ""),
        dataset=record.get("dataset", ""),
        truth=None if truth is None else tuple(truth),
    )
    turns = tuple(
        Turn(
            ids=np.array(turn["ids"], np.int32),
            logp=_array(turn["logp"], np.float32),
            text=turn["text"],
            actions=_actions(turn),
            response_ids=np.array(turn["response_ids"], np.int32),
            response=turn["response"],
            passages=tuple(turn["passages"]),
            found=turn.get("found", bool(turn["passages"])),
            failed=turn.get("failed", False),
            call=turn.get("call", 0),
        )
        for turn in record["turns"]
    )
    prompt, truncated = np.array(record["prompt_ids"], np.int32), record.get("truncated", "")
    rollout = Rollout(question, record["index"], prompt, turns, truncated, record.get("rewards", {}))
    if record["outcome"] is None:
        return rollout, None
    before_last = record["turns"][:-1]
    gains = [turn["info_gain"] for turn in before_last]
    unscored = all(value is None for value in (*record["values"], *gains))
    compared = [turn["baseline"] for turn in before_last] if "baseline" in record["turns"][0] else None
    credit = Credit(
        values=_array(record["values"], np.float64),
        gains=_array([] if unscored else gains, np.float64),
        outcome=record["outcome"],
        f1=_number(record["f1"]),
        em=_number(record["em"]),
        advantages=_array([turn["advantage"] for turn in record["turns"]], np.float64),
        baselines=None if compared is None else _array(compared, np.float64),
    )
    return rollout, credit


def _actions(turn: Mapping[str, Any]) -> tuple[Action, ...]:
    """Actions of a turn's record; those written before there were other tools than search have none."""
    if "actions" in turn:
        return tuple(Action(action["tool"], action["arguments"]) for action in turn["actions"])
    known = {SEARCH: search_for, ANSWER: answer_with}
    return (known[turn["action"]](turn["argument"]),) if turn["action"] in known else ()


def _numbers(values: Sequence[float] | np.ndarray) -> list[float | None]:
    """JSON has null in place of NaN."""
    return [finite(float(value)) for value in values]


def _array(values: Sequence[float | None], dtype: type) -> np.ndarray:
    return np.array([_number(value) for value in values], dtype)


def _number(value: float | None) -> float:
    return math.nan if value is None else value
