"""Stop strings: turns that end by their text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


class StopStrings:
    """Finds the token that completes a stop string.

    Args:
        decode: token ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._may_complete: dict[tuple[tuple[str, ...], int], bool] = {}

    def completed(self, strings: tuple[str, ...], ids: np.ndarray | list[int]) -> bool:
        """Whether the last of a turn's tokens so far completes any of the strings in the turn's text."""
        if not strings or not len(ids):
            return False
        token = int(ids[-1])
        # Only a token that shows a string's last character can complete it. A token that decodes to a replacement
        # character may show it with its neighbours, and a decoder may add spaces between tokens.
        if (may := self._may_complete.get((strings, token))) is None:
            text = self._decode([token])
            may = any(s[-1] in text or s[-1].isspace() or "\ufffd" in text for s in strings)
            self._may_complete[strings, token] = may
        if not may:
            return False
        # A token is a byte or more, and a character cut at the tail's start takes up to 4.
        tail = max(len(s.encode()) for s in strings) + 4
        text = self._decode([int(id) for id in ids[-tail:]])
        return any(s in text for s in strings)

    def end(self, strings: tuple[str, ...], ids: list[int]) -> int | None:
        """Number of a turn's tokens up to the end of a stop string; None if no string ends it."""
        return next((n for n in range(1, len(ids) + 1) if self.completed(strings, ids[:n])), None)
