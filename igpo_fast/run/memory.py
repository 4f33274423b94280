"""Memory of a training process, computed from the configuration alone (docs/recipes.md derives the formulas)."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from igpo_fast.config import Config
from igpo_kernels.workspace import GPU_BYTES

FFN = ("intermediate_size", "ffn_dim", "n_inner")
"""Names of the feed-forward width in configurations; without one it is four times the hidden size."""


def training_bytes(config: Config, lm: PretrainedConfig) -> dict[str, int]:
    """Bytes per part, for one process on a GPU; rollouts come on top (``kv_bytes_per_token``).

    Args:
        lm: the decoder's configuration; no weights are needed.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(lm, trust_remote_code=False).parameters())
    size = getattr(torch, config.train.precision).itemsize
    hidden, layers = lm.hidden_size, lm.num_hidden_layers
    ffn = next((width for name in FFN if (width := getattr(lm, name, None))), 4 * hidden)
    ffn = ffn if isinstance(ffn, int) else max(ffn)  # Gemma 3n has one width per layer
    token = size * config.train.token_budget  # bytes of one number per packed token
    inside = token * (12 * hidden + 6 * ffn)  # numbers that a layer keeps for backward, and its gradients
    kept = layers * token * hidden + inside if config.model.gradient_checkpointing else layers * inside
    return {
        "weights": count * size,
        "float32 masters": 0 if size == 4 else 4 * count,
        "gradients": 4 * count,
        "Adam states": 8 * count,
        "reference": count * size if config.algorithm.kl else 0,
        "activations of a pack": kept,
        "LM head": 2 * token * hidden + GPU_BYTES,
    }


def kv_bytes_per_token(lm: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    count = lm.num_hidden_layers
    layers = lm.per_layer_config if getattr(lm, "is_heterogeneous", False) else [lm] * count
    return sum(2 * _kv_width(layers[i]) * dtype.itemsize for i in range(count))


def _kv_width(layer: PretrainedConfig) -> int:
    heads = layer.num_attention_heads
    size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return (getattr(layer, "num_key_value_heads", None) or heads) * size
