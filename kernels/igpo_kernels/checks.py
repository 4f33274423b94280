"""Checks of arguments that all ops share."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
import torch


def check_tensors(op: str, **given: Any) -> None:
    """Raise ValueError for an argument that is neither a tensor nor None."""
    for name, x in given.items():
        if x is not None and not isinstance(x, torch.Tensor):
            raise ValueError(f"{op}: {name} is a {type(x).__name__}; give a tensor: torch.as_tensor({name})")


def number(op: str, name: str, x: Any) -> float:
    """``x`` as a float: a Python or numpy number, or a tensor that holds one and has no gradient.

    Raises:
        ValueError: anything else.
    """
    if isinstance(x, torch.Tensor) and x.numel() == 1 and not x.requires_grad:
        x = x.item()
    if isinstance(x, bool) or not isinstance(x, numbers.Real):
        what = f"a tensor {tuple(x.shape)}" if isinstance(x, torch.Tensor) else repr(x)
        gradient = ", with gradient" if isinstance(x, torch.Tensor) and x.requires_grad else ""
        raise ValueError(f"{op}: got {name} {what}{gradient}; give a plain number")
    return float(x)


def whole_numbers(owner: str, name: str, x: Any, least: int) -> np.ndarray:
    """``x``, an array or a list, as int64 [n]; ValueError unless all are whole numbers of at least ``least``."""
    x = np.asarray(x)
    if x.ndim != 1 or (len(x) and (x.dtype.kind not in "iu" or int(x.min()) < least)):
        what = f"{x.dtype} {list(x.shape)}" + (f" from {x.min()}" if x.ndim == 1 and x.dtype.kind in "iuf" else "")
        raise ValueError(f"{owner}: {name} are {what}; give one row of whole numbers of at least {least}")
    return x.astype(np.int64)
