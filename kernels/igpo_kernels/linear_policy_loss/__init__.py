"""LM head to clipped loss and gradients, without [M, V] logits and without computing logits twice."""

from __future__ import annotations

import torch

from igpo_kernels.autograd import no_autocast
from igpo_kernels.backend import choose, lazy
from igpo_kernels.checks import check_devices, check_kind
from igpo_kernels.linear_logprob import head_arguments
from igpo_kernels.linear_policy_loss import reference, torch_path
from igpo_kernels.pairs import Pairs
from igpo_kernels.policy_loss import check_inputs
from igpo_kernels.policy_loss.settings import LossSettings

IMPLEMENTATIONS = {
    "reference": reference.linear_policy_loss,
    "torch": torch_path.linear_policy_loss,
    "triton": lazy("igpo_kernels.linear_policy_loss.triton_path", "linear_policy_loss"),
}


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | Pairs,
    rows: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    settings: LossSettings | None = None,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    clip_scale: torch.Tensor | None = None,
    engine_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``policy_loss(*linear_logprob(hidden, weight, ...), ...)``, loss and gradients together in 6 * M * H * V FLOPs.

    The gradients are made in the forward and handed out by one backward, which only scales them.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V]. labels, rows: as in ``linear_logprob``. On Triton hidden and weight
            have one dtype, bfloat16, float16 or float32.
        old_logp, advantages, weights, settings, clip_scale, engine_logp, ref_logp: [M], as in ``policy_loss``, of any
            float dtype; ``old_logp=None`` is ratio 1.
        temperature, softcap, backend: as in ``linear_logprob``.
    Returns:
        The loss (a scalar), and ``policy_loss``'s sums together with ``logp`` [M] (no gradient); float32 or wider.
    Raises:
        ValueError: shapes, dtypes or values that do not fit, and settings that need a whole turn or rollout before the
            first gradient (their ratios or importance weights): use linear_logprob and policy_loss for those.
        RuntimeError: a second backward, or a second derivative.
    """
    settings = LossSettings() if settings is None else settings
    check_kind("linear_policy_loss", "settings", settings, LossSettings)
    if settings.needs_segment or settings.needs_sequence:
        name, whole = ("ratio", settings.ratio) if settings.needs_segment else ("importance", "sequence")
        raise ValueError(
            f"linear_policy_loss: {name}={getattr(settings, name)!r} needs the whole {whole} first; "
            "use linear_logprob and policy_loss"
        )
    pairs, temperature, softcap = head_arguments(
        "linear_policy_loss", hidden, weight, labels, rows, temperature, softcap, bias
    )
    pair_inputs = dict(
        old_logp=old_logp, advantages=advantages, weights=weights, clip_scale=clip_scale, engine_logp=engine_logp,
        ref_logp=ref_logp,
    )  # fmt: skip
    check_inputs("linear_policy_loss", pairs.labels.shape, settings, pair_inputs, exempt=("entropy",))
    check_devices("linear_policy_loss", hidden=hidden, **pair_inputs)
    if not torch.is_grad_enabled():  # an autograd.Function is not told
        hidden, weight, bias = (None if x is None else x.detach() for x in (hidden, weight, bias))
    run = choose("linear_policy_loss", backend, hidden.device, IMPLEMENTATIONS, (hidden.dtype, weight.dtype))
    with no_autocast(hidden.device):
        return run(hidden, weight, bias, pairs, pair_inputs, settings, temperature, softcap)
