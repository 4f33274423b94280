"""The forkserver behind ``processes.Processes``, and the children that it forks.

``main`` runs in a process whose standard input is a socket to the trainer. It imports a user's module once, then forks
a child per object or per concurrent call, so that a child costs a fork and not an import. Nothing but the standard
library and that module is imported, and no user's code but that module's import runs in the forkserver.

A message is its length in bytes and JSON. A command to the forkserver is a letter and the number of a child; ``FORK``,
``DESCRIBE`` and ``END_ALL`` bring a file descriptor. When the socket to the trainer closes, everything ends: a killed
trainer leaves nothing behind.
"""

from __future__ import annotations

import asyncio
import ctypes
import gc
import inspect
import json
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from igpo_fast.errors import reason_of
from igpo_fast.extend import imported

OWN = ("open", "close", "outcome")
"""Methods of a class that are no tools."""
LENGTH = struct.Struct("!I")
COMMAND = struct.Struct("!cQ")
FORK, DESCRIBE, KILL, END_ALL = b"f", b"d", b"k", b"e"

_LINUX = sys.platform == "linux"
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
LIBC = ctypes.CDLL(None, use_errno=True)
_POLL = 10
"""Milliseconds between looks at orphans that were killed and are not gone yet."""


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Send a message."""
    connection.sendall(framed(message))


def framed(message: Mapping[str, Any]) -> bytes:
    """A message as it travels. JSON is ASCII here, so that lone surrogates travel, too."""
    content = json.dumps(message).encode()
    return LENGTH.pack(len(content)) + content


def receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message; None if the other side has closed the connection. Blocks."""
    length = _read(connection, LENGTH.size)
    content = length and _read(connection, *LENGTH.unpack(length))
    return json.loads(content) if content else None


def _read(connection: socket.socket, size: int) -> bytes | None:
    content = bytearray()
    while len(content) < size:
        if not (chunk := connection.recv(size - len(content))):
            return None
        content += chunk
    return bytes(content)


class Unusable(Exception):
    """A user's module, function or class cannot be used: one line that names it and the remedy."""


def load(target: str) -> Callable:
    """What ``target`` ("package.module:name") names.

    Raises:
        Unusable: no such module or name, the import fails, or it cannot be called.
    """
    module_name, _, name = target.rpartition(":")
    try:
        module = imported(module_name)
    except FileNotFoundError as error:
        if error.filename and os.path.abspath(error.filename) == os.path.abspath(module_name):
            raise Unusable(f"{target}: there is no file {module_name} here; correct the path") from None
        raise Unusable(f"{target}: importing it fails: {why(error)}") from None
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise Unusable(
                f"{target}: no module {error.name}; it is looked for in {os.getcwd()} and among installed packages"
            ) from None
        raise Unusable(f"{target}: importing it fails: {why(error)}") from None
    except BaseException as error:  # a module may also raise SystemExit
        raise Unusable(f"{target}: importing it fails: {why(error)}") from None
    file = getattr(module, "__file__", None) or module_name
    if not hasattr(module, name):
        raise Unusable(f"{target}: {file} defines no {name}; correct the name or define it")
    entry = getattr(module, name)
    if not callable(entry):
        raise Unusable(f"{target}: {name} in {file} is of type {type(entry).__name__}; name a function or a class")
    return entry


def why(error: BaseException) -> str:
    """An exception in one line: its type, what it says, and the line of code that raised it."""
    try:
        said = reason_of(error)
    except BaseException:  # a user's __str__
        said = "its text cannot be made"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    users = [f"{file}:{line}" for file, line in frames if file != __file__ and not file.startswith("<frozen")]
    return f"{type(error).__name__}: {said}" + (f" ({users[-1]})" if users else "")


def methods(entry: type) -> dict[str, Callable]:
    """The public methods of a class but ``OWN``, in the order of their definition."""
    names = dict.fromkeys(name for base in reversed(entry.__mro__) for name in vars(base))
    names = [name for name in names if not name.startswith("_") and name not in OWN]
    return {name: getattr(entry, name) for name in names if inspect.isroutine(getattr(entry, name))}


