"""Dialects, which write and parse turns: ``tags`` (Search-R1's style) and ``chat`` (the model's own template)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from igpo_fast.extend import made
from igpo_fast.rollouts.dialect.base import Dialect
from igpo_fast.rollouts.dialect.chat import CHAT_SYSTEM, TODAY, ChatDialect
from igpo_fast.rollouts.dialect.encoding import unquote
from igpo_fast.rollouts.dialect.parsing import Schema
from igpo_fast.rollouts.dialect.tags import BARE, FULL, TagsDialect, Wording, full_wording, tags_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BARE", "CHAT_SYSTEM", "FULL", "TODAY", "ChatDialect", "Dialect", "TagsDialect", "Wording",
    "full_wording", "make_dialect", "tags_of", "unquote",
]  # fmt: skip


def make_dialect(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    functions: Sequence[Schema],
    *,
    system: str | None = None,
    thinking: bool | None = None,
    wrapper: str | None = None,
    **budgets: int,
) -> Dialect:
    """The dialect ``tags``, ``chat`` or ``package.module:name`` for a tokenizer.

    Args:
        name: of one's own: what makes it, called with the same arguments as ``TagsDialect``.
        functions: the functions that turns may call, as ``Tool.schemas`` has them.
        system: instructions before the question; None takes the dialect's own, "" has none.
        thinking: ``enable_thinking`` for templates of ``chat``; None keeps their default.
        wrapper: text around a forced answer, which replaces ``{}``; None takes the dialect's own.
        budgets: ``Dialect``'s ``max_passage_tokens``, ``max_answer_tokens``, ``max_answers``, ``max_result_tokens``.
    Raises:
        InputError: the tokenizer cannot serve the dialect.
    """
    if name not in ("tags", "chat"):
        return made(name, "rollout.dialect", tokenizer, functions, system=system, wrapper=wrapper, **budgets)
    if name == "tags":
        return TagsDialect(tokenizer, functions, system=system, wrapper=wrapper, **budgets)
    return ChatDialect(tokenizer, functions, system=system, thinking=thinking, wrapper=wrapper, **budgets)
