"""A process group of the trainer (rank 0) and a replica's workers, for weights: NCCL on GPUs, gloo on CPUs.

It stands beside torch's default group: a replica comes and goes during a run, with a group of its own, so that its loss
is noticed by its own transfers alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


class Broadcast:
    """A member of the group. Every call waits for the other members.

    Args:
        store: one store, in which the members find each other.
        rank: 0 sends, the others receive.
        size: members.
        backend: ``nccl`` or ``gloo``.
        timeout: seconds that a call waits for the others.
    Raises:
        RuntimeError: the others did not come.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, backend: str, timeout: float):
        self._store, self._wait = store, timedelta(seconds=timeout)
        store.set_timeout(self._wait)
        if backend == "nccl":
            with _errors_are_ours():
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = 2 * self._wait  # the watchdog's, after that of every call
                self._group = dist.ProcessGroupNCCL(store, rank, size, options)
        else:
            self._group = dist.ProcessGroupGloo(store, rank, size, self._wait)

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Send a tensor, or receive one in its place: any shape and dtype, contiguous, on the backend's device.

        Raises:
            RuntimeError: another member is gone, or does not come within the timeout.
        """
        options = dist.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        # With a time-out NCCL's wait, too, lasts until the tensor has travelled.
        self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait(self._wait)
        return tensor

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send them one by one."""
        for tensor in tensors:
            self(tensor)


@contextmanager
def _errors_are_ours() -> Iterator[None]:
    """NCCL groups that are made inside do not end the process when another member dies."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(name)
    os.environ[name] = "2"  # the watchdog gives up the communicator alone
    try:
        yield
    finally:
        os.environ.pop(name) if before is None else os.environ.update({name: before})


def open_store() -> dist.TCPStore:
    """A store of this process, on a free port (``.port``)."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
