"""Answer values, and what each turn gains: information, or the cost of a malformed or repeated call."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
from numpy.typing import ArrayLike

from igpo_fast.errors import InputError, reason_of
from igpo_fast.types import INVALID, Answers, Basis, Rollout, Turn

Gain = Callable[[Rollout, np.ndarray, np.ndarray | None], ArrayLike]


def values_of(answer_logp: ArrayLike, basis: Basis, answers: Answers) -> np.ndarray:
    """v_t of one rollout from its accepted answers' mean log-probabilities.

    Args:
        answer_logp: (1/A) sum_j log pi(a_j | prefix_t, wrapper, a_<j), nats, [n_answers >= 1, T].
        basis: ``log_prob`` keeps the mean log-probability, ``prob`` takes its exp (before combining answers).
        answers: the ``first`` answer's value, the ``max`` or ``mean`` over answers, or the value of the ``sum`` of
            their probabilities (with ``log_prob`` its log); NaN if one is NaN.
    Returns:
        float64 [T].
    Raises:
        ValueError: answer_logp is not [n_answers >= 1, T].
    """
    logp = np.asarray(answer_logp, dtype=np.float64)
    if logp.ndim != 2 or len(logp) == 0:
        raise ValueError(f"values_of: got answer_logp of shape {logp.shape}; expected [n_answers >= 1, T]")
    values = np.exp(logp) if basis == "prob" else logp
    if answers == "first":
        return values[0]
    if answers == "sum":
        with np.errstate(invalid="ignore"):
            return values.sum(axis=0) if basis == "prob" else np.logaddexp.reduce(values, axis=0)
    return values.max(axis=0) if answers == "max" else values.mean(axis=0)


def information_gain(
    values_T: ArrayLike, earning: np.ndarray | None = None, baselines: ArrayLike | None = None
) -> tuple[np.ndarray, int]:
    """The information gain of turns 1 .. T-1, and the number of undefined ones.

    ig_t = v_t - v_s, where s is the last turn before t that earns one, or the prompt (0); with ``baselines``
    ig_t = v_t - b_t. An undefined gain (a value is NaN or infinite) is 0.

    Args:
        earning: the turns that earn a gain, bool [T-1]; all of them if None.
        baselines: b_t of turns 1 .. T-1: float64 [T-1].
    Returns:
        Gains, float64 [T-1], NaN for turns that earn none; and the count.
    """
    values = np.asarray(values_T, dtype=np.float64)
    gains = np.full(max(len(values) - 1, 0), np.nan)
    turns = np.arange(1, len(values)) if earning is None else np.flatnonzero(earning) + 1
    with np.errstate(invalid="ignore"):
        if baselines is not None:
            between = values[turns] - np.asarray(baselines, dtype=np.float64)[turns - 1]
        else:
            between = np.diff(values[[0, *turns]]) if len(values) else gains
    defined = np.isfinite(between)
    gains[turns - 1] = np.where(defined, between, 0.0)
    return gains, int((~defined).sum())


def gains_of_ones_own(
    gain: Gain, rollout: Rollout, values_T: ArrayLike, earning: np.ndarray, baselines: np.ndarray | None
) -> tuple[np.ndarray, int]:
    """Like ``information_gain``, by a function of the user's.

    Args:
        gain: called with the rollout, v_0 .. v_{T-1} and b_1 .. b_{T-1} (or None); gives ig_1 .. ig_{T-1}.
    Raises:
        InputError: it raises, or gives something else than T-1 numbers.
    """
    values = np.asarray(values_T, dtype=np.float64)
    name = f"algorithm.gain={gain.__module__}:{gain.__qualname__}"
    try:
        found = np.asarray(gain(rollout, values.copy(), baselines), dtype=np.float64)
    except Exception as error:
        where = f"of a rollout of question {rollout.question.id}"
        raise InputError(f"{name}: raised {type(error).__name__} ({reason_of(error)}) on values {where}") from error
    if found.shape != (len(values) - 1,):
        raise InputError(
            f"{name}: gave shape {found.shape} for {len(values)} values; give one number per turn but the last"
        )
    undefined = earning & ~np.isfinite(found)
    return np.where(undefined, 0.0, np.where(earning, found, np.nan)), int(undefined.sum())


def earning_turns(
    rollout: Rollout,
    tools: Collection[str],
    every: int,
    penalised: bool,
    calls_only: bool = False,
    valued: bool = True,
) -> np.ndarray:
    """Which turns earn a gain of their own: bool [T-1]. The tokens of one that does not share the advantage of the next
    that does, or of the last turn.

    Args:
        tools: tools whose turns earn gains; all turns if empty.
        every: only every so many turns, counted from the first, earn one.
        penalised: whether malformed turns always count, because they pay a penalty in place of a gain.
        calls_only: whether turns that call no tool earn none.
        valued: whether the rollout has values; without, no turn earns a gain.
    """

    def earns(turn: Turn) -> bool:
        if not valued:
            return False
        called = not tools or any(action.tool in tools for action in turn.actions)
        return called and (turn.calls or not calls_only)

    return np.array(
        [
            (penalised and turn.action == INVALID) or (earns(turn) and number % every == 0)
            for number, turn in enumerate(rollout.turns[:-1], start=1)
        ],
        dtype=bool,
    )


def repeated_passages(rollout: Rollout) -> np.ndarray:
    """The share of each response's passages that the rollout has seen before, in an earlier response or in this one:
    float64 [T-1]; 0 where nothing was found. (StepSearch, arXiv 2505.15107: the part that needs no labels.)"""
    seen: set[str] = set()
    shares = np.zeros(len(rollout.turns) - 1)
    for t, turn in enumerate(rollout.turns[:-1]):
        repeated = 0
        for passage in turn.passages:
            repeated += passage in seen
            seen.add(passage)
        shares[t] = repeated / max(len(turn.passages), 1)
    return shares
