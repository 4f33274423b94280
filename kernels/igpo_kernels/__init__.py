"""Kernels for multi-turn RL: answer log-probabilities of every turn prefix in one packed pass, and what follows.

Usable from any trainer; needs torch and numpy only.
"""

from igpo_kernels.linear_logprob import linear_logprob
from igpo_kernels.linear_policy_loss import linear_policy_loss
from igpo_kernels.pairs import Pairs
from igpo_kernels.plan import (
    ANSWER,
    DECISION,
    FORK,
    Branch,
    Fork,
    RolloutTokens,
    Tree,
    TreePlan,
    pack,
    pack_within,
    tree_size,
)
from igpo_kernels.policy_loss import LossSettings, policy_loss
from igpo_kernels.tree_attention import tree_attention
from igpo_kernels.turn_advantages import Normaliser, turn_advantages
from igpo_kernels.workspace import set_workspace

__all__ = [
    "ANSWER",
    "DECISION",
    "FORK",
    "Branch",
    "Fork",
    "LossSettings",
    "Normaliser",
    "Pairs",
    "RolloutTokens",
    "Tree",
    "TreePlan",
    "linear_logprob",
    "linear_policy_loss",
    "pack",
    "pack_within",
    "policy_loss",
    "set_workspace",
    "tree_attention",
    "tree_size",
    "turn_advantages",
]
