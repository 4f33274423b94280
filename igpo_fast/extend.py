"""Objects of users' own code that settings name: ``package.module:name`` or ``path/to/file.py:name``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache, reduce
from pathlib import Path
from types import ModuleType
from typing import Any

from igpo_fast.errors import InputError, RunError, reason_of

_SPEC = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*|.+\.py):(?P<name>[^\W\d]\w*(\.[^\W\d]\w*)*)")


def is_spec(text: str) -> bool:
    """Whether ``text`` has the form of a name that ``named`` looks up.

    >>> is_spec("my.rewards:judge"), is_spec("examples/judge.py:judge"), is_spec("f1")
    (True, True, False)
    """
    return _SPEC.fullmatch(text) is not None


def named(spec: str, key: str) -> Callable[..., Any]:
    """The function or class that ``spec`` names. The current folder is importable; each module is imported once.

    Args:
        spec: ``package.module:name`` or ``path/to/file.py:name``.
        key: the setting that holds it, for messages.
    Raises:
        InputError: there is no such module, file or name, importing fails, or what it names cannot be called.
    """
    where, found = f"{key}={spec}", _SPEC.fullmatch(spec)
    if not found:
        raise InputError(f"{where}: not the name of an object; give package.module:name or path/to/file.py:name")
    module, name = found["module"], found["name"]
    try:
        found_module = imported(module)
    except (Exception, SystemExit) as error:
        if isinstance(error, FileNotFoundError) and module.endswith(".py") and not os.path.isfile(module):
            raise InputError(f"{where}: there is no file {module} here; correct the path") from None
        kind = type(error).__name__
        raise InputError(f"{where}: {module} does not import ({kind}: {reason_of(error)}); correct it") from error
    try:
        thing = reduce(getattr, name.split("."), found_module)
    except AttributeError:
        raise InputError(f"{where}: {module} has no {name}; define it there, or correct the name") from None
    if not callable(thing):
        raise InputError(f"{where}: {name} is {type(thing).__name__}, not a function or class; name one")
    return thing


def made(spec: str, key: str, *arguments: Any, **options: Any) -> Any:
    """What the function or class that ``spec`` names makes of the arguments.

    Raises:
        InputError: ``named``'s, or it raises or makes nothing.
    """
    try:
        thing = named(spec, key)(*arguments, **options)
    except RunError:
        raise
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        why = f"{type(error).__name__}: {reason_of(error)}, {place.filename}:{place.lineno}"
        raise InputError(f"{key}={spec}: it raised {why}; correct it") from error
    if thing is None:
        raise InputError(f"{key}={spec}: it returned None; return what it makes")
    return thing


def file_of(spec: str) -> str:
    """The source file of the module that ``spec`` names; empty if there is none."""
    found = _SPEC.fullmatch(spec)
    if not found:
        return ""
    if found["module"].endswith(".py"):
        return found["module"]
    _make_current_folder_importable()
    try:
        origin = importlib.util.find_spec(found["module"])
    except (ImportError, ValueError):
        return ""
    return origin.origin or "" if origin else ""


def imported(module: str) -> ModuleType:
    """The module ``package.module``, or that of the file ``path/to/file.py``. Raises whatever its import raises."""
    _make_current_folder_importable()
    return _of_file(Path(module).resolve()) if module.endswith(".py") else importlib.import_module(module)


@cache
def _of_file(path: Path) -> ModuleType:
    """The module of a file, known by its path: its name alone may be another module's."""
    spec = importlib.util.spec_from_file_location(str(path), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and type hints look modules up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _make_current_folder_importable() -> None:
    """Last on the path, so that a file of the user's replaces no library."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
