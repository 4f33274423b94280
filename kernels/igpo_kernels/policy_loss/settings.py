"""The knobs of the clipped loss, in one place."""

from __future__ import annotations

from dataclasses import dataclass

RATIOS = ("token", "turn", "sequence")
IMPORTANCE = ("none", "token", "sequence", "geometric")
IMPORTANCE_MODES = ("truncate", "mask")


@dataclass(frozen=True)
class LossSettings:
    """``loss = sum_m weights_m * (surrogate_m + kl * k3_m - entropy * H_m)``.

    Raises:
        ValueError: a value out of range, or a name that is not one of the choices.

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
    ratio: str = "token"
    """``token``, ``turn`` or ``sequence``: what shares one ratio, ``exp(mean(logp - old_logp))``; of a turn it is
    A2TGPO's and AT2PO's, of a rollout GSPO's. Its gradient reaches all tokens of the segment alike, even where their
    advantages differ; verl's ``gspo`` (GSPO-token) keeps each token's own advantage there."""
    importance: str = "none"
    """Weigh by pi_train / pi_engine of the ``token``, of the whole rollout (``sequence``, the product over its tokens)
    or by that product's root per token (``geometric``, the geometric mean); or ``none``."""
    importance_mode: str = "truncate"
    """``truncate``: clamp the weight to [importance_floor, importance_cap]. ``mask``: drop pairs whose weight is
    outside, also from the mean of their segment's ratio."""
    importance_cap: float = 2.0
    importance_floor: float = 0.0
    """The lower bound; 0 is none."""

    @property
    def needs_segment(self) -> bool:
        """Whether the loss needs ``segment``, and all pairs of a segment at once."""
        return self.ratio != "token"

    @property
    def needs_sequence(self) -> bool:
        """Whether the loss needs ``sequence``, and all pairs of a rollout at once."""
        return self.importance in ("sequence", "geometric")

    def __post_init__(self):
        chosen = {"ratio": RATIOS, "importance": IMPORTANCE, "importance_mode": IMPORTANCE_MODES}
        for name, choices in chosen.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"LossSettings: {name} is {getattr(self, name)!r}; choose one of {', '.join(choices)}")
        for name in ("clip_low", "kl", "entropy"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"LossSettings: {name} must be at least 0, got {getattr(self, name)}")
        if not self.clip_high >= -self.clip_low:
            raise ValueError(f"LossSettings: clip_high must be at least -clip_low, got {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"LossSettings: dual_clip must exceed 1, got {self.dual_clip}")
        if not self.importance_cap > 0:
            raise ValueError(f"LossSettings: importance_cap must exceed 0, got {self.importance_cap}")
        if not 0 <= self.importance_floor <= self.importance_cap:
            raise ValueError(
                f"LossSettings: importance_floor must be from 0 to importance_cap, got {self.importance_floor}"
            )
