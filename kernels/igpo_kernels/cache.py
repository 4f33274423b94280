"""What host data keep beside themselves: copies on devices and schedules, made once."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch


def on_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A copy on a device, which the host does not wait for: from pinned memory, for a copy from other memory would wait
    for all that the device has yet to do."""
    cuda = torch.device(device).type == "cuda"
    return torch.tensor(array, pin_memory=cuda).to(device, non_blocking=cuda)


class Cached:
    """For frozen dataclasses with a field ``cache``, a dict. Its values belong to the other fields:
    ``dataclasses.replace`` and pickle give an object with an empty cache."""

    cache: dict

    def __getstate__(self) -> dict:
        return {**self.__dict__, "cache": {}}

    def cached(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """``cache[key]``, made by ``make`` the first time.

        Values made under inference mode can be used in training, and torch.compile does not trace ``make``.
        """
        if key not in self.cache:
            _fill(self.cache, key, make)
        return self.cache[key]


@torch.compiler.disable
def _fill(cache: dict, key: Hashable, make: Callable[[], Any]) -> None:
    with torch.inference_mode(False):
        cache[key] = make()
