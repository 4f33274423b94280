"""Turns' actions by their kind."""

from igpo_fast.types import ANSWER, INVALID, SEARCH, Action, answer_with, search_for


def doing(action: str, argument: str = "x") -> tuple[Action, ...]:
    """The actions of a turn that searches, answers or is malformed."""
    return {SEARCH: (search_for(argument),), ANSWER: (answer_with(argument),), INVALID: ()}[action]