def describe(target: str, entry: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"stateful": bool, "schemas": [...]}``: JSON schemas as ``transformers.utils.get_json_schema`` writes them.

    Raises:
        Unusable: types or descriptions are missing, or the settings do not fit.
    """
    # get_json_schema imports torch, if there is one, to know the type torch.Tensor: seconds for nothing.
    sys.modules.setdefault("torch", None)
    from transformers.utils.chat_template_utils import get_json_schema

    stateful = isinstance(entry, type)
    try:
        # A class is made from the settings alone; a function gets its other arguments from the policy.
        signature = inspect.signature(entry)
        (signature.bind if stateful else signature.bind_partial)(**settings)
    except (TypeError, ValueError) as error:
        raise Unusable(f"{target}: its settings do not fit: {error}") from None
    functions = methods(entry) if stateful else {target.rpartition(":")[2]: entry}
    if not functions:
        raise Unusable(f"{target}: the class has no public method beside {', '.join(OWN)}; define one")
    schemas = []
    for name, function in functions.items():
        loose = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        if any(parameter.kind in loose for parameter in inspect.signature(function).parameters.values()):
            raise Unusable(f"{target}: {name} takes *args or **kwargs, which no schema describes; name its arguments")
        try:
            schema = get_json_schema(function)
        except Exception as error:
            code = getattr(inspect.unwrap(function), "__code__", None)
            place = f"{code.co_filename}:{code.co_firstlineno}: " if code else ""
            raise Unusable(
                f"{place}{target}: cannot be described: {reason_of(error)}; give {name} a docstring whose Args "
                "describe each argument, and each argument a type"
            ) from None
        schema["function"]["name"] = name
        if not stateful:
            parameters = schema["function"]["parameters"]
            parameters["properties"] = {k: v for k, v in parameters["properties"].items() if k not in settings}
            required = [k for k in parameters.pop("required", ()) if k not in settings]
            parameters |= {"required": required} if required else {}
        schemas.append(schema)
    return {"stateful": stateful, "schemas": schemas}


class _Served:
    """A function, or an object made by ``open``, that answers requests."""

    def __init__(self, entry: Callable, settings: Mapping[str, Any], max_characters: int):
        self._entry, self._settings, self._max_characters = entry, settings, max_characters
        self._object: Any = None
        self._runner: asyncio.Runner | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """``{"text": str}``, or ``{"failure": cause, "why": str}``."""
        try:
            value = getattr(self, f"_{request['do']}")(*request["with"])
            if inspect.isawaitable(value):
                value = self._run(value)
            if request["do"] not in ("call", "outcome"):
                return {"text": ""}
        except BaseException as error:  # whatever a user's code raises, SystemExit included
            return {"failure": "raised", "why": why(error)}
        try:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        except BaseException as error:
            return {"failure": "malformed", "why": f"returned {type(value).__name__}, which is no text, number or JSON "
                                                   f"value ({reason_of(error)})"}  # fmt: skip
        if len(text) > self._max_characters:
            too_long = f"returned {len(text):,} characters; {self._max_characters:,} are allowed"
            return {"failure": "too_large", "why": too_long}
        return {"text": text}

    def _open(self, question: Mapping[str, Any]) -> Any:
        self._object = self._entry(**self._settings)
        return self._object.open(question) if hasattr(self._object, "open") else None

    def _call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        if self._object is None:
            return self._entry(**arguments, **self._settings)
        if name not in methods(type(self._object)):
            raise AttributeError(f"no method {name}")
        return getattr(self._object, name)(**arguments)

    def _outcome(self, answer: str | None) -> Any:
        return self._object.outcome(answer) if hasattr(self._object, "outcome") else {}

    def _close(self) -> Any:
        return self._object.close() if hasattr(self._object, "close") else None

    def _run(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        # One loop for all calls: an object may keep connections that belong to it.
        self._runner = self._runner or asyncio.Runner()
        return self._runner.run(wait())


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        LIBC.prctl(option, value, 0, 0, 0)


def set_limit(limit: int, soft: int, hard: int | None = None) -> None:
    """Lower a limit of this process (``resource.RLIMIT_*``); one that is lower already stays."""
    most = resource.getrlimit(limit)[1]
    wanted = (soft, soft if hard is None else hard)
    resource.setrlimit(limit, tuple(n if most == resource.RLIM_INFINITY else min(n, most) for n in wanted))


def limit_memory(size: int) -> None:
    """Let this process map ``size`` bytes more than it has mapped by now (Linux; others have no such number)."""
    if _LINUX:
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        set_limit(resource.RLIMIT_AS, mapped + size)


def die_with_parent(parent: int) -> None:
    """End this process when ``parent``, the process that forked it, ends (Linux)."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(0)


