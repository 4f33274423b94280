"""PPO's critic (Schulman et al., arXiv 1707.06347): a value head, generalised advantage estimation (arXiv 1506.02438),
and the clipped value loss.

Decision tokens are the steps, or turns are; prompts and responses are no steps. A value V_s is the head on the hidden
state that predicts the step's first token, so one pass gives it beside that token's log-probability:

    delta_s = r_s + gamma V_{s+1} - V_s         V is 0 behind the end
    A_s = delta_s + gamma lambda A_{s+1}
    return_s = A_s + V_s                        the head's target
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from igpo_fast.types import INVALID, Credit, Level, Rollout
from igpo_fast.update.advantages import Recipe
from igpo_fast.update.gains import repeated_passages

if TYPE_CHECKING:
    from igpo_fast import config


ROUNDING = 1e-6
"""Returns that differ by less differ by the rounding of values."""


@dataclass(frozen=True)
class CriticSettings:
    """Settings of the head, its loss and its estimates."""

    lr: float = 0.05
    coefficient: float = 0.1
    """Factor of the value loss's gradient in the model's layers; the head's own is 1."""
    level: Level = "token"
    gae_lambda: float = 1.0
    clip: float = 0.5
    """Farthest that a value moves from the one before the update while the loss still rewards it; 0 is no limit."""
    whiten: bool = True


def critic_settings_of(config: config.Config, recipe: Recipe) -> CriticSettings | None:
    """The settings that the configuration's section ``critic`` describes; None if the algorithm has no critic."""
    return CriticSettings(**config.critic.model_dump()) if recipe.critic else None


class ValueHead(torch.nn.Module):
    """V = w h / |h|_1 + b of hidden states h, |h|_1 the sum of their absolute numbers, computed in float32; 0 at first.

    So an update of Adam moves both terms by hardly more than the learning rate, whatever the model's width and the size
    of its hidden states; and the head's gradient is no larger than the values' errors, with which it is clipped.

    Args:
        coefficient: factor of the gradient that goes on to the hidden states.
    """

    def __init__(self, hidden_size: int, coefficient: float = 1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size))
        self.bias = torch.nn.Parameter(torch.zeros(1))
        self._coefficient = coefficient

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [D, H] to values: float32 [D]."""
        if not self._coefficient:
            hidden = hidden.detach()
        inputs = torch.nn.functional.normalize(hidden.float(), p=1, dim=-1)
        if inputs.requires_grad:
            inputs.register_hook(lambda gradient: self._coefficient * gradient)
        return inputs @ self.weight.float() + self.bias.float()


@dataclass(frozen=True)
class ValueInputs:
    """Inputs of the value loss besides the model, one number per decision pair of the plan: float32 [D]."""

    weights: np.ndarray
    """Global weights; 0 for a pair that is not the first token of a step."""
    returns: np.ndarray
    """Targets."""
    values: np.ndarray
    """Values before the update."""


def value_loss(values: torch.Tensor, inputs: ValueInputs, clip: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``sum_d weights_d max((V_d - return_d)^2, (V'_d - return_d)^2) / 2``, where V' is V no farther than ``clip`` from
    the value before the update (0: no limit).

    Args:
        values: V of each decision pair: float32 [D].
    Returns:
        The loss, and sums over the pack's steps: ``value``, the loss itself; ``value_steps``, their number; and
        ``value_clipped``, the number of those whose loss is the clipped value's, so that they have no gradient.
    """
    device = values.device
    weights, returns, old = (torch.as_tensor(x, device=device) for x in (inputs.weights, inputs.returns, inputs.values))
    loss = (values - returns).square()
    steps, clipped = weights > 0, torch.zeros_like(weights, dtype=torch.bool)
    if clip:
        near = (old + (values - old).clamp(-clip, clip) - returns).square()
        clipped = steps & (near > loss)
        loss = torch.maximum(loss, near)
    total = (weights * loss).sum() / 2
    sums = {"value": total.detach(), "value_steps": steps.sum(), "value_clipped": clipped.sum()}
    return total, sums


def gae(rewards: np.ndarray, values: np.ndarray, gamma: float, gae_lambda: float) -> np.ndarray:
    """Generalised advantage estimates of several rollouts: float64 [R, S].

    Args:
        rewards, values: of each rollout's steps, float64 [R, S], filled up with zeros behind its last.

    >>> gae(np.array([[0.0, 1.0]]), np.array([[0.5, 0.25]]), gamma=1.0, gae_lambda=0.5).tolist()
    [[0.125, 0.75]]
    """
    advantages = np.zeros(values.shape)
    behind = after = np.zeros(len(values))
    for s in reversed(range(values.shape[1])):
        delta = rewards[:, s] + gamma * after - values[:, s]
        advantages[:, s] = behind = delta + gamma * gae_lambda * behind
        after = values[:, s]
    return advantages


