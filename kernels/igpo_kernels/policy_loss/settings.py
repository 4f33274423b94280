"""The knobs of the clipped loss, in one place."""

from __future__ import annotations

from dataclasses import dataclass, fields

from igpo_kernels.checks import check_finite, described

SURROGATES = ("clip", "cispo", "sapo", "vespo")
RATIOS = ("token", "turn", "sequence")
IMPORTANCE = ("none", "token", "sequence", "geometric")
IMPORTANCE_MODES = ("truncate", "mask")


@dataclass(frozen=True)
class LossSettings:
    """``loss = sum_m weights_m * (surrogate_m + kl * k3_m - entropy * H_m)``.

    Raises:
        ValueError: a value that is no number or out of range, a name that is not one of the choices, or choices that
            exclude each other.

    >>> LossSettings(clip_high=0.28).clip_low
    0.2
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; below 0, no lower than ``-clip_low``. ``clip_scale``
    multiplies both per pair."""
    dual_clip: float | None = None
    """Bound of the surrogate loss where the advantage is negative: ``dual_clip * |advantage|``; above 1."""
    kl: float = 0.0
    """Coefficient of k3 to the reference, ``exp(ref - logp) - (ref - logp) - 1``."""
    entropy: float = 0.0
    """Coefficient of the entropy bonus."""
    surrogate: str = "clip"
    """What becomes of the ratio r. ``clip``: PPO's ``max(-r A, -clip(r) A)``. ``cispo`` (MiniMax-M1, arXiv 2506.13585):
    ``-clip(r) A logp``, the clipped ratio without gradient, so that every token has one; the paper, TRL and Liger bound
    it from above only, ``clip_low=1``. ``sapo`` (arXiv 2511.20347): ``-4 / t sigmoid(t (r - 1)) A``, a gate in place of
    the clip. ``vespo`` (arXiv 2602.10693): ``-phi A logp`` with ``phi = w^k exp(lambda (1 - w))`` without gradient, w
    the product of the ratios of the turn or rollout that ``ratio`` names and of its importance weights."""
    unbiased_kl: bool = False
    """Multiply k3 by the ratio, with its gradient: tokens were sampled by the old policy, and the KL is of the present
    one (DeepSeek-V3.2, arXiv 2512.02556; TRL's ``use_bias_correction_kl``). With ``vespo`` it is the token's ratio."""
    ratio: str = "token"
    """``token``, ``turn`` or ``sequence``: what shares one ratio, ``exp(mean(logp - old_logp))``; of a turn it is
    A2TGPO's and AT2PO's, of a rollout GSPO's. Its gradient reaches all tokens of the segment alike, even where their
    advantages differ; verl's ``gspo`` (GSPO-token) keeps each token's own advantage there."""
    importance: str = "none"
    """Weigh by pi_train / pi_engine of the ``token``, of the whole rollout (``sequence``, the product over its tokens)
    or by that product's root per token (``geometric``, the geometric mean); or ``none``."""
    importance_mode: str = "truncate"
    """``truncate``: clamp the weight to [importance_floor, importance_cap]. ``mask``: drop the surrogate of pairs whose
    weight is outside, and drop them from the mean of their segment's ratio; their KL and entropy stay."""
    importance_cap: float = 2.0
    """The upper bound; inf is none."""
    importance_floor: float = 0.0
    """The lower bound; 0 is none."""
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    """``sapo``'s t where the advantage is above 0, and elsewhere."""
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    """``vespo``'s k and lambda where the advantage is at least 0, and below."""

    @property
    def needs_segment(self) -> bool:
        """Whether the loss needs ``segment``, and all pairs of a segment at once."""
        return self.ratio != "token"

    @property
    def needs_sequence(self) -> bool:
        """Whether the loss needs ``sequence``, and all pairs of a rollout at once."""
        return self.importance in ("sequence", "geometric")

    def __post_init__(self):
        chosen = dict(surrogate=SURROGATES, ratio=RATIOS, importance=IMPORTANCE, importance_mode=IMPORTANCE_MODES)
        for name, choices in chosen.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"LossSettings: {name} is {described(value)}; choose one of {', '.join(choices)}")
        if not isinstance(self.unbiased_kl, bool):
            raise ValueError(f"LossSettings: unbiased_kl must be True or False, got {described(self.unbiased_kl)}")
        for name in (f.name for f in fields(self) if f.name not in (*chosen, "unbiased_kl")):
            if name != "dual_clip" or self.dual_clip is not None:
                check_finite("LossSettings", name, getattr(self, name), or_inf=name == "importance_cap")
        for name in ("clip_low", "kl", "entropy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"LossSettings: {name} must be at least 0, got {getattr(self, name)}")
        if not self.clip_high >= -self.clip_low:
            raise ValueError(f"LossSettings: clip_high must be at least -clip_low, got {self.clip_high}")
        positive = ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_lambda_pos", "vespo_lambda_neg")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"LossSettings: {name} must exceed 0, got {getattr(self, name)}")
        if self.surrogate == "vespo" and self.ratio == "token":
            raise ValueError("LossSettings: surrogate=vespo weighs whole turns or rollouts; set ratio=turn or sequence")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"LossSettings: dual_clip must exceed 1, got {self.dual_clip}")
        if self.dual_clip is not None and self.surrogate != "clip":
            raise ValueError(f"LossSettings: dual_clip bounds surrogate=clip, not {self.surrogate}; leave it None")
        if not self.importance_cap > 0:
            raise ValueError(f"LossSettings: importance_cap must exceed 0, got {self.importance_cap}")
        if not 0 <= self.importance_floor <= self.importance_cap:
            raise ValueError(
                f"LossSettings: importance_floor must be from 0 to importance_cap, got {self.importance_floor}"
            )
