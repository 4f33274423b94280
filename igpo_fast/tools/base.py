"""What a tool is, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from igpo_fast.errors import ToolError

COUNTS = (
    "calls", "failures", "retries",
    "timeouts", "unreachable", "rate_limited", "server_errors", "refused", "malformed", "too_large",
)  # fmt: skip
"""What a tool counts: calls, those that failed for good, attempts after the first; then why attempts failed."""


@dataclass(frozen=True)
class Passage:
    """A retrievable piece of text."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class ToolResult:
    """What a tool call brought."""

    passages: tuple[Passage, ...]
    """Best first; empty when nothing was found."""
    failure: str = ""
    """What the policy reads in place of passages: the call failed for good. Empty if it did not."""


class Tool(Protocol):
    """A search tool: a query in, passages out.

    One that can fail has an attribute ``counts``, a Counter of ``COUNTS``; one that keeps connections has ``aclose``.
    """

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """Search ``corpus`` (``Question.corpus``) for ``query``."""
        ...


async def close(*parts: object) -> None:
    """Let tools and engines that have ``aclose`` close what belongs to this event loop, which ends."""
    for part in parts:
        if hasattr(part, "aclose"):
            await part.aclose()


def settle(tool: Tool, what: str) -> tuple[dict[str, float], str]:
    """What a tool counted during ``what`` ("step 3"), its counts set back to 0.

    Returns:
        ``tool/NAME`` for each of ``COUNTS``, and a warning if calls failed for good, else ""; nothing of a tool that
        does not count.
    Raises:
        ToolError: every call failed.
    """
    if not hasattr(tool, "counts"):
        return {}, ""
    counts = {name: tool.counts[name] for name in COUNTS}
    tool.counts.clear()
    found = {f"tool/{name}": float(count) for name, count in counts.items()}
    calls, failures = counts["calls"], counts["failures"]
    if not failures:
        return found, ""
    why = ", ".join(f"{name.replace('_', ' ')} {counts[name]}" for name in COUNTS[3:] if counts[name])
    if failures == calls:
        raise ToolError(
            f"{what}: every search failed ({calls} calls; {why}); see that the server at search.url answers"
        )
    return found, f"{what}: {failures:,} of {calls:,} searches failed for good ({why}); the policy read so"
