"""Retrieval servers for tests: one that fails as it is told, and ``igpo-fast search serve`` as a process."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]


class Slow(httpx.AsyncBaseTransport, httpx.AsyncByteStream):
    """A network behind which a server answers in the loop's own time: no sockets, so it runs on a ``JumpingLoop``.

    Args:
        seconds: before each answer.
        pieces: that a body of blanks comes in before it, each after ``seconds``.
        faults: by query, what is awaited before the answer.
    """

    BODY = b'{"result": [[{"document": {"id": "p1", "contents": "\\nA B born C D"}, "score": 1}]]}'

    def __init__(self, seconds=1.0, pieces=0, **faults):
        self.seconds, self.pieces, self.faults = seconds, pieces, faults
        self.requests = self.at_once = self.most_at_a_time = 0

    async def handle_async_request(self, request):
        (query,) = json.loads(await request.aread())["queries"]
        self.requests, self.at_once = self.requests + 1, self.at_once + 1
        self.most_at_a_time = max(self.most_at_a_time, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
            if query in self.faults:
                await self.faults[query]()
        finally:
            self.at_once -= 1
        return httpx.Response(200, stream=self)

    async def __aiter__(self):
        for _ in range(self.pieces):
            yield b" "
            await asyncio.sleep(self.seconds)
        yield self.BODY


class Server:
    """A retrieval server in a thread of this process.

    Args:
        answers: (status, body[, headers]), given in turn, the last one again and again; a body is JSON's, bytes, or a
            function that writes it. Or one function of a request's number (from 0) and its JSON that gives such.
        delay: seconds before each answer.
        port: 0 takes a free one.
    """

    def __init__(self, *answers, delay=0.0, port=0):
        self.answers, self.requests, self.headers, self.delay = list(answers), [], [], delay
        self.most_at_a_time, self._running, self._lock = 0, 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.headers.append(self.headers)
                status, body, *headers = server.answer_to(request)
                with server.counting():
                    time.sleep(server.delay)
                self.send_response(status)
                for name, value in (headers[0] if headers else {}).items():
                    self.send_header(name, value)
                self.end_headers()
                if callable(body):
                    body(self.wfile)
                else:
                    self.wfile.write(body if isinstance(body, bytes) else json.dumps(body).encode())

            def log_message(self, *args):
                pass

        class Listener(ThreadingHTTPServer):
            request_queue_size = 256  # of 5, the default, those that come too many wait a second

        self._server = Listener(("127.0.0.1", port), Handler)
        self._server.handle_error = lambda *args: None  # a client that has timed out
        self.url = f"http://127.0.0.1:{self._server.server_port}/retrieve"

    def answer_to(self, request):
        with self._lock:
            self.requests.append(request)
            number = len(self.requests) - 1
            if not callable(self.answers[0]):
                return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return self.answers[0](number, request)

    @contextmanager
    def counting(self):
        with self._lock:
            self._running += 1
            self.most_at_a_time = max(self.most_at_a_time, self._running)
        yield
        with self._lock:
            self._running -= 1

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()


class Serving:
    """A server that answers at ``url``; ``log`` are the lines that it printed before it did."""

    def __init__(self, corpus: Path, index: Path, *options: str, port: int = 0, cpu: int | None = None):
        command = [sys.executable, "-m", "igpo_fast", "search", "serve", f"--corpus={corpus}", f"--index={index}"]
        self.process = subprocess.Popen(
            [*command, f"--port={port}", *options],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=None if cpu is None else lambda: os.sched_setaffinity(0, {cpu}),
        )
        self.log: list[str] = []
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))
            if found := re.search(r" at (http://.*:(\d+)/retrieve)$", line):
                self.url, self.port = found[1], int(found[2])
                return
        raise AssertionError(f"exit code {self.process.wait()}: {self.log}")

    def end(self, how=subprocess.Popen.terminate) -> None:
        """``how`` is Popen.terminate or Popen.kill."""
        how(self.process)
        self.process.wait(10)
        self.process.stderr.close()


@contextmanager
def serving(corpus: Path, index: Path, *options: str, **more):
    server = Serving(corpus, index, *options, **more)
    try:
        yield server
    finally:
        server.end()
