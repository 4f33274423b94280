"""The LM head as a model of transformers defines it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedModel

from igpo_kernels.checks import number
from igpo_kernels.huggingface.dispatch import decoder_of
from igpo_kernels.linear_logprob import linear_logprob
from igpo_kernels.plan import TreePlan


@dataclass(frozen=True)
class Head:
    """The map from hidden states to logits: ``softcap(scale * (hidden @ weight.T + bias))``."""

    weight: torch.Tensor
    """[V, H]"""
    bias: torch.Tensor | None
    """[V]"""
    scale: float
    """Granite's 1 / logits_scaling, Cohere's logit_scale, ..."""
    softcap: float
    """``c * tanh(z / c)``; 0 is none."""


def head_of(model: PreTrainedModel) -> Head:
    """The LM head as ``model`` defines it, verified on a few hidden states of its own forward: at the first call, and
    again when the head's module, its hooks or the config's scales have changed.

    Raises:
        ValueError: the head computes more than ``Head`` can express, or has weights of its own (an adapter).
    """
    name = type(model).__name__
    module = model.get_output_embeddings()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(
            f"{name}: its LM head has no floating-point weight [V, H] to read; take the model's own logits"
        )
    held = (*module.named_parameters(), *module.named_buffers())
    if others := [key for key, _ in held if key not in ("weight", "bias")]:
        raise ValueError(
            f"{name}: its LM head has {', '.join(others)} beside weight and bias; merge the adapter into the head, or "
            "take the model's own logits"
        )
    state = _state(model, module)
    if model not in _measured or _measured[model][0] != state:
        _measured[model] = state, _measure(model, weight, bias)
    return Head(weight, bias, *_measured[model][1])


_measured: weakref.WeakKeyDictionary[PreTrainedModel, tuple[tuple, tuple[float, float]]] = weakref.WeakKeyDictionary()
"""What each model's head was when it was verified, with its scale and soft cap."""


def _state(model: PreTrainedModel, module: torch.nn.Module) -> tuple:
    """What a verified head depends on, but for the values of its weights: code, hooks and numbers of the model and of
    its head, and what the config states."""
    config = model.config.get_text_config()
    owners = []
    for owner in (model, module):
        numbers = {k: v for k, v in vars(owner).items() if isinstance(v, int | float) and k != "training"}
        hooks = *owner._forward_pre_hooks, *owner._forward_hooks
        owners.append((id(owner), type(owner), vars(owner).get("forward"), hooks, numbers))
    return *owners, _stated(config, SOFTCAPS), _scales(config)


@torch.no_grad()
def _measure(model: PreTrainedModel, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[float, float]:
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, weight.shape[1], generator=generator).to(weight.device)
    hidden *= LOGITS / (hidden @ weight.float().T).std()  # logits of real size, at which a soft cap shows
    hidden = hidden.to(weight.dtype)
    plain = hidden.float() @ weight.float().T + (0 if bias is None else bias.float())
    with _decoder_gives(model, hidden[None]):
        ids = torch.zeros(1, len(hidden), dtype=torch.long, device=weight.device)
        try:
            logits = model(input_ids=ids, use_cache=False, plan=None).logits[0].float()
        except RuntimeError:  # layers between the decoder and the head, of another width
            logits = torch.empty(0)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    for softcap, scale in product(_stated(config, SOFTCAPS), _scales(config)):
        expected = scale * plain
        expected = softcap * (expected / softcap).tanh() if softcap else expected
        if expected.shape == logits.shape and (expected - logits).abs().max() <= tolerance * logits.abs().max():
            return scale, softcap
    raise ValueError(
        f"{type(model).__name__}: its logits are not softcap(scale * (hidden @ weight.T + bias)) of anything that its "
        "config states; take the model's own logits"
    )


LOGITS = 10.0
"""Standard deviation of the logits on which a head is verified."""
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")
"""Names in configs."""


def _stated(config: Any, names: tuple[str, ...]) -> list[float]:
    """The numbers that a config has under ``names``, then 0."""
    return [float(x) for x in (getattr(config, name, None) for name in names) if x] + [0.0]


def _scales(config: Any) -> list[float]:
    found = [1.0]
    for x in _stated(config, SCALES)[:-1]:
        found += [x, 1 / x]
    if getattr(config, "dim_model_base", None):  # MiniCPM
        found.append(config.dim_model_base / config.hidden_size)
    return found


class _Given:
    """A decoder's output that has only the last hidden state."""

    def __init__(self, hidden: torch.Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, at):
        return (self.last_hidden_state,)[at]

    def __getattr__(self, name: str) -> None:
        return None


@contextmanager
def _decoder_gives(model: PreTrainedModel, hidden: torch.Tensor) -> Iterator[None]:
    decoder = decoder_of(model)
    before = decoder.__dict__.get("forward")
    decoder.forward = lambda *_, **__: _Given(hidden)
    try:
        yield
    finally:
        del decoder.forward
        if before is not None:
            decoder.forward = before


def logprobs(
    model: PreTrainedModel, hidden: torch.Tensor, plan: TreePlan, temperature: float = 1.0, *, rows_read: bool = False,
    entropy: bool = False, backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Log-probabilities of a pack's labels under the model's head, without logits [N, V].

    Args:
        model: a causal LM; its head's weight, bias, scale and soft cap are read as it defines them (``head_of``).
        hidden: the decoder's last hidden states of ``plan``, [N, H] or [1, N, H]; with ``rows_read`` [U, H].
        temperature: divides the model's logits.
        rows_read: ``hidden`` has the rows of ``plan.rows_read`` alone, as under ``TreeAttend(plan, rows_read=True)``.
        entropy, backend: as in ``linear_logprob``.
    Returns:
        logp [M] of ``plan.row``, ``plan.label``, in nats; with ``entropy`` also entropies [M]. Differentiable once in
        ``hidden`` and the head.
    Raises:
        ValueError: hidden states of another shape, a head that cannot be read; what ``linear_logprob`` raises.
    """
    if hidden.ndim == 3 and len(hidden) == 1:
        hidden = hidden[0]
    due = len(plan.rows_read) if rows_read else plan.n_tokens
    if hidden.ndim != 2 or len(hidden) != due:
        what = "rows that are read" if rows_read else "tokens"
        raise ValueError(
            f"logprobs: hidden {tuple(hidden.shape)} for a plan of {due} {what}; give the decoder's last "
            f"hidden states of model_inputs(plan), [{due}, H]"
        )
    head = head_of(model)
    temperature = number("logprobs", "temperature", temperature) / head.scale
    return linear_logprob(
        hidden, head.weight, plan.pairs(rows_read=rows_read), None, head.bias, temperature=temperature,
        softcap=head.softcap / head.scale, entropy=entropy, backend=backend,
    )  # fmt: skip
