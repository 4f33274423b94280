"""The same ops under the signatures of other trainers, to be dropped in there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.distributed as dist

from igpo_kernels.checks import check_devices, check_finite, check_tensors, described
from igpo_kernels.linear_logprob import linear_logprob
from igpo_kernels.linear_policy_loss import linear_policy_loss
from igpo_kernels.policy_loss import policy_loss
from igpo_kernels.policy_loss.reference import LOG_WEIGHT
from igpo_kernels.policy_loss.settings import LossSettings

IGNORED = -100
"""The label of tokens that verl leaves out."""
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    temperature: float = 1.0,
    reduction: str = "none",
    dist_process_group=None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's ``linear_cross_entropy``: log-probabilities (not losses) and entropies of labels.

    Args:
        hidden: [..., H]. weight: [V, H]. labels: int64 [...], -100 where a token has none.
        reduction: ``none``, ``mean`` or ``sum`` (case is ignored) of the log-probabilities; entropies come per token.
        dist_process_group: the processes that the vocabulary is split over, as ``group`` of ``linear_logprob``: weight
            is this rank's shard, and the gradient of ``hidden`` this rank's part, as verl's.
    Returns:
        log-probabilities [tokens], flat as verl's (a scalar unless ``none``), and entropy [tokens]; both
        differentiable. The log-probability of label -100 is 0, without gradient, and not counted in the mean.
    Raises:
        ValueError: an unknown reduction, and what ``linear_logprob`` raises.
    """
    check_tensors("linear_cross_entropy", hidden=hidden, weight=weight, labels=labels)
    if not isinstance(reduction, str) or reduction.lower() not in ("none", "mean", "sum"):
        raise ValueError(f"linear_cross_entropy: reduction={described(reduction)}; choose none, mean or sum")
    reduction = reduction.lower()
    labels = labels.flatten()
    kept = labels != IGNORED
    logp, entropy = linear_logprob(
        hidden.flatten(0, -2), weight, labels.where(kept, 0), temperature=temperature, entropy=True,
        group=dist_process_group,
    )  # fmt: skip
    return (logp.where(kept, 0.0) if reduction == "none" else getattr(logp[kept], reduction)()), entropy


