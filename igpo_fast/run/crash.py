"""One line per exception for the user: a remedy, or for our bugs the file with the traceback."""

from __future__ import annotations

import errno
import sys
import tempfile
import traceback

from igpo_fast.errors import RunError, masked


def line_of(error: Exception) -> str | None:
    """The line for an error that is not our bug: bad input, the system's refusals, no memory, a missing library."""
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno not in (None, errno.EPIPE):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; check that it is there, may be read and written, and that the disk has room"
    if isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("igpo_"):
        return f"{error}; pip install 'igpo-fast[train]'"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error):
        return (
            f"out of memory ({str(error)[:200] or 'no details'}); lower train.token_budget or rollout.concurrency, "
            "or set model.gradient_checkpointing=true"
        )
    return None


def report(error: Exception) -> str:
    """The line for a bug; its traceback is written to a file in the temporary folder, or to stderr if that fails."""
    what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    text = masked("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="igpo-fast-", suffix=".log", delete=False) as file:
            file.write(text)
        where = file.name
    except OSError:
        print(text, file=sys.stderr)
        where = "the lines above"
    return f"internal: {masked(what)}; this is a bug: please report it with {where}"
