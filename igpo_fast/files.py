"""Atomic files and folders, and refusals of the operating system in one line.

Content is written under ``.NAME.tmp`` and renamed when it is complete and on disk. If writing fails, the temporary is
removed, so that nothing half-written stays and the disk gets its space back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from igpo_fast.errors import InputError, RunError, StorageError
from igpo_fast.jsonl import json_bytes, json_value

AGAIN = "and the same command goes on"
REMEDIES = {
    errno.ENOSPC: f"the disk is full: make room, {AGAIN}",
    errno.EDQUOT: f"the disk quota is used up: make room, {AGAIN}",
    errno.EFBIG: f"the file-size limit is reached: raise it (ulimit -f), {AGAIN}",
    errno.EACCES: f"give this user the permission, {AGAIN}; or name another place",
    errno.EPERM: f"give this user the permission, {AGAIN}; or name another place",
    errno.EROFS: f"make the file system writable, {AGAIN}; or name another place",
    errno.ENOENT: "its folder does not exist: make or restore it, or name another place",
    errno.EEXIST: f"a file or folder of this name exists: move it, {AGAIN}",
    errno.ENOTDIR: f"a file is where a folder should be: move it, {AGAIN}",
    errno.EISDIR: f"a folder is where a file should be: move it, {AGAIN}",
}
"""Remedy by errno."""


@contextmanager
def storage(path: str | os.PathLike, doing: str = "write") -> Iterator[None]:
    """Refusals of the operating system inside the block become one line that names ``path``.

    Raises:
        StorageError: disk full, no permission, read-only, gone, ...; whichever library reports it.
    """
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        refusal = _refusal(error)
        if refusal is None:
            raise
        remedy = REMEDIES.get(refusal.errno, f"check the disk; once it works, {AGAIN.removeprefix('and ')}")
        raise StorageError(f"{path}: cannot {doing} ({refusal.strerror or refusal}); {remedy}") from error


def _refusal(error: BaseException | None) -> OSError | None:
    """The operating system's error behind ``error``. Rust libraries (safetensors, tokenizers) only quote it; torch.save
    raises its own RuntimeError while handling it."""
    if isinstance(error, OSError) and error.errno:  # libraries raise OSErrors without a number
        return error
    if quoted := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    return _refusal(error.__context__) if isinstance(error, RuntimeError) else None


def temporary_of(path: Path) -> Path:
    """The name under which ``path`` is written until it is complete."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write; it replaces ``path`` if the block ends without an error, else it is removed.

    Raises:
        InputError: another process is writing ``path``.
        StorageError: the operating system refuses.
    """
    temporary = temporary_of(path)
    with storage(path):
        # Not through a link: that would empty a file that is not ours.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "wb") as file:
            if not lock(file) or not _is_at(file, temporary):
                raise InputError(f"{path}: another process is writing it; wait for that process, or name another file")
            try:
                file.truncate()
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        sync(path.parent)


def _is_at(file: IO, path: Path) -> bool:
    """Whether ``path`` still names the open ``file``: another process may have renamed it before we had its lock."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.lstat(path))
    except FileNotFoundError:
        return False


@contextmanager
def atomic_folder(path: Path, owner: str = "") -> Iterator[Path]:
    """A folder to fill; it becomes ``path`` if the block ends without an error, else it is removed. A folder that has
    the name by then stays. Files get the modes of new files of this process.

    Args:
        owner: distinguishes the temporaries of processes that may write ``path`` at the same time.
    Raises:
        StorageError: the operating system refuses.
    """
    temporary = temporary_of(path.with_name(path.name + owner))
    with storage(path):
        remove(temporary)
        temporary.mkdir()
        try:
            yield temporary
            mode = temporary.stat().st_mode & 0o666
            for entry in temporary.rglob("*"):
                if entry.is_file():
                    entry.chmod(mode)
                sync(entry)
            sync(temporary)
            try:
                os.replace(temporary, path)
            except OSError:
                if not path.is_dir():
                    raise
            sync(path.parent)
        finally:
            with suppress(OSError):
                remove(temporary)


def append(path: Path, line: bytes) -> None:
    """Append to a file; it is on disk when this returns. If that fails, the file is as before.

    Raises:
        StorageError: the operating system refuses.
    """
    with storage(path), open(path, "ab", buffering=0) as file:
        size = file.tell()
        try:
            while line:
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                file.truncate(size)
            raise


def remove(path: Path) -> None:
    """Delete a file, a folder with its content, or a link (not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def check_writable(folder: Path) -> None:
    """Make ``folder`` and check that files can be made in it, before long work whose result it will hold.

    Raises:
        StorageError: files cannot be made there.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def lock(file: IO, *, wait: bool = False) -> bool:
    """Lock an open file for this process; the lock is released when it is closed, however the process ends.
    Returns False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """SHA-256 in hexadecimal of a file, or of the names and contents of a folder's files without hidden ones."""
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = [(file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file()]
    listed = [(name, sha256(file)) for name, file in sorted(files) if not re.search(r"(^|/)\.", name)]
    return hashlib.sha256(repr(listed).encode(errors="surrogateescape")).hexdigest()


def write_manifest(folder: Path, **about) -> None:
    """Write manifest.json: ``about`` and the size and digest of every file of the folder."""
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / "manifest.json").write_bytes(json_bytes({**about, "files": files}, indent=True))


def check_manifest(folder: Path, remedy: str) -> dict:
    """Compare every file of a folder with manifest.json, and return the manifest.

    Args:
        remedy: end of the error's line.
    Raises:
        InputError: a file is missing or has changed.
        StorageError: a file cannot be read.
    """
    manifest = folder / "manifest.json"
    with storage(folder, "read"):
        try:
            content = json_value(manifest.read_bytes() if manifest.is_file() else b"", manifest)
            files = {name: (entry["size"], entry["sha256"]) for name, entry in content["files"].items()}
        except (InputError, KeyError, TypeError, AttributeError):
            raise InputError(f"{manifest}: missing or damaged; {remedy}") from None
        for name, (size, digest) in files.items():
            path = folder / name
            if not path.is_file():
                raise InputError(f"{path}: missing from the checkpoint; {remedy}")
            if path.stat().st_size != size or sha256(path) != digest:
                raise InputError(f"{path}: damaged (it differs from manifest.json); {remedy}")
    return content