class Forkserver:
    """Forks children, kills them, and ends what they leave behind.

    It is the reaper of all its descendants: a process whose parent has ended becomes its child, however it was forked
    and whatever session it made for itself. A child that it did not fork is such an orphan and is killed, unless it was
    there after the import: a module may start a process for all its tools.
    """

    def __init__(self, control: socket.socket, options: Mapping[str, Any]):
        self._control, self._options = control, options
        self._folder = Path(options["folder"])
        self._children: dict[int, int] = {}  # process id -> the trainer's number for it
        self._waiting: list[int] = []  # descriptors to close once no process is left
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        # During the import nobody looks at the connection. Afterwards the signal is off: it comes when the thread that
        # started this process ends, though the trainer goes on.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._entry, self._fault = None, ""
        try:
            self._entry = load(options["target"])
        except Unusable as error:
            self._fault = str(error)
        _prctl(_PR_SET_PDEATHSIG, 0)
        self._helpers = set(_own_children())
        gc.collect()
        gc.freeze()  # else a child's first collection copies every page

    def run(self) -> None:
        """Obey until the trainer closes the connection or ends; then end all processes."""
        self._wake, wake_end = os.pipe()
        for end in (self._wake, wake_end):
            os.set_blocking(end, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # without a handler nothing is written to the pipe
        signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
        self._ours = (self._control.fileno(), self._wake, wake_end)
        poll = select.poll()
        for descriptor in (self._control.fileno(), self._wake):
            poll.register(descriptor, select.POLLIN)
        obeys = True
        while obeys:
            orphans = self._tidy()
            ready = dict(poll.poll(_POLL if orphans else None))
            if self._wake in ready:
                os.read(self._wake, 4096)
            if self._control.fileno() in ready:
                obeys = self._obey()
        self._helpers.clear()
        self._kill_all()
        while self._tidy() or self._children:
            time.sleep(_POLL / 1000)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _obey(self) -> bool:
        """Do what the next command says. False at the end of the connection."""
        try:
            command, descriptors, _, _ = socket.recv_fds(self._control, COMMAND.size, 1)
        except OSError:
            return False
        if len(command) < COMMAND.size:
            return False
        what, number = COMMAND.unpack(command)
        if what == KILL:
            for pid in [pid for pid, child in self._children.items() if child == number]:
                _kill(pid)
        elif what == END_ALL:
            self._kill_all()
            self._waiting += descriptors
        else:
            for descriptor in descriptors:
                self._fork(number, descriptor, self._describe if what == DESCRIBE else self._serve)
        return True

    def _kill_all(self) -> None:
        for pid in self._children:
            _kill(pid)

    def _tidy(self) -> bool:
        """Reap processes that have ended and kill orphans. Returns whether orphans remain."""
        with suppress(ChildProcessError):
            while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                if pid in self._children:
                    _kill(pid, group_only=True)  # what it forked without making a group of its own
                    shutil.rmtree(self._folder / str(self._children.pop(pid)), ignore_errors=True)
        orphans = [pid for pid in _own_children() if pid not in self._children and pid not in self._helpers]
        for orphan in orphans:
            _kill(orphan)
        if not orphans and not self._children:
            while self._waiting:
                os.close(self._waiting.pop())
        return bool(orphans)

    def _fork(self, number: int, descriptor: int, work: Callable[[socket.socket], None]) -> None:
        forkserver = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # no process to be had: the trainer sees the connection close
            pid = -1
        if pid == 0:
            self._be_child(forkserver, number, descriptor, work)
        os.close(descriptor)
        if pid > 0:
            self._children[pid] = number

    def _be_child(self, forkserver: int, number: int, descriptor: int, work: Callable) -> NoReturn:
        try:
            os.setsid()
            die_with_parent(forkserver)
            os.set_inheritable(descriptor, False)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for ours in (*self._ours, *self._waiting):
                os.close(ours)
            if _LINUX:  # where memory runs out, a tool is killed before the trainer
                with suppress(OSError):
                    Path("/proc/self/oom_score_adj").write_text("1000")
            set_limit(resource.RLIMIT_CORE, 0)
            if self._options["memory"] and work == self._serve:
                limit_memory(self._options["memory"])
            folder = self._folder / str(number)
            folder.mkdir(mode=0o700)
            os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
            work(socket.socket(fileno=descriptor))
        finally:
            os._exit(0)

    def _describe(self, connection: socket.socket) -> None:
        try:
            if self._fault:
                raise Unusable(self._fault)
            send(connection, describe(self._options["target"], self._entry, self._options["settings"]))
        except Unusable as error:
            send(connection, {"fault": str(error)})
        except Exception as error:  # transformers is not there, or a defect of ours
            send(connection, {"fault": f"{self._options['target']}: cannot be described: {why(error)}"})

    def _serve(self, connection: socket.socket) -> None:
        me = os.getpid()
        served = _Served(self._entry, self._options["settings"], self._options["max_characters"])
        send(connection, {"id": 0, "text": ""})
        while (request := receive(connection)) is not None:
            answer = served.answer(request)
            if os.getpid() != me:  # the tool forked, and this copy came back, too
                os._exit(0)
            send(connection, {"id": request["id"], **answer})


def _kill(pid: int, group_only: bool = False) -> None:
    """Kill a process and its group; the process may not have made its group yet."""
    for kill in (os.killpg,) if group_only else (os.killpg, os.kill):
        with suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _children_listed() -> Iterator[int]:
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        yield from map(int, file.read().split())


def _children_searched() -> Iterator[int]:
    me = str(os.getpid())
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError), open(f"/proc/{entry}/stat") as file:
                if file.read().rpartition(")")[2].split()[1] == me:
                    yield int(entry)


def _own_children() -> Iterator[int]:
    """Process ids of this process's children, zombies included. Other systems than Linux give it no orphans."""
    if not _LINUX:
        return iter(())
    return _children_listed() if _LISTED else _children_searched()


_LISTED = os.path.exists("/proc/self/task") and os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def main() -> None:
    """Run the forkserver on the socket that is standard input."""
    control = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    if null > 2:
        os.close(null)
    options = receive(control)
    if options is not None:
        Forkserver(control, options).run()
