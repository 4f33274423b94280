"""Arithmetic written as text: exact, of bounded size, and nothing but arithmetic."""

from __future__ import annotations

import ast
import operator
import re
from decimal import Context
from fractions import Fraction

NOT_ARITHMETIC, NO_QUOTIENT, TOO_LARGE = "not arithmetic", "division by zero", "too large"
"""What ``calculate`` says in place of a number."""
LONGEST = 200
"""Characters of the longest expression."""
_LARGEST = 1024
"""Bits of the largest numerator and denominator, which bound the time of each operation."""
_WRITTEN = re.compile(r"[0-9.+*/%() -]+")
_ROUNDED = Context(prec=12)
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


class ArithmeticFault(ValueError):
    """An expression without a number; says which of the three faults it has."""


def calculate(expression: str) -> str:
    """The number that an expression of numbers, ``+ - * / // % **`` and parentheses stands for.

    Computes with fractions, in Python's order of operations. A whole number is written with all its digits, another one
    rounded to 12.

    >>> calculate("0.1 + 0.2 * 3"), calculate("2 / 3")
    ('0.7', '0.666666666667')

    Raises:
        ArithmeticFault: not such an expression, a division by zero, or an expression or intermediate result that is too
            large.
    """
    expression = expression.strip()
    if len(expression) > LONGEST:
        raise ArithmeticFault(TOO_LARGE)
    if not _WRITTEN.fullmatch(expression):  # so that neither names nor calls ever reach Python's parser
        raise ArithmeticFault(NOT_ARITHMETIC)
    try:
        number = _value(ast.parse(expression, mode="eval").body, expression)
    except (SyntaxError, MemoryError, RecursionError):  # the parser's words for too many parentheses
        raise ArithmeticFault(NOT_ARITHMETIC) from None
    except ZeroDivisionError:
        raise ArithmeticFault(NO_QUOTIENT) from None
    if number.denominator == 1:
        return str(number.numerator)
    return str(_ROUNDED.divide(number.numerator, number.denominator))


def _value(node: ast.expr, expression: str) -> Fraction:
    match node:
        case ast.Constant():
            try:  # from the digits as written, which a float would round
                number = Fraction(expression[node.col_offset : node.end_col_offset])
            except ValueError:  # an ellipsis
                raise ArithmeticFault(NOT_ARITHMETIC) from None
        case ast.UnaryOp():
            number = _OPERATORS[type(node.op)](_value(node.operand, expression))
        case ast.BinOp(op=ast.Pow()):
            number = _power(_value(node.left, expression), _value(node.right, expression))
        case ast.BinOp():
            number = Fraction(_OPERATORS[type(node.op)](_value(node.left, expression), _value(node.right, expression)))
        case _:
            raise ArithmeticFault(NOT_ARITHMETIC)
    if _bits(number) > _LARGEST:
        raise ArithmeticFault(TOO_LARGE)
    return number


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:  # a root, which is no fraction
        raise ArithmeticFault(NOT_ARITHMETIC)
    if (_bits(base) - 1) * abs(exponent) > _LARGEST:  # the least that the power has
        raise ArithmeticFault(TOO_LARGE)
    return base**exponent.numerator


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())
