"""What a training process holds in memory, from the configuration alone (docs/recipes.md derives the formulas)."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from igpo_fast.config import Config
from igpo_kernels.workspace import GPU_BYTES


def training_bytes(config: Config, lm: PretrainedConfig) -> dict[str, int]:
    """Bytes of each part, for one process and a GPU; rollouts come on top (``kv_bytes_per_token``).

    Args:
        lm: the model's configuration, of a Llama-like decoder; no weights are loaded.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(lm).parameters())
    size = getattr(torch, config.model.dtype).itemsize
    hidden, ffn, layers = lm.hidden_size, lm.intermediate_size, lm.num_hidden_layers
    token = size * config.train.token_budget  # of one number for each packed token
    inside = token * (12 * hidden + 6 * ffn)  # what a layer keeps for its backward pass, and gradients on the way
    kept = layers * token * hidden + inside if config.model.gradient_checkpointing else layers * inside
    return {
        "weights": count * size,
        "gradients": count * size,
        "Adam states": 2 * count * size,
        "reference": count * size if config.algorithm.kl else 0,
        "activations of a pack": kept,
        "LM head": 2 * token * hidden + GPU_BYTES,
    }


def kv_bytes_per_token(lm: PretrainedConfig, dtype: torch.dtype) -> int:
    """Keys and values of one token, all layers."""
    width = getattr(lm, "head_dim", None) or lm.hidden_size // lm.num_attention_heads
    return 2 * lm.num_hidden_layers * lm.num_key_value_heads * width * dtype.itemsize
