"""Tools that users bring: a typed Python function, or a class with a state per rollout."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict

from igpo_fast.errors import ToolError, masked, reason_of
from igpo_fast.rollouts.tools.base import OVER_LIMIT, Tool
from igpo_fast.rollouts.tools.processes import CAUSES, CallError, Handle, Processes
from igpo_fast.types import Action, Question, Rollout, ToolResult

SAID = {
    "timeouts": "it took too long",
    "died": "its process ended",
    "too_large": "its result is too long",
    "malformed": "its result is no text",
}
"""What the policy is told of a failed call; of one that raised, the error itself."""
RAISED = "raised"
_PLACE = re.compile(r" \([^()]*:\d+\)$")
"""The line of code at the end of an error's text, which is the user's and tells a policy nothing."""
LONGEST = 300
"""Characters of an error that the policy is shown."""


class UserTool(Tool):
    """A function, or the public methods of a class, called in processes of their own (processes.py).

    Args:
        name: what counters and limits call it: the function's or the class's name.
        processes: describes and calls it.
    """

    counted = ("calls", "failures", *CAUSES)

    def __init__(self, name: str, processes: Processes):
        super().__init__()
        self._name, self._processes = name, processes
        # Every object of a rollout takes a descriptor.
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self.schemas = tuple(processes.schemas)

    @property
    def name(self) -> str:
        return self._name

    async def open(self, question: Question) -> Handle | CallError:
        """The rollout's object; the error if it cannot be made, which fails each of the rollout's calls."""
        try:
            return await self._processes.open(json.loads(json.dumps(asdict(question))))
        except CallError as error:
            return error
        except OSError as error:  # no descriptor, no process to be had
            return CallError("died", reason_of(error))

    async def call(self, opened: Handle | CallError, action: Action) -> ToolResult:
        """The result as a text; a call that fails has a failure, and never raises."""
        self.counts["calls"] += 1
        try:
            if isinstance(opened, CallError):
                raise opened
            return ToolResult(text=await self._processes.call(opened, action.tool, action.arguments))
        except CallError as error:
            self.counts.update(("failures", error.cause))
            why = SAID.get(error.cause) or masked(_PLACE.sub("", str(error)))[:LONGEST]
            return ToolResult(failure=f"{action.tool} failed: {why}")

    async def outcome(self, opened: Handle | CallError, rollout: Rollout) -> Mapping[str, float]:
        """What the class's ``outcome(answer)`` returns; empty if it has none.

        Raises:
            ToolError: it failed, or the object was never opened.
        """
        if isinstance(opened, CallError):
            raise self._fault("open", opened)
        try:
            return await self._processes.outcome(opened, rollout.answer)
        except CallError as error:
            raise self._fault("outcome", error) from None

    def _fault(self, method: str, error: CallError) -> ToolError:
        return ToolError(f"{self.name}: its {method}() failed ({SAID.get(error.cause) or error}); correct it")

    async def close(self, opened: Handle | CallError) -> None:
        if not isinstance(opened, CallError):
            with suppress(CallError):  # its process has ended all the same
                await self._processes.close(opened)

    def warning(self, counts: Mapping[str, int]) -> str:
        """About failures that are not the policy's own: those of calls that raised or exceeded their number are."""
        theirs = counts["failures"] - counts[RAISED] - counts[OVER_LIMIT]
        return super().warning(counts) if theirs or 0 < counts["calls"] == counts["failures"] else ""

    async def aclose(self) -> None:
        await self._processes.aclose()
