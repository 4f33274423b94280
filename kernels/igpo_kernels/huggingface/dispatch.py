"""The attention function that layers call, and its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PreTrainedModel

from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention import tree_attention

ATTENTION = "igpo_tree"
"""The name of the attention implementation that models are set to."""
HARMLESS = {
    "cache_position", "deterministic", "logits_to_keep", "num_items_in_batch", "output_attentions",
    "output_hidden_states", "output_router_logits", "position_ids", "return_dict", "use_cache",
}  # fmt: skip
"""Keywords that layers hand on to attention functions and that change no result of softmax attention."""


class Attend(Protocol):
    """Attention of one layer over a flat row of S tokens."""

    def __call__(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        *, scale: float, softcap: float, window: int | None,
    ) -> torch.Tensor:  # fmt: skip
        """q [S, Hq, D], k and v [S, Hkv, D] -> [S, Hq, D]."""
        ...


@dataclass(frozen=True)
class TreeAttend:
    """Attention under a TreePlan's mask.

    Args:
        rows_read: have the last layer give ``plan.rows_read`` alone, of a model that ``read_rows_in_last_layer`` has
            prepared.
    """

    plan: TreePlan
    backend: str = "auto"
    rows_read: bool = False

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        rows = "rows_read" if len(q) < len(k) else None
        return tree_attention(q, k, v, self.plan, scale, softcap, window, self.backend, rows=rows)

    def last_rows(self, device: torch.device) -> torch.Tensor | None:
        """Places, among the tokens of a forward, of the rows that the last layer gives; None for all."""
        return self.plan.tensor("rows_read", device) if self.rows_read else None

    def last_of(self, hidden: torch.Tensor) -> torch.Tensor:
        """``last_rows`` of a forward's hidden states, whether its last layer gave all rows, [S, H], or those alone."""
        rows = self.last_rows(hidden.device)
        return hidden if rows is None or len(rows) == len(hidden) else hidden[rows]


