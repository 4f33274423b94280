"""The tool ``python``: runs a program that the policy wrote and returns what it printed.

Each program runs in a process of its own, forked from a small interpreter, in an empty folder that is removed
afterwards, without the trainer's environment variables (where API keys are). ``Limits`` has seconds, memory, size of a
file, number of processes, characters of output. What the kernel allows beyond that is found out once, by
``isolation()``:

- ``network``: no network at all (a network namespace).
- ``processes``: signals no process but its own, and all of those end with it (a PID namespace).
- ``files``: reads nothing but the Python installation and the system's libraries, writes nothing but its folder
  (Landlock, Linux 6.2 or later).

What this does not protect from. Without ``files``, a program reads, changes and deletes whatever the user may; without
``network``, it sends it anywhere; without ``processes``, it may end the trainer. With all three: bugs of the kernel; a
disk filled with many files, each below the limit; processors and memory taken by many processes until the time is up.
Memory is limited per process. The number of processes is not limited if the trainer runs as root; otherwise, all of the
user's processes count where the kernel allows neither ``network`` nor ``processes``. A program sees which packages are
installed, and which files exist. Programs that may be hostile need a container or a virtual machine of their own.

The same program prints the same again, ``random`` and the order of sets included, unless it reads the clock, addresses,
or the kernel's randomness.
"""

from __future__ import annotations

import ast
import ctypes
import json
import linecache
import math
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
import types
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from igpo_fast.rollouts.tools.processes import Processes
from igpo_fast.rollouts.tools.worker import LIBC, die_with_parent, limit_memory, set_limit, why

ISOLATION = ("network", "processes", "files")
"""What a program can be kept from, where the kernel allows it."""
ENVIRONMENT = {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "PATH": "/usr/local/bin:/usr/bin:/bin", "PYTHONHASHSEED": "0"}
"""The environment variables of programs, beside HOME and TMPDIR, which name the program's folder."""

_HARNESS_SECONDS = 60.0
"""What a call may take beyond the program's own time before its process counts as hanging."""
_NOTE = 200
"""Characters left for what is said about the program's end."""
_PROGRAM = "<program>"
_CLONE_NEWIPC, _CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Time that it may run, and processor time of each of its processes."""
    max_characters: int = 4000
    """Characters of what it prints that are returned; the rest is left out."""
    memory: int = 1_000_000_000
    """Bytes that each of its processes may map beyond the interpreter's own."""
    file_size: int = 10_000_000
    """Bytes of each file that it writes."""
    processes: int = 64
    """Processes and threads that it may have; what the kernel counts is said above."""
    isolated: tuple[str, ...] = ISOLATION
    """Names of ``ISOLATION`` to insist on, usually ``isolation()``. Where one cannot be had, every call fails and no
    program runs."""


class NotRunError(Exception):
    """A program was not run, because a limit could not be set."""


def python_processes(limits: Limits, *, concurrency: int = 8) -> Processes:
    """The tool as ``Processes`` of the function ``python``, at most ``concurrency`` programs at once."""
    return Processes(
        f"{__name__}:python", seconds=limits.seconds + _HARNESS_SECONDS, max_characters=limits.max_characters + _NOTE,
        concurrency=concurrency, memory=0, settings={"limits": asdict(limits)}, environment=ENVIRONMENT,
    )  # fmt: skip


def isolation() -> tuple[str, ...]:
    """The names of ``ISOLATION`` that this machine allows, tried in another process."""
    tried = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:] = sys.argv[1:]; from {__name__} import _allowed; _allowed()",
         *sys.path], capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return tuple(json.loads(tried.stdout))


def _allowed() -> None:
    allowed = []
    for name in ISOLATION:
        with suppress(NotRunError):
            printed = python("1", asdict(Limits(seconds=_HARNESS_SECONDS, isolated=(name,))))
            assert printed == "1", printed
            allowed.append(name)
    print(json.dumps(allowed))


def python(code: str, limits: dict) -> str:
    """Run a Python program. Returns what it prints and the value of its last line, if that is an expression.

    Args:
        code: The program. Nothing is kept from earlier programs.
        limits: The fields of ``Limits``; the policy does not see them.

    Raises:
        NotRunError: a limit cannot be set here.
    """
    allowed = Limits(**limits)
    folder = tempfile.mkdtemp()
    output, output_end = os.pipe()
    ended, ended_end = os.pipe()
    me = os.getpid()
    try:
        guard = os.fork()
        if guard == 0:
            _guard(code, folder, allowed, me, output_end, ended_end)
        os.close(output_end)
        os.close(ended_end)
        printed, size, end = _watch(output, ended, 4 * allowed.max_characters, time.monotonic() + allowed.seconds)
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)
    finally:
        os.close(output)
        os.close(ended)
        shutil.rmtree(folder, ignore_errors=True)
    if "fault" in end:
        raise NotRunError(f"the program was not run: {end['fault']}")
    text = printed.decode(errors="replace")
    if len(text) > allowed.max_characters or size > len(printed):
        text = f"{text[: allowed.max_characters]}\n[cut: {size:,} bytes were printed]"
    if not end or end["code"] == -signal.SIGXCPU:
        note = f"[stopped after {allowed.seconds:g} s]"
    elif end["code"] < 0:
        note = f"[killed by {signal.Signals(-end['code']).name}]"
    else:
        note = "" if text.strip() else "[nothing was printed]"
    return "\n".join(filter(None, (text.rstrip("\n"), note)))


