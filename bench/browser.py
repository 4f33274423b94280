"""A headless Chromium, driven over a pipe by the DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 60.0
"""Longest wait for an answer."""
# Chromium reads commands from descriptor 3 and writes to 4.
START = "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"


def chromium() -> str | None:
    """The program, if there is one."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Browser:
    """A window of a Chromium of its own, as a context."""

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        theirs, self._write = os.pipe()
        self._read, written = os.pipe()
        self._process = subprocess.Popen(
            [
                sys.executable, "-c", START, str(theirs), str(written), chromium(), "--headless", "--no-sandbox",
                "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={self._folder.name}",
            ],
            pass_fds=(theirs, written), stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(written)
        self._received, self._session, self._asked, self._events = b"", None, 0, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.window(1280, 800)
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._write)  # ends it
        os.close(self._read)
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def call(self, method: str, **parameters: Any) -> dict:
        """A command's result."""
        self._asked += 1
        message = {"id": self._asked, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._asked:
            self._events.append(answer.get("method"))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self._received:
            if not select.select([self._read], [], [], SECONDS)[0]:
                raise TimeoutError(f"Chromium did not answer for {SECONDS:.0f} s")
            self._received += os.read(self._read, 1 << 20)
        message, _, self._received = self._received.partition(b"\0")
        return json.loads(message)

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._events.clear()
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._events:
            self._events.append(self._next().get("method"))

    def js(self, expression: str) -> Any:
        """The value of an expression in the page, of a promise what it gives."""
        told = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in told:
            raise RuntimeError(told["exceptionDetails"]["exception"].get("description"))
        return told["result"].get("value")

    def press(self, key: str) -> None:
        text = key if len(key) == 1 else ""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def window(self, width: int, height: int, dark: bool = False) -> None:
        """CSS pixels, and whether the system is dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: Path) -> None:
        """What the window shows, as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
