"""Turn rewards to advantages of turns or tokens: gate, normalise, discount (README.md has the equations)."""

from __future__ import annotations

import torch

from igpo_kernels.backend import choose, lazy
from igpo_kernels.checks import check_devices, check_kind, check_tensors, described, is_whole, number
from igpo_kernels.turn_advantages.reference import (
    GAIN,
    OUTCOME,
    Normaliser,
    normalised_rewards_reference,
    turn_advantages_reference,
)
from igpo_kernels.turn_advantages.torch_path import normalised_rewards_torch, turn_advantages_torch

__all__ = ["GAIN", "OUTCOME", "Normaliser", "normalised_rewards", "turn_advantages"]

IMPLEMENTATIONS = {
    "reference": turn_advantages_reference,
    "torch": turn_advantages_torch,
    "triton": lazy("igpo_kernels.turn_advantages.triton_path", "turn_advantages_triton"),
}


@torch.no_grad()
def turn_advantages(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    gamma: float,
    normaliser: Normaliser,
    *,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Advantages of S turns, in R rollouts, in Gr groups, or of their M tokens. Never carries a gradient.

    Args:
        rewards: float32 or float64 [S], rollout after rollout; finite (the caller puts 0 where a gain is
            undefined).
        kinds: integers [S]: ``OUTCOME`` at the last turn of each rollout, ``GAIN`` at the others.
        rollout_offsets: int64 [R + 1]: rollout i has turns ``rollout_offsets[i] .. [i + 1] - 1``.
        group_offsets: int64 [Gr + 1]: group j has rollouts ``group_offsets[j] .. [j + 1] - 1``.
        gamma: discount in [0, 1].
        normaliser: see ``Normaliser``.
        token_offsets: int64 [S + 1]: turn s has tokens ``token_offsets[s] .. [s + 1] - 1``, or none.
        n_tokens: M, which is ``token_offsets[-1]``; read from there, which a GPU waits for, if not given.
        backend: ``auto``, ``torch``, ``reference`` or ``triton``; Triton's kernel has the pools ``separate``,
            ``joint`` and ``scaled_separate`` and accumulates by ``sum``; ``auto`` takes torch for others.
    Returns:
        Advantages [S], or [M] with ``token_offsets``, in rewards' dtype, on their device; computed in float64.
    Raises:
        ValueError: shapes, dtypes or devices that do not fit, gamma outside [0, 1], ``n_tokens`` without
            ``token_offsets``, unknown backend. On a CPU also values: a non-finite reward, offsets or kinds that do not
            fit. On a GPU reading them would make the host wait: there
            a non-finite reward leaves no advantage of its pool finite (others of its group may stay so; with
            ``scope="group"`` those of other groups do), and the rest is the caller's promise.
    """
    gamma = number("turn_advantages", "gamma", gamma)
    _check(rewards, kinds, rollout_offsets, group_offsets, gamma, normaliser, token_offsets)
    if n_tokens is not None and (token_offsets is None or not is_whole(n_tokens)):
        what = described(n_tokens) + (" without token_offsets" if token_offsets is None else "")
        raise ValueError(f"turn_advantages: got n_tokens {what}; expected the whole number token_offsets[-1], or None")
    if token_offsets is not None and n_tokens is None:
        n_tokens = int(token_offsets[-1])
    if not rewards.is_cuda:
        _check_values(rewards, kinds, rollout_offsets, group_offsets, token_offsets, n_tokens)
    if not normaliser.fused:
        if backend == "triton":
            raise ValueError(
                f"turn_advantages: the triton kernel has no pool={normaliser.pool} with "
                f"accumulate={normaliser.accumulate}; use backend auto or torch"
            )
        backend = "torch" if backend == "auto" else backend
    run = choose("turn_advantages", backend, rewards.device, IMPLEMENTATIONS)
    return run(rewards, kinds, rollout_offsets, group_offsets, gamma, normaliser, token_offsets, n_tokens)


@torch.no_grad()
def normalised_rewards(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    normaliser: Normaliser,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """The normalised rewards z of S turns, before weights and the sum over later turns.

    Args:
        rewards, kinds, rollout_offsets, group_offsets, normaliser: as in ``turn_advantages``.
        backend: ``auto`` (torch), ``torch`` or ``reference``.
    Returns:
        float64 [S].
    Raises:
        ValueError: what ``turn_advantages`` raises.
    """
    named = dict(rewards=rewards, kinds=kinds, rollout_offsets=rollout_offsets, group_offsets=group_offsets)
    _check(*named.values(), 1.0, normaliser, None)
    if not rewards.is_cuda:
        _check_values(*named.values(), None, None)
    paths = {"reference": normalised_rewards_reference, "torch": normalised_rewards_torch}
    run = choose("normalised_rewards", backend, rewards.device, paths)
    return run(*named.values(), normaliser)


def _check(rewards, kinds, rollout_offsets, group_offsets, gamma, normaliser, token_offsets) -> None:
    named = dict(
        rewards=rewards, kinds=kinds, rollout_offsets=rollout_offsets, group_offsets=group_offsets,
        token_offsets=token_offsets,
    )  # fmt: skip
    check_tensors("turn_advantages", optional=("token_offsets",), **named)
    check_devices("turn_advantages", **named)
    check_kind("turn_advantages", "normaliser", normaliser, Normaliser)
    if rewards.ndim != 1 or rewards.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"turn_advantages: got rewards {rewards.dtype} {tuple(rewards.shape)}; expected float32/64 [S]"
        )
    if kinds.shape != rewards.shape or kinds.is_floating_point():
        raise ValueError(
            f"turn_advantages: got kinds {kinds.dtype} {tuple(kinds.shape)}; expected integers {tuple(rewards.shape)}"
        )
    for name, offsets in (("rollout_offsets", rollout_offsets), ("group_offsets", group_offsets)):
        if offsets.ndim != 1 or offsets.dtype != torch.int64 or len(offsets) < 2:
            raise ValueError(
                f"turn_advantages: got {name} {offsets.dtype} {tuple(offsets.shape)}; expected int64, two or more"
            )
    if token_offsets is not None and (token_offsets.dtype, token_offsets.shape) != (torch.int64, (len(rewards) + 1,)):
        raise ValueError(
            f"turn_advantages: got token_offsets {token_offsets.dtype} {tuple(token_offsets.shape)}; "
            f"expected int64 [{len(rewards) + 1}]"
        )
    if not 0 <= gamma <= 1:
        raise ValueError(f"turn_advantages: got gamma={gamma}; expected 0 <= gamma <= 1")


def _check_values(rewards, kinds, rollout_offsets, group_offsets, token_offsets, n_tokens) -> None:
    for name, offsets, total, of, least in (
        ("rollout_offsets", rollout_offsets, len(rewards), "the number of rewards", 1),
        ("group_offsets", group_offsets, len(rollout_offsets) - 1, "the number of rollouts", 1),
        ("token_offsets", token_offsets, n_tokens, "n_tokens", 0),
    ):
        wrong = None if offsets is None else _wrong(offsets, total, of, least)
        if wrong:
            raise ValueError(f"turn_advantages: {name}{wrong}")
    expected = torch.full_like(kinds, GAIN)
    expected[rollout_offsets[1:] - 1] = OUTCOME
    if not torch.equal(kinds, expected):
        raise ValueError("turn_advantages: kinds must be OUTCOME at each rollout's last turn, else GAIN")
    if not bool(rewards.isfinite().all()):
        raise ValueError("turn_advantages: non-finite reward; replace undefined gains by 0 and count them")


def _wrong(offsets: torch.Tensor, total: int, of: str, least: int) -> str | None:
    """Which entry breaks the rise from 0 to ``total``, in steps of at least ``least``."""
    if offsets[0] != 0:
        return f"[0] is {offsets[0]}; expected 0"
    small = (offsets.diff() < least).nonzero()
    if len(small):
        i = int(small[0]) + 1
        return f"[{i}] is {offsets[i]} after {offsets[i - 1]}; expected {offsets[i - 1] + least} or more"
    return None if offsets[-1] == total else f"[{len(offsets) - 1}] is {offsets[-1]}; expected {total}, {of}"
