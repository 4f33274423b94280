"""The processes of a run (ranks), and what they tell each other on the host.

Each rank samples and trains on its share. What follows from the whole batch (weights of the loss, statistics, the
choice of groups, who takes which group) is computed by every rank alike, so host objects are all that is exchanged
here; gradients and weights are the learner's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from igpo_fast.errors import RunError

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
PATIENCE = timedelta(days=7)
"""How long an exchange waits for the slowest rank: rollouts take as long as they take. A rank that dies closes its
connections, which ends the exchange at once."""


class Ranks:
    """This process among ``size``; without torchrun's environment the only one.

    Raises:
        RunError: the other processes cannot be reached.
    """

    def __init__(self):
        self.number, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        """Number of this process on its host, and of its GPU."""
        self._group = None
        if self.size > 1:
            try:
                if not dist.is_initialized():
                    dist.init_process_group("gloo", timeout=PATIENCE)
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)
            except (RuntimeError, ValueError) as error:
                raise RunError(f"rank {self.number}: cannot reach the other processes ({error})") from error

    def close(self) -> None:
        """Leave the other processes. Without it threads of torch's groups may outlive Python and abort the process."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes the run folder and the display."""
        return self.number == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """This rank's share of what all ranks have."""
        return items[self.number :: self.size]

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by its number, on every rank; all must call it.

        Raises:
            RunError: a rank has died.
        """
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise RunError(f"rank {self.number}: another rank has died; its log says why") from error
        return values

    def together(self, part: Callable[[], T]) -> list[T]:
        """Run ``part`` on every rank and gather what it returns. If it raises anywhere, it raises everywhere, so that
        no rank waits for one that has given up, and the error is marked as known to all (``shared``).

        Raises:
            RunError: it failed on another rank.
            Exception: what ``part`` raises on this one.
        """
        error, value = None, None
        try:
            value = part()
        except Exception as raised:
            error = raised
        told = self.gather((value, None if error is None else (type(error).__name__, str(error))))
        failed = [number for number, (_, reason) in enumerate(told) if reason is not None]
        if failed:
            kind, text = told[failed[0]][1]
            error = error or RunError(f"rank {failed[0]}: {text or kind}")
            error.shared = True
            raise error
        return [value for value, _ in told]

    def first_alone(self, part: Callable[[], T]) -> T:
        """Run ``part`` on the first rank; every rank gets what it returns, or fails as it does."""
        return self.together(part if self.first else lambda: None)[0]

    @staticmethod
    def on_all(error: E) -> E:
        """An error that every rank is about to raise, for all compute it from the same numbers."""
        error.shared = True
        return error

    def knows_all(self, error: BaseException) -> bool:
        """Whether every rank has stopped at the same point because of ``error``, so that ranks may go on exchanging."""
        return self.size == 1 or getattr(error, "shared", False)
