"""The training loop. Everything from trees to the optimiser step is update/update.py.

questions -> rollouts -> trees -> ONE pass: answer log-probs, decision log-probs -> turn rewards
  -> turn advantages -> loss -> backward -> optimiser step -> weights to the engine
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace

from igpo_fast.config import Config
from igpo_fast.data.load import question_order
from igpo_fast.engines.base import Again
from igpo_fast.errors import RunError
from igpo_fast.evaluate import evaluate
from igpo_fast.ranks import Ranks
from igpo_fast.rollouts.batch import Stragglers, finished_groups, in_ranges
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.display import Display
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.run.session import Session
from igpo_fast.setup import Setup, make_learner, make_updater, set_up
from igpo_fast.types import Batch, Evaluation, Group, Question
from igpo_fast.update.packs import Readings
from igpo_fast.update.rewards import agreement, with_majority
from igpo_fast.update.update import Updater


def train(config: Config, display: Display | None = None) -> RunFolder | None:
    """Train in ``config.run.dir``, or resume training there.

    Returns:
        The run folder; None in a process that is not the run's first.
    Raises:
        RunError: ends the run with one line; every finished step is kept.
        Interrupted: the user asked to stop; a checkpoint was written first.
    """
    display = display or Display(config.train.steps)
    with closing(Ranks()) as ranks, Session(config, display, ranks) as run:
        trainer = Trainer(config, run.display, run.checkpoint, ranks)
        trainer.resume(run)
        for step in run.steps():
            with run.step(step) as metrics:
                questions = trainer.questions(step)
                finished = trainer.rollouts(questions, step, metrics)
                batch, readings = trainer.collect(finished, step, metrics)
                batch = trainer.update(batch, readings, metrics)
                run.write_rollouts(batch)
                trainer.sync(metrics)
                if trainer.evaluation_due(step):
                    with metrics.timed("eval"):
                        metrics.set(run.write_evaluation(step, trainer.evaluate()))
    return run.folder if ranks.first else None


class Trainer:
    """The state of training, with one method per arrow of the flow.

    Every rank has one. Each samples and trains on its share; what it returns is the whole.
    """

    def __init__(self, config: Config, display: Display, checkpoint: str | None = None, ranks: Ranks | None = None):
        self.config, self.display, self.ranks = config, display, ranks or Ranks()
        # The reference and an adapter's base are the model before training, which a resumed run makes again.
        a = config.algorithm
        referred = a.kl or a.value_model == "reference" or config.model.lora_rank
        weights = None if referred else checkpoint
        self.setup: Setup = set_up(
            config,
            weights=weights,
            tokenizer=checkpoint,
            sft_progress=display.warm_start,
            ranks=self.ranks,
            trained=True,
        )
        self.agent = self.setup.agent
        self._left_out: Counter[str] = Counter()  # rollouts of the last step that are not trained on, by reason
        self.learner = make_learner(config, self.setup.lm, self.ranks)
        self.update: Updater = make_updater(self.setup, self.learner, display, self.ranks)
        self.display.note(self.setup.summary(self.update.passes, self.learner.parameters))
        for warning in self.setup.warnings:
            display.warn(warning)

    def resume(self, run: Session) -> None:
        """Resume after the newest checkpoint, or begin: the engine gets the weights, the first row its evaluation."""
        step = run.resume(self.learner, self.setup.tokenizer)
        self._send_weights()
        if run.row_is_missing:
            run.complete_row(run.write_evaluation(step, self.evaluate()) if self.evaluation_due(step) else {})

    def questions(self, step: int) -> list[Question]:
        """Questions of a step, spare ones (``rollout.oversample``) included."""
        train, config = self.setup.data.train, self.config.train
        asked = config.questions + self.config.rollout.oversample
        return [train[i] for i in question_order(len(train), asked, step - 1, config.seed)]

    def rollouts(self, questions: Sequence, step: int, metrics: StepMetrics) -> Iterator[tuple[int, Group]]:
        """This rank's groups and their places, as they finish, each when the engine is idle (``finished_groups``)."""
        rollout, counts = self.config.rollout, Counter()
        mine = self.ranks.share(questions)
        self.display.phase("rollout", total=len(mine) * rollout.group_size)
        limited = rollout.straggler_share < 1
        groups = finished_groups(
            self.agent, mine, rollout.group_size, step, counts=counts,
            progress=lambda done, total: self.display.advance(),
            enough=self.config.train.questions if rollout.keep == "arrival" else None,
            stragglers=Stragglers(rollout.straggler_share, rollout.straggler_factor) if limited else None,
        )  # fmt: skip
        with closing(groups):
            while True:
                with metrics.timed("rollout"):
                    found = next(groups, None)
                if found is None:
                    break
                place, group = found
                judged = self._judged(group)
                counts["rollout/unjudged"] += len(group.rollouts) - len(judged.rollouts)
                if len(judged.rollouts) >= min(2, rollout.group_size):
                    yield place * self.ranks.size + self.ranks.number, judged
        self.agent.engine.sleep()
        told = {"rollout/stragglers": limited, "rollout/unjudged": self.agent.outcome is not None}
        self._left_out = Counter({key: counts[key] for key, possible in told.items() if possible})

    def _judged(self, group: Group) -> Group:
        """The group as it is scored: without rollouts on which there is no verdict, and with its majority answer as
        the accepted one if it is to have that."""
        algorithm = self.config.algorithm
        if self.agent.outcome is not None:
            group = replace(group, rollouts=tuple(rollout for rollout in group.rollouts if rollout.rewards))
        if algorithm.pseudo_answer == "majority":
            group = with_majority(group, algorithm.f1_normalisation)
        return group

    def collect(self, finished: Iterator[tuple[int, Group]], step: int, metrics: StepMetrics) -> tuple[Batch, Readings]:
        """The groups to train on, and the first pass's results for those that it has already read.

        With ``rollout.overlap`` groups are scored while others wait for their tools, in packs that do not depend on the
        finishing order. One-pass mode cannot begin so early: its backward would add gradients in finishing order, and
        weights that depend on all tokens of the batch are not known yet. Neither can several ranks, whose passes may
        wait for each other, nor a baseline that takes responses of other groups.
        """
        rollout, wanted = self.config.rollout, self.config.train.questions
        asked = wanted + rollout.oversample
        by_gains = rollout.skip_collapsed and self.update.recipe.needs_values
        alone = self.ranks.size == 1 and not self.update.packer.scoring.needs_batch
        early = self.update.reads_first and rollout.overlap and alone
        readings: Readings = {}

        def sample() -> dict[int, Group]:
            mine: dict[int, Group] = {}
            with closing(finished):
                for finished_range in in_ranges(finished, self.update.groups_per_pack, asked):
                    mine |= finished_range
                    if early:
                        needed = tuple(group for place, group in finished_range.items() if by_gains or place < wanted)
                        self.update.read(Batch(step, needed), readings, metrics)
            return mine

        groups: dict[int, Group] = {}
        for theirs in self.ranks.together(sample):
            groups |= theirs
        self._count(step, metrics)
        if by_gains:
            self.update.read(Batch(step, tuple(groups.values())), readings, metrics)
        collapsed = self.update.packer.collapsed
        avoided = {i for i in groups if rollout.skip_collapsed and collapsed(step, groups[i], readings)}
        kept = sorted(sorted(groups, key=lambda i: (i in avoided, i))[:wanted])
        if not kept:
            raise self.ranks.on_all(RunError(
                f"step {step}: stragglers left no group with two rollouts; raise rollout.straggler_factor or "
                "rollout.straggler_share" if rollout.straggler_share < 1 else
                f"step {step}: algorithm.outcome={self.config.algorithm.outcome} gave no verdict on two rollouts of "
                "any group; see that its judge answers"
            ))  # fmt: skip
        if rollout.oversample or rollout.straggler_share < 1 or len(kept) < wanted:
            metrics.set({"group/sampled": asked, "group/dropped": asked - len(kept)})
        batch = Batch(step, tuple(groups[i] for i in kept))
        if self.config.algorithm.pseudo_answer == "majority":
            agreed = [agreement(group, self.config.algorithm.f1_normalisation) for group in batch.groups]
            metrics.set({"group/majority": sum(agreed) / len(agreed)})
        return batch, readings

    def _count(self, step: int, metrics: StepMetrics) -> None:
        """Add what the ranks' tools counted, and the rollouts left out, to the row; warns of failed calls and missing
        verdicts."""
        tools = self.agent.tools
        told = self.ranks.gather((self._left_out, tools.take()))
        left_out, calls = (sum(counts, Counter()) for counts in zip(*told, strict=True))
        counts, warning = self.ranks.together(lambda: tools.report(calls, f"step {step}"))[0]
        metrics.set({key: left_out[key] for key in self._left_out} | counts)
        if unjudged := left_out["rollout/unjudged"]:
            self.display.warn(
                f"step {step}: algorithm.outcome={self.config.algorithm.outcome} gave no verdict on {unjudged:,} "
                "rollouts, which are left out"
            )
        if warning:
            self.display.warn(warning)

    def sync(self, metrics: StepMetrics) -> None:
        """Send the new weights to the engine; the row gets ``time/sync`` and the engine's counts of the step.

        Raises:
            EngineError: the weights did not arrive.
        """
        try:
            with metrics.timed("sync"):
                self._send_weights()
        finally:
            metrics.set(self.agent.engine.counts())

    def _send_weights(self) -> None:
        def send() -> None:
            engine, learner = self.agent.engine, self.learner
            if getattr(engine, "lm", None) is learner.lm:
                engine.load_weights(())
                return
            weights = Again(learner.weights) if learner.alone else learner.weights()
            try:
                engine.load_weights(weights)
            finally:
                if not learner.alone:
                    for _ in weights:  # other ranks wait for each weight
                        pass

        self.ranks.together(send)

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate: at the start, at the end and every ``eval.every`` steps."""
        every = self.config.eval.every
        return step in (0, self.config.train.steps) or (every > 0 and step % every == 0)

    def evaluate(self) -> Evaluation:
        """Evaluate on held-out questions; warns if searches failed."""
        questions = self.setup.data.eval
        self.display.phase("evaluation", total=len(self.ranks.share(questions)))
        normalisation = self.config.algorithm.f1_normalisation
        evaluation = evaluate(
            self.setup.eval_agent, questions, normalisation, lambda done, total: self.display.advance(), self.ranks
        )
        if failures := evaluation.metrics.get("eval/search_failures"):
            self.display.warn(
                f"evaluation: {failures:.0f} searches failed for good; the policy was shown search.failure_text "
                "instead of passages"
            )
        return evaluation