def _watch(output: int, ended: int, most: int, deadline: float) -> tuple[bytes, int, dict]:
    """The first ``most`` bytes that the program printed, the number of all, and how it ended; {} at the deadline."""
    printed, size = bytearray(), 0
    os.set_blocking(output, False)
    end, waits = None, [output, ended]
    while True:
        left = 0 if end is not None else max(deadline - time.monotonic(), 0)
        ready, _, _ = select.select(waits, [], [], left)
        if output in ready:
            if chunk := os.read(output, 1 << 16):
                size += len(chunk)
                printed += chunk[: most - len(printed)]
            else:
                waits.remove(output)
        if end is None and ended in ready:
            end = json.loads(os.read(ended, 4096) or '{"code": -9}')
            waits.remove(ended)
        # After its end, what is in the pipe is still read, but not what processes that it left go on printing.
        if (end is not None and output not in ready) or time.monotonic() > deadline:
            return bytes(printed), size, end or {}


def _guard(code: str, folder: str, limits: Limits, parent: int, output: int, ended: int) -> NoReturn:
    """Take the limits on, fork the program and say how it ended. The program has no end of the pipe ``ended``."""
    report: dict[str, Any] = {}
    try:
        os.setsid()
        die_with_parent(parent)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        ended = os.dup2(ended, 3)
        os.closerange(4, os.sysconf("SC_OPEN_MAX"))
        os.chdir(folder)
        os.environ["HOME"] = os.environ["TMPDIR"] = tempfile.tempdir = folder
        seconds = math.ceil(limits.seconds)
        set_limit(resource.RLIMIT_CPU, seconds, seconds + 1)
        set_limit(resource.RLIMIT_FSIZE, limits.file_size)
        limit_memory(limits.memory)
        _unshare(limits.isolated)
        if "files" in limits.isolated:
            _restrict_files([sys.prefix, sys.base_prefix, *_installed(), *_SYSTEM], folder)
        guard, program = os.getpid(), os.fork()
        if program == 0:
            os.close(ended)
            # In a PID namespace of its own, a program's parent has no number.
            _program(code, limits, 0 if "processes" in limits.isolated else guard)
        for descriptor in (1, 2):
            os.close(descriptor)
        report["code"] = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
    except BaseException as error:
        report["fault"] = why(error)
    finally:
        os.write(ended, json.dumps(report).encode())
        os._exit(0)


def _installed() -> list[str]:
    """The folders of the standard library and of installed packages."""
    paths = sysconfig.get_paths()
    folders = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    return list(dict.fromkeys([*folders, *(path for path in sys.path if path.endswith("lib-dynload"))]))


def _program(code: str, limits: Limits, parent: int) -> NoReturn:
    """Run the program. The limit on processes comes last: the guard must be able to fork."""
    status = 1
    try:
        die_with_parent(parent)
        set_limit(resource.RLIMIT_NPROC, limits.processes)
        sys.path[:] = [os.getcwd(), *_installed()]
        sys.path_importer_cache.clear()
        sys.argv = [_PROGRAM]
        random.seed(0)
        sys.stdout, sys.stderr = (
            open(number, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
            for number in (1, 2)
        )
        status = _execute(code)
        sys.stdout.flush()
    finally:
        os._exit(status)


def _execute(code: str) -> int:
    """Run the program's text in a fresh ``__main__``. Returns the exit code."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    linecache.cache[_PROGRAM] = (len(code), None, code.splitlines(keepends=True), _PROGRAM)  # tracebacks quote it
    try:
        tree = ast.parse(code, _PROGRAM)
        last = tree.body.pop().value if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, _PROGRAM, "exec"), main.__dict__)
        value = eval(compile(ast.Expression(last), _PROGRAM, "eval"), main.__dict__) if last is not None else None
        if value is not None:
            print(repr(value))
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0x7F
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename != _PROGRAM:
            frames = frames.tb_next
        traceback.print_exception(type(error), error, frames)
        return 1
    return 0


def _unshare(isolated: Sequence[str]) -> None:
    """Enter namespaces of its own, as ``isolated`` asks."""
    flags = {"network": _CLONE_NEWNET, "processes": _CLONE_NEWPID | _CLONE_NEWIPC}
    wanted = sum(flags[name] for name in set(isolated) & flags.keys())
    if wanted and LIBC.unshare(_CLONE_NEWUSER | wanted) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"no namespaces of its own ({os.strerror(number)})")


# Landlock (landlock(7)): the numbers are the same on every architecture but Alpha.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_PR_SET_NO_NEW_PRIVS = 38
_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1, 2, 4, 8
_TRUNCATING = 3
"""The first version that can forbid truncating a file: with an earlier one, a program could still empty files."""
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def _restrict_files(readable: Iterable[str], writable: str) -> None:
    """Forbid this process and its descendants all other files, and signals to processes outside.

    Raises:
        OSError: the kernel has no Landlock, or one too old.
    """
    version = LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < _TRUNCATING:
        raise OSError("no Landlock of version 3 or later")
    everything = (1 << (16 if version >= 5 else 15)) - 1
    # A kernel refuses what it does not know: TCP came with version 4, signals with 6.
    rules = _Ruleset(everything, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = _checked(LIBC.syscall(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0))
    reading = _EXECUTE | _READ_FILE | _READ_DIR
    allowed = [(path, reading) for path in readable] + [(path, _READ_FILE | _WRITE_FILE) for path in _DEVICES]
    for path, access in [*allowed, (writable, everything)]:
        with suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                access &= ~_READ_DIR
            rule = _PathBeneath(access, descriptor)
            _checked(LIBC.syscall(_ADD_RULE, ruleset, 1, ctypes.byref(rule), 0))
            os.close(descriptor)
    _checked(LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(LIBC.syscall(_RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
