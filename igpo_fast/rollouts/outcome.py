"""What a rollout earned, asked of a user's function or of the tools when it has ended."""

from __future__ import annotations

import asyncio
import inspect
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from igpo_fast.errors import RunError, reason_of
from igpo_fast.extend import named
from igpo_fast.rollouts.tools.base import OpenTools
from igpo_fast.types import OF_ANSWERS, OF_TOOLS, REWARD, Rollout

OWN = re.compile(r"outcome|f1|f1_se|em|turns|search_failures|ig_.*")
"""Names that a function may not give a number, because ``reward/NAME`` or ``eval/NAME`` is another's."""


class Outcome:
    """Judges rollouts, each in its own task: an asynchronous function overlaps with other rollouts' sampling, and a
    synchronous one runs in a thread.

    Args:
        kind: ``algorithm.outcome``, for messages.
        function: takes a rollout and returns a number, numbers by name of which ``reward`` trains, or None: no verdict.
            None asks the rollout's tools.
    """

    def __init__(self, kind: str, function: Callable[[Rollout], Any] | None = None):
        self._kind, self._function = kind, function
        call = getattr(function, "__call__", None)  # noqa: B004 (of an object that is called like a function)
        self._is_asynchronous = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

    async def __call__(self, rollout: Rollout, tools: OpenTools) -> Mapping[str, float]:
        """Numbers by name, ``reward`` among them; empty if there is no verdict.

        Raises:
            RunError: the function raises, or returns something else; names function, question and result. Its own
                RunErrors pass through: a judge that is down raises a ToolError.
        """
        try:
            found = await self._ask(rollout, tools)
        except RunError:
            raise
        except (Exception, SystemExit) as error:
            raise self._fault(rollout, f"raised {type(error).__name__}: {reason_of(error)}") from error
        if found is None:
            return {}
        numbers = found if isinstance(found, Mapping) else {REWARD: found}
        if self._function is None and not numbers:
            raise RunError(
                f"algorithm.outcome={self._kind}: none of the run's tools judges rollouts; give one a method outcome, "
                "or algorithm.outcome another value"
            )
        if REWARD not in numbers:
            raise self._fault(rollout, f'returned {reprlib.repr(found)}, without "{REWARD}"')
        for name, number in numbers.items():
            if not isinstance(name, str) or not re.fullmatch(r"[\w.+-]+", name) or OWN.fullmatch(name):
                raise self._fault(rollout, f"named a number {reprlib.repr(name)}, which is taken or no plain name")
            if _finite(number) is None:
                raise self._fault(rollout, f"returned {reprlib.repr(found)}, not a finite number or numbers by name")
        return {name: _finite(number) for name, number in numbers.items()}

    async def _ask(self, rollout: Rollout, tools: OpenTools) -> Any:
        if self._function is None:
            return await tools.outcome(rollout)
        if self._is_asynchronous:
            return await self._function(rollout)
        found = await asyncio.to_thread(self._function, rollout)
        return await found if inspect.isawaitable(found) else found

    def _fault(self, rollout: Rollout, what: str) -> RunError:
        who = "a tool" if self._function is None else "it"
        return RunError(
            f"algorithm.outcome={self._kind}: {who} {what} for question {rollout.question.id!r}, rollout "
            f"{rollout.index}; correct it"
        )


def make_outcome(kind: str) -> Outcome | None:
    """Who judges rollouts by ``algorithm.outcome``; None where answers alone decide (update/rewards.py).

    Raises:
        InputError: there is no such function.
    """
    if kind in OF_ANSWERS:
        return None
    return Outcome(kind, None if kind == OF_TOOLS else named(kind, "algorithm.outcome"))


def _finite(value: Any) -> float | None:
    """A finite number, numpy's and torch's included; else None."""
    if isinstance(value, str | bytes | bytearray):
        return None
    try:
        number = float(value.item() if isinstance(value, np.ndarray) else value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
    return number if math.isfinite(number) else None
