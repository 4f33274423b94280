"""One training step on recorded rollouts, by everyone: each side is a function without arguments that takes the step.

    ours          the trainer's own update: ``igpo`` in one pass or two, or ``grpo``, the same trees without answers
    trl           TRL's GRPOTrainer, or IGPOTrainer inside it, through TRL's own ``training_step``

All train the same Qwen2 from the same random weights in float32, with gradients clipped to a norm of 1 and AdamW.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bench.recorded import Recorded
from bench.timing import DEVICE
from igpo_fast.config import load
from igpo_fast.integrations.trl import IGPOConfig, IGPOTrainer
from igpo_fast.model import recompute_layers, use_attend
from igpo_fast.ranks import Ranks
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.types import REWARD, Batch, Rollout
from igpo_fast.update.advantages import recipe_of
from igpo_fast.update.learner import Learner
from igpo_fast.update.packs import Packer
from igpo_fast.update.policy import make_trees
from igpo_fast.update.scoring import Scoring
from igpo_fast.update.update import Updater
from igpo_kernels import LossSettings, tree_size

LR = 1e-6
SCORED = ("algorithm.outcome=tools", "algorithm.answers=max")
"""The outcomes of the rollouts count, and all accepted answers."""
PLAIN = {"bf16": False, "gradient_checkpointing": False, "loss_type": "grpo"}
"""What is not TRL's default: float32, nothing computed twice, and the mean over sequences of their means over tokens,
which does not depend on what is generated together."""


@dataclass(frozen=True)
class Size:
    """A Qwen2 with heads of 64, half as many for keys, and tied embeddings."""

    hidden: int
    layers: int
    vocab: int = 16384

    def lm(self, attention: str = "sdpa") -> Qwen2ForCausalLM:
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=self.vocab, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64, num_key_value_heads=max(1, self.hidden // 128),
            intermediate_size=3 * self.hidden, max_position_embeddings=8192, tie_word_embeddings=True,
            attn_implementation=attention,
        )  # fmt: skip
        return Qwen2ForCausalLM(config).to(DEVICE)


class Silent:
    """A progress display that shows nothing."""

    def phase(self, name, total=None): ...
    def advance(self, done=1): ...
    def warn(self, text): ...


def counts(data: Recorded) -> dict[str, int]:
    """Tokens of the rollouts: decision tokens, packed tokens without answers, what the answers add, and the tokens of
    the largest group with its answers."""
    numbers = [range(len(group.rollouts)) for group in data.groups]
    plain = [tree_size(tree)[0] for tree in make_trees(data.groups, None, numbers)]
    branches = [data.branches[group.question.id] for group in data.groups]
    scored = [tree_size(tree)[0] for tree in make_trees(data.groups, branches, numbers)]
    return {
        "decision_tokens": data.decision_tokens, "trunk_tokens": sum(plain),
        "branch_tokens": sum(scored) - sum(plain), "largest_group": max(scored),
    }  # fmt: skip


def largest_rollout(data: Recorded) -> int:
    """Packed tokens of the largest rollout with its answers."""
    alone = (
        make_trees([replace(group, rollouts=(rollout,))], [data.branches[group.question.id]], [[0]])[0]
        for group in data.groups
        for rollout in group.rollouts
    )
    return max(tree_size(tree)[0] for tree in alone)


def updater(
    size: Size, data: Recorded, *, algorithm: str = "igpo", preset: str = "robust", passes: str = "one",
    budget: int | None = None, recomputed: bool = False,
) -> Updater:  # fmt: skip
    """The trainer's own update.

    Args:
        budget: tokens of a pack; None holds the largest group.
        recomputed: gradient checkpointing.
    """
    settings = [f"algorithm.name={algorithm}", f"algorithm.preset={preset}", *SCORED]
    recipe = recipe_of(load(None, settings).algorithm)
    lm = use_attend(size.lm().eval())
    if recomputed:
        recompute_layers(lm)
    learner = Learner(lm, settings=LossSettings(), lr=LR, factor=lambda _: 1.0)
    scoring = Scoring(lambda question: data.branches[question.id] if recipe.needs_values else ())
    packer = Packer(learner, scoring, recipe, passes, budget or counts(data)["largest_group"], Ranks())
    return Updater(
        learner, packer, recipe, passes=passes, groups_per_pack=1, updates=1, aggregation="seq_mean_token_mean",
        most_tokens=1, mismatch_stop=0.0, progress=Silent(),
    )  # fmt: skip


def ours(size: Size, data: Recorded, **options) -> Callable[[], None]:
    """A step of ``updater``, which takes the options."""
    update = updater(size, data, **options)

    def step():
        update(Batch(1, data.groups), {}, StepMetrics(1))

    return step


class TrlStep:
    """A step of one of TRL's trainers on recorded rollouts, which its ``rollout_func`` gives.

    Args:
        trainer: GRPOTrainer or a subclass.
        config: the class of its configuration, which gets the other options.
        micro: sequences per forward, whose gradients are added up; None is all.
        generation: sequences that are generated, and so padded, together: whole groups, and a multiple of ``micro``;
            None is all.
    """

    def __init__(
        self, trainer: type, config: type, size: Size, data: Recorded, folder: Path, *, micro: int | None = None,
        generation: int | None = None, attention: str = "sdpa", **options,
    ):  # fmt: skip
        rollouts = data.rollouts
        self._micro, self._generation = micro or len(rollouts), generation or len(rollouts)
        self._rows = [{"prompt": r.question.question, "answers": _answers(data, r)} for r in rollouts]
        args = config(
            output_dir=str(folder), per_device_train_batch_size=self._micro,
            num_generations=len(data.groups[0].rollouts), gradient_accumulation_steps=len(rollouts) // self._micro,
            steps_per_generation=self._generation // self._micro, max_completion_length=8192, learning_rate=LR,
            report_to="none", use_cpu=DEVICE == "cpu", **{**PLAIN, **options},
        )  # fmt: skip
        self.trainer = trainer(
            size.lm(attention), lambda outcome, **_: outcome, args, train_dataset=Dataset.from_list(self._rows),
            processing_class=tokenizer_of(size.vocab), rollout_func=lambda prompts, _: for_trl(self._given),
        )  # fmt: skip
        self.trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps  # as ``train`` sets it
        self._rollouts, self._given = rollouts, []
        self._model = self.trainer.accelerator.prepare_model(self.trainer.model)  # what torch_compile compiles
        self._optimizer = self.trainer.create_optimizer()

    def backward(self) -> float:
        """The loss, its gradients added to the model's."""
        loss = 0.0
        for start in range(0, len(self._rollouts), self._generation):
            part = slice(start, start + self._generation)
            self._given = self._rollouts[part]
            for _ in range(self._generation // self._micro):
                loss += self.trainer.training_step(self._model, [dict(row) for row in self._rows[part]], None).item()
        return loss

    def __call__(self) -> None:
        assert math.isfinite(self.backward())
        self.trainer.accelerator.clip_grad_norm_(self.trainer.model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def igpo_trainer(size: Size, data: Recorded, folder: Path, **options) -> TrlStep:
    """IGPOTrainer, with a wrapper and answers as long as the recorded ones."""
    opening = max(branch.start for branches in data.branches.values() for branch in branches)
    wrapper = " ".join(f"w{i}" for i in range(10, 10 + opening)) + " {}"
    algorithm = {"preset": "robust", "answers": "max", "wrapper": wrapper}
    return TrlStep(
        IGPOTrainer, IGPOConfig, size, data, folder, dialect="tags", algorithm=algorithm, packed="on", **options
    )


def for_trl(rollouts: Sequence[Rollout]) -> dict[str, list]:
    """What TRL's ``rollout_func`` returns."""
    return {
        "prompt_ids": [r.prompt_ids.tolist() for r in rollouts],
        "completion_ids": [r.ids[len(r.prompt_ids) :].tolist() for r in rollouts],
        "logprobs": [[0.0] * (len(r.ids) - len(r.prompt_ids)) for r in rollouts],
        "env_mask": [(r.turn_of_token[len(r.prompt_ids) :] >= 0).astype(int).tolist() for r in rollouts],
        "outcome": [r.rewards[REWARD] for r in rollouts],
    }


def tokenizer_of(vocab: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``vocab`` words: w0, w1, ..., and last the tags that a dialect stops at."""
    words = [*(f"w{i}" for i in range(vocab - 2)), "</search>", "</answer>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w0", pad_token="w0")


def _answers(data: Recorded, rollout: Rollout) -> list[str]:
    """The accepted answers of a rollout's question, as words."""
    branches = data.branches[rollout.question.id]
    return [" ".join(f"w{i}" for i in branch.ids[branch.start : branch.stop]) for branch in branches]
