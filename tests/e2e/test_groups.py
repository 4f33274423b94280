"""Which groups a step trains on and when they are scored: overlap, over-sampling, stragglers, in whole steps."""

from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest
import torch

from igpo_fast.errors import RunError
from igpo_fast.rollouts import batch
from igpo_fast.rollouts.tools import make
from igpo_fast.rollouts.tools.search import Search
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.train import Trainer, train
from igpo_fast.update.policy import Policy
from igpo_fast.update.rewards import f1_score
from tests.clock import JumpingLoop
from tests.tiny import Recorder, rows, settings

TWO = ("algorithm.passes=two", "train.token_budget=600", "eval.every=0", "train.steps=2")
"""Two passes, a group a pack at most."""


@pytest.fixture
def trainer_of(tmp_path, cache):
    return lambda *overrides: Trainer(settings(tmp_path, cache, *TWO, *overrides), Recorder())


@pytest.fixture
def slow_search(monkeypatch):
    """Search that takes ``seconds(query, corpus)`` of a clock that jumps; ``waiting`` counts the searches under way."""
    real = make.make_search

    class Slow(Search):
        waiting, seconds = 0, staticmethod(lambda query, corpus: 0.0)

        async def search(self, query, corpus):
            self.waiting += 1
            await asyncio.sleep(self.seconds(query, corpus))
            self.waiting -= 1
            return await self.real.search(query, corpus)

    def made(config, data):
        slow.real = real(config, data)
        return slow

    slow = Slow()
    monkeypatch.setattr(make, "make_search", made)
    monkeypatch.setattr(batch, "RolloutLoop", JumpingLoop)
    return slow


def step_of(trainer, finished=None):
    """The first step: batch, what was found early, row; ``finished`` in place of its own rollouts."""
    metrics = StepMetrics(1)
    finished = finished or trainer.rollouts(trainer.questions(1), 1, metrics)
    batch, found = trainer.collect(finished, 1, metrics)
    early = dict(found)
    return trainer.update(batch, found, metrics), early, metrics.row()


def in_order(groups, order):
    yield from ((place, groups[place]) for place in order)


