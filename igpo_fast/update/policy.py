"""One pass over a pack gives answer values, decision log-probabilities and the loss.

``Policy.forward`` owns all use of the LM head, so that a sharded weight has to be whole only there. It runs no
collective of its own: the loss weights are global numbers known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_fast.model import attention_of, hidden_states, hidden_states_of_loss, lm_head
from igpo_fast.types import Group
from igpo_fast.update.critic import ValueHead, ValueInputs, value_loss
from igpo_fast.update.scoring import Forks
from igpo_kernels import (
    Branch,
    LossSettings,
    RolloutTokens,
    Tree,
    TreePlan,
    linear_logprob,
    linear_policy_loss,
    policy_loss,
)
from igpo_kernels.huggingface import TreeAttend


@dataclass(frozen=True)
class LossInputs:
    """Inputs of the policy loss besides the model, one number per decision pair of the plan: float32 [D]."""

    weights: np.ndarray
    """Global token weights, which define the aggregation."""
    advantages: np.ndarray | None
    """Advantages; None in one-pass mode, where the pass itself gives them."""
    old_logp: np.ndarray | None = None
    """Old log-probabilities; None is ratio 1."""
    engine_logp: np.ndarray | None = None
    ref_logp: np.ndarray | None = None
    clip_scale: np.ndarray | None = None
    """Factors of ``clip_low`` and ``clip_high``; None is 1."""
    critic: ValueInputs | None = None
    """Inputs of the value loss, of a policy with a critic."""


@dataclass(frozen=True)
class SupervisedInputs:
    """Inputs of supervised fine-tuning besides the model: a weight per decision pair of the plan, float32 [D]. The loss
    is the weighted mean of negative log-likelihoods."""

    weights: np.ndarray


@dataclass(frozen=True)
class PackResult:
    """Results of a pass over a pack. Those of a pass with a loss are on the model's device until ``read``, so that the
    host can go on to its backward."""

    scored_logp: np.ndarray
    """log pi of each pair of answers and forks, in the plan's order: float64 [M - D]; empty without any."""
    decision_logp: np.ndarray | torch.Tensor | None = None
    """log pi of each decision pair: float32 [D]."""
    loss: torch.Tensor | None = None
    sums: dict[str, float] | dict[str, torch.Tensor] | None = None
    """``policy_loss``'s sums, and ``value_loss``'s with a critic."""
    critic: np.ndarray | None = None
    """The critic's value of each decision pair: float32 [D]; None in a pass with a loss."""
    advantages: np.ndarray | torch.Tensor | None = None
    """What ``advantages_of`` gave: [D]; float64 once read."""

    def read(self) -> PackResult:
        """The result of a pass with a loss, on the host and without the loss; waits for the device once."""
        given = () if self.advantages is None else (self.advantages,)
        sums, logp, *advantages = read(
            torch.stack([x.double() for x in self.sums.values()]), self.decision_logp, *given
        )
        return PackResult(
            self.scored_logp, logp.astype(np.float32), sums=dict(zip(self.sums, sums.tolist(), strict=True)),
            advantages=advantages[0] if given else None,
        )  # fmt: skip


def read(*tensors: torch.Tensor) -> list[np.ndarray]:
    """The tensors' numbers on the host, which waits for their device once: float64 [n] each."""
    joined = torch.cat([x.detach().double().flatten() for x in tensors]).cpu().numpy()
    return np.split(joined, np.cumsum([x.numel() for x in tensors])[:-1])


AdvantagesOf = Callable[[np.ndarray], torch.Tensor]
"""Answer log-probabilities [M - D], on the host, -> advantages [D], on the model's device: what comes between a pass's
answers and its loss. The host waits for the answers, and for nothing else before the backward."""


