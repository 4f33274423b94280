"""``igpo_tree``: tree attention as an attention implementation of transformers.

Importing this module registers it. A causal LM that is set to it reads a pack in one forward:

    model.set_attn_implementation("igpo_tree")
    logits_1NV = model(**model_inputs(plan, model.device)).logits

The plan travels as a forward argument to every layer, so nothing is patched and a model may serve many plans. Gradient
checkpointing recomputes the attention with the plan's schedules as they are. Under ``torch.compile`` the attention is
left out, because a plan is no tensor: one graph break a layer, and what lies between is compiled for any length.

Right only for models whose every layer is softmax attention that depends on the visible path alone. Attention sinks
(gpt-oss) are refused. The others raise nothing here: recurrent layers, ALiBi, RoPE that depends on the longest path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention import tree_attention

ATTENTION = "igpo_tree"
"""The name of the attention implementation that models are set to."""


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
    """Attention under a TreePlan's mask."""

    plan: TreePlan
    backend: str = "auto"

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        return tree_attention(q, k, v, self.plan, scale, softcap, window, self.backend)


def model_inputs(plan: TreePlan, device: torch.device | str = "cpu") -> dict[str, Any]:
    """A pack as arguments of a model's forward: one row of N tokens, with the positions that its paths have."""
    ids, positions = (plan.tensor(name, device)[None] for name in ("input_ids", "position_ids"))
    return dict(input_ids=ids, position_ids=positions, plan=plan, use_cache=False)


def heads_of(model: PreTrainedModel) -> tuple[int, int]:
    """Numbers of a head and query heads to a key head, which with ``model.device`` and ``model.dtype`` decide what
    ``auto`` is: ``tree_attention.backend_for(plan, model.device, model.dtype, *heads_of(model))``."""
    config = model.config.get_text_config()
    if getattr(config, "is_heterogeneous", False):  # Gemma 4: the largest head decides for all layers
        return max(_heads(config.per_layer_config[i]) for i in range(config.num_hidden_layers))
    return _heads(config)


def _heads(config: PretrainedConfig) -> tuple[int, int]:
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return size, heads // (getattr(config, "num_key_value_heads", None) or heads)


@torch.compiler.disable
def attention(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: torch.Tensor | None = None,
    plan: TreePlan | Attend | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What every attention layer of a model set to ``igpo_tree`` calls.

    Args:
        query: [1, Hq, N, D]. key, value: [1, Hkv, N, D].
        attention_mask: None: the plan is the mask.
        s_aux: attention sinks, which a plan's attention does not have. An ``Attend`` is not given them: ``probe`` of
            igpo_fast shows what that changes.
        plan: of N tokens; or an ``Attend``, for whatever else a flat row may mean.
    Returns:
        [1, N, Hq, D], and no attention weights.
    Raises:
        ValueError: no plan, a batch of several rows, dropout, a mask, sinks; what ``tree_attention`` raises.
    """
    name = type(module).__name__
    if plan is None:
        raise ValueError(f"{ATTENTION}: {name} got no plan; run the model as model(**model_inputs(plan, device))")
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
    attend = TreeAttend(plan) if isinstance(plan, TreePlan) else plan
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(module.layer_idx, q, k, v, scale=scale, softcap=softcap or 0.0, window=sliding_window)
    return out[None], None


# No mask function beside it: for a name that AttentionMaskInterface does not know, transformers makes no mask and does
# not search position_ids for packed sequences, which would have the host wait for the device in every forward.
AttentionInterface.register(ATTENTION, attention)
