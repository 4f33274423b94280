"""A run's page over HTTP, on this machine alone, while the run goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from igpo_fast.errors import InputError, RunError
from igpo_fast.report.page import Report

HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Answers GET of ``/``, the page, and ``/version``, a text that differs when the run has gone on.

    A page of another site cannot read it: requests must name this host, and browsers keep answers from other origins.

    Raises:
        InputError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, report: Report, port: int = 0):
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise InputError(f"{HOST}:{port}: cannot listen there ({error.strerror}); give another --port") from None
        self._report, self._lock = report, Lock()
        self._version, self._page = "", b""
        self.hosts = {f"{name}:{self.server_port}" for name in (HOST, "localhost")}
        self.pages: dict[str, tuple[Callable[[], bytes], str]] = {
            "/": (self.page, "text/html"),
            "/version": (lambda: report.version().encode(), "text/plain"),
        }

    def handle_error(self, request, client_address) -> None:
        """A browser that goes away while it is answered is no error."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> bytes:
        """The page as of now; made once per version, however many ask."""
        with self._lock:
            version = self._report.version()  # before the page is made: what comes meanwhile is another version
            if version != self._version:
                self._page = self._report.html(version)
                self._version = version
            return self._page


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = 10.0

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self._answer(421, b"ask for 127.0.0.1 or localhost", "text/plain")
        elif self.path not in self.server.pages:
            self._answer(404, b"there are / and /version", "text/plain")
        else:
            content, kind = self.server.pages[self.path]
            try:
                self._answer(200, content(), kind)
            except RunError as error:
                self._answer(503, str(error).encode(errors="replace"), "text/plain")

    def _answer(self, status: int, content: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        """Nothing: a page asks every two seconds."""


def serve(report: Report, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C.

    Args:
        ready: called with the URL once clients can connect.
    """
    with Server(report, port) as server, suppress(KeyboardInterrupt):
        ready(server.url)
        server.serve_forever()
