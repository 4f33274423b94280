"""Memory that nobody wrote, made visible."""

from __future__ import annotations

import torch


class Poison(torch.overrides.TorchFunctionMode):
    """Every float tensor made without values holds NaN: what a kernel leaves unwritten shows."""

    MAKERS = (torch.empty, torch.empty_like, torch.Tensor.new_empty)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return out.fill_(float("nan")) if func in self.MAKERS and out.is_floating_point() else out