class Policy(torch.nn.Module):
    """A causal LM that runs on packs.

    Args:
        lm: made by ``igpo_fast.model``.
        temperature: divides every logit, as in sampling.
        backend: implementation of igpo_kernels.
        critic: gives a value of each decision pair's hidden state.
        value_clip: ``value_loss``'s ``clip``.
    """

    def __init__(
        self, lm: PreTrainedModel, temperature: float, settings: LossSettings, backend: str = "auto",
        critic: ValueHead | None = None, value_clip: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.lm, self.temperature, self.settings, self.backend = lm, temperature, settings, backend
        self.critic, self._value_clip = critic, value_clip
        self.in_parts = True
        """Whether a pass may run the decoder twice. Where ranks gather weights in forwards (ZeRO-3) it may not: those
        whose packs have no answers would not join in."""

    def choose_attention(self, plan: TreePlan) -> None:
        """Choose the attention implementation for a plan that was just built."""
        attention_of(self.lm, plan, self.backend)

    def forward(
        self,
        plan: TreePlan,
        inputs: LossInputs | SupervisedInputs | None = None,
        advantages_of: AdvantagesOf | None = None,
    ) -> PackResult:
        """One pass over a pack.

        Args:
            inputs: inputs of the loss; None only scores answers and decisions, without gradient.
                ``inputs.advantages`` may be None if ``advantages_of`` is given, which is called with this pass's
                answer log-probabilities (one-pass mode); with advantages that are known, answers are not scored.
        """
        if isinstance(inputs, LossInputs):
            return self._with_loss(plan, inputs, advantages_of)
        device = self.lm.device
        with torch.set_grad_enabled(inputs is not None and torch.is_grad_enabled()):
            attend = TreeAttend(plan, self.backend, rows_read=True)
            hidden = hidden_states(self.lm, *plan.tokens(self.lm.device), attend)
        n = plan.n_decisions
        if inputs is None:
            with torch.no_grad():
                critic = () if self.critic is None else (self._values(hidden, plan),)
                scored, *others = read(self._answers(hidden, plan), self._logp(hidden, plan, slice(0, n)), *critic)
            logp, *critic = (x.astype(np.float32) for x in others)
            return PackResult(scored, logp, critic=critic[0] if critic else None)
        weight = torch.as_tensor(inputs.weights, device=device)
        logp = self._logp(hidden, plan, slice(0, n))
        weight = weight.to(logp.dtype)
        return PackResult(np.zeros(0), loss=-(weight * logp).sum() / weight.sum())

    def _with_loss(self, plan: TreePlan, inputs: LossInputs, advantages_of: AdvantagesOf | None) -> PackResult:
        """A pass with the policy loss: first the answers, if advantages come from them."""
        in_parts = self.in_parts and inputs.advantages is None
        hidden, every, of_loss = hidden_states_of_loss(self.lm, plan, self.backend, in_parts=in_parts)
        scored, advantages = np.zeros(0), None
        if inputs.advantages is None:
            (scored,) = read(self._answers(every, plan))
            advantages = torch.as_tensor(advantages_of(scored), device=hidden.device)
            inputs = replace(inputs, advantages=advantages)
        loss, sums, logp = self._loss(hidden, of_loss, inputs)
        if inputs.critic is not None:
            of_critic, more = value_loss(self._values(hidden, of_loss), inputs.critic, self._value_clip)
            loss, sums = loss + of_critic, sums | more
        return PackResult(scored, logp, loss, sums, advantages=advantages)

    def _values(self, hidden: torch.Tensor, plan: TreePlan) -> torch.Tensor:
        """The critic's value of each decision pair: float32 [D]."""
        return self.critic(hidden[plan.pairs(slice(0, plan.n_decisions), rows_read=True).on(hidden.device).rows])

    def _head(self) -> tuple[torch.Tensor, dict]:
        head = lm_head(self.lm)
        options = dict(bias=head.bias, softcap=head.softcap, temperature=self.temperature, backend=self.backend)
        return head.weight, options

    def _logp(self, hidden: torch.Tensor, plan: TreePlan, part: slice, **more):
        weight, options = self._head()
        return linear_logprob(hidden, weight, plan.pairs(part, rows_read=True), **options, **more)

    @torch.no_grad()
    def _answers(self, hidden: torch.Tensor, plan: TreePlan) -> torch.Tensor:
        """log pi of each pair of answers and forks: [M - D]."""
        if plan.n_pairs == plan.n_decisions:
            return hidden.new_empty(0)
        return self._logp(hidden, plan, slice(plan.n_decisions, None))

    def _loss(self, hidden: torch.Tensor, plan: TreePlan, inputs: LossInputs):
        """Loss, metric sums, and the decision pairs' log-probabilities without gradient."""
        settings, device = self.settings, hidden.device
        on = {
            name: None if value is None else torch.as_tensor(value, dtype=torch.float32, device=device)
            for name, value in vars(inputs).items()
            if name != "critic"
        }
        part = slice(0, plan.n_decisions)
        if settings.needs_segment or settings.needs_sequence:
            logp, entropy = self._logp(hidden, plan, part, entropy=True)
            entropy = entropy if settings.entropy else entropy.detach()
            sequence, turn = _segments(plan, device)
            loss, sums = policy_loss(
                logp, settings=settings, entropy=entropy, segment=turn if settings.ratio == "turn" else sequence,
                sequence=sequence, backend=self.backend, **on,
            )  # fmt: skip
            return loss, sums, logp.detach()
        weight, options = self._head()
        pairs = plan.pairs(part, rows_read=True)
        loss, sums = linear_policy_loss(hidden, weight, pairs, None, settings=settings, **on, **options)
        return loss, sums, sums.pop("logp")


def _segments(plan: TreePlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each decision pair's rollout in the pack, and of its turn there: int64 [D] each. Counted on the
    host: a device would make it wait for how many there are."""

    def numbered() -> tuple[torch.Tensor, torch.Tensor]:
        rollout, turn = plan.rollout[: plan.n_decisions], plan.turn[: plan.n_decisions]
        keys = rollout, rollout * (turn.max() + 1) + turn
        return tuple(torch.from_numpy(np.unique(key, return_inverse=True)[1]).to(device) for key in keys)

    return plan.cached(("segments", str(device)), numbered)


def make_trees(
    groups: Sequence[Group],
    branches: Sequence[Sequence[Branch]] | None,
    numbers: Sequence[Sequence[int]],
    forks: Forks | None = None,
) -> list[Tree]:
    """One tree per group.

    Args:
        branches: the answers to force, one sequence per group; None for passes without scoring.
        numbers: each rollout's number in its batch, which comes back as ``TreePlan.rollout``.
        forks: other continuations that are scored.
    """
    forks = forks or {}
    return [
        Tree(
            [
                RolloutTokens(number, rollout.ids, rollout.turn_of_token, rollout.boundaries, forks.get(number, ()))
                for number, rollout in zip(group_numbers, group.rollouts, strict=True)
            ],
            () if branches is None else branches[i],
        )
        for i, (group, group_numbers) in enumerate(zip(groups, numbers, strict=True))
    ]
