"""Setting a model's attention, and showing that it then reads a packed tree as separate sequences."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_kernels.huggingface.dispatch import ATTENTION, Attend, TreeAttend, decoder_of, model_inputs
from igpo_kernels.plan import Branch, RolloutTokens, Tree, TreePlan, pack

LARGE = 10.0
"""Size of the attention logits on which models are verified: random weights give small ones, which hide faults."""


def use_tree_attention(model: PreTrainedModel, verify: bool = True) -> PreTrainedModel:
    """Set ``model``'s attention to ``igpo_tree``, having shown that it then reads a packed tree as separate sequences.

    Args:
        model: a causal LM, with its weights on a device.
        verify: run two small trees packed, and each of their paths by itself. Without it only the config is checked,
            and nothing is run.
    Returns:
        ``model``, in the mode it was in.
    Raises:
        ValueError: layers that do not go through transformers' AttentionInterface, or whose results depend on more
            than the visible path (recurrent layers, positions counted along the row, ALiBi, dynamic RoPE); and what
            ``attention`` raises.
    """
    name = type(model).__name__
    model.set_attn_implementation(ATTENTION)
    got = model.config.get_text_config()._attn_implementation
    if got != ATTENTION:
        raise ValueError(
            f"{name}: its attention stays {got!r}, because its layers do not go through transformers' "
            "AttentionInterface; use a model whose every layer is softmax attention that does"
        )
    if verify:
        training = model.training
        try:
            _verify(model.eval())
        finally:
            model.train(training)
    return model


@torch.no_grad()
def _verify(model: PreTrainedModel) -> None:
    _refuse_growing_rope(model)
    trees = _small_trees(model.config.get_text_config().vocab_size)
    plan = pack(trees)
    heard = _Sharp(TreeAttend(plan))
    _hidden(model, plan, heard)
    if not heard.largest:
        raise ValueError(f"{type(model).__name__}: none of its layers called {ATTENTION}; use another model")
    factor = max(1.0, LARGE / heard.largest)
    packed = _hidden(model, plan, _Sharp(TreeAttend(plan), factor))[plan.tensor("row", model.device)]
    separate = []
    for path in _paths(plan):
        alone = pack([Tree([RolloutTokens(0, np.append(plan.input_ids[path], 0), _last_only(len(path) + 1))])])
        separate.append(_hidden(model, alone, _Sharp(TreeAttend(alone), factor))[-1])
    separate = torch.stack(separate)
    error = float((packed - separate).abs().max() / separate.abs().max())
    if not error <= (1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2):
        raise ValueError(
            f"{type(model).__name__}: a packed tree differs by {error:.1e} (relative) from separate sequences, so a "
            "layer reads more than the visible path; use a model whose every layer is softmax attention"
        )


def _refuse_growing_rope(model: PreTrainedModel) -> None:
    """Frequencies that depend on the longest path of a row differ between a pack and its sequences."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    for entry in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        kind = entry.get("rope_type", entry.get("type"))
        if kind in ("dynamic", "longrope"):
            raise ValueError(
                f"{type(model).__name__} has {kind} RoPE, whose frequencies depend on a forward's longest sequence; "
                "use a model with default, linear, llama3 or YaRN RoPE"
            )


def _hidden(model: PreTrainedModel, plan: TreePlan, attend: Attend) -> torch.Tensor:
    out = decoder_of(model)(**{**model_inputs(plan, model.device), "plan": attend})
    return out.last_hidden_state[0].float()


def _paths(plan: TreePlan) -> Iterator[np.ndarray]:
    """The tokens that each pair's row sees."""
    index = np.arange(plan.n_tokens)
    for row in plan.row:
        yield np.flatnonzero((index <= row) & (row < plan.subtree_end))


def _last_only(length: int) -> np.ndarray:
    return np.where(np.arange(length) < length - 1, -1, 0)


class _Sharp:
    """An Attend that multiplies logits and records a bound on them."""

    def __init__(self, inner: Attend, factor: float = 1.0):
        self.inner, self.factor, self.largest = inner, factor, 0.0

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        norms = q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max() * scale
        self.largest = max(self.largest, float(norms))
        return self.inner(layer, q, k, v, scale=scale * self.factor, softcap=softcap, window=window)


def _small_trees(vocab: int) -> list[Tree]:
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, vocab, n)  # noqa: E731
    trees = []
    for prompt_length in (3, 5):
        prompt = draw(prompt_length)
        ids = [np.concatenate([prompt, draw(n)]) for n in (6, 4)]
        rollouts = [RolloutTokens(i, x, _last_only(len(x)), np.array([prompt_length])) for i, x in enumerate(ids)]
        trees.append(Tree(rollouts, [Branch(draw(3), 1, 3)]))
    return trees
