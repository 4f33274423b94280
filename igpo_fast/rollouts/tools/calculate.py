"""The tool ``calculate``: exact arithmetic."""

from __future__ import annotations

from igpo_fast.arithmetic import ArithmeticFault, calculate
from igpo_fast.rollouts.tools.base import Tool, text_function
from igpo_fast.types import CALCULATE, Action, Question, ToolResult

CALCULATE_TOOL = text_function(
    CALCULATE,
    "Calculate exactly with numbers, + - * / // % ** and parentheses.",
    "expression",
    "An expression, like: (3 + 4) * 5",
)


class Calculate(Tool):
    """Computes an expression (``arithmetic.calculate``). It counts ``calls`` and, of those, ``empty`` ones, which have
    no number."""

    schemas = (CALCULATE_TOOL,)
    counted = ("calls", "empty")

    async def call(self, opened: Question, action: Action) -> ToolResult:
        self.counts["calls"] += 1
        try:
            return ToolResult(text=calculate(action.arguments["expression"]))
        except ArithmeticFault as fault:
            self.counts["empty"] += 1
            return ToolResult(text=str(fault))
