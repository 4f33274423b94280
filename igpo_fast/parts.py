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
from igpo_fast.engines import vllm
from igpo_fast.engines.base import Engine, Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import InputError
from igpo_fast.evaluate import evaluate
from igpo_fast.rollout import Limits, opening
from igpo_fast.sft import Progress, warm_start
from igpo_fast.tokenizer import load_tokenizer
from igpo_fast.tools.base import Tool, settle
from igpo_fast.tools.search import make_search
from igpo_kernels import triton_variants


@dataclass(frozen=True)
class Parts:
    """A run's parts: ``assemble`` makes them, the commands use them."""

    config: Config
    data: Data
    tokenizer: PreTrainedTokenizerFast
    dialect: Dialect
    tool: Tool
    lm: PreTrainedModel
    engine: Engine
    limits: Limits
    answer_tokens: int
    """Most tokens that the forced answers of a training question take after one prefix."""

    @property
    def sampling(self) -> Sampling:
        """Of rollouts that are trained on."""
        return Sampling(temperature=self.config.rollout.temperature)

    def send_weights(self) -> None:
        """Bring the engine to the policy's present weights."""
        self.engine.load_weights(self.lm.state_dict().items())

    def evaluate(
        self, tool: Tool | None = None, progress: Callable[[int, int], None] | None = None
    ) -> dict[str, float]:
        """Sampled F1 on the held-out questions, with the run's search or another ``tool``; where that can fail,
        ``eval/search_failures`` is how many searches did, for good.

        Raises:
            InputError: no engine answers, or every search failed.
        """
        if not self.engine.version:
            self.send_weights()
        settings, tool = self.config.eval, tool or self.tool
        found = evaluate(
            self.data.eval,
            engine=self.engine,
            tool=tool,
            dialect=self.dialect,
            limits=self.limits,
            sampling=Sampling(settings.temperature, settings.top_p, settings.top_k, settings.repetition_penalty),
            seed=self.config.train.seed,
            concurrency=self.config.rollout.concurrency,
            f1_normalisation=self.config.algorithm.f1_normalisation,
            progress=progress,
        )
        counts, _ = settle(tool, "evaluation")
        return found | ({"eval/search_failures": counts["tool/failures"]} if "tool/failures" in counts else {})


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
        thinking=config.rollout.thinking,
        max_passage_tokens=config.search.max_passage_tokens,
        max_answer_tokens=config.data.max_answer_tokens,
        max_answers=config.data.max_answers,
    )
    dialect.check()
    limits = Limits(config.rollout.max_turns, config.rollout.max_turn_tokens, config.rollout.max_tokens)
    answer_tokens = _check_questions(config, data, dialect, limits)
    tool = make_search(config, data)
    device = model.device_of(config.model.device)
    if config.model.kernels == "triton" and device == "cpu" and not triton_variants.runs_on_cpu():
        raise InputError("model.kernels=triton: needs a GPU, and the model is on the CPU; use model.kernels=auto")
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
    engine = _make_engine(config, lm, tokenizer)
    return Parts(config, data, tokenizer, dialect, tool, lm, engine, limits, answer_tokens)


def _make_engine(config: Config, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Engine:
    if config.rollout.engine == "vllm":
        return vllm.make_engine(config, lm, tokenizer.decode)
    slots, tokens = config.rollout.concurrency, config.rollout.max_tokens
    return TorchEngine(lm, decode=tokenizer.decode, max_slots=slots, max_tokens=tokens)


def _check_questions(config: Config, data: Data, dialect: Dialect, limits: Limits) -> int:
    """Refuse now what would end the run in some later step; returns ``Parts.answer_tokens``."""
    asked = config.train.questions + config.rollout.oversample
    question_order(len(data.train), asked, step=0, seed=config.train.seed)
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
