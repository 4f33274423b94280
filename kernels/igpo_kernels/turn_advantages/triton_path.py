"""turn_advantages on Triton: statistics, discounted sums and the broadcast to tokens in one launch.

Memory traffic: per turn 4 bytes for a float32 reward, the kind's bytes and 4 for the advantage; per token 4. Nothing
else runs on the device if the inputs are contiguous.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch
import triton

from igpo_kernels.triton_variants import Tunable, Variant, arch_of, config_for, configs
from igpo_kernels.turn_advantages.reference import GAIN, OUTCOME, Normaliser
from igpo_kernels.turn_advantages.triton_kernels import turn_advantages_kernel

DTYPES = {torch.float32: "fp32", torch.float64: "fp64"}


def turn_advantages_triton(
    rewards: torch.Tensor,
    kinds: torch.Tensor,
    rollout_offsets: torch.Tensor,
    group_offsets: torch.Tensor,
    gamma: float,
    normaliser: Normaliser,
    token_offsets: torch.Tensor | None = None,
    n_tokens: int | None = None,
) -> torch.Tensor:
    """Arguments and result as ``igpo_kernels.turn_advantages``; checks nothing. Rollouts end where ``kinds`` says."""
    n = normaliser
    config = config_for("turn_advantages", arch_of(rewards.device), "any", DTYPES[rewards.dtype])
    groups = len(group_offsets) - 1
    pools = groups if n.scope == "group" else 1
    rewards, kinds, rollout_offsets, group_offsets = (
        x.contiguous() for x in (rewards, kinds, rollout_offsets, group_offsets)
    )
    advantages = torch.empty_like(rewards)
    out, splits, n_tokens = None, 1, n_tokens or 0
    if token_offsets is not None:
        out, token_offsets = rewards.new_empty(n_tokens), token_offsets.contiguous()
        splits = max(1, min(config["PROGRAMS"] // pools, triton.cdiv(n_tokens, pools * config["BLOCK"])))
    turn_advantages_kernel[(pools * splits,)](
        rewards, kinds, rollout_offsets, group_offsets, token_offsets, advantages, out,
        len(rewards), (len(rollout_offsets) - 1) // pools, groups // pools, splits, n_tokens, float(gamma),
        at_least(n.gate, rewards.dtype), float(n.center), float(n.min_std), float(n.outcome_floor),
        float(n.min_var), float(n.gain_weight), float(n.outcome_weight), int(n.scale_std), int(n.leave_one_out),
        POOL=n.pool, BLOCK=config["BLOCK"], **config.options(),
    )  # fmt: skip
    return advantages if out is None else out


def at_least(bound: float, dtype: torch.dtype) -> float:
    """The smallest number of ``dtype`` that is not below ``bound``: a number of ``dtype`` is below both or neither."""
    if dtype == torch.float64:
        return float(bound)
    rounded = np.float32(bound)
    return float(rounded if rounded >= bound else np.nextafter(rounded, np.float32(np.inf)))


# Pool of a shipped variant, and whether it spreads advantages to tokens.
FEATURES = {
    "separate": ("separate", False),
    "joint": ("joint", False),
    "scaled_separate": ("scaled_separate", False),
    "tokens": ("separate", True),
}
INTEGERS = ("rollout_offset_ptr", "group_offset_ptr", "token_offset_ptr")
NUMBERS = ("reward_ptr", "advantage_ptr", "out_ptr")
FLAGS = ("scale_std", "leave_one_out")
COUNTS = ("turns", "rollouts_per_pool", "groups_per_pool", "splits", "n_tokens")


def variants() -> Iterator[Variant]:
    """Variants of every pool, and of the preset's pool with tokens; kinds are int8. Other knobs are arguments."""
    fn = turn_advantages_kernel
    for arch, shape_class, dtype, config in configs("turn_advantages"):
        for features, (pool, tokens) in FEATURES.items():
            constexprs = {"POOL": pool, "BLOCK": config["BLOCK"]}
            if not tokens:
                constexprs |= {"token_offset_ptr": None, "out_ptr": None}
            types = dict.fromkeys(INTEGERS, "*i64:16") | dict.fromkeys(NUMBERS, f"*{dtype}:16")
            types |= {"kind_ptr": "*i8:16"} | dict.fromkeys(COUNTS, "i64") | dict.fromkeys(FLAGS, "i32")
            signature = {name: types.get(name, "fp64") for name in fn.arg_names if name not in constexprs}
            yield Variant(
                "turn_advantages", "turn_advantages", arch, dtype, f"{shape_class}/{features}", fn, signature,
                constexprs, config.num_warps, config.num_stages,
            )  # fmt: skip


def tunables() -> Iterator[Tunable]:
    """256 groups of 16 rollouts of 128 turns of 64 tokens."""
    space = {"num_warps": [4, 8, 16], "num_stages": [1], "BLOCK": [1024, 2048, 4096], "PROGRAMS": [2, 3, 4, 6, 8]}
    for dtype, name in DTYPES.items():
        workload = functools.partial(_workload, dtype=dtype)
        yield Tunable("turn_advantages", "any", name, space, workload, ("PROGRAMS",))


def _workload(device: torch.device, dtype: torch.dtype):
    rollouts, turns, group, tokens = 4096, 128, 16, 64
    kinds = torch.full((rollouts, turns), GAIN, dtype=torch.int8, device=device)
    kinds[:, -1] = OUTCOME
    rewards = torch.rand(rollouts * turns, device=device, dtype=dtype)
    rollout_offsets = torch.arange(0, rollouts * turns + 1, turns, device=device)
    group_offsets = torch.arange(0, rollouts + 1, group, device=device)
    args = rewards, kinds.flatten(), rollout_offsets, group_offsets, 1.0, Normaliser()
    token_offsets = torch.arange(0, (rollouts * turns + 1) * tokens, tokens, device=device)
    return lambda: turn_advantages_triton(*args, token_offsets, rollouts * turns * tokens)
