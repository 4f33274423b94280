"""``igpo_tree``: tree attention as an attention implementation of transformers.

Importing this module registers it. A causal LM that is set to it reads a pack in one forward:

    use_tree_attention(model)
    hidden = model.base_model(**model_inputs(plan, model.device)).last_hidden_state
    logp = logprobs(model, hidden, plan)

The plan travels as a forward argument to every layer, so no class is patched and a model may serve many plans. Gradient
checkpointing recomputes the attention with the plan's schedules as they are, or not at all (``keep_attention``). Under
``torch.compile`` the attention is left out, because a plan is no tensor: one graph break per layer; the code between is
compiled for any length.

Right only for models whose every layer is softmax attention that depends on the visible path alone.
``use_tree_attention`` checks this; unchecked, recurrent layers, ALiBi, RoPE that depends on the longest path, and
layers that do not go through transformers' AttentionInterface raise nothing.
"""

from igpo_kernels.huggingface.dispatch import (
    ATTENTION,
    Attend,
    TreeAttend,
    attention,
    heads_of,
    masked_limits,
    model_inputs,
)
from igpo_kernels.huggingface.last_layer import read_rows_in_last_layer
from igpo_kernels.huggingface.lm_head import Head, head_of, logprobs
from igpo_kernels.huggingface.parts import BranchAttend, TrunkAttend, read_in_parts
from igpo_kernels.huggingface.verify import use_tree_attention
from igpo_kernels.recompute import keep_attention

__all__ = [
    "ATTENTION",
    "Attend",
    "BranchAttend",
    "Head",
    "TreeAttend",
    "TrunkAttend",
    "attention",
    "head_of",
    "heads_of",
    "keep_attention",
    "logprobs",
    "masked_limits",
    "model_inputs",
    "read_in_parts",
    "read_rows_in_last_layer",
    "use_tree_attention",
]
