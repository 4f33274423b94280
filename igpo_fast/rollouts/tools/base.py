"""The interface of tools: results, failures, counters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter

from igpo_fast.errors import ToolError
from igpo_fast.types import ToolResult

FOUND = ("calls", "passages", "empty")
"""Counters of every tool: calls, passages found, calls that found none."""
CAUSES = ("timeouts", "unreachable", "rate_limited", "server_errors", "refused", "malformed", "too_large")
"""Counters of the causes of failed attempts."""
COUNTS = (*FOUND, "failures", "retries", *CAUSES)
"""Counters of a tool that can fail: also calls that failed for good, and retries."""


class Tool(ABC):
    """A search tool: a query in, passages out. Calling it searches and counts; a tool defines ``search``."""

    counted: tuple[str, ...] = FOUND
    """The names in ``counts``, for the metrics."""
    where = "data.corpus"
    """The setting that names the source of passages, for messages."""

    def __init__(self):
        self.counts: Counter[str] = Counter()

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """Search ``corpus`` (``Question.corpus``) for ``query``.

        Raises:
            ToolError: the search failed for good, and ``search.on_failure`` is ``stop``.
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
        """Check before a run that the tool answers ``query``. Nothing is counted.

        Raises:
            ToolError: the tool does not answer.
        """

    async def aclose(self) -> None:  # noqa: B027 (most tools keep nothing)
        """Close resources of the running event loop before it ends. A later call opens them anew."""


async def close(*parts: object) -> None:
    """Close resources of tools and engines in the running event loop before it ends; engines may have no ``aclose``."""
    for part in parts:
        if hasattr(part, "aclose"):
            await part.aclose()


def take_counts(tool: Tool, what: str) -> tuple[dict[str, float], str]:
    """Read a tool's counts for ``what`` ("step 3") and reset them to 0.

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
