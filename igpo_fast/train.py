"""The training loop: every line of ``train`` is one arrow of the data flow.

questions -> rollouts -> trees -> ONE pass: answer log-probs, decision log-probs -> turn rewards
  -> turn advantages -> loss -> backward -> optimiser step -> weights to the engine
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
import torch
from transformers import get_scheduler

from igpo_fast.advantages import ALGORITHMS, Recipe, reward_metrics, score_rollouts
from igpo_fast.checkpoint import RunFolder, load_checkpoint, open_run, rewind, save_checkpoint
from igpo_fast.config import Config
from igpo_fast.data import question_order
from igpo_fast.display import Display
from igpo_fast.errors import InputError, RunError
from igpo_fast.interrupt import Interrupted, stop_requested
from igpo_fast.losses import token_weights
from igpo_fast.metrics import StepMetrics, ordered, tracker
from igpo_fast.model import kernels_of
from igpo_fast.packs import Packs, Scored, count_tokens, rollout_key
from igpo_fast.parts import Parts, assemble
from igpo_fast.passes import choose_passes, groups_a_pack
from igpo_fast.rollout import Stragglers, finished_groups, in_ranges, rollout_record
from igpo_fast.scoring import LossInputs, Policy
from igpo_fast.signatures import warnings_for
from igpo_fast.tools.base import settle
from igpo_fast.types import Batch, Group, Question, TurnScores
from igpo_kernels import LossSettings, TreePlan
from igpo_kernels.huggingface import heads_of
from igpo_kernels.tree_attention import automatic

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""``train.lr_schedule`` -> transformers' name of it."""


def train(config: Config, display: Display | None = None) -> RunFolder:
    """Train, or go on training, in ``config.run.dir``.

    Raises:
        InputError: bad input, in one line.
        Interrupted: the user asked to stop; a checkpoint was written first.
    """
    with display or Display(config.train.steps) as display, open_run(config.run.dir, config) as run:
        trainer = Trainer(config, display)
        first, row = trainer.resume(run)
        rows = run.read_metrics()
        with tracker(config.run.tracker, run.path / "tensorboard", first) as track:

            def report(row: dict[str, float]) -> None:
                rows.append(row)
                run.append_metrics(row)
                track(row)
                display.step(row)
                for warning in warnings_for(rows, {"mismatch/logp_abs_diff": config.rollout.mismatch_warn}):
                    display.warn(warning)

            if not rows or rows[-1]["step"] < first:  # the start, or a step whose sync or evaluation failed
                report(ordered(row | trainer.evaluate()) if trainer.evaluation_due(first) else row)
            with stop_requested() as stop:
                for step in range(first + 1, config.train.steps + 1):
                    metrics = StepMetrics(step)
                    questions = trainer.questions(step)
                    finished = trainer.rollouts(questions, step, metrics)
                    try:
                        batch, found = trainer.collect(finished, step, metrics)
                    except RunError:  # nothing has changed since the last step: keep that
                        if step > 1:
                            trainer.save(run, step - 1)
                        raise
                    batch = trainer.update(batch, metrics, found)
                    run.write_rollouts(step, map(rollout_record, batch.rollouts, batch.scores))
                    try:
                        trainer.sync(metrics)
                        if trainer.evaluation_due(step):
                            metrics.set(trainer.evaluate())
                    except RunError:  # keep the step; who resumes completes its row
                        trainer.save(run, step, metrics.row())
                        raise
                    report(metrics.row())
                    if step % config.train.checkpoint_every == 0 or step == config.train.steps or stop.is_set():
                        trainer.save(run, step)
                    if stop.is_set() and step < config.train.steps:
                        raise Interrupted(f"stopped after step {step}, which {run.checkpoints} holds")
    return run


