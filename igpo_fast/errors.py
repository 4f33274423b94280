"""Errors that end a command in one line. The CLI prints it and exits with code 2; any other exception is our bug."""

from __future__ import annotations

import re

_CREDENTIALS = re.compile(r"(//)[^/?#\s]*@|((?:^|[\s='\"])(?!//))[^/?#\s=:'\"]+:[^/?#\s]*@(?=[\w.\[-]+[:/])")
_SECRETS = re.compile(r"(?i)([?&][^=&#\s]*(?:key|token|secret|passw|auth|sig)[^=&#\s]*=)[^&#\s'\"]+")


def masked(text: str) -> str:
    """``text`` with ``***`` for the secrets of every URL in it: the part before ``@``, and the values of query
    parameters named like a key, token, secret, password or signature."""
    text = _CREDENTIALS.sub(lambda found: f"{found[1] or found[2]}***@", text)
    return _SECRETS.sub(r"\1***", text)


LONGEST = 1000
"""Characters of a message. Longer ones quote input that may be of any length; their middle is left out."""


class RunError(Exception):
    """Ends the command in one line: what was wrong, where, what to do. A run keeps every finished step.

    Secrets of URLs are masked.
    """

    def __init__(self, message: str = ""):
        line = masked(str(message))
        super().__init__(line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}")


class InputError(RunError, ValueError):
    """Bad input: a file, a setting, a model or a command that cannot be used as it is."""


class EngineError(RunError):
    """No engine answers. Nothing has changed since the last step, and the same run may go on later."""


class ToolError(RunError):
    """A tool failed for good. Nothing has changed since the last step, and the same run may go on later."""


class StorageError(RunError):
    """The operating system refused to read or write: disk full, no permission, read-only, gone."""


class DivergedError(RunError):
    """The model's numbers are no longer finite, or no longer what the engine samples from."""


def reason_of(error: BaseException, length: int = 200) -> str:
    """Another library's error message, in one line of at most ``length`` characters."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, auto_map, which is never run; use a model that transformers itself has"
    return " ".join(str(error).split())[:length] or type(error).__name__
