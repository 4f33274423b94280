"""One batch, one update: trees, one pass or two, turn rewards, advantages, loss, backward, optimiser steps.

One-pass mode reads each token once: answers first, then gains on the host and advantages on the device, then the loss
from the same hidden states, whose backward leaves the answers out. The host waits for the device once per pack, for its
answers, and reads the rest when the device has all its work. Two-pass mode first scores answers and old
log-probabilities without gradient, then trains without branches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

import numpy as np
import torch

from igpo_fast.errors import DivergedError
from igpo_fast.types import Aggregation, Batch, Credit
from igpo_fast.update.advantages import Earned, Recipe, credited, earn, reward_metrics, token_advantages
from igpo_fast.update.critic import CriticSettings, Targets, ValueInputs, estimate
from igpo_fast.update.learner import Learner
from igpo_fast.update.losses import importance_sums, measured, token_weights
from igpo_fast.update.packs import (
    Pack,
    Packer,
    Reading,
    Readings,
    advantages_of_pairs,
    clip_scales_of_pairs,
    decision_runs,
    of_pairs,
    rollout_key,
)
from igpo_fast.update.policy import LossInputs
from igpo_kernels import TreePlan

T = TypeVar("T")
PerRollout = Mapping[int, np.ndarray]
"""A float32 per decision token, by a rollout's number in the batch."""


class Row(Protocol):
    """The metrics row of an update (run/metrics.StepMetrics)."""

    def __getitem__(self, key: str) -> float: ...
    def timed(self, phase: str) -> AbstractContextManager: ...
    def set(self, values: Mapping[str, float]) -> None: ...
    def add(self, values: Mapping[str, float]) -> None: ...
    def largest(self, values: Mapping[str, float]) -> None: ...
    def update(self, packs: Sequence[Mapping[str, float]], grad_norm: float) -> None: ...


class Progress(Protocol):
    """Progress display of an update (run/display.Display)."""

    def phase(self, name: str, total: int | None = None) -> None: ...
    def advance(self, done: int = 1) -> None: ...
    def warn(self, text: str) -> None: ...


