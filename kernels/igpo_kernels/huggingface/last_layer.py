"""A decoder whose last layer gives the rows that are read, and no others.

Of a pack the LM head reads the policy's tokens and the answers, often a tenth of it. In the last layer other tokens are
needed as keys and values alone: their attention's output and their feed-forward layer change nothing. Below the last
layer every token is another's key, and nothing can be left out.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from igpo_kernels.huggingface.dispatch import Attend, TreeAttend, decoder_of

PARTS = "self_attn", "input_layernorm"
"""A layer's attention, and what it reads: names that most of transformers' decoders share."""


def read_rows_in_last_layer(model: PreTrainedModel) -> bool:
    """Let the last layer of ``model`` give only ``plan.rows_read`` under ``TreeAttend(plan, rows_read=True)``.

    A hook of the layer does it. Forwards under anything else stay what they were; a second call changes nothing. Verify
    the model under such a ``TreeAttend``, as ``probe`` of igpo_fast does.

    Returns:
        Whether the layer has the parts for that; if not, the model gives all rows, whatever ``rows_read`` is.
    """
    try:
        layers = getattr(decoder_of(model), "layers", None)
    except ValueError:
        return False
    if not isinstance(layers, torch.nn.ModuleList) or not all(hasattr(layers[-1], part) for part in PARTS):
        return False
    if _on_rows not in layers[-1]._forward_pre_hooks.values():
        layers[-1].register_forward_pre_hook(_on_rows, with_kwargs=True)
    return True


@torch.compiler.disable
def _on_rows(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """Run the layer's attention on all tokens for its keys and values, and then let the layer run on the rows, which
    attend to those. (The first run projects queries and outputs in vain, the second some keys and values: about a sixth
    of a forward of the layer.)"""
    attend = kwargs.get("plan")
    if not isinstance(attend, TreeAttend) or len(args) != 1:
        return None
    (hidden,) = args
    rows = attend.last_rows(hidden.device)
    if rows is None or not len(rows):
        return None
    keys = _Keys()
    layer.self_attn(hidden_states=layer.input_layernorm(hidden), **{**kwargs, "plan": keys})
    of_rows = {name: _chosen(x, rows, hidden.shape[1]) for name, x in kwargs.items()}
    # index_select: rows are distinct, so its gradient is a copy; that of indexing would sort on a GPU.
    return (hidden.index_select(1, rows),), of_rows | {"plan": _ToAllKeys(attend, keys)}


def _chosen(x: Any, rows: torch.Tensor, length: int) -> Any:
    """The rows of everything in ``x`` that is [1, length, ...]: positions, and their cosines and sines."""
    if isinstance(x, tuple | list):
        return type(x)(_chosen(each, rows, length) for each in x)
    if isinstance(x, torch.Tensor) and x.ndim > 1 and x.shape[:2] == (1, length):
        return x[:, rows]
    return x


class _Keys(Attend):
    """Keeps a layer's keys and values. What it gives is not read."""

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        self.k, self.v = k, v
        return q


class _ToAllKeys(Attend):
    """Attention of the rows' queries to the keys and values that were kept."""

    def __init__(self, attend: TreeAttend, keys: _Keys):
        self._attend, self._keys = attend, keys

    def __call__(self, layer, q, k, v, **options):
        return self._attend(layer, q, self._keys.k, self._keys.v, **options)
