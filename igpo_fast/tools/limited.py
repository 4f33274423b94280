"""Any tool, with a limit on calls at a time and on how long each may take."""

from __future__ import annotations

import asyncio
from collections import Counter

from igpo_fast.errors import RunError, ToolError
from igpo_fast.tools.base import Tool, ToolResult, close


class LimitedTool:
    """A ``Tool`` that hands calls on to another.

    ``counts`` is the other tool's Counter, or one of its own where that does not count.

    Args:
        tool: it must be asynchronous: what never awaits can neither run beside others nor be given up.
        calls: most calls at a time; the rest wait their turn.
        timeout: seconds after which a call is cancelled; waiting for its turn does not count. A tool that goes on
            regardless keeps its turn, and what it brings late is not used.
        failure_text: what the policy reads when a call timed out; None raises ToolError.
    """

    def __init__(self, tool: Tool, *, calls: int, timeout: float, failure_text: str | None):
        self._tool, self._calls, self._timeout, self._failure_text = tool, calls, timeout, failure_text
        self._counts_calls = not hasattr(tool, "counts")
        self.counts: Counter[str] = Counter() if self._counts_calls else tool.counts
        self._loop: asyncio.AbstractEventLoop | None = None

    def check(self) -> None:
        """The other tool's check, where it has one: whether it can be used at all."""
        if hasattr(self._tool, "check"):
            self._tool.check()

    async def aclose(self) -> None:
        """The other tool's, where it has one."""
        await close(self._tool)

    async def __call__(self, query: str, corpus: str = "") -> ToolResult:
        """What the tool finds, or that it took too long.

        Raises:
            ToolError: the tool raised, or timed out and there is no ``failure_text``.
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:  # a semaphore belongs to an event loop, and each step has its own
            self._gate, self._loop = asyncio.Semaphore(self._calls), loop
        async with self._gate:
            self.counts["calls"] += self._counts_calls
            try:
                async with asyncio.timeout(self._timeout) as deadline:
                    result = await self._tool(query, corpus)
            except RunError:
                raise
            except Exception as error:
                if not (isinstance(error, TimeoutError) and deadline.expired()):
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    raise ToolError(f"search: the tool raised {reason}; correct it, then resume the run") from error
            if not deadline.expired():
                return result
        self.counts["timeouts"] += 1
        self.counts["failures"] += 1
        if self._failure_text is None:
            raise ToolError(
                f"search: no result within {self._timeout:g} s; raise rollout.tool_timeout, or let the policy read of "
                "it with search.on_failure=text"
            )
        return ToolResult((), failure=self._failure_text)