def model_inputs(plan: TreePlan, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Arguments of a model's forward for a pack: one row of N tokens, with positions along their paths."""
    ids, positions = plan.tokens(device)
    return dict(input_ids=ids[None], position_ids=positions[None], plan=plan, use_cache=False)


def heads_of(model: PreTrainedModel) -> tuple[int, int]:
    """Head size and query heads per key head, the largest of any layer. With ``model.device`` and ``model.dtype``
    they decide which backend ``auto`` is:
    ``tree_attention.backend_for(plan, model.device, model.dtype, *heads_of(model))``."""
    config = model.config.get_text_config()
    layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    sizes, groups = [], []
    for layer in layers:
        heads = layer.num_attention_heads
        sizes.append(getattr(layer, "head_dim", None) or layer.hidden_size // heads)
        groups.append(heads // (getattr(layer, "num_key_value_heads", None) or heads))
    return max(sizes), max(groups)


def decoder_of(model: PreTrainedModel) -> torch.nn.Module:
    """The decoder, whose last hidden state the LM head reads.

    Raises:
        ValueError: the model has none.
    """
    decoder = model.get_decoder()
    decoder = model.model if decoder is model and hasattr(model, "model") else decoder
    if not isinstance(decoder, PreTrainedModel):
        raise ValueError(f"{type(model).__name__}: it has no decoder of transformers' kind; give a causal LM")
    return decoder


UNSAID: Any = object()
"""Stands for the window of a layer that passes none to its attention function."""


@torch.compiler.disable
def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = UNSAID, softcap: float | None = None, s_aux: torch.Tensor | None = None,
    plan: TreePlan | Attend | None = None, is_causal: bool | None = None, **others: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The function that every attention layer of a model set to ``igpo_tree`` calls.

    Args:
        query: [1, Hq, N, D]. key, value: [1, Hkv, N, D].
        attention_mask: None: the plan is the mask.
        s_aux: attention sinks, which a plan's attention does not have. An ``Attend`` is not given them: ``probe`` of
            igpo_fast shows what that changes.
        plan: a TreePlan of N tokens, or an ``Attend`` that defines another attention over the row.
    Returns:
        [1, N, Hq, D], and no attention weights.
    Raises:
        ValueError: no plan, a batch of several rows, dropout, a mask, sinks, attention that is not causal, keywords
            that this function does not know, values with another head size than keys, a window or chunk in the config
            that the layer does not hand over; what ``tree_attention`` raises.
    """
    name = type(module).__name__
    if plan is None:
        raise ValueError(
            f"{ATTENTION}: {name} got no plan; run the model as model(**model_inputs(plan, device)), or use another "
            "model if its layers keep keywords from their attention"
        )
    if len(query) != 1:
        raise ValueError(f"{ATTENTION}: {name} got a batch of {len(query)}; a pack is one row, input_ids [1, N]")
    if dropout:
        raise ValueError(f"{ATTENTION}: {name} drops out {dropout} of its weights; set attention_dropout to 0")
    if attention_mask is not None:
        raise ValueError(f"{ATTENTION}: {name} got an attention_mask, but the plan is the mask; leave it out")
    if s_aux is not None and isinstance(plan, TreePlan):
        raise ValueError(
            f"{ATTENTION}: {name} has attention sinks, which packed attention does not have; use another model"
        )
    unknown = sorted(key for key, x in others.items() if x is not None and key not in HARMLESS)
    if unknown:
        raise ValueError(
            f"{ATTENTION}: {name} got {', '.join(unknown)}, which packed attention would ignore; use another model, or "
            "leave these arguments out of the forward"
        )
    if (getattr(module, "is_causal", None) if is_causal is None else is_causal) is False:
        raise ValueError(f"{ATTENTION}: {name} asks for attention that is not causal; a plan's attention is")
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{ATTENTION}: {name} has keys of {key.shape[-1]} and values of {value.shape[-1]} numbers per head (MLA); "
            "packed attention takes one size: use another model"
        )
    refuse_masked_limits(module, window=sliding_window is UNSAID)
    sliding_window = None if sliding_window is UNSAID else sliding_window
    attend = TreeAttend(plan) if isinstance(plan, TreePlan) else plan
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(module.layer_idx, q, k, v, scale=scale, softcap=softcap or 0.0, window=sliding_window or None)
    return out[None], None


def refuse_masked_limits(layer: torch.nn.Module, window: bool) -> None:
    """Refuse an attention layer whose window or chunk is in transformers' mask alone, which a plan replaces, and a
    layer that scales queries by their place in the row (Llama 4 without RoPE).

    Args:
        window: whether to look for windows and chunks, because the layer passed none.
    Raises:
        ValueError: the config states a limit that does not reach attention.
    """
    config = getattr(layer, "config", None)
    stated = masked_limits(config.get_text_config()) if window and config is not None else {}
    if getattr(layer, "attn_temperature_tuning", None) and not getattr(layer, "use_rope", True):
        stated["attn_temperature_tuning"] = layer.attn_temperature_tuning
    if stated:
        raise ValueError(
            f"{ATTENTION}: the config has {', '.join(f'{key}={x}' for key, x in stated.items())}, but "
            f"{type(layer).__name__} does not hand it to its attention, so a pack would get it wrong; set it to "
            "None if no sequence is that long, or use another model"
        )


def masked_limits(config: Any) -> dict[str, int]:
    """Limits on attention's reach in a config: name -> tokens."""
    limits = {}
    for layer in config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]:
        kinds = getattr(layer, "layer_types", None)
        for key, kind in (("sliding_window", "sliding_attention"), ("attention_chunk_size", "chunked_attention")):
            used = kinds is None or kind in kinds
            if key == "sliding_window":
                used = used and getattr(layer, "use_sliding_window", True) is not False
            if used and getattr(layer, key, None):
                limits[key] = getattr(layer, key)
    return limits


# No mask function beside it: for a name that AttentionMaskInterface does not know, transformers makes no mask and does
# not search position_ids for packed sequences, which would have the host wait for the device in every forward.
AttentionInterface.register(ATTENTION, attention)