class Updater:
    """Takes a batch's optimiser steps.

    Args:
        passes: ``one`` or ``two``, chosen once per run.
        groups_per_pack: whole groups that surely fit a pack: they are read together.
        most_tokens: decision tokens of the longest rollout that the limits allow.
        updates: optimiser steps per batch, each on its share of the groups; one pass takes one.
        mismatch_stop: largest mean difference between the engine's and the trainer's log-probabilities over the
            batch's tokens; a larger one raises before anything changes. 0 is no limit.
        critic: settings of the critic, for a recipe that has one; it takes two passes.
        teacher_every: steps between refreshes of the learner's teacher; 0 without one.
    """

    def __init__(
        self, learner: Learner, packer: Packer, recipe: Recipe, *, passes: str, groups_per_pack: int, updates: int,
        aggregation: Aggregation, most_tokens: int, mismatch_stop: float, progress: Progress,
        critic: CriticSettings | None = None, teacher_every: int = 0,
    ):  # fmt: skip
        self.packer, self.recipe, self.passes, self.groups_per_pack = packer, recipe, passes, groups_per_pack
        self._learner, self._updates, self._aggregation = learner, updates, aggregation
        self._most_tokens, self._mismatch_stop, self._progress = most_tokens, mismatch_stop, progress
        self._critic, self._teacher_every, self._halved = critic, teacher_every, False

    def __call__(self, batch: Batch, readings: Readings, row: Row) -> Batch:
        """Score groups that are not in ``readings`` yet and take the batch's optimiser steps.

        The first time that memory does not suffice, packs become half as large and the update begins anew, unless an
        optimiser step was taken already.

        Returns:
            The batch with its rollouts' rewards and advantages.
        Raises:
            DivergedError: ``mismatch_stop`` is exceeded; nothing has changed.
            OutOfMemoryError, MemoryError: memory does not suffice, and packs cannot be smaller.
        """
        credits = self._with_less(batch, lambda: self._credits(batch, readings, row))
        if self._teacher_every and batch.step % self._teacher_every == 0:
            self._learner.refresh_teacher()
        row.set(reward_metrics(batch.groups, credits, self.recipe.gate))
        separate = self.packer.separate_tokens(batch)
        row.set(
            {
                "tokens/rollout": sum(len(rollout.ids) for rollout in batch.rollouts),
                "sharing/ratio": separate / row["tokens/packed"],
            }
        )
        return Batch(batch.step, batch.groups, credits)

    def _with_less(self, batch: Batch, part: Callable[[], T]) -> T:
        """Run ``part``, and once per session again, with half as large packs, if memory does not suffice."""
        steps = self._learner.steps
        try:
            return part()
        except (torch.OutOfMemoryError, MemoryError):
            possible = not self._halved and self._learner.steps == steps and self._learner.forget()
            budget = self.packer.halve() if possible else None
            if budget is None:
                raise
        # Outside the handler: the error's frames held the pack's activations.
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        self._halved = True
        self._progress.warn(
            f"step {batch.step}: out of memory; the update is repeated with packs of {budget} tokens, which stays so "
            f"in this session. Start the next one with train.token_budget={budget}"
        )
        return part()

    @property
    def reads_first(self) -> bool:
        """Whether a pass comes before the update: the first of two, or that of another model's values."""
        return self.passes == "two" or self.recipe.values_apart

    def _credits(self, batch: Batch, readings: Readings, row: Row) -> tuple[Credit, ...]:
        if self.recipe.needs_whole_groups(self.passes):
            return self._in_one_pass(batch, row)
        return self._from_readings(batch, readings, row)

    def _in_one_pass(self, batch: Batch, row: Row) -> tuple[Credit, ...]:
        """Values, advantages, loss and gradients from one pass over each pack."""
        self._progress.phase("train")
        everything = range(len(batch.groups))
        with row.timed("train"):
            packs = self.packer.packs(batch, everything, scored=True)
            weights = self._weights(batch, everything)
            crediting = Crediting(self.packer, batch, self.recipe.at(batch.step), self._learner.lm.device)
            self._step(batch, packs, weights, row, crediting=crediting)
        credits = crediting.credits
        for theirs in self.packer.ranks.gather(credits):
            credits |= theirs
        return tuple(credits[i] for i in range(len(batch.rollouts)))

    def _from_readings(self, batch: Batch, readings: Readings, row: Row) -> tuple[Credit, ...]:
        """Advantages that are known before the update, from the passes before it or from outcomes alone."""
        updates = min(self._updates, len(batch.groups))
        if self.reads_first:
            self._progress.phase("score")
            self.read(batch, readings, row)
        known = [readings.get(rollout_key(rollout), Reading()) for rollout in batch.rollouts]
        old_logp = None
        if self.passes == "two":
            old_logp = {i: reading.logp for i, reading in enumerate(known)}
            differences = [np.abs(old_logp[i] - rollout.logp) for i, rollout in enumerate(batch.rollouts)]
            self._check_mismatch(batch.step, float(np.concatenate(differences).mean()))
        ref_logp = None
        if self.recipe.value_source == "reference":
            ref_logp = {i: reading.other_logp for i, reading in enumerate(known)}
        credits, targets = self.packer.credits(batch.step, batch.groups, readings), None
        if self._critic:
            values = [reading.critic for reading in known]
            recipe = self.recipe.at(batch.step)
            credits, targets, metrics = estimate(batch.rollouts, credits, values, recipe, self._critic)
            row.set(metrics)
        self._progress.phase("train", total=updates if self.passes == "two" else None)
        with row.timed("train"):
            for share in np.array_split(np.arange(len(batch.groups)), updates):
                packs = self.packer.packs(batch, share, scored=False)
                weights = self._weights(batch, share)
                self._step(
                    batch, packs, weights, row, credits=dict(enumerate(credits)), old_logp=old_logp, ref_logp=ref_logp,
                    targets=targets,
                )  # fmt: skip
                self._progress.advance()
        return credits

    def read(self, batch: Batch, readings: Readings, row: Row) -> None:
        """Run the passes before the update over groups that are not in ``readings`` yet."""
        with row.timed("score"):
            for tokens in self._with_less(batch, lambda: self.packer.read(batch, readings)):
                row.add(tokens)

    def _step(
        self,
        batch: Batch,
        packs: Sequence[Pack],
        weights: np.ndarray,
        row: Row,
        *,
        credits: Mapping[int, Credit] | None = None,
        crediting: Crediting | None = None,
        old_logp: PerRollout | None = None,
        ref_logp: PerRollout | None = None,
        targets: Sequence[Targets] | None = None,
    ) -> None:
        """One optimiser update over packs, whose losses only add because the weights are global. The reference runs
        only if ``ref_logp`` are not known. Advantages are those of ``credits``, or ``crediting`` finds them."""
        engine_logp = {i: rollout.logp for i, rollout in enumerate(batch.rollouts)}
        results = []
        for pack in packs:
            plan = pack.plan
            if pack.filler:
                nothing = np.zeros(plan.n_decisions, np.float32)
                idle = LossInputs(
                    nothing, nothing, engine_logp=nothing,
                    ref_logp=nothing if ref_logp else self._learner.reference(plan),
                    critic=targets and ValueInputs(nothing, nothing, nothing),
                )  # fmt: skip
                self._learner.backward(self._learner(plan, idle).loss)
                continue
            inputs = LossInputs(
                weights=weights[plan.rollout[: plan.n_decisions]].astype(np.float32),
                advantages=None if crediting else advantages_of_pairs(plan, credits),
                old_logp=None if old_logp is None else of_pairs(plan, old_logp),
                engine_logp=of_pairs(plan, engine_logp),
                ref_logp=of_pairs(plan, ref_logp) if ref_logp else self._learner.reference(plan),
                clip_scale=None if old_logp is None else clip_scales_of_pairs(plan, credits),  # else the ratio is 1
                critic=targets and _value_inputs(plan, weights, targets),
            )
            result = self._learner(plan, inputs, crediting and partial(crediting.advantages, pack))
            self._learner.backward(result.loss)
            results.append((pack, inputs, replace(result, loss=None)))
        mine = []
        for pack, inputs, result in results:  # once the device has all its work
            result = result.read()
            anchor = result.decision_logp if inputs.old_logp is None else inputs.old_logp
            owner = pack.plan.rollout[: pack.plan.n_decisions]
            weighed = importance_sums(anchor, inputs.engine_logp, owner, self._learner.settings)
            largest = float(np.abs(anchor - inputs.engine_logp).max())
            mine.append((pack.tokens, largest, measured(result.sums, inputs) | weighed))
            if crediting:
                crediting.read(pack, result.advantages)
        told = [pack for theirs in self.packer.ranks.gather(mine) for pack in theirs]
        sums = [found for _, _, found in told]
        for tokens, largest, _ in told:
            row.add(tokens)
            row.largest({"mismatch/logp_abs_max": largest})
        if old_logp is None:
            self._check_mismatch(batch.step, sum(s["mismatch"] for s in sums) / sum(s["tokens"] for s in sums))
        row.set({"train/lr": self._learner.lr})
        norm = self._learner.step(sound=all(math.isfinite(s["policy"]) for s in sums))
        if norm is None:
            row.add({"loss/skipped": 1})
            self._progress.warn(
                f"step {batch.step}: the loss or its gradient is not finite; this update is skipped. "
                "If it recurs, lower train.lr or use train.precision=float32"
            )
        row.update(sums, math.nan if norm is None else norm)

    def _check_mismatch(self, step: int, mean: float) -> None:
        """Raises DivergedError if ``mismatch_stop`` is exceeded; called before the first optimiser step."""
        limit = self._mismatch_stop
        if limit and not mean <= limit:
            raise self.packer.ranks.on_all(DivergedError(
                f"step {step}: the engine's log-probabilities differ from the trainer's by {mean:.3g} on average, more "
                f"than rollout.mismatch_stop={limit:g}; correct for it (algorithm.importance), or raise the limit"
            ))  # fmt: skip

    def _weights(self, batch: Batch, share: Sequence[int]) -> np.ndarray:
        """Token weight of each rollout, 0 outside the groups ``share``: float64 [R]."""
        inside = np.repeat(np.isin(np.arange(len(batch.groups)), share), [len(g.rollouts) for g in batch.groups])
        weights = np.zeros(len(inside))
        lengths = [r.decision_tokens for r, mine in zip(batch.rollouts, inside, strict=True) if mine]
        weights[inside] = token_weights(lengths, self._aggregation, self._most_tokens)
        return weights


