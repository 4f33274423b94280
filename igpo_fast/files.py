"""Files that appear under their names whole: written to ``.NAME.tmp``, fsynced, renamed."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """The name under which ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write; it replaces ``path`` when the block ends without an error."""
    with open(temporary_of(path), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary_of(path), path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