class Trainer:
    """The state of training, and one method for each arrow of the flow."""

    def __init__(self, config: Config, display: Display):
        self.config, self.display = config, display
        self.parts: Parts = assemble(config, sft_progress=self._sft_progress)
        if config.search.url:
            self.parts.tool.check()
        a = config.algorithm
        self.recipe = Recipe(
            algorithm=a.name, basis=a.basis, answers=a.answers, pool=a.pool, gate=a.ig_gate, center=a.ig_center,
            min_std=a.ig_min_std, gamma=a.gamma, format_penalty=a.format_penalty, outcome=a.outcome,
            f1_normalisation=a.f1_normalisation,
        )  # fmt: skip
        settings = LossSettings(
            clip_low=a.clip_low, clip_high=a.clip_high, dual_clip=a.dual_clip, kl=a.kl, entropy=a.entropy,
            sequence_ratio=ALGORITHMS[a.name].sequence_ratio, importance=a.importance,
            importance_mode=a.importance_mode, importance_cap=a.importance_cap,
        )  # fmt: skip
        lm = self.parts.lm
        self.policy = Policy(lm, config.rollout.temperature, settings, config.model.kernels)
        self.reference = None
        if a.kl:
            frozen = copy.deepcopy(lm).requires_grad_(False)
            self.reference = Policy(frozen, config.rollout.temperature, settings, config.model.kernels)
        self._tokens_read = 0  # at the last update
        self.passes = choose_passes(config, self.recipe, self.parts.answer_tokens)
        self.groups_a_pack = groups_a_pack(config, self.recipe, self.parts.answer_tokens)
        self.packs = Packs(self.policy, self.parts.dialect, self.recipe, self.passes, config.train.token_budget)
        self.optimizer = torch.optim.AdamW(
            lm.parameters(), lr=config.train.lr, betas=config.train.betas, weight_decay=config.train.weight_decay
        )
        updates = config.train.updates
        self.scheduler = get_scheduler(
            SCHEDULES[config.train.lr_schedule], self.optimizer, config.train.warmup_steps * updates,
            config.train.steps * updates,
        )  # fmt: skip
        display.note(
            f"{type(lm).__name__}, {sum(p.numel() for p in lm.parameters()):,} parameters, {lm.dtype} on {lm.device}; "
            f"{a.name} (preset {a.preset}), {self.passes} pass{'es' if self.passes == 'two' else ''} an update, "
            f"engine {self.parts.engine.name}, kernels {_kernels(config, lm)}, "
            f"{torch.get_num_threads()} threads, {len(self.parts.data.train):,} questions"
        )

    def resume(self, run: RunFolder) -> tuple[int, dict[str, float]]:
        """Restore the newest checkpoint, move aside what was written after it.

        Returns:
            its step, 0 without one, and what is known of the step's row, where that was not written.
        """
        loaded = load_checkpoint(run, self.parts.lm, self.optimizer, self.scheduler)
        run.begin()
        step, extra = loaded or (0, {})
        moved = rewind(run, step)
        if loaded:
            self.display.note(f"resumed after step {step}")
        if moved:
            self.display.note(f"what an earlier session wrote after step {step} is in {moved}")
        self.parts.send_weights()
        return step, extra.get("row", {"step": step})

    def save(self, run: RunFolder, step: int, row: Mapping[str, float] | None = None) -> None:
        """Write the checkpoint of a step that has just ended; ``row``: its row, if that cannot be written yet."""
        extra = {} if row is None else {"row": {key: np.asarray(value).item() for key, value in row.items()}}
        save_checkpoint(run, step, self.parts.lm, self.parts.tokenizer, self.optimizer, self.scheduler, extra)

    def questions(self, step: int) -> list[Question]:
        """What a step asks, spare questions (``rollout.oversample``) included."""
        train, config = self.parts.data.train, self.config.train
        asked = config.questions + self.config.rollout.oversample
        return [train[i] for i in question_order(len(train), asked, step - 1, config.seed)]

    def rollouts(self, questions: Sequence, step: int, metrics: StepMetrics) -> Iterator[tuple[int, Group]]:
        """Groups and their places, as they finish; each when the engine has nothing to do (``finished_groups``)."""
        rollout, parts, counts = self.config.rollout, self.parts, Counter()
        self.display.phase("rollout", total=len(questions) * rollout.group_size)
        limited = rollout.straggler_share < 1
        groups = finished_groups(
            questions, rollout.group_size, seed=self.config.train.seed, step=step, engine=parts.engine,
            tool=parts.tool, dialect=parts.dialect, limits=parts.limits, sampling=parts.sampling,
            concurrency=rollout.concurrency, counts=counts, progress=lambda done, total: self.display.advance(),
            enough=self.config.train.questions if rollout.keep == "arrival" else None,
            stragglers=Stragglers(rollout.straggler_share, rollout.straggler_factor) if limited else None,
        )  # fmt: skip
        with closing(groups):
            while True:
                with metrics.phase("rollout"):
                    group = next(groups, None)
                if group is None:
                    break
                yield group
        parts.engine.sleep()
        metrics.set(counts if limited else {})
        counts, warning = settle(parts.tool, f"step {step}")
        metrics.set(counts)
        if warning:
            self.display.warn(warning)

    def collect(self, finished: Iterator[tuple[int, Group]], step: int, metrics: StepMetrics) -> tuple[Batch, Scored]:
        """The groups to train on, and what the first of two passes found for those that it has read by now.

        With ``rollout.overlap`` groups are scored while others wait for their tools, in packs that depend on nothing
        that finished when. One pass cannot begin so early: its backward would add up gradients in the order in which
        groups finish, and where a weight depends on all tokens of the batch it is not known yet.
        """
        rollout, wanted = self.config.rollout, self.config.train.questions
        asked = wanted + rollout.oversample
        by_gains = rollout.skip_collapsed and self.recipe.needs_values
        groups: dict[int, Group] = {}
        found: Scored = {}
        with closing(finished):
            for some in in_ranges(finished, self.groups_a_pack, asked):
                groups |= some
                if self.passes == "two" and rollout.overlap:
                    needed = tuple(group for place, group in some.items() if by_gains or place < wanted)
                    self.packs.score(Batch(step, needed), found, metrics)
        if by_gains:
            self.packs.score(Batch(step, tuple(groups.values())), found, metrics)
        preferred = sorted(groups, key=lambda i: (rollout.skip_collapsed and self.packs.collapsed(groups[i], found), i))
        kept = sorted(preferred[:wanted])
        if not kept:
            raise InputError(
                f"step {step}: stragglers left no group with two rollouts; raise rollout.straggler_factor or "
                "rollout.straggler_share"
            )
        if rollout.oversample or rollout.straggler_share < 1:
            metrics.set({"group/sampled": asked, "group/dropped": asked - len(kept)})
        return Batch(step, tuple(groups[i] for i in kept)), found

    def update(self, batch: Batch, metrics: StepMetrics, found: Scored | None = None) -> Batch:
        """Score what is not ``found`` yet and take ``train.updates`` optimiser steps; returns the scored batch."""
        one = self.passes == "one"
        scores = self._one_pass(batch, metrics) if one else self._two_passes(batch, found or {}, metrics)
        read, self._tokens_read = self.policy.tokens_read - self._tokens_read, self.policy.tokens_read
        metrics.set(reward_metrics(batch.groups, scores))
        metrics.set(
            {
                "tokens/rollout": sum(len(rollout.ids) for rollout in batch.rollouts),
                "tokens/read": read,
                "sharing/ratio": self.packs.separate_tokens(batch) / read,
            }
        )
        return Batch(batch.step, batch.groups, scores)

    def sync(self, metrics: StepMetrics) -> None:
        """Bring the engine to the new weights; the row gets ``time/sync`` and what the engine counted in the step.

        Raises:
            InputError: they did not arrive.
        """
        try:
            with metrics.phase("sync"):
                self.parts.send_weights()
        finally:
            metrics.set(self.parts.engine.counts())

    def evaluation_due(self, step: int) -> bool:
        """At the start (step 0), at the end, and every ``eval.every`` steps."""
        every = self.config.eval.every
        return step in (0, self.config.train.steps) or (every > 0 and step % every == 0)

    def evaluate(self) -> dict[str, float]:
        """The metrics of ``Parts.evaluate``; warns where searches failed.

        Raises:
            InputError: no engine or no search answers.
        """
        self.display.phase("evaluation", total=len(self.parts.data.eval))
        found = self.parts.evaluate(progress=lambda done, total: self.display.advance())
        if failures := found.get("eval/search_failures"):
            self.display.warn(f"evaluation: {failures:.0f} searches failed for good; the policy read so")
        return found

    def _one_pass(self, batch: Batch, metrics: StepMetrics) -> tuple[TurnScores, ...]:
        """Each pack is read once: answers, then gains and advantages, then the loss of the same hidden states."""
        self.display.phase("train")
        metrics.set({"time/score": 0.0})
        with metrics.phase("train"):
            plans = self.packs.plans(batch, range(len(batch.groups)), scored=True)
            weights = self._weights(batch, range(len(batch.groups)))
            if not self.recipe.needs_values:  # known beforehand, of the whole batch: a pack is not one
                known = score_rollouts(batch.groups, None, self.recipe)
                self._step(batch, plans, weights, metrics, scores=known)
                return known
            scores: dict[int, TurnScores] = {}
            number_of_group = np.concatenate([[0], np.cumsum([len(g.rollouts) for g in batch.groups])])

            def advantages_of(plan: TreePlan, answer_logp: np.ndarray) -> np.ndarray:
                inside = np.unique(plan.rollout)
                groups = np.unique(np.searchsorted(number_of_group, inside, side="right") - 1)
                values = self.packs.values(plan, answer_logp)
                scored = score_rollouts([batch.groups[g] for g in groups], [values[i] for i in inside], self.recipe)
                scores.update(zip(inside.tolist(), scored, strict=True))
                return _advantages(plan, scores)

            self._step(batch, plans, weights, metrics, advantages_of=advantages_of)
        return tuple(scores[i] for i in range(len(batch.rollouts)))

    def _two_passes(self, batch: Batch, found: Scored, metrics: StepMetrics) -> tuple[TurnScores, ...]:
        """A pass without gradient gives values and old log-probabilities; then the updates, without branches."""
        updates = min(self.config.train.updates, len(batch.groups))
        self.display.phase("score")
        self.packs.score(batch, found, metrics)
        old_logp = {i: found[rollout_key(rollout)].logp for i, rollout in enumerate(batch.rollouts)}
        scores = self.packs.scores(batch.groups, found)
        self.display.phase("train", total=updates)
        with metrics.phase("train"):
            for share in np.array_split(np.arange(len(batch.groups)), updates):
                plans = self.packs.plans(batch, share, scored=False)
                self._step(batch, plans, self._weights(batch, share), metrics, scores=scores, old_logp=old_logp)
                self.display.advance()
        return scores

    def _step(
        self,
        batch: Batch,
        plans: Sequence[TreePlan],
        weights: np.ndarray,
        metrics: StepMetrics,
        *,
        advantages_of=None,
        scores: Sequence[TurnScores] = (),
        old_logp: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        """One optimiser update over packs, which only add: the weights are global."""
        rollouts = batch.rollouts
        engine_logp = {i: rollout.logp for i, rollout in enumerate(rollouts)}
        sums = []
        for plan in plans:
            ref_logp = self.reference(plan).decision_logp if self.reference else None
            inputs = LossInputs(
                weights=weights[plan.rollout[: plan.n_decisions]].astype(np.float32),
                advantages=None if advantages_of else _advantages(plan, scores),
                old_logp=None if old_logp is None else _of_pairs(plan, old_logp),
                engine_logp=_of_pairs(plan, engine_logp),
                ref_logp=ref_logp,
            )
            result = self.policy(plan, inputs, advantages_of and (lambda logp, plan=plan: advantages_of(plan, logp)))
            result.loss.backward()
            count_tokens(metrics, plan)
            anchor = result.decision_logp if inputs.old_logp is None else inputs.old_logp
            metrics.largest({"mismatch/logp_abs_max": np.abs(anchor - inputs.engine_logp).max()})
            sums.append(result.sums)
        self._check_mismatch(batch.step, sums)
        parameters = list(self.policy.parameters())
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.train.max_grad_norm)
        finite = math.isfinite(grad_norm) and all(math.isfinite(s["policy"]) for s in sums)
        if finite:
            self.optimizer.step()
        else:
            metrics.add({"loss/skipped": 1})
            self.display.warn(
                f"step {batch.step}: the loss or its gradient is not finite; this update is skipped. "
                "If it recurs, lower train.lr or use model.dtype=float32"
            )
        self.optimizer.zero_grad()
        self.scheduler.step()
        metrics.update(sums, grad_norm)

    def _check_mismatch(self, step: int, sums: Sequence[Mapping[str, float]]) -> None:
        """Raises InputError, before the update, where ``rollout.mismatch_stop`` is exceeded."""
        limit = self.config.rollout.mismatch_stop
        mean = sum(s["mismatch"] for s in sums) / sum(s["tokens"] for s in sums)
        if limit and not mean <= limit:
            raise InputError(
                f"step {step}: the engine's log-probabilities differ from the trainer's by {mean:.3g} on average, more "
                f"than rollout.mismatch_stop={limit:g}; correct for it (algorithm.importance), or raise the limit"
            )

    def _weights(self, batch: Batch, share: Sequence[int]) -> np.ndarray:
        """Each rollout's token weight, 0 outside the groups ``share``: float64 [R]."""
        inside = np.repeat(np.isin(np.arange(len(batch.groups)), share), [len(g.rollouts) for g in batch.groups])
        weights = np.zeros(len(inside))
        lengths = [r.decision_tokens for r, mine in zip(batch.rollouts, inside, strict=True) if mine]
        weights[inside] = token_weights(lengths, self.config.algorithm.aggregation)
        return weights

    def _sft_progress(self, done: int, total: int, loss: float) -> None:
        if done == 1:
            self.display.phase("warm start", total=total)
        self.display.advance()
        if done % max(1, total // 5) == 0:
            self.display.note(f"warm start {done}/{total}  loss {loss:.3f}")


def _kernels(config: Config, lm: torch.nn.Module) -> str:
    """Which implementation of each op runs, in words."""
    names = kernels_of(lm, config.model.kernels)
    if config.model.kernels == "auto":
        sequences = automatic(lm.device, lm.dtype, *heads_of(lm), sequences=True)
        if sequences != names["tree_attention"]:
            names["tree_attention"] += f" ({sequences} for single sequences)"
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{op} {name}" for op, name in names.items())


def _advantages(plan: TreePlan, scores: Mapping[int, TurnScores] | Sequence[TurnScores]) -> np.ndarray:
    """A_t of the turn of each decision pair: float32 [D]."""
    n = plan.n_decisions
    pairs = zip(plan.rollout[:n].tolist(), plan.turn[:n].tolist(), strict=True)
    return np.array([scores[i].advantages[t] for i, t in pairs], dtype=np.float32)


def _of_pairs(plan: TreePlan, per_rollout: Mapping[int, np.ndarray]) -> np.ndarray:
    """Numbers of each rollout's decision tokens, in the order of the plan's decision pairs: float32 [D]."""
    owner = plan.rollout[: plan.n_decisions]
    first = np.flatnonzero(np.diff(owner, prepend=-1))  # a rollout's decision pairs are contiguous and in order
    return np.concatenate([per_rollout[int(owner[at])] for at in first]).astype(np.float32)
