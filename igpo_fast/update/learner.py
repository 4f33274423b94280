"""The owner of the weights: policy, optimiser, schedule, reference, and their part of a checkpoint.

This learner is plain torch in one process. A learner over several processes offers the same methods; nothing else in
the trainer touches parameters.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from igpo_fast.update.policy import LossInputs, PackResult, Policy, SupervisedInputs
from igpo_kernels import LossSettings, TreePlan


@dataclass(frozen=True)
class State:
    """What a checkpoint holds of a learner."""

    lm: PreTrainedModel
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler

    def save(self, folder: Path) -> None:
        """Write the model, in a layout that ``from_pretrained`` loads, and learner.pt into ``folder``."""
        self.lm.save_pretrained(folder)
        with open(folder / "learner.pt", "wb") as file:  # given a path, torch.save hides the operating system's error
            torch.save({"optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict()}, file)

    def load(self, folder: Path) -> None:
        """Read them back in place, so that ties and the optimiser's references stay valid.

        Raises:
            ValueError: the folder lacks a tensor, or has one of another shape.
            Exception: whatever transformers, unpickling and the optimiser raise for a damaged folder.
        """
        saved, about = type(self.lm).from_pretrained(folder, dtype=self.lm.dtype, output_loading_info=True)
        if unknown := sorted({*about["missing_keys"], *about["mismatched_keys"]}, key=str):
            raise ValueError(f"no tensor {unknown[0]}")
        self.lm.load_state_dict(saved.state_dict())
        state = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, moments in self.optimizer.state.items():  # else it fails at the next update only
            if bad := [name for name, value in moments.items() if value.ndim and value.shape != parameter.shape]:
                raise ValueError(f"{bad[0]} has another shape than its parameter")
        self.scheduler.load_state_dict(state["scheduler"])


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
        self.steps = 0
        """Calls of ``step`` in this session: while it is unchanged, so are weights, optimiser and schedule."""
        self._max_grad_norm = max_grad_norm
        self.optimizer = torch.optim.AdamW(lm.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)
        state = State(lm, self.optimizer, self.scheduler)
        self.save, self.load = state.save, state.load

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
            The gradient norm before clipping; None if the update was dropped, because ``sound`` is False or the norm is
            not finite. The schedule goes on in either case.
        """
        norm = float(torch.nn.utils.clip_grad_norm_(list(self.policy.parameters()), self._max_grad_norm))
        sound = sound and math.isfinite(norm)
        self.steps += 1
        if sound:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        return norm if sound else None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every weight by its name, in the model's order."""
        yield from self.lm.state_dict().items()
