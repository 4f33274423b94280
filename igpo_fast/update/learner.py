"""The owner of the weights: policy, optimiser, schedule, reference, and their part of a checkpoint.

Adam's states and the weights that it updates (the masters) are float32, whatever the model computes in: a step of 1e-6
is smaller than the rounding of a bfloat16 weight. This learner is plain torch in one process; deepspeed.py has the one
for several. Nothing else in the trainer touches parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_fast import adapter
from igpo_fast.types import ValueModel
from igpo_fast.update.critic import CriticSettings, ValueHead
from igpo_fast.update.policy import LossInputs, PackResult, Policy, SupervisedInputs
from igpo_fast.update.states import (
    Write,
    copies,
    read_states,
    read_teacher,
    read_weights,
    write_states,
    write_teacher,
    write_weights,
)
from igpo_kernels import LossSettings, TreePlan

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of a weight."""
CRITIC = "critic."
"""Begins the names of the critic's weights. They are no weights of the model: a checkpoint has them among the
optimiser's states, as masters."""


def trained_weights(lm: torch.nn.Module, critic: ValueHead | None = None) -> dict[str, torch.nn.Parameter]:
    """The weights that an optimiser updates, by name, the critic's last."""
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    return trained | ({f"{CRITIC}{name}": p for name, p in critic.named_parameters()} if critic else {})


class Masters:
    """The float32 weights that the optimiser updates: copies of a model's parameters, or, if those are float32, the
    parameters themselves.

    Gradients of copied parameters are moved here as backward gives them, and are added up in float32 over the packs of
    an update.

    Args:
        lm: its parameters that require gradients are mastered.
        critic: mastered, too.
    """

    def __init__(self, lm: torch.nn.Module, critic: ValueHead | None = None):
        trained = trained_weights(lm, critic)
        self.copied = {name: p for name, p in trained.items() if p.dtype != torch.float32}
        """The model's parameters whose masters are copies."""
        self.of = {
            name: torch.nn.Parameter(p.detach().float()) if name in self.copied else p for name, p in trained.items()
        }
        """Masters by the names of their parameters, in the model's order."""
        for name, p in self.copied.items():
            p.register_post_accumulate_grad_hook(partial(self._take, self.of[name]))

    @staticmethod
    def _take(master: torch.nn.Parameter, parameter: torch.Tensor) -> None:
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    @torch.no_grad()
    def round(self) -> None:
        """Write the masters into the model, rounded to its dtype."""
        for name, p in self.copied.items():
            p.copy_(self.of[name])


