"""Demonstrations from files, for the warm start: trajectories as tokens and their authors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from igpo_fast.data.rows import rows_of
from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import Dialect
from igpo_fast.trajectories import Record, read_row
from igpo_fast.transcripts import Chat, Tags, check_known, check_sampled, make_writer, unknown_id

PROMPT, RESPONSE, WRITTEN = -1, 0, 1
"""Author of a token: the prompt's are not trained, the environment's with a small weight, the policy's fully."""


@dataclass(frozen=True)
class Demonstrations:
    """Trajectories of files, ready to train on."""

    written: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    """Tokens and their authors, int [L] each."""
    warnings: tuple[str, ...] = ()
    """Notes for the user, one line each."""


NONE_GIVEN = Demonstrations()


def joined(pieces: list[tuple[np.ndarray, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pieces of one author each, laid end to end: tokens and their authors, int [L]."""
    return np.concatenate([ids for ids, _ in pieces]), np.concatenate([np.full(len(ids), who) for ids, who in pieces])


def read_demonstrations(source: str, dialect: Dialect, max_tokens: int) -> Demonstrations:
    """The trajectories of ``sft.demonstrations``. Those without a prompt of their own get the dialect's.

    Args:
        max_tokens: longer ones are left out.
    Raises:
        InputError: a row that is no trajectory or cannot be written in the dialect, naming it; none that fits.
    """
    writer, unknown = make_writer(dialect), unknown_id(dialect.tokenizer)
    kept, long, silent = [], 0, 0
    for row in rows_of(source):
        pieces = _pieces(read_row(row.values, row.where, scored=False), writer)
        written = joined(pieces)
        check_known(written[0], unknown, row.where)
        if len(written[0]) > max_tokens:
            long += 1
            continue
        kept.append(written)
        silent += any(who == WRITTEN and not dialect.parse(dialect.decode(ids)) for ids, who in pieces)
    if not kept:
        raise InputError(
            f"sft.demonstrations={source}: no trajectory of at most rollout.max_tokens={max_tokens} tokens; give "
            "others, or raise it"
        )
    warnings = []
    if long:
        warnings.append(
            f"sft.demonstrations: {long:,} of {len(kept) + long:,} are left out, because they are longer than "
            f"rollout.max_tokens={max_tokens}"
        )
    if silent:
        warnings.append(
            f"sft.demonstrations: {silent:,} of {len(kept):,} have a turn in which the dialect reads no action; the "
            "policy learns to write such turns"
        )
    return Demonstrations(tuple(kept), tuple(warnings))


def _pieces(record: Record, writer: Tags | Chat) -> list[tuple[np.ndarray, int]]:
    """Tokens by author: the prompt, then of each turn its own and the responses to it."""
    if record.rollout:
        rollout = check_sampled(record, writer.dialect, len(writer.dialect.tokenizer))
        prompt, turns = rollout.prompt_ids, rollout.turns
    else:
        prompt, turns = writer.write(record, apart=True, last=True)
    pieces = [(prompt, PROMPT)]
    for number, turn in enumerate(turns, start=1):
        if not len(turn.ids):
            raise InputError(f"{record.where}: turn {number} has no tokens; give it a text")
        if not len(turn.response_ids) and number < len(turns):
            raise InputError(
                f"{record.where}: nothing responds to turn {number}; join it with the next, or leave the line out"
            )
        pieces += [(turn.ids, WRITTEN), (turn.response_ids, RESPONSE)]
    return pieces
