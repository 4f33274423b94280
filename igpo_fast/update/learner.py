"""The owner of the weights: policy, optimiser, schedule, reference, and their part of a checkpoint.

This learner is plain torch in one process. A learner over several processes offers the same methods; nothing else in
the trainer touches parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_fast.update.policy import LossInputs, PackResult, Policy, SupervisedInputs
from igpo_kernels import LossSettings, TreePlan


class Learner:
    """AdamW on a policy.

    Args:
        lm: trained in place.
        temperature: divides every logit.
        settings: settings of the policy loss; with a KL coefficient a frozen copy of ``lm`` is kept as reference.
        backend: implementation of igpo_kernels.
        factor: the learning rate of update 0, 1, .. as a share of ``lr``.
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
    ):
        settings = settings or LossSettings()
        self.policy = Policy(lm, temperature, settings, backend)
        self._reference = None
        if settings.kl:
            self._reference = Policy(copy.deepcopy(lm).requires_grad_(False), temperature, settings, backend)
        self.updates = 0
        """Optimiser steps in this session; if it is unchanged, so are the weights."""
        self._max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @property
    def lm(self) -> PreTrainedModel:
        """The model that owns the weights."""
        return self.policy.lm

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return self.optimizer.param_groups[0]["lr"]

    def __call__(self, plan: TreePlan, inputs: LossInputs | SupervisedInputs, advantages_of=None) -> PackResult:
        """One training pass over a pack: ``Policy.forward``."""
        return self.policy(plan, inputs, advantages_of)

    def reference(self, plan: TreePlan) -> np.ndarray | None:
        """The reference's log-probability of each decision pair: float32 [D]; None without a KL term."""
        return None if self._reference is None else self._reference(plan).decision_logp

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a pack's loss to those of earlier packs."""
        loss.backward()

    def step(self, sound: bool = True) -> float | None:
        """One optimiser update from the gradients so far, clipped to ``max_grad_norm``.

        Args:
            sound: False drops the update, whatever its gradient is.
        Returns:
            The gradient norm before clipping; None if the update was dropped because it, or the norm, is not finite.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.policy.parameters()), self._max_grad_norm))
        sound = sound and math.isfinite(norm)
        if sound:
            self.updates += 1
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return norm if sound else None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its name, in the model's order."""
        yield from self.lm.state_dict().items()
