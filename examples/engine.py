"""An engine: the embedded one, made to report how many tokens it samples.

igpo-fast train --config configs/quickstart.yaml rollout.engine=examples/engine.py:counting
"""

from igpo_fast.engines.torch import TorchEngine


class CountingEngine(TorchEngine):
    sampled = 0

    async def generate(self, request):
        generation = await super().generate(request)
        self.sampled += len(generation.ids)
        return generation

    def counts(self):
        sampled, self.sampled = self.sampled, 0
        return super().counts() | {"rollout/sampled_tokens": sampled}


def counting(config, lm, tokenizer):
    rollout = config.rollout
    return CountingEngine(lm, decode=tokenizer.decode, max_slots=rollout.concurrency, max_tokens=rollout.max_tokens)
