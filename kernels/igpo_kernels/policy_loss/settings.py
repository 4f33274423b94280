"""The knobs of the clipped loss, in one place."""

from __future__ import annotations

from dataclasses import dataclass

IMPORTANCE = ("none", "token", "sequence")
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
    """The ratio is clipped to [1 - clip_low, 1 + clip_high]; below 0, no lower than ``-clip_low``."""
    dual_clip: float | None = None
    """Bound of the surrogate loss where the advantage is negative: ``dual_clip * |advantage|``; above 1."""
    kl: float = 0.0
    """Coefficient of k3 to the reference, ``exp(ref - logp) - (ref - logp) - 1``."""
    entropy: float = 0.0
    """Coefficient of the entropy bonus."""
    sequence_ratio: bool = False
    """GSPO: one ratio per rollout, ``exp(mean(logp - old_logp))``. Its gradient reaches all tokens of the rollout
    alike, even where their advantages differ; verl's ``gspo`` (GSPO-token) keeps each token's
    own advantage there."""
    importance: str = "none"
    """``none``, ``token`` or ``sequence``: weigh by pi_train / pi_engine of the token, or of the whole rollout."""
    importance_mode: str = "truncate"
    """``truncate``: min(weight, cap). ``mask``: drop pairs whose weight exceeds the cap, also from the mean of a
    sequence's ratio."""
    importance_cap: float = 2.0

    @property
    def needs_sequence(self) -> bool:
        """Whether the loss needs ``sequence``, and all pairs of a rollout at once."""
        return self.sequence_ratio or self.importance == "sequence"

    def __post_init__(self):
        for name, choices in (("importance", IMPORTANCE), ("importance_mode", IMPORTANCE_MODES)):
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
