"""A step's rollouts, sampled from the same policy on the same questions.

    ours            the embedded engine: continuous batching, keys and values kept across turns
    vllm            vLLM in this process
    transformers    ``generate`` on the waiting rollouts, with all prefixes again in each turn; no log-probabilities

``extra_info`` has rollouts and generated tokens per second (the shape's, divided by the times). Draws differ slightly
between sides, and so do the tokens.
"""

from __future__ import annotations

import asyncio
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

pytest.importorskip("pydantic")

from bench.peers import imported
from bench.timing import DEVICE
from igpo_fast import config
from igpo_fast.engines import vllm
from igpo_fast.engines.base import Generation, Request, let_others_run
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.setup import set_up

SMALL = ("sft.clean_steps=120", "sft.noisy_steps=0", "sft.hard_steps=0")
LARGER = (
    "model.hidden_size=512", "model.layers=8", "model.heads=8", "model.kv_heads=4", "model.ffn_size=1408",
    "sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0",
)  # fmt: skip
SHAPES = {"0.4m": (SMALL, 16, 8), "24m": (LARGER, 4, 4)}
"""Settings, questions, rollouts per question; the second policy is untrained and uses all its turns."""


class GenerateEngine:
    """An ``Engine`` that passes all waiting requests to ``generate`` as one left-padded batch."""

    name, version, remote, keeps_rollouts = "transformers", 1, False, True

    def __init__(self, lm):
        self.lm, self._waiting, self._pump = lm, [], None

    async def generate(self, request: Request) -> Generation:
        loop = asyncio.get_running_loop()
        self._waiting.append((request, future := loop.create_future()))
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
        return await future

    async def _run(self):
        await let_others_run()
        while self._waiting:
            jobs, self._waiting = self._waiting, []
            for (_, future), generation in zip(jobs, self._batch([request for request, _ in jobs]), strict=True):
                future.set_result(generation)
            await let_others_run()

    def _batch(self, requests: list[Request]) -> list[Generation]:
        width = max(len(request.ids) for request in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long, device=DEVICE)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, width - len(request.ids) :] = torch.as_tensor(request.ids)
            mask[row, width - len(request.ids) :] = 1
        stops = set(requests[0].stop_ids)
        settings = GenerationConfig(
            do_sample=True, top_k=0, max_new_tokens=requests[0].max_tokens, eos_token_id=sorted(stops), pad_token_id=0
        )
        found = self.lm.generate(ids, attention_mask=mask, generation_config=settings)[:, width:].tolist()
        ends = [next((i + 1 for i, id in enumerate(row) if id in stops), len(row)) for row in found]
        return [
            Generation(np.asarray(row[:end], np.int32), np.zeros(end, np.float32), row[end - 1] in stops)
            for row, end in zip(found, ends, strict=True)
        ]

    def release(self, key):
        pass


@pytest.mark.parametrize("name", SHAPES)
def test_rollout(name, compare, benchmark, tmp_path):
    options, questions, group_size = SHAPES[name]
    settings = config.load("configs/quickstart.yaml", [*options, "run.cache=runs/cache", f"run.dir={tmp_path}"])
    setup = set_up(settings)
    plain = copy.deepcopy(setup.lm)
    plain.set_attn_implementation("sdpa")
    tokens = {}

    def side(key, engine):
        def run():
            agent = replace(setup.agent, engine=engine)
            groups = rollout_groups(agent, setup.data.train[:questions], group_size, 1)
            tokens[key] = sum(rollout.decision_tokens for group in groups for rollout in group.rollouts)

        return run

    sides = {
        "ours": side("ours", TorchEngine(setup.lm, decode=setup.tokenizer.decode)),
        "transformers": side("transformers", GenerateEngine(plain)),
    }
    vllm.prepare()
    if imported("vllm", "vllm", gpu=False):
        engine = vllm.make_engine(
            config.load(None, ["rollout.engine=vllm", "rollout.max_tokens=224"]), setup.lm, setup.tokenizer.decode
        )
        engine.load_weights(setup.lm.state_dict().items())
        sides["vllm"] = side("vllm", engine)
    parameters = sum(p.numel() for p in setup.lm.parameters())
    for run in sides.values():
        run()
    shape = {"parameters": parameters, "rollouts": questions * group_size, "generated_tokens": dict(tokens)}
    found = compare("rollout/engines", shape, sides)
    rates = benchmark.extra_info["rates"] = {
        key: {
            "rollouts/s": round(1e3 * questions * group_size / times["median"], 1),
            "tokens/s": round(1e3 * tokens[key] / times["median"]),
        }
        for key, times in found.items()
    }
    print(rates)
