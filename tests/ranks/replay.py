"""``python -m tests.ranks.replay FOLDER CASE ...``: recorded groups replayed through the trainer's own updates under
ZeRO; each rank runs it, and the first writes FOLDER/CASE.pt with what each update did."""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from igpo_fast import adapter
from igpo_fast.model import build, recompute_layers
from igpo_fast.ranks import Ranks
from igpo_fast.run.display import Display
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.types import Batch
from igpo_fast.update.advantages import Recipe
from igpo_fast.update.critic import CriticSettings, ValueInputs
from igpo_fast.update.learner import Learner, trained_weights
from igpo_fast.update.packs import FILLER, Packer
from igpo_fast.update.policy import LossInputs
from igpo_fast.update.scoring import Scoring
from igpo_fast.update.update import Updater
from igpo_kernels import LossSettings
from tests.parity.test_parity import Case as Groups
from tests.trees import VOCAB

UPDATES = 5
BETA = 0.9
GROUPS, BUDGET = 3, 88
"""Groups, and tokens per pack: one pack per group, which two ranks cannot share out equally."""


class Way(NamedTuple):
    """A case of the replay."""

    passes: str
    tied: bool
    lora: bool = False
    dtype: str = "float32"
    recompute: bool = False
    critic: bool = False

    def __str__(self) -> str:
        more = "-recompute" * self.recompute + "-critic" * self.critic
        kind = "lora" if self.lora else "whole"
        return f"{self.passes}-{'tied' if self.tied else 'untied'}-{kind}-{self.dtype}{more}"


WAYS = [Way(*way) for way in itertools.product(("one", "two"), (True, False), (False, True))]
WAYS += [Way("one", True, lora, recompute=True) for lora in (False, True)]
WAYS += [Way("two", True, lora, critic=True) for lora in (False, True)]
HALF = Way("one", True, False, "bfloat16")


class Case(NamedTuple):
    """A way under one of ZeRO's stages."""

    way: Way
    stage: int

    def __str__(self) -> str:
        return f"{self.way}-{self.stage}"


CASES = [Case(way, stage) for way in (*WAYS, HALF) for stage in (1, 2, 3)]
IN_CI = [Case(way, 1 + number % 3) for number, way in enumerate(WAYS)] + [Case(HALF, 3)]
"""Each way once, the stages in turns; the other cases are slow."""


def model(way: Way) -> torch.nn.Module:
    lm = build(
        VOCAB, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, max_tokens=256, tie_embeddings=way.tied,
        seed=1,
    )  # fmt: skip
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.ndim == 2:
                weight *= 5
        if way.lora:
            adapter.add(lm, 2, 4.0, "all-linear")
            generator = torch.Generator().manual_seed(2)
            for name, weight in lm.named_parameters():
                if ".lora_B" in name:
                    weight.normal_(std=0.3, generator=generator)
    if way.recompute:
        recompute_layers(lm)
    return lm.to(getattr(torch, way.dtype))


def replay(way: Way, make_learner, moment, ranks: Ranks) -> dict:
    """What UPDATES updates did: norms, gradients as Adam's first moment tells them, weights.

    Args:
        make_learner: a model and a learner's options -> the learner.
        moment: a learner, a parameter's name and the parameter -> its exp_avg, whole.
    """
    case = Groups(7, GROUPS)
    lm = model(way)
    critic = CriticSettings(lr=3e-3, coefficient=0.5) if way.critic else None
    settings = LossSettings(entropy=0.01, kl=0.05)
    learner = make_learner(
        lm, temperature=1.3, settings=settings, lr=1e-3, factor=lambda step: 1.0, betas=(BETA, 0.999),
        max_grad_norm=1e9, critic=critic,
    )  # fmt: skip
    branches = {g.question.id: tuple(b) for g, b in zip(case.groups, case.branches, strict=True)}
    name = "ppo_ig" if way.critic else "igpo"
    recipe = Recipe(name, answers="max", basis="prob", min_std=0.05, center=False)
    packer = Packer(learner, Scoring(lambda question: branches[question.id]), recipe, way.passes, BUDGET, ranks)
    updater = Updater(
        learner, packer, recipe, passes=way.passes, groups_per_pack=1, updates=1, aggregation="token_mean",
        most_tokens=100, mismatch_stop=0.0, progress=Display(1), critic=critic,
    )  # fmt: skip

    def drop(factor: float, sound: bool = True) -> float | None:
        """The norm of an update whose loss is ``factor`` times a filler's; None if it was dropped."""
        one = np.ones(FILLER.plan.n_decisions, np.float32)
        ref, values = learner.reference(FILLER.plan), critic and ValueInputs(one, one, one)
        inputs = LossInputs(one, one, engine_logp=one, ref_logp=ref, critic=values)
        learner.backward(learner(FILLER.plan, inputs).loss * factor)
        return learner.step(sound)

    dropped = [drop(0.5, sound=False)]  # before an update has made Adam's states
    norms, gradients, rows = [], [], []
    before = dict.fromkeys(trained_weights(lm, learner.policy.critic), 0.0)
    for step in range(1, UPDATES + 1):
        if way.critic and step == 3:  # an update that a checkpoint undoes
            folder = Path(ranks.first_alone(tempfile.mkdtemp))
            learner.snapshot()(folder)
            assert drop(0.5) is not None
            learner.load(folder)
        row = StepMetrics(step)
        updater(Batch(step, tuple(case.groups)), {}, row)
        rows.append({key: value for key, value in row.row().items() if not key.startswith(("time", "memory"))})
        norms.append(rows[-1]["loss/grad_norm"])
        trained = trained_weights(learner.lm, learner.policy.critic)
        now = {name: moment(learner, name, p).clone() for name, p in trained.items()}
        gradients.append({name: (now[name] - BETA * before[name]) / (1 - BETA) for name in now})
        before = now
    weights = {name: weight.clone() for name, weight in learner.weights()}
    dropped += [drop(math.nan), drop(math.inf), drop(0.5, sound=False)]
    plan = FILLER.plan
    zeros = np.zeros(plan.n_decisions, np.float32)
    idle = critic and ValueInputs(zeros, zeros, zeros)
    learner.backward(learner(plan, LossInputs(zeros, zeros, engine_logp=zeros, ref_logp=zeros, critic=idle)).loss)
    dropped.append(learner.step())
    last = packer.packs(Batch(9, tuple(case.groups)), range(GROUPS), scored=True)
    packs, kept = ranks.gather(len(last)), ranks.gather(sum(not pack.filler for pack in last))
    moved = {name: weight.clone() for name, weight in learner.weights()}
    return dict(
        norms=norms,
        gradients=gradients,
        rows=rows,
        weights=weights,
        packs=packs,
        kept=kept,
        dropped=dropped,
        moved=moved,
    )


@cache
def plain(way: Way) -> dict:
    """The replay in this process."""
    masters = lambda learner, name, _: learner.optimizer.state[learner._masters.of[name]]["exp_avg"]  # noqa: E731
    return replay(way, Learner, masters, Ranks())


def main(folder: Path, names: Collection[str]) -> None:
    from functools import partial

    from deepspeed.utils import safe_get_full_optimizer_state

    from igpo_fast.update.zero import ZeroLearner

    ranks = Ranks()
    torch.manual_seed(0)
    np.random.seed(0)
    for case in (case for case in CASES if str(case) in names):
        make = partial(ZeroLearner, ranks=ranks, stage=case.stage)
        found = replay(case.way, make, lambda learner, _, p: safe_get_full_optimizer_state(p, "exp_avg"), ranks)
        if ranks.first:
            torch.save(found, folder / f"{case}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
