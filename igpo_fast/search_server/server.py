"""A retrieval server over an index, speaking Search-R1's protocol.

POST /retrieve {"queries": [..], "topk": 3, "return_scores": true}
  -> {"result": [[{"document": {"id", "contents": "title\\ntext"}, "score"}, ..], ..]}
without return_scores -> {"result": [[{"id", "contents"}, ..], ..]}
GET /health -> {"status": "ok", "retriever": "bm25", "passages": 1890}

Limits: a request beyond ``MOST_*`` is refused (status 413 for its bytes, else 422), and a connection is closed whose
request has not arrived in full after ``RECEIVE_WITHIN``.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Annotated

import h11
import uvicorn
from fastapi import FastAPI, HTTPException, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, model_validator
from uvicorn.protocols.http.h11_impl import H11Protocol

from igpo_fast.data.bm25 import Hits
from igpo_fast.errors import InputError
from igpo_fast.search_server.index import Index

MOST_BYTES = 4_000_000
"""Bytes of a request's body."""
MOST_QUERIES = 1024
"""Queries per request."""
MOST_CHARACTERS = 10_000
"""Characters per query."""
MOST_TOPK = 1000
"""Passages per query."""
MOST_PASSAGES = 10_000
"""Passages per request: queries times topk."""
RECEIVE_WITHIN = 10.0
"""Seconds in which a request must arrive in full."""


class Request(BaseModel):
    """The body of a request to ``/retrieve``."""

    queries: Annotated[list[Annotated[str, Field(max_length=MOST_CHARACTERS)]], Field(max_length=MOST_QUERIES)]
    """Queries; the answer has one list per query, in their order."""
    topk: Annotated[int, Field(ge=0, le=MOST_TOPK)] | None = None
    """Passages per query; None and 0 take the server's own number."""
    return_scores: bool = False
    """Return documents with their scores, or alone."""

    @model_validator(mode="after")
    def _together(self) -> Request:
        if len(self.queries) * (self.topk or 1) > MOST_PASSAGES:
            raise ValueError(f"queries times topk must be at most {MOST_PASSAGES:,}")
        return self


def make_app(index: Index, topk: int) -> FastAPI:
    """The server's application; ``topk`` applies if a request gives none."""
    app = FastAPI(title="igpo-fast search")
    app.add_middleware(BodyLimit)

    # FastAPI's own answer repeats the input, which may be long, or NaN, which JSON does not have.
    @app.exception_handler(RequestValidationError)
    async def refuse(_, error: RequestValidationError) -> JSONResponse:
        found = [{key: one[key] for key in ("type", "loc", "msg")} for one in error.errors()[:10]]
        return JSONResponse({"detail": found}, status_code=422)

    # Not async: it runs in a thread, so that a slow query delays neither other queries nor /health.
    @app.post("/retrieve")
    def retrieve(request: Request) -> Response:
        found = index.search(request.queries, request.topk or topk)
        lists = b", ".join(_hits(index, hits, request.return_scores) for hits in found)
        return Response(b'{"result": [' + lists + b"]}", media_type="application/json")

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "retriever": index.retriever.kind, "passages": len(index.documents)}

    return app


class BodyLimit:
    """ASGI middleware: refuses a body longer than ``MOST_BYTES``, with status 413."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        size = 0

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MOST_BYTES:
                raise HTTPException(413, f"a request has at most {MOST_BYTES:,} bytes")
            return message

        await self._app(scope, counted, send)


class Timed(H11Protocol):
    """HTTP protocol that closes connections whose request takes longer than ``RECEIVE_WITHIN`` to arrive: uvicorn's own
    timeout covers only the wait for the first byte."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        if self._late is None:
            self._wait()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):  # the request is complete
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._late = self.loop.call_later(RECEIVE_WITHIN, self.transport.abort)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def _hits(index: Index, hits: Hits, scores: bool) -> bytes:
    """A query's passages as JSON; documents are JSON already."""
    if scores:
        entries = (b'{"document": %b, "score": %b}' % (index.documents[i], repr(s).encode()) for i, s in hits)
    else:
        entries = (index.documents[i] for i, _ in hits)
    return b"[" + b", ".join(entries) + b"]"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that a taken port is found before an index is built.

    Raises:
        InputError: the address is taken, or is not one of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError, UnicodeError) as error:
        raise _refusal(host, port, error) from None
    return listener


def serve(index: Index, listener: socket.socket, topk: int, ready=lambda url: None) -> None:
    """Answer requests on ``listener`` until SIGINT or SIGTERM.

    Args:
        ready: called with the URL as soon as clients can connect.
    Raises:
        InputError: another process began to listen there meanwhile.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(2048)
    except OSError as error:
        raise _refusal(host, port, error) from None
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve")
    config = uvicorn.Config(make_app(index, topk), log_level="warning", access_log=False, lifespan="off", http=Timed)
    uvicorn.Server(config).run(sockets=[listener])


def _refusal(host: str, port: int, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{host}:{port}: cannot listen there ({reason}); give another --port or --host")
