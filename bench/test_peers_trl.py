"""A training step on recorded rollouts of several turns: ``IGPOTrainer`` against TRL's ``GRPOTrainer``.

    ours        packed trees: values of every prefix, gains, loss and gradients from one pass
    trl         GRPOTrainer, one advantage per rollout and no values
    separate    IGPOTrainer with packed=off: TRL's loss, and a sequence for each prefix and answer

All take TRL's own ``training_step`` and an AdamW step. TRL's LM head reads every position on a CPU, on a GPU those of
completions; ours reads the policy's tokens.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("trl", exc_type=ImportError)

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from bench.timing import DEVICE
from igpo_fast.integrations.trl import IGPOConfig, IGPOTrainer

SHAPES = {
    "16x1300": dict(
        groups=2, rollouts=8, prompt=150, turns=(4, 6), turn=(20, 45), response=(200, 300), wrapper=26, answer=4,
        hidden=256, layers=4, vocab=16384,
    )
}  # fmt: skip
"""Lengths like those of configs/musique.yaml's rollouts: (least, most) where they vary."""
PEERS = {"trl": 3, "separate": 1}
"""Sides and rounds."""


def recorded(shape: dict) -> dict[str, list]:
    """What TRL's rollout_func returns, from random tokens; a group shares its prompt."""
    rng = np.random.default_rng(0)
    between = lambda bounds: int(rng.integers(bounds[0], bounds[1] + 1))  # noqa: E731
    draw = lambda n: rng.integers(1, shape["vocab"], n).tolist()  # noqa: E731
    made = {"prompt_ids": [], "completion_ids": [], "logprobs": [], "env_mask": [], "outcome": []}
    for _ in range(shape["groups"]):
        prompt = draw(shape["prompt"])
        for _ in range(shape["rollouts"]):
            ids, mask = [], []
            for left in reversed(range(between(shape["turns"]))):
                ids += draw(own := between(shape["turn"]))
                mask += [1] * own
                if left:
                    ids += draw(others := between(shape["response"]))
                    mask += [0] * others
            made["prompt_ids"].append(prompt)
            made["completion_ids"].append(ids)
            made["logprobs"].append([0.0] * len(ids))
            made["env_mask"].append(mask)
            made["outcome"].append(float(rng.random()))
    return made


def words(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocab`` words, w0, w1, ..."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w0", pad_token="w0")


def side(trainer: type, config: type, shape: dict, folder, **options):
    """A step of a trainer on recorded rollouts, from fresh weights."""
    torch.manual_seed(0)
    hidden = shape["hidden"]
    lm = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape["vocab"], hidden_size=hidden, num_hidden_layers=shape["layers"],
            num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 128), intermediate_size=3 * hidden,
            max_position_embeddings=4096,
        )
    )  # fmt: skip
    rollouts = recorded(shape)
    answer = " ".join(f"w{i}" for i in range(100, 100 + shape["answer"]))
    rows = [{"prompt": f"w{g}", "answers": [answer]} for g in range(shape["groups"]) for _ in range(shape["rollouts"])]
    args = config(
        output_dir=str(folder), per_device_train_batch_size=len(rows), num_generations=shape["rollouts"],
        max_completion_length=2048, bf16=DEVICE == "cuda", use_cpu=DEVICE == "cpu", gradient_checkpointing=False,
        report_to="none", **options,
    )  # fmt: skip
    made = trainer(
        lm, lambda outcome, **_: outcome, args, train_dataset=Dataset.from_list(rows),
        processing_class=words(shape["vocab"]), rollout_func=lambda prompts, _: rollouts,
    )  # fmt: skip
    made.current_gradient_accumulation_steps = 1  # as ``train`` sets it
    optimizer = made.create_optimizer()

    def step():
        loss = made.training_step(made.model, [dict(row) for row in rows], None)
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()

    return step


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", SHAPES)
def test_step(name, peer, compare, tmp_path):
    shape = SHAPES[name]
    wrapper = " ".join(f"w{i}" for i in range(10, 10 + shape["wrapper"])) + " {}"
    igpo = partial(
        side, IGPOTrainer, IGPOConfig, shape, tmp_path, dialect="tags",
        algorithm={"preset": "robust", "wrapper": wrapper},
    )  # fmt: skip
    peers = {"trl": partial(side, GRPOTrainer, GRPOConfig, shape, tmp_path), "separate": partial(igpo, packed="off")}
    tokens = sum(len(ids) for key in ("prompt_ids", "completion_ids") for ids in recorded(shape)[key])
    about = {"model": "qwen2", **shape, "tokens": tokens}
    compare("peers", about, {"ours": igpo(packed="on"), peer: peers[peer]()}, PEERS[peer])