class Learner:
    """AdamW on a policy, in one process.

    Args:
        lm: trained in place, in its dtype over float32 masters.
        temperature: divides every logit.
        settings: settings of the policy loss. With a KL coefficient the reference is a frozen copy of ``lm``, or, if it
            has adapters, ``lm`` without them.
        backend: implementation of igpo_kernels.
        factor: the learning rate of update 0, 1, .. as a share of ``lr``, and of the critic's.
        critic: settings of a critic; None for none.
        value_model: what ``value`` runs: the ``policy``, the ``reference`` or a ``teacher``, a copy of the policy.
    """

    def __init__(
        self,
        lm: PreTrainedModel,
        *,
        temperature: float = 1.0,
        settings: LossSettings | None = None,
        backend: str = "auto",
        lr: float,
        factor: Callable[[int], float],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        critic: CriticSettings | None = None,
        value_model: ValueModel = "policy",
    ):
        self.settings = settings or LossSettings()
        head = critic and ValueHead(lm.config.get_text_config().hidden_size, critic.coefficient).to(lm.device, lm.dtype)
        self.policy = Policy(lm, temperature, self.settings, backend, head, critic.clip if critic else 0.0)
        self._rates = [lr, critic.lr] if critic else [lr]
        self._lr, self._factor, self._max_grad_norm = lr, factor, max_grad_norm
        self._reference: Callable[[TreePlan], PackResult] | None = None
        self._adapted = adapter.adapted(lm)
        self.value_model, self._teacher = value_model, None

        def frozen() -> Policy:
            return Policy(copy.deepcopy(lm).requires_grad_(False), temperature, self.settings, backend)

        if (self.settings.kl or value_model == "reference") and not self._adapted:
            self._reference = self._freeze(frozen())
        if value_model == "teacher":
            self._teacher = frozen()
        self.parameters = sum(p.numel() for p in lm.parameters())
        """How many numbers the weights are."""
        self.alone = True
        """Whether this process may walk over ``weights`` by itself at any time; else all ranks do so together."""
        self.steps = 0
        """Calls of ``step`` in this session: while it is unchanged, so are weights, optimiser and schedule."""
        self._number = 0  # of the next update, dropped ones counted
        self._optimise(betas, weight_decay)

    def _freeze(self, reference: Policy) -> Callable[[TreePlan], PackResult]:
        return reference

    def _optimise(self, betas: tuple[float, float], weight_decay: float) -> None:
        self._masters = Masters(self.lm, self.policy.critic)
        self.optimizer = torch.optim.AdamW(
            self._groups(self._masters.of), lr=self._lr, betas=betas, weight_decay=weight_decay
        )

    def _groups(self, trained: Mapping[str, torch.nn.Parameter]) -> list[dict]:
        """AdamW's groups: the model's weights and the critic's, in the order of ``_rates``."""
        of_critic = [p for name, p in trained.items() if name.startswith(CRITIC)]
        others = [p for name, p in trained.items() if not name.startswith(CRITIC)]
        return [{"params": group} for group in (others, of_critic) if group]

    @property
    def lm(self) -> PreTrainedModel:
        """The model that owns the weights."""
        return self.policy.lm

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self._lr * self._factor(self._number)

    def __call__(
        self, plan: TreePlan, inputs: LossInputs | SupervisedInputs | None = None, advantages_of=None
    ) -> PackResult:
        """One pass over a pack: ``Policy.forward``."""
        return self.policy(plan, inputs, advantages_of)

    def reference(self, plan: TreePlan) -> np.ndarray | None:
        """The reference's log-probability of each decision pair: float32 [D]; None without a KL term."""
        return self._read_reference(plan).decision_logp if self.settings.kl else None

    def _read_reference(self, plan: TreePlan) -> PackResult:
        if self._adapted:
            with adapter.off(self.lm):
                return self(plan)
        return self._reference(plan)

    def value(self, plan: TreePlan) -> PackResult:
        """A pass of the value model, without gradient."""
        if self.value_model == "policy":
            return self(plan)
        return self._teacher(plan) if self._teacher else self._read_reference(plan)

    @torch.no_grad()
    def refresh_teacher(self) -> None:
        """Copy the policy's weights into the teacher."""
        self._teacher.lm.load_state_dict(self.lm.state_dict())

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a pack's loss to those of earlier packs."""
        loss.backward()

    def forget(self) -> bool:
        """Drop the gradients so far, those of a pass that raised included; returns False if only a new process can."""
        self.policy.zero_grad()
        self.optimizer.zero_grad()
        return True

    def step(self, sound: bool = True) -> float | None:
        """One optimiser update from the gradients so far, clipped to ``max_grad_norm``.

        Args:
            sound: False drops the update, whatever its gradient is.
        Returns:
            The gradient norm before clipping; None if the update was dropped, because ``sound`` is False or the norm is
            not finite. The schedule goes on in either case.
        """
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._factor(self._number)
        self.steps += 1
        self._number += 1
        return self._step(sound)

    def _step(self, sound: bool) -> float | None:
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._masters.of.values()), self._max_grad_norm))
        sound = sound and math.isfinite(norm)
        if sound:
            self.optimizer.step()
            self._masters.round()
        self.optimizer.zero_grad()
        return norm if sound else None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its name, in the model's order, adapters merged into theirs."""
        yield from adapter.merged(self.lm) if self._adapted else self.lm.state_dict().items()

    def snapshot(self) -> Write:
        """The state now, in the CPU's memory, for a checkpoint (states.py)."""
        named = self.lm.state_dict(keep_vars=True)
        weights = copies({n: p for n, p in named.items() if adapter.is_adapter(n)} if self._adapted else named)
        teacher = self._teacher_copies()
        states, counts = {}, {"number": self._number}
        for name, master in self._masters.of.items():
            moments = self.optimizer.state.get(master, {})
            copied = {"master": master} if name in self._masters.copied or name.startswith(CRITIC) else {}
            states[name] = copies(copied | {key: moments[key] for key in MOMENTS if key in moments})

        def write(folder: Path) -> None:
            write_weights(self.lm, folder, weights)
            write_states(folder, states, counts)
            write_teacher(folder, teacher)

        return write

    def _teacher_copies(self) -> dict[str, torch.Tensor] | None:
        """What a checkpoint keeps of the teacher: what it keeps of the policy, by the same names."""
        if self._teacher is None:
            return None
        named = self._teacher.lm.state_dict(keep_vars=True)
        return copies({n: p for n, p in named.items() if adapter.is_adapter(n)} if self._adapted else named)

    def _load_teacher(self, folder: Path) -> None:
        if self._teacher is not None:
            self._teacher.lm.load_state_dict(read_teacher(folder), strict=not self._adapted)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read them back in place, so that ties and the optimiser's references stay valid.

        Raises:
            ValueError: the folder lacks a tensor, or has one of another shape.
            Exception: whatever transformers and unpickling raise for a damaged folder.
        """
        self.lm.load_state_dict(read_weights(self.lm, folder), strict=not self._adapted)
        states, counts = read_states(folder, self._masters.of)
        for name, master in self._masters.of.items():
            state = states[name]
            if bad := [key for key, value in state.items() if value.ndim and value.shape != master.shape]:
                raise ValueError(f"{bad[0]} of {name} has another shape than the weight")
            known = self._masters.copied.get(name) if not name.startswith(CRITIC) else None
            if known is not None and not torch.equal(state["master"].to(known), known):
                raise ValueError(f"the float32 master of {name} does not round to the model's")
            if "master" in state:
                master.copy_(state["master"])
            moments = {key: state[key] for key in MOMENTS if key in state}
            if moments:
                self.optimizer.state[master] = {
                    key: value.clone() if key == "step" else value.to(master.device, copy=True)
                    for key, value in moments.items()
                }
        self._masters.round()
        self._load_teacher(folder)
        self._number = counts["number"]
