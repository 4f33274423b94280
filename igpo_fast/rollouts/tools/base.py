"""What a tool is: its description, its state per rollout, results, failures and counters."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from igpo_fast.errors import InputError, ToolError
from igpo_fast.types import ANSWER, INVALID, Action, Question, Rollout, ToolResult

OVER_LIMIT = "over_limit"
"""Counter of calls beyond the limit per rollout, which were not made."""
CAUSES = (
    "timeouts", "unreachable", "rate_limited", "server_errors", "refused", "malformed", "too_large", "raised", "died",
    OVER_LIMIT,
)  # fmt: skip
"""Counters of the causes of failed attempts."""


def text_function(name: str, description: str, parameter: str, meaning: str) -> Mapping[str, Any]:
    """The schema of a function whose only argument is a text, so that the tags dialect writes it as it is."""
    parameters = {
        "type": "object",
        "properties": {parameter: {"type": "string", "description": meaning}},
        "required": [parameter],
    }
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


class Tool(ABC):
    """Something that a policy can call, under one name or several. Every rollout opens it for itself."""

    schemas: Sequence[Mapping[str, Any]]
    """Its functions as chat templates take them: ``{"type": "function", "function": {"name", "description",
    "parameters"}}``, the parameters as a JSON schema."""
    caution: str = ""
    """What the user should know before the run, in one line."""
    counted: tuple[str, ...] = ("calls", "failures")
    """The names in ``counts``, for the metrics."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """What counters, limits and messages call it."""
        return self.names[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names under which it is called."""
        return tuple(schema["function"]["name"] for schema in self.schemas)

    async def open(self, question: Question) -> Any:
        """The tool's state in one rollout, opened before its first call; by default the question itself."""
        return question

    @abstractmethod
    async def call(self, opened: Any, action: Action) -> ToolResult:
        """The result of one call, whose arguments fit the schema. Calls of one turn run at once. It counts ``calls``,
        ``failures`` and the causes.

        Raises:
            ToolError: the call failed for good, and the run shall end.
        """

    async def outcome(self, opened: Any, rollout: Rollout) -> Mapping[str, float]:
        """What the rollout earned in the tool's eyes, by name; empty if it has no opinion. ``reward`` trains with
        ``algorithm.outcome=tools``."""
        return {}

    async def close(self, opened: Any) -> None:  # noqa: B027 (most tools keep nothing)
        """End the state of one rollout."""

    def check(self, question: Question) -> None:  # noqa: B027 (most tools have nothing to check)
        """Check before a run that the tool answers; ``question`` is one of the run's. Nothing is counted.

        Raises:
            ToolError: the tool does not answer.
        """

    def warning(self, counts: Mapping[str, int]) -> str:
        """What to tell the user about a step's counts; empty if all is well.

        Raises:
            ToolError: nothing works any more, and the run shall end.
        """
        if not counts["failures"]:
            return ""
        return f"{counts['failures']:,} of {counts['calls']:,} calls of {self.name} failed ({causes(counts)})"

    async def aclose(self) -> None:  # noqa: B027 (most tools keep nothing)
        """Close resources of the running event loop before it ends. A later call opens them anew."""


def causes(counts: Mapping[str, int]) -> str:
    """The causes of failures and their numbers, in words."""
    return ", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in CAUSES if counts[name])


