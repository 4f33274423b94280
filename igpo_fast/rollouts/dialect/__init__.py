"""Dialects, which write and parse turns: ``tags`` (Search-R1's style) and ``chat`` (the model's own template)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from igpo_fast.rollouts.dialect.base import Dialect
from igpo_fast.rollouts.dialect.chat import CHAT_SYSTEM, SEARCH_TOOL, TODAY, ChatDialect
from igpo_fast.rollouts.dialect.encoding import unquote
from igpo_fast.rollouts.dialect.tags import BARE, FULL, TagsDialect, Wording

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BARE", "CHAT_SYSTEM", "FULL", "SEARCH_TOOL", "TODAY", "ChatDialect", "Dialect", "TagsDialect", "Wording",
    "make_dialect", "unquote",
]  # fmt: skip


def make_dialect(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    system: str | None = None,
    thinking: bool | None = None,
    wrapper: str | None = None,
    **budgets: int,
) -> Dialect:
    """The dialect ``tags`` or ``chat`` for a tokenizer.

    Args:
        system: instructions before the question; None takes the dialect's own, "" has none.
        thinking: ``enable_thinking`` for templates of ``chat``; None keeps their default.
        wrapper: text around a forced answer, which replaces ``{}``; None takes the dialect's own.
        budgets: ``Dialect``'s ``max_passage_tokens``, ``max_answer_tokens`` and ``max_answers``.
    Raises:
        InputError: the tokenizer cannot serve the dialect.
    """
    if name == "tags":
        return TagsDialect(tokenizer, system=system, wrapper=wrapper, **budgets)
    return ChatDialect(tokenizer, system=system, thinking=thinking, wrapper=wrapper, **budgets)
