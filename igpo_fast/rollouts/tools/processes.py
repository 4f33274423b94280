"""Processes of their own for users' tools, so that a tool that hangs, floods, raises, dies, forks or eats memory costs
its call and nothing else.

One forkserver per tool (worker.py) imports the user's module; the trainer never does. A class gets a child per rollout,
which holds its object; a function gets a pool of children, one per concurrent call. What a tool prints is discarded.
Files that it makes through ``tempfile`` are removed with its child. A process that it forks ends with the child, and
maybe as soon as its own parent has ended.

This guards against accidents, not against malice: a tool runs with the user's rights, can read and write the user's
files, and can end its own forkserver, which ends every child of that tool (their calls count as died; the next one
starts a new forkserver). On other systems than Linux there is no limit on memory, and a process that a tool leaves in a
session of its own outlives it.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from igpo_fast.errors import InputError
from igpo_fast.extend import is_spec
from igpo_fast.rollouts.tools import worker

CAUSES = ("timeouts", "raised", "died", "too_large", "malformed")
"""Why a call failed: no answer in time; the tool raised; its process ended; its result is too long; its result is no
text, number or JSON value."""

PATIENCE = 120.0
"""Seconds that an import, a fork, or the end of all processes may take. None of them is the tool's own time."""
_LAST_WAIT = 10.0
"""Seconds in which a forkserver may end by itself before it is killed."""


class CallError(Exception):
    """A call of a tool failed.

    Args:
        cause: one of ``CAUSES``.
        why: one line for a log. It may quote the tool, so the policy should not see it.
    """

    def __init__(self, cause: str, why: str):
        super().__init__(why)
        self.cause = cause


