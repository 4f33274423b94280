"""Turn rewards to turn advantages: gate, normalise, then discount (README.md has the equations)."""

from __future__ import annotations

import torch

from igpo_kernels.backend import choose
from igpo_kernels.turn_advantages.reference import GAIN, OUTCOME, Normaliser, turn_advantages_reference
from igpo_kernels.turn_advantages.torch_path import turn_advantages_torch

__all__ = ["GAIN", "OUTCOME", "Normaliser", "turn_advantages"]

IMPLEMENTATIONS = {"reference": turn_advantages_reference, "torch": turn_advantages_torch}


@torch.no_grad()
def turn_advantages(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    gamma: float,
    normaliser: Normaliser,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Advantages of S turns, in R rollouts, in Gr groups. Never carries a gradient.

    Args:
        rewards: float32 or float64 [S], rollout after rollout; finite (the caller puts 0 where a gain is
            undefined).
        kinds: integers [S]: ``OUTCOME`` at the last turn of each rollout, ``GAIN`` at the others.
        rollout_offsets: int64 [R + 1]: rollout i has turns ``rollout_offsets[i] .. [i + 1] - 1``.
        group_offsets: int64 [Gr + 1]: group j has rollouts ``group_offsets[j] .. [j + 1] - 1``.
        gamma: discount in [0, 1].
        normaliser: see ``Normaliser``.
        backend: ``auto``, ``torch`` or ``reference``.
    Returns:
        Advantages [S], of rewards' dtype and device; computed in float64.
    Raises:
        ValueError: shapes, dtypes, offsets or kinds that do not fit; a non-finite reward; unknown backend.
    """
    _check(rewards, kinds, rollout_offsets, group_offsets, gamma)
    run = choose("turn_advantages", backend, rewards.device, IMPLEMENTATIONS)
    return run(rewards, kinds, rollout_offsets, group_offsets, gamma, normaliser)


def _check(rewards, kinds, rollout_offsets, group_offsets, gamma) -> None:
    if rewards.ndim != 1 or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"turn_advantages: got rewards {rewards.dtype} {tuple(rewards.shape)}; expected float32/64 [S]"
        )
    if kinds.shape != rewards.shape:
        raise ValueError(f"turn_advantages: got kinds {tuple(kinds.shape)}; expected {tuple(rewards.shape)}")
    rollouts = len(rollout_offsets) - 1
    for name, offsets, total in (
        ("rollout_offsets", rollout_offsets, len(rewards)),
        ("group_offsets", group_offsets, rollouts),
    ):
        good = offsets.ndim == 1 and offsets.dtype == torch.int64 and len(offsets) >= 2
        if not good or offsets[0] != 0 or offsets[-1] != total or bool((offsets.diff() <= 0).any()):
            raise ValueError(f"turn_advantages: {name} must be int64, rising from 0 to {total}")
    expected = torch.full_like(kinds, GAIN)
    expected[rollout_offsets[1:] - 1] = OUTCOME
    if not torch.equal(kinds, expected):
        raise ValueError("turn_advantages: kinds must be OUTCOME at each rollout's last turn, else GAIN")
    if not bool(rewards.isfinite().all()):
        raise ValueError("turn_advantages: non-finite reward; replace undefined gains by 0 and count them")
    if not 0 <= gamma <= 1:
        raise ValueError(f"turn_advantages: got gamma={gamma}; expected 0 <= gamma <= 1")