class TestOverlap:
    @pytest.mark.parametrize("passes", ["one", "two"])
    def test_groups_are_scored_while_others_wait_and_only_in_two_passes(
        self, trainer_of, slow_search, monkeypatch, passes
    ):
        slowest, waiting, forward = [], [], Policy.forward

        def seconds(query, corpus):  # of the batch's queries, the first one takes long
            slowest.append(query)
            return 60.0 if query == slowest[0] else 1.0

        def patched(policy, plan, *arguments):
            waiting.append(slow_search.waiting)
            return forward(policy, plan, *arguments)

        monkeypatch.setattr(Policy, "forward", patched)
        slow_search.seconds = seconds
        trainer = trainer_of(f"algorithm.passes={passes}")
        _, early, row = step_of(trainer)
        if passes == "one":
            assert waiting == [0] * len(waiting) and early == {}
        else:
            assert waiting[0] > 0 and waiting[-1] == 0
            assert len(early) == 16
            assert row["time/score"] > 0

    def test_results_are_the_same_bits_whatever_finishes_first(self, trainer_of):
        # A range of two groups each: those that finish apart are scored together.
        options = ("train.token_budget=1000", "train.questions=6", "algorithm.basis=prob")
        trainer = trainer_of(*options)
        assert trainer.update.groups_per_pack == 2
        groups = dict(trainer.rollouts(trainer.questions(1), 1, StepMetrics(1)))
        results = []
        for order in (range(6), (5, 0, 4, 1, 3, 2)):
            trainer = trainer_of(*options)
            batch, early, _ = step_of(trainer, in_order(groups, order))
            results.append((batch, early, trainer.learner.lm.state_dict()))
            assert [group.question.id for group in batch.groups] == [groups[i].question.id for i in range(6)]
        (batch, early, weights), (batch_too, early_too, weights_too) = results
        assert early.keys() == early_too.keys() and len(early) == 24
        for key in early:
            assert early[key].values.values.tolist() == early_too[key].values.values.tolist()
            assert early[key].logp.tolist() == early_too[key].logp.tolist()
        for scores, same in zip(batch.credits, batch_too.credits, strict=True):
            assert scores.advantages.tolist() == same.advantages.tolist()
        assert all(torch.equal(weights[name], weights_too[name]) for name in weights)

    def test_without_it_they_differ_by_rounding(self, trainer_of):
        trainer = trainer_of("rollout.overlap=false", "train.token_budget=2000")
        groups = dict(trainer.rollouts(trainer.questions(1), 1, StepMetrics(1)))
        batch, early, row = step_of(trainer, in_order(groups, range(4)))
        assert early == {}
        overlapped, early, row_too = step_of(trainer_of(), in_order(groups, (2, 0, 1, 3)))
        assert len(early) == 16
        for scores, same in zip(batch.credits, overlapped.credits, strict=True):
            np.testing.assert_allclose(scores.values, same.values, rtol=1e-6)
            np.testing.assert_allclose(scores.advantages, same.advantages, atol=1e-4)
        assert row["tokens/packed"] == row_too["tokens/packed"]

    def test_a_run_with_slow_search_writes_the_same_rollouts(self, tmp_path, cache, slow_search):
        for name, slow in (("quick", 0.0), ("slow", 0.05)):
            slow_search.seconds = lambda query, corpus, slow=slow: slow * (len(query) % 5)
            train(settings(tmp_path / name, cache, *TWO, "train.lr=1e-5"), Recorder())
        for step in (1, 2):
            texts = [
                [[t["text"] for t in json.loads(line)["turns"]] for line in path.read_text().splitlines()]
                for path in (tmp_path / name / f"rollouts/step_{step:06d}.jsonl" for name in ("quick", "slow"))
            ]
            assert texts[0] == texts[1] and len(texts[0]) == 16
        for row, other in zip(rows(tmp_path / "quick")[1:], rows(tmp_path / "slow")[1:], strict=True):
            assert row == pytest.approx(other, rel=1e-3, abs=1e-5)

    def test_no_task_survives_a_fault_in_scoring(self, trainer_of, slow_search, monkeypatch, caplog):
        slow_search.seconds = lambda query, corpus: 0.05 * (len(query) % 3)

        def broken(policy, plan, *arguments):
            raise MemoryError("while scoring")

        monkeypatch.setattr(Policy, "forward", broken)
        trainer = trainer_of()
        with pytest.raises(MemoryError, match="while scoring"):
            step_of(trainer)
        assert not trainer.agent.engine._running and not trainer.agent.engine._waiting
        assert not [record for record in caplog.records if record.name == "asyncio"]


def outcomes_differ(group):
    return len({f1_score(r.answer, group.question.answers, "igpo") for r in group.rollouts}) > 1