def turn_rewards(rollout: Rollout, credit: Credit, recipe: Recipe) -> np.ndarray:
    """What a rollout's turns earn, before any normalisation: float64 [T]. The outcome in the last; in those before it
    ``ig_weight`` times the gain, if it passes the gate, or the penalty of a malformed turn; off it comes what repeated
    passages cost.

    With ``recipe.potential`` the outcome pays back ``ig_weight`` times the value of the last prefix. Where nothing else
    was gated or charged, a rollout's rewards then add up to ``outcome - ig_weight v_0`` whatever it found (TIPS, arXiv
    2603.22293).
    """
    rewards = np.zeros(len(rollout.turns))
    rewards[-1] = credit.outcome
    if recipe.needs_values:
        earned = np.nan_to_num(credit.gains)  # NaN earns none
        earned[np.abs(earned) < recipe.gate] = 0.0
        if recipe.turn_format_penalty:
            earned[[turn.action == INVALID for turn in rollout.turns[:-1]]] = -recipe.turn_format_penalty
        rewards[:-1] = recipe.ig_weight * earned
        if recipe.potential:
            rewards[-1] -= recipe.ig_weight * np.nan_to_num(credit.values[-1])
    if recipe.redundancy_penalty:
        rewards[:-1] -= recipe.redundancy_penalty * repeated_passages(rollout)
    return rewards


class Targets(NamedTuple):
    """What the critic is to learn from one rollout, per decision token."""

    returns: np.ndarray
    """float32 [decision tokens]."""
    values: np.ndarray
    """The critic's, before the update: float32 [decision tokens]."""
    share: np.ndarray
    """Tokens whose weight a token's value loss has: 1; with steps of turns all of the turn's at its first, 0 at the
    others. int64 [decision tokens]."""


def estimate(
    rollouts: Sequence[Rollout],
    credits: Sequence[Credit],
    values: Sequence[np.ndarray],
    recipe: Recipe,
    settings: CriticSettings,
) -> tuple[tuple[Credit, ...], list[Targets], dict[str, float]]:
    """Advantages and returns of a batch.

    Args:
        credits: the rollouts' outcomes and gains.
        values: the critic's, per rollout: float32 [decision tokens].
    Returns:
        ``credits`` with advantages, whitened over the batch's decision tokens if ``settings.whiten``; the critic's
        targets; and metrics over the batch's steps: ``critic/value_mean``, and ``critic/explained_variance``, the share
        of the returns' variance that the values explain, left out where returns do not vary.
    """
    lengths = [np.array([len(turn.ids) for turn in rollout.turns]) for rollout in rollouts]
    by_turn = settings.level == "turn"
    first = [np.cumsum(n) - n for n in lengths]  # place of each turn's first token
    ends = [np.arange(len(n)) if by_turn else np.cumsum(n) - 1 for n in lengths]  # step that a turn's reward is of
    at_steps = [v[place] if by_turn else v for v, place in zip(values, first, strict=True)]
    steps = [len(v) for v in at_steps]
    inside = np.arange(max(steps)) < np.array(steps)[:, None]
    filled_values, filled_rewards = np.zeros((2, *inside.shape))
    filled_values[inside] = np.concatenate(at_steps)
    for row, end, rollout, credit in zip(filled_rewards, ends, rollouts, credits, strict=True):
        row[end] = turn_rewards(rollout, credit, recipe)
    advantages = gae(filled_rewards, filled_values, recipe.discount, settings.gae_lambda)
    returns = advantages + filled_values
    metrics = {"critic/value_mean": float(filled_values[inside].mean())}
    if returns[inside].std() > ROUNDING:
        metrics["critic/explained_variance"] = 1 - float(advantages[inside].var() / returns[inside].var())

    def per_token(filled: np.ndarray) -> list[np.ndarray]:
        rows = [row[:n] for row, n in zip(filled, steps, strict=True)]
        return [np.repeat(row, n) for row, n in zip(rows, lengths, strict=True)] if by_turn else rows

    of_tokens = per_token(advantages)
    if settings.whiten:
        of_tokens = np.split(_white(np.concatenate(of_tokens)), np.cumsum([len(a) for a in of_tokens])[:-1])
    found = tuple(
        replace(credit, advantages=np.add.reduceat(a, place) / n, token_advantages=a.astype(np.float32))
        for credit, a, place, n in zip(credits, of_tokens, first, lengths, strict=True)
    )
    targets = []
    for values_of_rollout, returned, place, n in zip(values, per_token(returns), first, lengths, strict=True):
        share = np.ones(len(returned), np.int64)
        if by_turn:
            share[:] = 0
            share[place] = n
        targets.append(Targets(returned.astype(np.float32), values_of_rollout, share))
    return found, targets, metrics


def _white(advantages: np.ndarray) -> np.ndarray:
    """At mean 0 and std 1, but for verl's floor of 1e-4 under the std; zeros if all are equal."""
    if advantages.min() == advantages.max():
        return np.zeros_like(advantages)
    return (advantages - advantages.mean()) / np.sqrt(advantages.var() + 1e-8)
