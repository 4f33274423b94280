"""Files and folders that appear under their names whole, and refusals of the operating system in one line.

What is written stands under ``.NAME.tmp`` until it is complete and on disk, then it is renamed. Where writing fails,
the temporary goes, so that nothing half-written stays and the disk gets its room back.
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
    errno.ENOENT: "its folder is not there, or no longer: make or restore it, or name another place",
    errno.EEXIST: f"something of this name is in the way: move it, {AGAIN}",
    errno.ENOTDIR: f"a file is where a folder should be: move it, {AGAIN}",
    errno.EISDIR: f"a folder is where a file should be: move it, {AGAIN}",
}
"""What to do about an errno."""


@contextmanager
def storage(path: str | os.PathLike, doing: str = "write") -> Iterator[None]:
    """Refusals of the operating system inside the block become one line that names ``path``.

    Raises:
        StorageError: disk full, no permission, read-only, gone, ...; from whichever library met it.
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
    raises a RuntimeError of its own while it handles the file's."""
    if isinstance(error, OSError) and error.errno:  # libraries raise OSErrors of their own, without a number
        return error
    if quoted := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(quoted[1]), os.strerror(int(quoted[1])))
    return _refusal(error.__context__) if isinstance(error, RuntimeError) else None


def temporary_of(path: Path) -> Path:
    """The name under which ``path`` is written until it is whole."""
    return path.with_name(f".{path.name}.tmp")


@contextmanager
def atomic(path: Path) -> Iterator[io.BufferedWriter]:
    """A file to write; it replaces ``path`` when the block ends without an error, else it vanishes.

    Raises:
        InputError: another process is writing ``path``.
        StorageError: the operating system refuses.
    """
    temporary = temporary_of(path)
    with storage(path):
        # Not through a link: it would empty a file that is none of ours.
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        with open(descriptor, "wb") as file:
            if not lock(file) or not _is_at(file, temporary):
                raise InputError(f"{path}: another process writes it; wait for that one, or name another file")
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
    """A folder to fill; it becomes ``path`` when the block ends without an error, else it vanishes. A folder that has
    the name by then stays. Files get the modes that this process gives to new files.

    Args:
        owner: tells the temporary from those of other processes, where several may write ``path`` at a time.
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
    """Add to a file, on disk when this returns; where that fails, the file is as it was.

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
    """Delete a file, a folder with all in it, or a link (not what it points to); nothing is fine, too."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()


def check_writable(folder: Path) -> None:
    """Make ``folder`` and see that files can be made in it, before long work whose result goes there.

    Raises:
        StorageError: they cannot.
    """
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def lock(file: IO, *, wait: bool = False) -> bool:
    """Lock an open file for this process; the lock goes when it is closed, by whatever end. False: another has it."""
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
    """A file's content, in hexadecimal; of a folder the contents and names of its files, hidden ones left out."""
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
    """Read every file of a folder and compare it with manifest.json, whose content this returns.

    Args:
        remedy: ends the error's line.
    Raises:
        InputError: a file is missing or is not what was written.
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
                raise InputError(f"{path}: damaged (not what manifest.json says was written); {remedy}")
    return content