class TestOversampling:
    MORE = ("rollout.oversample=8", "rollout.skip_collapsed=true")

    @pytest.mark.parametrize("passes, overlap", [("one", "true"), ("two", "true"), ("two", "false")])
    def test_outcomes_alone_decide_where_only_they_are_learnt_from(self, trainer_of, passes, overlap):
        options = ("algorithm.name=grpo", f"algorithm.passes={passes}", f"rollout.overlap={overlap}", *self.MORE)
        trainer = trainer_of(*options, "algorithm.format_penalty=0")
        # In places where those to learn from come last, so that the first four are never the ones to keep.
        sampled = dict(trainer.rollouts(trainer.questions(1), 1, StepMetrics(1)))
        groups = dict(enumerate(sorted(sampled.values(), key=outcomes_differ)))
        assert len(groups) == 12
        learning = [i for i in range(12) if outcomes_differ(groups[i])]
        assert 0 < len(learning) < 12  # else this test shows nothing
        filled = [i for i in range(12) if i not in learning]
        batch, _, row = step_of(trainer, in_order(groups, reversed(range(12))))
        kept = sorted((learning + filled)[:4])
        assert [group.question.id for group in batch.groups] == [groups[i].question.id for i in kept]
        assert kept != [0, 1, 2, 3]
        assert (row["group/sampled"], row["group/dropped"]) == (12, 8)
        assert row["group/collapsed"] == 1 - min(len(learning), 4) / 4

    @pytest.mark.parametrize("overlap", ["true", "false"])
    def test_a_group_of_equal_outcomes_is_kept_where_gains_differ(self, trainer_of, overlap):
        trainer = trainer_of(f"rollout.overlap={overlap}", *self.MORE)
        groups = dict(trainer.rollouts(trainer.questions(1), 1, StepMetrics(1)))
        equal = [i for i in range(4) if not outcomes_differ(groups[i])]
        longer = [i for i in equal if any(len(r.turns) > 1 for r in groups[i].rollouts)]
        assert longer  # else this test shows nothing
        batch, early, _ = step_of(trainer, in_order(groups, range(12)))
        kept = {group.question.id for group in batch.groups}
        assert all(groups[i].question.id in kept for i in longer)
        assert len(early) == 12 * 4  # gains of all were needed

    def test_gains_that_are_all_gated_are_none(self, trainer_of):
        """With a gate that no gain passes, outcomes decide."""
        trainer = trainer_of(*self.MORE, "algorithm.ig_gate=1000", "algorithm.format_penalty=0")
        groups = dict(trainer.rollouts(trainer.questions(1), 1, StepMetrics(1)))
        learning = [i for i in range(12) if outcomes_differ(groups[i])]
        batch, _, _ = step_of(trainer, in_order(groups, range(12)))
        filled = [i for i in range(12) if i not in learning]
        assert [g.question.id for g in batch.groups] == [groups[i].question.id for i in sorted((learning + filled)[:4])]

    def test_a_run_repeats(self, tmp_path, cache):
        for name in ("a", "b"):
            train(settings(tmp_path / name, cache, *TWO, *self.MORE), Recorder())
        assert rows(tmp_path / "a") == rows(tmp_path / "b")
        assert all(row["group/dropped"] == 8 for row in rows(tmp_path / "a")[1:])

    def test_the_first_to_finish_are_kept_if_asked(self, trainer_of, slow_search):
        # Of the two worlds that are asked about, one is slow to search.
        trainer = trainer_of("rollout.oversample=8", "rollout.keep=arrival")
        finished, questions = [], trainer.questions(1)
        slow = min(corpora := {question.corpus for question in questions})
        slow_search.seconds = lambda query, corpus: 60.0 * (corpus == slow)
        assert len(corpora) == 2 and sum(question.corpus != slow for question in questions) >= 4
        rollouts = trainer.rollouts(questions, 1, StepMetrics(1))
        seen = ((finished.append(place), (place, group))[1] for place, group in rollouts)
        batch, _, row = step_of(trainer, seen)
        assert 4 <= len(finished) < 12
        kept = [questions.index(group.question) for group in batch.groups]
        assert kept == sorted(finished)[:4]
        assert (row["group/sampled"], row["group/dropped"]) == (12, 8)


class TestStragglers:
    OPTIONS = ("rollout.straggler_share=0.5", "rollout.straggler_factor=4")

    @pytest.mark.parametrize("mode", [("algorithm.passes=one",), ("train.updates=2",)])
    def test_are_left_out_and_counted(self, trainer_of, slow_search, mode):
        asked = []

        def seconds(query, corpus):
            asked.append(query)
            return 60.0 if len(asked) in (3, 4) else 1.0

        slow_search.seconds = seconds
        batch, _, row = step_of(trainer_of(*self.OPTIONS, *mode, "train.token_budget=16384"))
        assert row["rollout/stragglers"] == 2
        assert sum(len(group.rollouts) for group in batch.groups) == 14 == len(batch.credits)
        assert row["group/dropped"] == 4 - len(batch.groups) <= 1
        assert row["loss/grad_norm"] > 0

    def test_without_any_group_left_the_run_ends_in_a_line(self, trainer_of):
        with pytest.raises(RunError, match=r"^step 1: stragglers left no group with two rollouts; raise rollout\."):
            step_of(trainer_of(*self.OPTIONS), in_order({}, ()))

    def test_fewer_groups_than_updates_make_fewer_updates(self, trainer_of):
        trainer = trainer_of(*self.OPTIONS, "train.updates=4")
        groups = dict(trainer.rollouts(trainer.questions(1), 1, StepMetrics(1)))
        _, _, row = step_of(trainer, in_order(groups, (1, 2)))
        assert (row["group/sampled"], row["group/dropped"]) == (4, 2)
        assert row["loss/grad_norm"] > 0
        assert {float(state["step"]) for state in trainer.learner.optimizer.state.values()} == {2.0}
