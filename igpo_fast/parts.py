"""What every command needs, made from a configuration: data, tokenizer, policy, dialect, tool, engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from igpo_fast import model
from igpo_fast.config import Config
from igpo_fast.data import Data, load_data, question_order
from igpo_fast.dialect import Dialect, make_dialect
from igpo_fast.engines.base import Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.evaluate import evaluate
from igpo_fast.rollout import Limits, opening
from igpo_fast.sft import Progress, warm_start
from igpo_fast.tokenizer import load_tokenizer
from igpo_fast.tools.base import Tool
from igpo_fast.tools.search import make_search


@dataclass(frozen=True)
class Parts:
    config: Config
    data: Data
    tokenizer: PreTrainedTokenizerFast
    dialect: Dialect
    tool: Tool
    lm: PreTrainedModel
    engine: TorchEngine
    limits: Limits
    answer_tokens: int
    """Most tokens that the forced answers of a training question take after one prefix."""

    @property
    def sampling(self) -> Sampling:
        """Of rollouts that are trained on."""
        return Sampling(temperature=self.config.rollout.temperature)

    def evaluate(
        self, tool: Tool | None = None, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Sampled F1 on the held-out questions, with the run's search or another ``tool``."""
        settings = self.config.eval
        return evaluate(
            self.data.eval[: settings.questions],
            engine=self.engine,
            tool=tool or self.tool,
            dialect=self.dialect,
            limits=self.limits,
            sampling=Sampling(settings.temperature, settings.top_p, settings.top_k, settings.repetition_penalty),
            seed=self.config.train.seed,
            concurrency=self.config.rollout.concurrency,
            f1_normalisation=self.config.algorithm.f1_normalisation,
            progress=progress,
        )


def assemble(config: Config, *, weights: str | None = None, sft_progress: Progress | None = None) -> Parts:
    """Everything a command needs.

    Args:
        weights: a checkpoint or model directory to use in place of the configured (and warm-started) model.
        sft_progress: told of the warm start, where there is one to train.
    Raises:
        InputError: bad input of any kind, in one line.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    data = load_data(config)
    tokenizer = load_tokenizer(config, data)
    dialect = make_dialect(
        config.rollout.dialect,
        tokenizer,
        system=config.rollout.system,
        max_passage_tokens=config.search.max_passage_tokens,
        max_answer_tokens=config.data.max_answer_tokens,
        max_answers=config.data.max_answers,
    )
    limits = Limits(config.rollout.max_turns, config.rollout.max_turn_tokens, config.rollout.max_tokens)
    answer_tokens = _check_questions(config, data, dialect, limits)
    tool = make_search(config, data)
    device = model.device_of(config.model.device)
    dtype = getattr(torch, config.model.dtype)
    path = weights or config.model.path
    if path:
        lm = model.load(path, dtype=dtype, device=device, check=config.model.probe)
    else:
        lm = _small_model(config, len(tokenizer), tokenizer.eos_token_id).to(device, dtype)
        if config.model.probe:
            model.probe(lm)
    if not weights:
        lm = warm_start(config, lm, tokenizer, dialect, data, tool, sft_progress)
    if config.model.gradient_checkpointing:
        model.recompute_layers(lm)
    engine = TorchEngine(
        lm,
        decode=tokenizer.decode,
        max_slots=config.rollout.concurrency,
        max_tokens=config.rollout.max_tokens,
    )
    return Parts(config, data, tokenizer, dialect, tool, lm, engine, limits, answer_tokens)


def _check_questions(config: Config, data: Data, dialect: Dialect, limits: Limits) -> int:
    """Refuse now what would end the run in some later step; returns ``Parts.answer_tokens``."""
    question_order(len(data.train), config.train.questions, step=0, seed=config.train.seed)
    for question in (*data.train, *data.eval):
        opening(question, dialect, limits)
    scored = 1 if config.algorithm.answers == "first" else None
    branches = (dialect.branches(question)[:scored] for question in data.train)
    return max(sum(len(branch.ids) for branch in some) for some in branches)


def _small_model(config: Config, vocab_size: int, eos_token_id: int | None) -> PreTrainedModel:
    m = config.model
    return model.build(
        vocab_size, hidden_size=m.hidden_size, layers=m.layers, heads=m.heads, kv_heads=m.kv_heads,
        ffn_size=m.ffn_size, max_tokens=config.rollout.max_tokens, tie_embeddings=m.tie_embeddings,
        seed=config.train.seed, eos_token_id=eos_token_id,
    )  # fmt: skip
