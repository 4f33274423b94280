"""What a training process holds in memory, from the configuration alone (docs/recipes.md derives the formulas)."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from igpo_fast.config import Config
from igpo_kernels.workspace import GPU_BYTES

FFN = ("intermediate_size", "ffn_dim", "n_inner")
"""What configurations call the width of a feed-forward layer. Those without one have four times the hidden size."""


def training_bytes(config: Config, lm: PretrainedConfig) -> dict[str, int]:
    """Bytes of each part, for one process and a GPU; rollouts come on top (``kv_bytes_per_token``).

    Args:
        lm: the decoder's configuration; no weights are loaded.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(lm, trust_remote_code=False).parameters())
    size = getattr(torch, config.model.dtype).itemsize
    hidden, layers = lm.hidden_size, lm.num_hidden_layers
    ffn = next((width for name in FFN if (width := getattr(lm, name, None))), 4 * hidden)
    ffn = ffn if isinstance(ffn, int) else max(ffn)  # Gemma 3n has one per layer
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
    count = lm.num_hidden_layers
    layers = lm.per_layer_config if getattr(lm, "is_heterogeneous", False) else [lm] * count
    return sum(2 * _kv_width(layers[i]) * dtype.itemsize for i in range(count))


def _kv_width(layer: PretrainedConfig) -> int:
    heads = layer.num_attention_heads
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return (getattr(layer, "num_key_value_heads", None) or heads) * size
