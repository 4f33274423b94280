"""A training step on rollouts of recorded lengths: ours beside TRL's ``GRPOTrainer`` and the usual ways of scoring.

    ours           IGPO in one pass: values of every prefix, gains, loss and gradients
    recomputed     the same with gradient checkpointing
    two_passes     the same update from a pass without gradient and one with it
    small_packs    two passes, each over packs of about one rollout: the least memory
    outcome_only   our GRPO: the same packed trees without answers
    igpo_trainer   IGPOTrainer, whose loss, generation and reward code are TRL's
    trl            TRL's GRPOTrainer at its best setting: one advantage per rollout, no values
    igpo_full_logits, igpo_kv_reuse      trl, and before it the values by bench/scoring.py

All are float32 and take an AdamW step. ``tokens_per_s`` counts decision tokens: what the policy wrote and trains on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("trl", exc_type=ImportError)

from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from bench.recorded import Recorded, read, recorded
from bench.scoring import full_logits, kv_reuse
from bench.steps import Size, TrlStep, counts, igpo_trainer, largest_rollout, ours

SMALL, LARGE = Size(256, 4), Size(512, 8)
TRL = dict(micro=1, generation=8)
"""GRPOTrainer's best setting: the fastest micro-batch, and the least memory (rows ``trl_settings``). What is generated
together is padded together, so a group at a time."""
IN_TRL = dict(micro=8, generation=8)
"""IGPOTrainer's: a group at a time gives values and gradients in one pass."""
AT_ONCE = 4
"""Sequences per pass with full logits."""
SHAPES = {"musique": SMALL}
FULL = {"equal_lengths": SMALL, "own_prompts": SMALL, "large": LARGE}
"""Two groups of 8 rollouts; with --full one group: all rollouts of one length, or each with a prompt of its own, or in
a model of eight times the work per token."""
PEERS = {
    "ours": ("recomputed", "two_passes", "small_packs", "outcome_only", "igpo_trainer"),
    "trl": ("trl", "recomputed"),
    "scoring": ("trl", "full_logits", "kv_reuse"),
}
CASES = [("musique", "ours"), ("musique", "scoring"), *((name, "trl") for name in FULL)]
SETTINGS = {
    "micro_batches": {f"micro_{n}": dict(micro=n) for n in (8, 4, 2, 1)},
    "modes": {
        "plain": dict(micro=1),
        "eager": dict(micro=1, attention="eager"),
        "compiled": dict(micro=1, torch_compile=True),
        "bfloat16": dict(micro=1, bf16=True),
        "head_on_completions": dict(micro=1),
    },
}
"""GRPOTrainer's settings that may make its step faster; the last is no setting: its LM head reads completions alone, as
TRL's does on a GPU."""
ROUNDS = 5


def data_of(name: str, size: Size) -> Recorded:
    """The rollouts of a shape: the first groups of about 1,300 tokens."""
    groups = read("musique", (1200, 1400))[: 2 if name in SHAPES else 1]
    if name == "equal_lengths":
        groups = [group.equal() for group in groups]
    return recorded(groups, size.vocab, own_prompts=name == "own_prompts")


def shape_of(name: str, size: Size, data: Recorded) -> dict:
    return {
        "lengths": name, "groups": len(data.groups), "rollouts": len(data.rollouts), "hidden": size.hidden,
        "layers": size.layers, "vocab": size.vocab, **counts(data),
    }  # fmt: skip


def grpo_trainer(size: Size, data: Recorded, folder: Path, **settings) -> TrlStep:
    return TrlStep(GRPOTrainer, GRPOConfig, size, data, folder, **settings)


@pytest.mark.parametrize("name, peers", CASES)
def test_peers(name, peers, compare, request, tmp_path):
    if name in FULL and not request.config.getoption("--full"):
        pytest.skip("with --full")
    size = {**SHAPES, **FULL}[name]
    data = data_of(name, size)
    lm = size.lm().eval()
    branches_of = lambda rollout: data.branches[rollout.question.id]  # noqa: E731
    made = {
        "recomputed": lambda: ours(size, data, recomputed=True),
        "two_passes": lambda: ours(size, data, passes="two"),
        "small_packs": lambda: ours(size, data, passes="two", budget=largest_rollout(data)),
        "outcome_only": lambda: ours(size, data, algorithm="grpo"),
        "igpo_trainer": lambda: igpo_trainer(size, data, tmp_path, **IN_TRL),
        "trl": lambda: grpo_trainer(size, data, tmp_path, **TRL),
        "full_logits": lambda: partial(full_logits, lm, data.rollouts, branches_of, at_once=AT_ONCE),
        "kv_reuse": lambda: lambda: [kv_reuse(lm, rollout, branches_of(rollout)) for rollout in data.rollouts],
    }
    sides = {"ours": ours(size, data)} | {peer: made[peer]() for peer in PEERS[peers]}
    sums = {f"igpo_{way}": (way, "trl") for way in ("full_logits", "kv_reuse") if way in sides}
    compare("peers", shape_of(name, size, data), sides, ROUNDS, long=True, sums=sums, tokens=data.decision_tokens)


@pytest.mark.parametrize("settings", SETTINGS)
def test_trl_settings(settings, compare, request, tmp_path):
    if not request.config.getoption("--full"):
        pytest.skip("with --full")
    data = data_of("one_group", SMALL)
    sides = {name: grpo_trainer(SMALL, data, tmp_path, **options) for name, options in SETTINGS[settings].items()}
    if settings == "modes":
        sides["head_on_completions"] = on_completions(sides["head_on_completions"])
    sides["ours"] = ours(SMALL, data)
    compare("trl_settings", shape_of("one_group", SMALL, data), sides, 1, long=True, tokens=data.decision_tokens)


def on_completions(side: Callable[[], None]) -> Callable[[], None]:
    """A step whose LM head reads the positions that have a label, which TRL does where it has Triton."""

    def step():
        before, utils._use_triton = utils._use_triton, lambda device: True
        try:
            side()
        finally:
            utils._use_triton = before

    return step
