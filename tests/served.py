"""A real ``vllm serve`` replica."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import httpx

STARTS_WITHIN = 480


class Server:
    """A replica in processes of its own, killed as one; ``more`` are vLLM's options."""

    def __init__(self, model, log, *more, **environment):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "igpo_fast.engines.vllm.serve", str(model)]
        self._log = open(log, "wb")  # noqa: SIM115
        self.process = subprocess.Popen(
            [*command, f"--port={port}", "--host=127.0.0.1", "--max-model-len=96", *more], stdout=self._log,
            stderr=subprocess.STDOUT, start_new_session=True, env=os.environ | environment,
        )  # fmt: skip

    def wait(self):
        deadline = time.monotonic() + STARTS_WITHIN
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            time.sleep(0.2)
        raise AssertionError(f"the server did not start: {open(self._log.name).read()[-2000:]}")  # noqa: SIM115

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