def fused_linear_grpo(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    mask: torch.Tensor,
    advantages: torch.Tensor,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    *,
    bias: torch.Tensor | None = None,
    beta: float = 0.0,
    epsilon_low: float = 0.2,
    epsilon_high: float | None = 0.2,
    delta: float | None = None,
    loss_type: str = "grpo",
    importance_sampling_level: str = "token",
    max_completion_length: int | None = None,
    temperature: float = 1.0,
    use_bias_correction_kl: bool = False,
    vllm_is_ratio: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | float | None = None,
    entropy_coef: float = 0.0,
    softcap: float | None = 0.0,
    backend: str = "auto",
    **shape: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The fused LM head and GRPO loss of TRL and Liger; unlike theirs, advantages may differ by token.

    Args:
        hidden: [B, T, H], the states that predict ``ids`` [B, T]. weight: [V, H]. mask: [B, T], 1 where trained; a
            fraction weighs its token's loss, as in TRL.
        advantages: [B] or [B, 1], one per sequence, or [B, T], one per token.
        old_logp, ref_logp: [B, T]; without old_logp the ratio is 1, without ref_logp ``beta`` must be 0.
        beta: coefficient of the k3 KL, which ``use_bias_correction_kl`` multiplies by the ratio.
        epsilon_high: for ``cispo`` the bound of the ratio itself, else of the ratio less 1; None is epsilon_low's.
        delta: TRL's and Liger's upper bound of the unclipped ratio, ``-min(min(r, delta) A, clip(r) A)``; at least
            ``1 - epsilon_low``. (verl's dual clip is ``LossSettings.dual_clip``: it bounds negative advantages alone.)
        loss_type: ``grpo`` and ``sapo`` mean over a sequence's tokens, then over sequences; ``bnpo`` over all tokens;
            ``dapo``, ``cispo`` and ``vespo`` divide by ``num_items_in_batch``; ``dr_grpo`` sums, divided by
            B * max_completion_length (default T); ``luspo`` sums over tokens, a mean over sequences.
        importance_sampling_level: ``token``, or ``sequence``: GSPO's ratio, without which ``luspo`` is not its paper's.
        vllm_is_ratio: [B], [B, 1] or [B, T], weights of the surrogate, bounded by the caller.
        num_items_in_batch: trained tokens of the whole update, over all processes and micro-batches; None is those of
            this call over all processes, which then all have to call.
        entropy_coef: coefficient of an entropy bonus, aggregated as the loss is.
        softcap, backend: as in ``linear_policy_loss``.
        shape: ``sapo_temperature_pos`` and ``_neg``, ``vespo_k_pos``, ``vespo_lambda_pos``, ``vespo_k_neg`` and
            ``vespo_lambda_neg``, as in ``LossSettings``.
    Returns:
        The loss, and means over the tokens whose mask is not 0: ``kl``, ``clip_ratio``, ``entropy``, ``ratio``.
    Raises:
        ValueError: shapes or options that do not fit; nothing else is broadcast.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"fused_linear_grpo: loss_type={loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"fused_linear_grpo: importance_sampling_level={importance_sampling_level!r}; choose token or sequence"
        )
    epsilon_high = epsilon_low if epsilon_high is None else epsilon_high
    numbers = dict(beta=beta, epsilon_low=epsilon_low, epsilon_high=epsilon_high, entropy_coef=entropy_coef)
    for name, x in (numbers if delta is None else numbers | {"delta": delta}).items():
        check_finite("fused_linear_grpo", name, x)
    tensors = dict(
        hidden=hidden, weight=weight, ids=ids, mask=mask, advantages=advantages, old_logp=old_logp, ref_logp=ref_logp,
        vllm_is_ratio=vllm_is_ratio,
    )  # fmt: skip
    check_tensors("fused_linear_grpo", optional=("old_logp", "ref_logp", "vllm_is_ratio"), **tensors)
    check_devices("fused_linear_grpo", **tensors)
    if beta and ref_logp is None:
        raise ValueError(f"fused_linear_grpo: beta={beta!r} needs ref_logp=")
    if ids.ndim != 2:
        raise ValueError(f"fused_linear_grpo: ids {tuple(ids.shape)}; give [B, T]")
    batch, length = ids.shape
    if hidden.shape[:-1] != ids.shape:
        raise ValueError(
            f"fused_linear_grpo: hidden {tuple(hidden.shape)} for ids {tuple(ids.shape)}; "
            f"give the states that predict ids, [{batch}, {length}, H] (hidden[:, :-1] for ids[:, 1:])"
        )
    for name, x in (("mask", mask), ("old_logp", old_logp), ("ref_logp", ref_logp)):
        if x is not None and x.shape != ids.shape:
            raise ValueError(f"fused_linear_grpo: {name} {tuple(x.shape)}; give [{batch}, {length}] as of ids")
    per_token = _by_token("advantages", advantages, ids)
    trained, share = mask != 0, mask.float()
    pick = lambda x: None if x is None else x[trained].to(torch.promote_types(x.dtype, torch.float32))  # noqa: E731
    weights = pick(_token_weights(share, loss_type, max_completion_length, num_items_in_batch))
    settings = _settings(
        loss_type, importance_sampling_level, epsilon_low, epsilon_high, delta, kl=beta, entropy=entropy_coef,
        unbiased_kl=use_bias_correction_kl, **shape,
    )  # fmt: skip
    gap = None  # log of vllm_is_ratio, which vespo adds up
    if vllm_is_ratio is not None:
        ratio = _by_token("vllm_is_ratio", vllm_is_ratio, ids)
        if loss_type == "vespo":
            settings = replace(settings, importance="token", importance_cap=math.inf)
            gap = ratio.log().clamp(*LOG_WEIGHT)
            if vllm_is_ratio.shape != ids.shape:  # the sequence's, once
                gap = gap / trained.sum(1, keepdim=True).clamp(min=1)
        else:  # a surrogate grows with its advantage
            per_token = per_token * ratio
    rows, old, inputs = trained.flatten().nonzero()[:, 0], pick(old_logp), dict(ref_logp=pick(ref_logp))
    head = dict(bias=bias, temperature=temperature, softcap=softcap, backend=backend)
    if settings.needs_segment:
        logp, entropy = linear_logprob(hidden.flatten(0, 1), weight, ids[trained], rows, entropy=True, **head)
        if gap is not None:
            inputs["engine_logp"] = (logp.detach() if old is None else old) - pick(gap)
        loss, sums = policy_loss(
            logp, old, pick(per_token), weights, settings,
            segment=torch.unique_consecutive(rows // length, return_inverse=True)[1],
            entropy=entropy if entropy_coef else entropy.detach(), backend=backend, **inputs,
        )  # fmt: skip
    else:
        loss, sums = linear_policy_loss(
            hidden.flatten(0, 1), weight, ids[trained], rows, old, pick(per_token), weights, settings, **head, **inputs
        )
    tokens = sums["tokens"].clamp(min=1)
    names = {"kl": "kl", "clip_ratio": "clipped", "entropy": "entropy", "ratio": "ratio"}
    return loss, {name: sums[key] / tokens for name, key in names.items()}


class LigerFusedLinearGRPOLoss(torch.nn.Module):
    """The module of the same name of Liger 0.8.5, by ``fused_linear_grpo``: arguments, their order, defaults,
    attributes and results are Liger's, but for

    - the share of clipped tokens with ``delta`` below ``1 + epsilon_high``: ours counts tokens that ``delta`` holds,
      Liger's those whose ratio is outside ``epsilon_low`` and ``epsilon_high``;
    - ``luspo`` with padding: Liger's sum has the surrogate and the KL of padding, too.

    Args:
        use_ref_model: whether the KL needs a reference; without one it is 0.
        compiled, chunk_size: without effect; chunks follow the workspace.
        entropy_coef, softcap, backend: as in ``fused_linear_grpo``; Liger has none of them.
    """

    def __init__(
        self, beta: float = 0.04, compiled: bool = True, use_ref_model: bool = True, chunk_size: int = 1,
        epsilon_low: float = 0.2, epsilon_high: float | None = 0.2, loss_type: str = "dapo",
        max_completion_length: int | None = None, importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0, sapo_temperature_neg: float = 1.05, temperature: float = 1.0,
        delta: float | None = None, use_bias_correction_kl: bool = False, vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0, vespo_k_neg: float = 3.0, vespo_lambda_neg: float = 2.0, *,
        entropy_coef: float = 0.0, softcap: float | None = 0.0, backend: str = "auto",
    ):  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        for name, value in given.items():
            setattr(self, name, value)
        self._options = tuple(given)[4:]  # those of ``fused_linear_grpo``

    def forward(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, vllm_is_ratio=None,
        num_items_in_batch=None,
    ):  # fmt: skip
        """Return the loss, and as Liger does a tuple: the mean KL unless beta is 0, and the share of clipped tokens."""
        ref = ref_per_token_logps if self.use_ref_model and self.beta else None
        if ref is None and self.use_ref_model and self.beta:
            if ref_input is None or ref_weight is None:
                raise ValueError(
                    f"LigerFusedLinearGRPOLoss: beta={self.beta!r} needs a reference; "
                    "give ref_per_token_logps, or ref_input and ref_weight"
                )
            with torch.no_grad():
                ref = linear_logprob(
                    ref_input.flatten(0, 1), ref_weight, selected_token_ids.flatten(), bias=ref_bias,
                    temperature=self.temperature, softcap=self.softcap,
                ).view(selected_token_ids.shape)  # fmt: skip
        loss, means = fused_linear_grpo(
            _input, lin_weight, selected_token_ids, attention_mask, advantages, old_per_token_logps, ref, bias=bias,
            beta=0.0 if ref is None else self.beta, vllm_is_ratio=vllm_is_ratio, num_items_in_batch=num_items_in_batch,
            **{name: getattr(self, name) for name in self._options},
        )  # fmt: skip
        return loss, (means["kl"], means["clip_ratio"]) if self.beta else (means["clip_ratio"],)


def _by_token(name: str, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Expand one number per sequence to its tokens."""
    batch, length = ids.shape
    if x.shape not in ((batch,), (batch, 1), (batch, length)):
        raise ValueError(f"fused_linear_grpo: {name} {tuple(x.shape)}; give [{batch}] or [{batch}, {length}]")
    return (x if x.ndim == 2 else x[:, None]).expand(batch, length)


def _token_weights(share: torch.Tensor, loss_type: str, longest: int | None, items) -> torch.Tensor:
    """The weight of each token in the loss."""
    batch, length = share.shape
    if loss_type in ("grpo", "sapo"):
        return share / (batch * share.sum(1, keepdim=True).clamp(min=1))
    if loss_type == "luspo":
        return share / max(1, batch)
    if loss_type == "dr_grpo":
        return share / max(1, batch * (longest or length))
    if loss_type == "bnpo":
        return share / share.sum().clamp(min=1)
    # Gradients are averaged over processes, so each divides by its part.
    processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if items is None:
        items = share.sum()
        if processes > 1:
            dist.all_reduce(items)
    items = torch.as_tensor(items, dtype=share.dtype, device=share.device) / processes
    return share / items.clamp(min=1)


def _settings(loss_type, level, low, high, delta, **more) -> LossSettings:
    """Settings of TRL's names.

    The ratio's bound ``delta`` is expressed as clips: where A > 0 it lowers the upper clip; where A < 0 it is a dual
    clip, which acts above the upper clip only.
    """
    more["ratio"] = "sequence" if loss_type == "vespo" else level
    if loss_type == "cispo":
        return LossSettings(clip_low=1.0, clip_high=high - 1, surrogate="cispo", **more)
    if loss_type in ("sapo", "vespo"):
        return LossSettings(surrogate=loss_type, **more)
    if delta is None:
        return LossSettings(clip_low=low, clip_high=high, **more)
    if not delta >= 1 - low:
        raise ValueError(f"fused_linear_grpo: delta is {delta}; give at least 1 - epsilon_low, {1 - low:g}")
    return LossSettings(clip_low=low, clip_high=min(high, delta - 1), dual_clip=max(delta, 1 + high), **more)
