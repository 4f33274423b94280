"""The interface of tools: what they bring, how they fail, what they count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter

from igpo_fast.errors import ToolError
from igpo_fast.types import ToolResult

FOUND = ("calls", "passages", "empty")
"""Counters of every tool: calls, passages they brought, calls that brought none."""
CAUSES = ("timeouts", "unreachable", "rate_limited", "server_errors", "refused", "malformed", "too_large")
"""Why an attempt failed."""
COUNTS = (*FOUND, "failures", "retries", *CAUSES)
"""Counters of a tool that can fail: also calls that failed for good, and attempts after the first."""


class Tool(ABC):
    """A search tool: a query in, passages out. Calling it searches and counts; a tool defines ``search``."""

    counted: tuple[str, ...] = FOUND
    """The names in ``counts``, for the metrics."""
    where = "data.corpus"
    """The setting that says where the passages come from, for messages."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """Search ``corpus`` (``Question.corpus``) for ``query``.

        Raises:
            ToolError: the search failed for good, and no text is to be shown in its place.
        """
        self.counts["calls"] += 1
        try:
            result = await self.search(query, corpus)
        except ToolError:
            self.counts["failures"] += 1
            raise
        if result.failure:
            self.counts["failures"] += 1
        else:
            self.counts["passages"] += len(result.passages)
            self.counts["empty"] += not result.passages
        return result

    @abstractmethod
    async def search(self, query: str, corpus: str) -> ToolResult:
        """Find the passages; ``__call__`` counts them."""

    def check(self, query: str) -> None:  # noqa: B027 (most tools have nothing to check)
        """See, before a run, that the tool answers ``query``. Nothing is counted.

        Raises:
            ToolError: it does not.
        """

    async def aclose(self) -> None:  # noqa: B027 (most tools keep nothing)
        """Close what belongs to the running event loop, which ends. A later call opens it anew."""


async def close(*parts: object) -> None:
    """Close what tools and engines keep for the running event loop, which ends; engines may have no ``aclose``."""
    for part in parts:
        if hasattr(part, "aclose"):
            await part.aclose()


def take_counts(tool: Tool, what: str) -> tuple[dict[str, float], str]:
    """Take a tool's counts of ``what`` ("step 3") and set them back to 0.

    Returns:
        ``tool/NAME`` for each of ``tool.counted``, and a warning if calls failed for good or none found anything,
        else "".
    Raises:
        ToolError: every call failed.
    """
    counts = Counter(tool.counts)
    tool.counts.clear()
    calls, failures = counts["calls"], counts["failures"]
    why = ", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in CAUSES if counts[name])
    if failures and failures == calls:
        raise ToolError(
            f"{what}: every search failed ({calls:,} calls; {why}); see that the server at {tool.where} answers"
        )
    warnings = []
    if failures:
        warnings.append(
            f"{failures:,} of {calls:,} searches failed for good ({why}); the policy was shown search.failure_text "
            "instead of passages"
        )
    if calls and counts["empty"] == calls - failures:
        warnings.append(
            f"none of {calls - failures:,} searches found a passage; see that {tool.where} has the passages that these "
            "questions need"
        )
    found = {f"tool/{name}": float(counts[name]) for name in tool.counted}
    return found, f"{what}: {'; '.join(warnings)}" if warnings else ""