class Processes:
    """A function or a class of the user's, called in processes of its own.

    A function is called with the policy's arguments. A class is instantiated per rollout (``open``), its public methods
    are the tools; if it has ``open(question)``, ``close()`` or ``outcome(answer)``, these are called first, last, and
    before the last. Any of them may be async; those of one object share an event loop. Calls of one object are made one
    after another, others concurrently.

    Usable from one event loop after another: ``aclose`` before a loop ends, ``end`` after the last.

    Args:
        target: "package.module:name" or "path/to/file.py:name"; modules are found as in this process, and in the
            current folder.
        seconds: most that ``open``, a call or ``close`` may take; waiting for a place, a fork or an import does not
            count. May be changed later.
        max_characters: most characters of a result.
        concurrency: most calls at once; further ones wait.
        memory: most bytes that a child may map beyond what the import has; 0 sets no limit. A process that the child
            forks may have as much again.
        settings: keyword arguments from the configuration: of the class, or of every call of the function. The policy
            neither sees nor gives them.
        environment: the processes' environment variables; None passes on this process's.
    Raises:
        InputError: the target cannot be imported, called or described.
    """

    stateful: bool
    """Whether the target is a class."""
    schemas: list[dict[str, Any]]
    """A JSON schema per tool, as ``transformers.utils.get_json_schema`` makes them."""

    def __init__(
        self,
        target: str,
        *,
        seconds: float,
        max_characters: int,
        concurrency: int = 64,
        memory: int = 4_000_000_000,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        if not is_spec(target):
            raise InputError(
                f"{target}: is not of the form package.module:name or path/to/file.py:name; write it like "
                "my_tools:look_up"
            )
        self._target, self.seconds, self._concurrency = target, seconds, concurrency
        self._options = {
            "target": target, "settings": dict(settings or {}), "max_characters": max_characters, "memory": memory,
        }  # fmt: skip
        self._environment = environment
        self._max_bytes = 12 * max_characters + 4096  # JSON's longest escape of a character has 12 bytes
        self._numbers = itertools.count(1)
        self._server: _Forkserver | None = None
        self._children: set[_Child] = set()
        self._idle: list[_Child] = []
        self._places = asyncio.Semaphore(concurrency)
        try:
            description = self._describe()
        except BaseException:
            self.end()
            raise
        self.stateful, self.schemas = description["stateful"], description["schemas"]

    async def open(self, question: Mapping[str, Any]) -> Handle:
        """Make the object of a rollout; for a function, which has none, nothing is done.

        Args:
            question: JSON values, given to the object's ``open``.
        Raises:
            CallError: making or opening it failed.
        """
        if not self.stateful:
            return Handle(None)
        async with self._places:
            child = await self._fork()
            try:
                await child.ask(self.seconds, "open", question)
            except BaseException:
                self._kill(child)
                raise
        return Handle(child)

    async def call(self, handle: Handle, name: str, arguments: Mapping[str, Any]) -> str:
        """Call the function, or the method ``name`` of the object.

        Returns:
            A text as it is (without lone surrogates), any other JSON value as JSON.
        Raises:
            CallError: the call failed. An object whose process ended with the call fails every later call as ``died``.
        """
        if not self.stateful:
            async with self._places:
                child = self._free() or await self._fork()
                return await self._ask(child, "call", name, arguments)
        return await self._ask_object(handle, "call", name, arguments)

    async def outcome(self, handle: Handle, answer: str | None) -> dict[str, float]:
        """What the object's ``outcome(answer)`` says that the rollout earned: a number is ``reward``; empty for a
        function, and for a class without that method.

        Raises:
            CallError: it failed, or gave something else than numbers by name.
        """
        if not self.stateful:
            return {}
        text = await self._ask_object(handle, "outcome", answer)
        try:
            earned = json.loads(text)
        except ValueError:  # a text
            earned = None
        earned = {"reward": earned} if isinstance(earned, (int, float)) else earned
        if not isinstance(earned, dict) or not all(isinstance(n, (int, float)) for n in earned.values()):
            raise CallError("malformed", "outcome() returned no number and no mapping of numbers")
        return {name: float(number) for name, number in earned.items()}

    async def _ask_object(self, handle: Handle, *request: Any) -> str:
        async with handle.turn:
            if handle.child is None or handle.child.lost:
                raise CallError("died", "the object is gone since an earlier call, or was closed")
            async with self._places:
                return await self._ask(handle.child, *request)

    async def close(self, handle: Handle) -> None:
        """Call the object's ``close()`` and end its process. Closing twice does nothing.

        Raises:
            CallError: ``close()`` failed; the process has ended all the same.
        """
        async with handle.turn:
            child, handle.child = handle.child, None
            if child and not child.lost:
                try:
                    await child.ask(self.seconds, "close")
                finally:
                    self._kill(child)

    async def aclose(self) -> None:
        """End all children and whatever they have forked, in the loop that used them; the forkserver stays.

        No call may be in flight.
        """
        for child in tuple(self._children):
            self._kill(child)
        self._idle.clear()
        self._places = asyncio.Semaphore(self._concurrency)
        if self._server and self._server.alive:
            ours, theirs = socket.socketpair()
            with ours:
                ours.setblocking(False)
                with theirs, suppress(OSError):
                    self._server.command(worker.END_ALL, 0, theirs)
                try:
                    async with asyncio.timeout(PATIENCE):
                        await asyncio.get_running_loop().sock_recv(ours, 1)  # it closes once all have ended
                except TimeoutError:
                    self.end()

    def end(self) -> None:
        """End the forkserver, too. Another call starts a new one."""
        for child in self._children:
            child.lose()
        self._children.clear()
        self._idle.clear()
        if self._server:
            self._server.end()
            self._server = None

    def _describe(self) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                self._command(worker.DESCRIBE, theirs)
            ours.settimeout(PATIENCE)
            try:
                description = worker.receive(ours)
            except TimeoutError:
                raise InputError(
                    f"{self._target}: importing it takes more than {PATIENCE:g} s; see what its module does at import"
                ) from None
        if description is None:
            raise InputError(
                f"{self._target}: the process that imports it died; see that python -c 'import "
                f"{self._target.split(':')[0]}' works"
            )
        if "fault" in description:
            raise InputError(description["fault"])
        return description

    async def _fork(self) -> _Child:
        """A child that is ready for requests.

        Raises:
            CallError: none can be had.
        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            number = self._command(worker.FORK, theirs)
        child = _Child(self._server, ours, number, self._max_bytes)
        self._children.add(child)
        try:
            await child.ready(PATIENCE)
        except BaseException:
            self._kill(child)
            raise
        return child

    def _command(self, what: bytes, descriptor: socket.socket) -> int:
        """Give the forkserver a command, starting one if there is none; returns the number of the child to come."""
        number = next(self._numbers)
        try:
            if self._server and self._server.alive:
                self._server.command(what, number, descriptor)
                return number
        except OSError:  # it has just died
            pass
        if self._server:
            self._server.end()
        self._server = _Forkserver(self._options, self._environment)
        self._server.command(what, number, descriptor)
        return number

    def _free(self) -> _Child | None:
        """A child of the pool that is alive and has said nothing unasked."""
        while self._idle:
            child = self._idle.pop()
            if child.quiet:
                return child
            self._kill(child)
        return None

    async def _ask(self, child: _Child, *request: Any) -> str:
        try:
            return await child.ask(self.seconds, *request)
        finally:
            if child.lost:
                self._kill(child)
            elif not self.stateful:
                self._idle.append(child)

    def _kill(self, child: _Child) -> None:
        self._children.discard(child)
        child.lose()


class Handle:
    """A rollout's object, or nothing for a function."""

    def __init__(self, child: _Child | None):
        self.child, self.turn = child, asyncio.Lock()


class _Child:
    """A child and the connection to it.

    Args:
        number: the forkserver's name for it.
        max_bytes: longest answer; a longer one is refused unread.
    """

    def __init__(self, server: _Forkserver, connection: socket.socket, number: int, max_bytes: int):
        self._server, self._connection, self._number, self._max_bytes = server, connection, number, max_bytes
        self._requests = 0
        self.lost = False

    @property
    def quiet(self) -> bool:
        """Whether it is alive and has sent nothing."""
        try:
            self._connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            pass
        return False

    async def ready(self, seconds: float) -> None:
        """Wait until it takes requests."""
        await self._exchange(b"", seconds)

    async def ask(self, seconds: float, do: str, *with_: Any) -> str:
        """The text that answers a request. Whatever else ends the wait loses the child: its state is unknown.

        Raises:
            CallError: there is none.
        """
        if self.lost:
            raise CallError("died", "its process was ended")
        self._requests += 1
        answer = await self._exchange(worker.framed({"id": self._requests, "do": do, "with": with_}), seconds)
        if "failure" in answer:
            raise CallError(answer["failure"], answer["why"])
        return answer["text"].encode(errors="replace").decode()

    async def _exchange(self, request: bytes, seconds: float) -> dict[str, str]:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.get_running_loop().sock_sendall(self._connection, request)
                return await self._answer()
        except BaseException as error:
            self.lose()
            if isinstance(error, TimeoutError):
                raise CallError("timeouts", f"no answer within {seconds:g} s") from None
            if isinstance(error, OSError):
                raise CallError("died", "its process ended") from None
            raise

    async def _answer(self) -> dict[str, str]:
        (length,) = worker.LENGTH.unpack(await self._read(worker.LENGTH.size))
        if length > self._max_bytes:
            raise CallError("too_large", f"sent {length:,} bytes; {self._max_bytes:,} are allowed")
        content = await self._read(length)
        try:
            answer = json.loads(content)
            if answer["id"] != self._requests:
                raise ValueError("it answers another request")
            failed = "failure" in answer
            if failed and answer["failure"] not in CAUSES:
                raise ValueError("unknown cause")
            if not isinstance(answer["why" if failed else "text"], str):
                raise TypeError("no text")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise CallError("malformed", f"sent something else than an answer ({type(error).__name__})") from None
        return answer

    async def _read(self, size: int) -> bytearray:
        content = bytearray()
        while len(content) < size:
            chunk = await asyncio.get_running_loop().sock_recv(self._connection, size - len(content))
            if not chunk:
                raise CallError("died", "its process ended")
            content += chunk
        return content

    def lose(self) -> None:
        """Kill it, with all that it forked."""
        if not self.lost:
            self.lost = True
            self._connection.close()
            with suppress(OSError):  # the forkserver has died, and its children with it
                self._server.command(worker.KILL, self._number)


class _Forkserver:
    """The forkserver of a tool, seen from the trainer.

    ``end()`` ends it and all its descendants; so does losing the last reference to it, or the end of this process.
    """

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str] | None):
        folder = tempfile.mkdtemp(prefix="igpo-tool-")
        self._control, theirs = socket.socketpair()
        self._control.settimeout(PATIENCE)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, os.getcwd(), *sys.path], stdin=theirs, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True, env=environment,
            )  # fmt: skip
        self.end = weakref.finalize(self, _end, self._process, self._control, folder)
        worker.send(self._control, {**options, "folder": folder})

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def command(self, what: bytes, number: int, *descriptors: socket.socket) -> None:
        """Send a command; raises OSError if there is nobody to take it."""
        message = worker.COMMAND.pack(what, number)
        socket.send_fds(self._control, [message], [descriptor.fileno() for descriptor in descriptors])


# The forkserver finds modules where this process does. PYTHONPATH would reach every program that a tool starts.
_START = f"import sys; sys.path[:] = sys.argv[1:]; from {worker.__name__} import main; main()"


def _end(process: subprocess.Popen, control: socket.socket, folder: str) -> None:
    control.close()
    try:
        process.wait(_LAST_WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
