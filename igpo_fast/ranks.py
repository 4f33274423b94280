"""The processes of a run (ranks), and what they tell each other on the host.

Each rank samples and trains on its share. What follows from the whole batch (weights of the loss, statistics, the
choice of groups, who takes which group) is computed by every rank alike, so host objects are all that is exchanged
here; gradients and weights are the learner's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from igpo_fast import heartbeat
from igpo_fast.errors import RunError

T = TypeVar("T")
E = TypeVar("E", bound=Exception)
PATIENCE = timedelta(days=7)
"""How long an exchange waits for the slowest rank: rollouts take as long as they take. A rank that dies closes its
connections, which ends the exchange at once; one that is stuck is found by its heartbeat."""
_FAILURE = "failure"
"""Key of what the first rank to fail said."""


class _GoneError(RunError):
    """An exchange broke off because another rank is gone."""


class Ranks:
    """This process among ``size``; without torchrun's environment the only one.

    Raises:
        RunError: the other processes cannot be reached.
    """

    def __init__(self):
        self.number, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        """Number of this process on its host, and of its GPU."""
        self.log_end: Callable[[int], str] = lambda rank: ""
        """The last lines of a rank's log, for the message about that rank."""
        self._group = None
        if self.size > 1:
            try:
                if not dist.is_initialized():
                    dist.init_process_group("gloo", timeout=PATIENCE)
                self._store = _connect()
                beats = heartbeat.Heartbeat(self._store, self.number, self.size, self._give_up)
                self._group = dist.new_group(backend="gloo", timeout=PATIENCE)  # waits for all ranks
            except (RuntimeError, ValueError) as error:
                raise RunError(f"rank {self.number}: cannot reach the other processes ({error})") from error
            beats.start()

    def close(self) -> None:
        """Leave the other processes. Without it threads of torch's groups may outlive Python and abort the process.
        vLLM's groups lie inside ours, and it ends them all itself."""
        if self.size > 1 and dist.is_initialized() and "vllm" not in sys.modules:
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
            raise _GoneError(f"rank {self.number}: another rank has died; its log says why") from error
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

    def post(self, key: str, text: str) -> None:
        """Tell the others something, from any thread; nobody waits."""
        if self.size > 1:
            self._store.set(key, text)

    def posted(self, key: str) -> str | None:
        """What a rank has told under ``key``; None if nothing yet. From any thread."""
        return self._store.get(key).decode() if self._store.check([key]) else None

    def failure(self, error: Exception) -> Exception:
        """The error to end with on a rank whose ``error`` the others do not know: itself on the first rank to fail.
        The others fail because that rank is gone, so they end with its reason."""
        gone = isinstance(error, _GoneError | dist.DistError) or "gloo" in str(error)
        reason = str(error) if isinstance(error, RunError) else " ".join(f"{type(error).__name__}: {error}".split())
        try:
            if not gone:
                told = self._store.compare_set(_FAILURE, "", f"{self.number}:{reason}").decode()
            else:
                told = self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else ""
        except RuntimeError:  # the store went with the first rank, whose own line is in the terminal
            told = ""
        number, _, theirs = told.partition(":")
        if theirs:
            return error if theirs == reason else RunError(f"rank {number}: {theirs}")
        return _GoneError(f"rank {self.number}: another rank has died; its log says why") if gone else error

    def _give_up(self, stuck: Sequence[int]) -> None:
        """End this process, from a thread: the main thread may wait in a collective for ever."""
        who = f"rank{'s' * (len(stuck) > 1)} {', '.join(map(str, stuck))}"
        logs = "".join(map(self.log_end, stuck))
        line = (
            f"error: {who}: no sign of life for {heartbeat.BEAT * heartbeat.LIMIT:.0f} s (stopped, or stuck outside "
            f"Python); the run ends, and the same command goes on after its last checkpoint{logs}"
        )
        shown = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""  # clears the display's line, shows the cursor
        os.write(2, f"{shown}{line}\n".encode())
        os._exit(heartbeat.STALLED)


def _connect() -> dist.Store:
    """A connection of our own to the store at which the ranks meet: threads use it beside torch's own."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    # torchrun may start the ranks again and keep the store.
    return dist.PrefixStore(f"igpo-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
