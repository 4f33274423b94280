"""The clipped policy-gradient loss of log-probabilities."""

from __future__ import annotations

import torch

from igpo_kernels.autograd import no_autocast
from igpo_kernels.backend import choose, lazy
from igpo_kernels.checks import check_devices, check_kind, check_tensors, integers
from igpo_kernels.policy_loss import reference
from igpo_kernels.policy_loss.settings import LossSettings

# Elementwise over M numbers, which on a CPU costs nothing beside an LM head: the definition is the torch path.
IMPLEMENTATIONS = {
    "reference": reference.policy_loss,
    "torch": reference.policy_loss,
    "triton": lazy("igpo_kernels.policy_loss.triton_path", "policy_loss"),
}


def policy_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    settings: LossSettings | None = None,
    *,
    clip_scale: torch.Tensor | None = None,
    engine_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    segment: torch.Tensor | None = None,
    sequence: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``sum_m w_m * (c_m * max(-r_m A_m, -clip(r_m) A_m) + kl * k3_m - entropy * H_m)``, ``r_m = exp(logp - old)``.

    ``settings.surrogate`` chooses another in place of the ``max``; the formulas are in `LossSettings` and the README.

    Args:
        logp: [M], with gradient. Inputs may have any float dtype; on Triton logp may not be float64.
        old_logp: [M], or None for ratio 1 (the gradient is then the policy gradient's).
        advantages: [M], one per token. weights: [M], global: they define the aggregation, nothing is divided here. A
            pair of weight 0 adds nothing to any result, whatever its other numbers are.
        clip_scale: [M], at least 0: pair m's ratio is clipped to [1 - clip_low * scale_m, 1 + clip_high * scale_m].
            None is 1 everywhere. ``settings.dual_clip`` is not scaled.
        engine_logp: [M], of the rollout engine that sampled; gives ``mismatch`` and, with
            ``settings.importance``, the correction c_m (of old_logp, or of logp without gradient).
        ref_logp: [M] of the reference policy, for ``settings.kl``.
        entropy: [M], with gradient, for ``settings.entropy``.
        segment: int64 [M], the turn or rollout with which a pair shares its ratio, from 0; turns are numbered across
            rollouts. Needed unless ``settings.ratio`` is ``token``. A segment's pairs must all be here. Numbers are
            below M.
        sequence: int64 [M], the rollout to which a pair belongs, from 0 to below M; needed by ``settings.importance``
            of ``sequence`` and ``geometric``. A rollout's pairs must all be here.
    Returns:
        The loss (a scalar), and sums over pairs of non-zero weight: ``tokens``, ``clipped``, ``ratio``, ``kl``,
        ``mismatch``, ``entropy``; the maximum ``ratio_max``; and ``policy``, the loss without KL and entropy. All are
        float32 on Triton, else of the inputs' dtype. On Triton backward runs once: the gradient is handed out.
    Raises:
        ValueError: shapes that differ (advantages are never broadcast) or have more than one dimension, devices that
            differ, a missing input, or ``segment`` or ``sequence`` of floats, below 0 or not below M.
    """
    settings = LossSettings() if settings is None else settings
    inputs = dict(
        old_logp=old_logp, advantages=advantages, weights=weights, clip_scale=clip_scale, engine_logp=engine_logp,
        ref_logp=ref_logp, entropy=entropy, segment=segment, sequence=sequence,
    )  # fmt: skip
    check_kind("policy_loss", "settings", settings, LossSettings)
    check_tensors("policy_loss", logp=logp)
    check_inputs("policy_loss", logp.shape, settings, inputs)
    check_devices("policy_loss", logp=logp, **inputs)
    for name in ("segment", "sequence"):
        if inputs[name] is not None:
            inputs[name] = integers("policy_loss", f"numbers of {name}", inputs[name])
    run = choose("policy_loss", backend, logp.device, IMPLEMENTATIONS, (logp.dtype,))
    with no_autocast(logp.device):
        return run(logp, settings=settings, **inputs)


def check_inputs(op: str, shape: torch.Size, settings: LossSettings, inputs: dict, exempt: tuple = ()) -> None:
    """Check that every given input has one number per pair, and that the inputs which the settings need are given."""
    if len(shape) != 1:
        raise ValueError(f"{op}: logp is {tuple(shape)}; give one dimension: flatten() it and every other input")
    check_tensors(op, optional=inputs.keys() - {"advantages", "weights"}, **inputs)
    for name, x in inputs.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{op}: {name} is {tuple(x.shape)}, the pairs {tuple(shape)}; give one number per pair")
    needs = {
        "ref_logp": ("kl", settings.kl), "entropy": ("entropy", settings.entropy),
        "engine_logp": ("importance", settings.importance != "none"), "segment": ("ratio", settings.needs_segment),
        "sequence": ("importance", settings.needs_sequence),
    }  # fmt: skip
    for name, (setting, needed) in needs.items():
        if needed and inputs.get(name) is None and name not in exempt:
            raise ValueError(f"{op}: {setting}={getattr(settings, setting)!r} needs {name}=")
