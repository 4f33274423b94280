"""A retrieval server over an index, speaking Search-R1's protocol.

POST /retrieve {"queries": [..], "topk": 3, "return_scores": true}
  -> {"result": [[{"document": {"id", "contents": "title\\ntext"}, "score"}, ..], ..]}
without return_scores -> {"result": [[{"id", "contents"}, ..], ..]}
GET /health -> {"status": "ok", "retriever": "bm25", "passages": 1890}
"""

from __future__ import annotations

import socket

import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel, NonNegativeInt

from igpo_fast.errors import InputError
from igpo_fast.tools.index import Hits, Index


class Request(BaseModel):
    """The body of a request to ``/retrieve``."""

    queries: list[str]
    """Each is answered by a list of its own, in their order."""
    topk: NonNegativeInt | None = None
    """Passages a query gets; None and 0 take the server's own number."""
    return_scores: bool = False
    """Documents with their scores, else alone."""


def make_app(index: Index, topk: int) -> FastAPI:
    """The server's application; ``topk`` where a request names none."""
    app = FastAPI(title="igpo-fast search")

    # Not async: it runs in a thread, so that a slow query holds up neither the others nor /health.
    @app.post("/retrieve")
    def retrieve(request: Request) -> Response:
        found = index.search(request.queries, request.topk or topk)
        lists = b", ".join(_hits(index, hits, request.return_scores) for hits in found)
        return Response(b'{"result": [' + lists + b"]}", media_type="application/json")

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok", "retriever": index.retriever.kind, "passages": len(index.documents)}

    return app


def _hits(index: Index, hits: Hits, scores: bool) -> bytes:
    """A query's passages as JSON: documents are JSON already."""
    if scores:
        entries = (b'{"document": %b, "score": %b}' % (index.documents[i], repr(s).encode()) for i, s in hits)
    else:
        entries = (index.documents[i] for i, _ in hits)
    return b"[" + b", ".join(entries) + b"]"


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address, not listening yet: a port that is taken is found before an index is built.

    Raises:
        InputError: the address is taken, or not ours.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise _refusal(host, port, error) from None
    return listener


def serve(index: Index, listener: socket.socket, topk: int, ready=lambda url: None) -> None:
    """Answer requests on ``listener`` until SIGINT or SIGTERM.

    Args:
        ready: told the URL as soon as clients can connect.
    Raises:
        InputError: another process began to listen there meanwhile.
    """
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(2048)
    except OSError as error:
        raise _refusal(host, port, error) from None
    ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/retrieve")
    config = uvicorn.Config(make_app(index, topk), log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(sockets=[listener])


def _refusal(host: str, port: int, error: OSError) -> InputError:
    return InputError(f"{host}:{port}: cannot listen there ({error.strerror}); give another --port or --host")
