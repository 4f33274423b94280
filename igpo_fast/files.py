"""Files that appear under their names whole: written to ``.NAME.tmp``, fsynced, renamed."""

from __future__ import annotations

import fcntl
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from igpo_fast.errors import InputError


def temporary_of(path: Path) -> Path:
    """The name under which ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write; it replaces ``path`` when the block ends without an error, else it vanishes.

    Raises:
        InputError: another process is writing ``path``.
    """
    temporary = temporary_of(path)
    with open(temporary, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{path}: another process writes it; wait for that one, or name another file") from None
        try:
            file.truncate(0)
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
