"""Checks of arguments that all ops share."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

import numpy as np
import torch

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_tensors(op: str, *, optional: Collection[str] = (), **given: Any) -> None:
    """Raise ValueError for an argument that is no tensor; those named in ``optional`` may be None."""
    for name, x in given.items():
        if not isinstance(x, torch.Tensor) and (x is not None or name not in optional):
            how = "" if x is None else f": torch.as_tensor({name})"
            raise ValueError(f"{op}: {name} is {_kind(x)}; give a tensor{how}")


def check_kind(op: str, name: str, x: Any, kind: type) -> None:
    """Raise ValueError unless ``x`` is a ``kind``."""
    if not isinstance(x, kind):
        raise ValueError(f"{op}: {name} is {_kind(x)}; give a {kind.__name__}")


def check_devices(op: str, **given: torch.Tensor | None) -> None:
    """Raise ValueError unless all tensors lie where the first does."""
    (first, base), *others = given.items()
    for name, x in others:
        if x is not None and x.device != base.device:
            raise ValueError(f"{op}: {name} on {x.device}, {first} on {base.device}; move them to one device")


def integers(op: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """``x`` as int64; ValueError unless its dtype is an integer's."""
    if x.dtype not in INTEGERS:
        raise ValueError(f"{op}: {name} must be integers, got {x.dtype}; convert them with .long()")
    return x.long()


def is_number(x: Any) -> bool:
    """Whether ``x`` is a Python or numpy number; True and False are none."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_whole(x: Any) -> bool:
    """Whether ``x`` is a Python or numpy integer; True and False are none."""
    return is_number(x) and isinstance(x, numbers.Integral)


def is_finite(x: Any) -> bool:
    """``is_number``, and neither NaN nor infinite."""
    return is_number(x) and math.isfinite(x)


def check_finite(owner: str, name: str, x: Any, or_inf: bool = False) -> None:
    """Raise ValueError unless ``x`` is finite or, with ``or_inf``, positive infinity."""
    if not is_finite(x) and not (or_inf and is_number(x) and x == math.inf):
        raise ValueError(f"{owner}: {name} must be a finite number, got {described(x)}")


def described(x: Any) -> str:
    """``x`` in a message: in one line, arrays by their shapes."""
    return f"a {type(x).__name__.lower()} {tuple(x.shape)}" if isinstance(x, (torch.Tensor, np.ndarray)) else repr(x)


def _kind(x: Any) -> str:
    return "None" if x is None else f"a {type(x).__name__}"


def number(op: str, name: str, x: Any) -> float:
    """``x`` as a float: a Python or numpy number, or a tensor that holds one and has no gradient.

    Raises:
        ValueError: anything else.
    """
    if isinstance(x, torch.Tensor) and x.numel() == 1 and not x.requires_grad:
        x = x.item()
    if not is_number(x):
        gradient = ", with gradient" if isinstance(x, torch.Tensor) and x.requires_grad else ""
        raise ValueError(f"{op}: got {name} {described(x)}{gradient}; give a plain number")
    return float(x)


def whole_numbers(owner: str, name: str, x: Any, least: int) -> np.ndarray:
    """``x``, an array or a list, as int64 [n]; ValueError unless all are whole numbers of at least ``least``."""
    x = np.asarray(x)
    if x.ndim != 1 or (len(x) and (x.dtype.kind not in "iu" or int(x.min()) < least)):
        what = f"{x.dtype} {list(x.shape)}" + (f" from {x.min()}" if x.ndim == 1 and x.dtype.kind in "iuf" else "")
        raise ValueError(f"{owner}: {name} are {what}; give one row of whole numbers of at least {least}")
    return x.astype(np.int64)