class Tools:
    """The tools of a run.

    Args:
        tools: no name twice, none named ``answer`` or ``invalid``.
        calls: most calls per rollout by ``Tool.name``; 0, or no entry, sets no limit.
    Raises:
        InputError: two tools of one name, or a name that a turn cannot have.
    """

    def __init__(self, tools: Sequence[Tool], calls: Mapping[str, int] | None = None):
        self._tools = tuple(tools)
        self._calls = calls or {}
        self._by_name: dict[str, Tool] = {}
        for tool in tools:
            for name in tool.names:
                if name in self._by_name or name in (ANSWER, INVALID):
                    raise InputError(f"rollout.tools: the name {name!r} is taken; give the tool another")
                self._by_name[name] = tool

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._tools)

    def with_others(self, *others: Tool) -> Tools:
        """These tools, each with a namesake among ``others`` replaced by it."""
        named = {tool.name: tool for tool in others}
        return Tools([named.get(tool.name, tool) for tool in self._tools], self._calls)

    def called(self, name: str) -> Tool:
        """The tool that is called under ``name``."""
        return self._by_name[name]

    @property
    def schemas(self) -> tuple[Mapping[str, Any], ...]:
        """The descriptions of all functions, in order."""
        return tuple(schema for tool in self._tools for schema in tool.schemas)

    def check(self, question: Question) -> None:
        """Check before a run that every tool answers (``Tool.check``)."""
        for tool in self._tools:
            tool.check(question)

    @asynccontextmanager
    async def open(self, question: Question) -> AsyncIterator[OpenTools]:
        """The tools of one rollout."""
        opened = OpenTools(self, self._calls, question)
        try:
            yield opened
        finally:
            await opened.close()

    async def aclose(self) -> None:
        """Close resources of the running event loop before it ends."""
        for tool in self._tools:
            await tool.aclose()

    def take(self) -> Counter[str]:
        """The counts since the last time, as ``NAME/COUNT``; they begin anew."""
        counts = Counter({f"{tool.name}/{key}": n for tool in self._tools for key, n in tool.counts.items()})
        for tool in self._tools:
            tool.counts.clear()
        return counts

    def report(self, counts: Mapping[str, int], what: str) -> tuple[dict[str, float], str]:
        """Metrics and a warning about ``what`` ("step 3") from what ``take`` gave.

        Returns:
            ``tool/COUNT`` summed over tools, and of several tools ``tool/NAME/COUNT``, too; the warning, or "".
        Raises:
            ToolError: nothing works any more (``Tool.warning``).
        """
        metrics: Counter[str] = Counter()
        warnings = []
        for tool in self._tools:
            name = tool.name
            own = Counter({key.removeprefix(f"{name}/"): n for key, n in counts.items() if key.startswith(f"{name}/")})
            try:
                warnings.append(tool.warning(own))
            except ToolError as error:
                raise ToolError(f"{what}: {error}") from None
            for key in tool.counted:
                metrics[f"tool/{key}"] += own[key]
                if len(self._tools) > 1:
                    metrics[f"tool/{name}/{key}"] = own[key]
        told = "; ".join(filter(None, warnings))
        return {key: float(n) for key, n in metrics.items()}, f"{what}: {told}" if told else ""


class OpenTools:
    """The tools of one rollout; each is opened before its first call."""

    def __init__(self, tools: Tools, calls: Mapping[str, int], question: Question):
        self._tools, self._calls, self._question = tools, calls, question
        self._made: Counter[Tool] = Counter()
        self._opening = asyncio.Lock()
        self._opened: dict[Tool, Any] = {}

    async def call(self, actions: Sequence[Action]) -> list[ToolResult]:
        """The results of a turn's calls, which run at once."""
        if len(actions) == 1:  # no task of its own, so that a quick call does not look like one that waits
            return [await self._call(actions[0])]
        return await asyncio.gather(*map(self._call, actions))

    async def _call(self, action: Action) -> ToolResult:
        tool = self._tools.called(action.tool)
        most = self._calls.get(tool.name, 0)
        self._made[tool] += 1
        if most and self._made[tool] > most:
            tool.counts.update(("calls", "failures", OVER_LIMIT))
            return ToolResult(failure=f"No more calls of {action.tool}: the limit per rollout is {most}.")
        return await tool.call(await self._open(tool), action)

    async def _open(self, tool: Tool) -> Any:
        async with self._opening:
            if tool not in self._opened:
                self._opened[tool] = await tool.open(self._question)
            return self._opened[tool]

    async def outcome(self, rollout: Rollout) -> dict[str, float]:
        """What the tools say that the rollout earned (``Tool.outcome``).

        Raises:
            ToolError: two tools give a number of one name.
        """
        earned: dict[str, float] = {}
        for tool in self._tools:
            own = await tool.outcome(await self._open(tool), rollout)
            if twice := sorted(earned.keys() & own.keys()):
                raise ToolError(
                    f"rollout.tools: {tool.name} and a tool before it both judge {twice[0]!r}; let one of them, or "
                    "name the numbers apart"
                )
            earned |= own
        return earned

    async def close(self) -> None:
        """End the states of all that was opened."""
        while self._opened:
            tool, opened = self._opened.popitem()
            await tool.close(opened)


async def close(*parts: object) -> None:
    """Close resources of tools and engines in the running event loop before it ends; engines may have no ``aclose``."""
    for part in parts:
        if hasattr(part, "aclose"):
            await part.aclose()