class Crediting:
    """Advantages of one-pass mode: a pack's own answers give the rewards on the host, the rewards the advantages on the
    device, and those the credits, once they are read.

    Args:
        recipe: the step's.
        device: where the loss takes its advantages.
    """

    def __init__(self, packer: Packer, batch: Batch, recipe: Recipe, device: torch.device):
        self._packer, self._batch, self._recipe, self._device = packer, batch, recipe, device
        self._earned: dict[int, tuple[tuple[Credit, ...], Earned]] = {}
        self.credits: dict[int, Credit] = {}
        """By the rollouts' numbers in the batch, of the packs that were read."""

    def advantages(self, pack: Pack, scored_logp: np.ndarray) -> torch.Tensor:
        """The advantage of each decision pair: float64 [D]."""
        values = self._packer.values(self._batch, pack.plan, scored_logp)  # in the order of the decision pairs
        groups = [self._batch.groups[g] for g in pack.groups]
        credits, earned = earn(groups, list(values.values()), self._recipe)
        self._earned[pack.groups[0]] = credits, earned
        return token_advantages(earned, self._recipe, self._device)

    def read(self, pack: Pack, advantages: np.ndarray) -> None:
        """Complete the credits of a pack's rollouts."""
        found = credited(*self._earned.pop(pack.groups[0]), advantages, self._recipe)
        self.credits.update(zip(decision_runs(pack.plan)[0], found, strict=True))


def _value_inputs(plan: TreePlan, weights: np.ndarray, targets: Sequence[Targets]) -> ValueInputs:
    """Inputs of a pack's value loss from the token weight and the targets of each rollout."""
    returns, values, share = (of_pairs(plan, column) for column in zip(*targets, strict=True))
    return ValueInputs((weights[plan.rollout[: plan.n_decisions]] * share).astype(np.float32), returns, values)
