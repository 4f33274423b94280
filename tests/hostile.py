"""Tools that misbehave, for test_tool_processes.py. Only the tools' own processes import this."""

import asyncio
import ctypes
import json
import os
import signal
import struct
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path


def misbehave(how: str, folder: str = "") -> object:
    """Call a function of this module.

    Args:
        how: Its name.
        folder: Where it may leave files.
    """
    os.environ["FOLDER"] = folder
    return globals()[how]()


def echo(value: object) -> object:
    """Return it.

    Args:
        value: Anything.
    """
    return value


def quick():
    return "quick"


def modules():
    return sorted({name.partition(".")[0] for name in sys.modules})


def environment():
    return dict(os.environ)


def spin():
    while True:
        pass


def sleep():
    time.sleep(1000)


def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sleep()


def tell_and_sleep():
    """Tell that it has begun, then hang, with a process of its own that hangs, too."""
    daemon()
    Path(os.environ["FOLDER"], "begun").touch()
    sleep()


async def sleep_async():
    await asyncio.sleep(1000)


def flood_result():
    return "x" * 10**9


def flood_output():
    for _ in range(1000):
        os.write(1, b"x" * 10**6)
        os.write(2, b"x" * 10**6)
    print("x" * 10**6)
    return "printed"


def flood_memory():
    return len([bytearray(10**8) for _ in range(1000)])


def say():
    raise ValueError("no\nsuch   thing")


def say_rudely():
    class Rude(Exception):
        def __str__(self):
            raise ValueError

    raise Rude


def leave():
    sys.exit("bye")


def interrupt():
    raise KeyboardInterrupt


def recurse():
    return recurse()


def data():
    return b"bytes"


def nested_data():
    return {"a": [b"bytes"]}


def thing():
    return object()


def circle():
    circle = []
    circle.append(circle)
    return circle


def deep():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    return deep


def generator():
    yield 1


def surrogate():
    return "a\ud800b"


def exit_hard():
    os._exit(0)


def kill_itself():
    os.kill(os.getpid(), signal.SIGKILL)


def segfault():
    ctypes.string_at(0)


def kill_forkserver():
    os.kill(os.getppid(), signal.SIGKILL)
    sleep()


def fork_child():
    if os.fork() == 0:
        sleep()
    return "parent"


def fork_and_return():
    """Both copies return. The second must not answer, and must not take the next request."""
    return "parent" if os.fork() else "child"


def daemon():
    """A process with a session of its own whose parent has ended."""
    parent = os.fork()
    if parent == 0:
        os.setsid()
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sleep()
        os._exit(0)
    os.waitpid(parent, 0)
    return "parent"


def daemon_then_die():
    daemon()
    fork_child()
    os._exit(1)


def close_descriptors():
    os.closerange(0, 1000)


def close_descriptors_and_hang():
    os.closerange(0, 1000)
    sleep()


def thread():
    threading.Thread(target=sleep).start()
    return "started"


def die_later():
    """The answer comes, then the process ends."""

    def end():
        while not later.exists():
            time.sleep(0.001)
        os._exit(1)

    later = Path(os.environ["FOLDER"], "later")
    threading.Thread(target=end).start()
    return os.getpid()


def make_file():
    handle, name = tempfile.mkstemp()
    os.write(handle, b"x" * 1000)
    os.close(handle)
    return name


def _open_files():
    """What each open descriptor is of, by number."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing's own descriptor
            yield int(name), os.readlink(f"/proc/self/fd/{name}").partition(":")[0]


def descriptors():
    return [what for _, what in sorted(_open_files())]


def _write(content):
    """Write to the protocol's connection."""
    for number, what in _open_files():
        if what == "socket":
            os.write(number, content)
    return "after rubbish"


def _frame(content):
    return struct.pack("!I", len(content)) + content


def write_rubbish():
    return _write(b"\xff" * 1000)


def write_no_json():
    return _write(_frame(b"\xff\x00"))


def write_deep_json():
    return _write(_frame(b"[" * 10_000))


def write_list():
    return _write(_frame(b"[]"))


def write_another_answer():
    return _write(_frame(json.dumps({"id": 10**6, "text": "forged"}).encode()))


def write_unknown_cause():
    """The first request of a child has the number 1."""
    return _write(b"".join(_frame(json.dumps({"id": i, "failure": "?", "why": "?"}).encode()) for i in range(1, 9)))


def write_half_an_answer():
    _write(struct.pack("!I", 100) + b"{")
    sleep()


class Room:
    """Keeps what it is told, and may misbehave."""

    def __init__(self, prefix="", log=""):
        self.heard, self.prefix, self.log = [], prefix, log

    def open(self, question):
        self.heard.append(question["id"])
        self._do(question.get("open", ""))

    def hear(self, word: str) -> str:
        """Hear a word.

        Args:
            word: The word.
        """
        heard = [*self.heard, word]
        time.sleep(0.001)  # a concurrent call would now lose a word
        self.heard = heard
        return self.prefix + " ".join(heard)

    async def loop(self) -> bool:
        """Whether this is the event loop of the call before."""
        before, self.before = getattr(self, "before", None), asyncio.get_running_loop()
        return before is self.before

    def misbehave(self, how: str) -> str:
        """Call a function of this module.

        Args:
            how: Its name.
        """
        return globals()[how]()

    def close(self):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"closed {self.heard[0]}\n")
        self._do(self.heard[-1])

    def _do(self, how):
        if how in globals():
            globals()[how]()
