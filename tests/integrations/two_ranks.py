"""``torchrun ... -m tests.integrations.two_ranks FOLDER``: this rank's half of a recorded batch, so that a group spans
ranks; fails unless TRL's exchanged gradients are those of one process."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from tests.integrations.test_trl import PAPER, SIZE, made, outcomes_of

folder, rank, ranks = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
rollouts, tokenizer, gradients = torch.load(folder / "recorded.pt", weights_only=False)
share = len(rollouts) // ranks
assert share % SIZE
mine = slice(rank * share, (rank + 1) * share)
world = SimpleNamespace(
    tokenizer=tokenizer, model=lambda: AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
)
trainer, rows = made(world, rollouts[mine], folder, algorithm=PAPER, rewards=outcomes_of(rollouts)[mine])
assert not trainer.packed
trainer.training_step(trainer.accelerator.prepare(trainer.model), rows, None)
largest = max(gradient.abs().max() for gradient in gradients.values())
for name, parameter in trainer.model.named_parameters():
    if name in gradients:
        assert (parameter.grad - gradients[name]).abs().max() <= 1e-4 * largest, name
