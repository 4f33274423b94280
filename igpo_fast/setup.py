"""Sets up what every command needs from a configuration: data, tokenizer, policy, dialect, tool, engine."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from igpo_fast import adapter, model
from igpo_fast.config import CRITICS, OF_GAINS, OF_GROUPS, PRESETS, Algorithm, Config, Critic, Distributed
from igpo_fast.data.load import Data, load_data, question_order, without_long
from igpo_fast.data.tokenizer import check_known, load_tokenizer
from igpo_fast.demonstrations import NONE_GIVEN, read_demonstrations
from igpo_fast.engines import vllm
from igpo_fast.engines.base import Engine, Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import InputError, reason_of
from igpo_fast.extend import made
from igpo_fast.liger import has_liger, use_liger
from igpo_fast.ranks import Ranks
from igpo_fast.rollouts.dialect import Dialect, make_dialect, tags_of
from igpo_fast.rollouts.outcome import make_outcome
from igpo_fast.rollouts.rollout import Agent, Limits, opening
from igpo_fast.rollouts.tools.make import make_tools
from igpo_fast.rollouts.tools.search import Search
from igpo_fast.run import memory
from igpo_fast.sft import Progress as SftProgress
from igpo_fast.sft import warm_start
from igpo_fast.types import OF_ANSWERS, SEARCH, Action, Question, ToolResult
from igpo_fast.update.advantages import ALGORITHMS, recipe_of
from igpo_fast.update.critic import critic_settings_of
from igpo_fast.update.learner import Learner
from igpo_fast.update.losses import loss_settings_of
from igpo_fast.update.packs import Packer
from igpo_fast.update.passes import choose_passes, groups_per_pack, least_budget, most_decision_tokens
from igpo_fast.update.schedule import schedule_factor
from igpo_fast.update.scoring import Scoring
from igpo_fast.update.update import Progress, Updater
from igpo_kernels import Branch, triton_variants
from igpo_kernels.huggingface import heads_of
from igpo_kernels.tree_attention import automatic

SEAM = 2
"""Tokens by which the place of an answer after its wrapper may differ between answers, whose first token may begin
before it."""


if TYPE_CHECKING:
    from igpo_fast.integrations.verifiers import Environment


@dataclass(frozen=True)
class Setup:
    """Parts that a command needs; ``set_up`` makes them from a configuration."""

    config: Config
    data: Data
    tokenizer: PreTrainedTokenizerFast
    lm: PreTrainedModel
    agent: Agent
    """Samples the rollouts that are trained on."""
    scoring: Scoring
    """What is scored beside the rollouts' own tokens."""
    warnings: tuple[str, ...] = ()
    """Notes for the user before work begins, one line each."""

    @property
    def eval_agent(self) -> Agent:
        """The agent for held-out questions, with the sampling of section ``eval``."""
        e = self.config.eval
        return replace(self.agent, sampling=Sampling(e.temperature, e.top_p, e.top_k, e.repetition_penalty))

    def summary(self, passes: str, parameters: int) -> str:
        """A summary of the run, in one line; ``parameters`` is ``Learner.parameters``."""
        lm, a, threads = self.lm, self.config.algorithm, torch.get_num_threads()
        return (
            f"{type(lm).__name__}, {parameters:,} parameters, {lm.dtype} on {lm.device}; "
            f"{a.name} (preset {a.preset}), {passes} pass{'es' if passes == 'two' else ''} per update, engine "
            f"{self.agent.engine.name}, kernels {_kernels(self.config, lm)}{', Liger layers' * has_liger(lm)}, "
            f"{threads} thread{'s' * (threads > 1)}, "
            f"{len(self.data.train):,} questions"
        )


def set_up(
    config: Config,
    *,
    weights: str | None = None,
    tokenizer: str | None = None,
    search: Search | None = None,
    sft_progress: SftProgress | None = None,
    ranks: Ranks | None = None,
    trained: bool = False,
) -> Setup:
    """Make the parts that a command needs.

    Args:
        weights: a checkpoint or model directory that replaces the configured (and warm-started) model.
        tokenizer: a checkpoint whose tokenizer is used instead of that of ``weights``.
        search: the tool ``search`` in place of the configured one.
        sft_progress: called during a warm start, if one is trained.
        ranks: the run's processes.
        trained: the model is about to be trained, so it gets adapters if the configuration wants them.
    Raises:
        InputError: bad input of any kind, in one line.
        ToolError: a tool does not answer; known before the model is loaded.
    """
    ranks = ranks or Ranks()
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    outcome = make_outcome(config.algorithm.outcome)
    environment = _environment(config)
    data = environment.data if environment else load_data(config)
    tools = make_tools(config, data, search, environment.tool if environment else None)
    tags = [tag for tool in tools for name in tool.names for tag in tags_of(name)]
    words = load_tokenizer(config, data, tokenizer or weights, tags)
    dialect = make_dialect(
        config.rollout.dialect,
        words,
        tools.schemas,
        system=_instructions(config),
        thinking=config.rollout.thinking,
        max_passage_tokens=config.search.max_passage_tokens,
        max_result_tokens=config.tools.max_tokens,
        max_answer_tokens=config.data.max_answer_tokens,
        max_answers=config.data.max_answers,
        wrapper=config.algorithm.wrapper,
    )
    dialect.check()
    limits = Limits(config.rollout.max_turns, config.rollout.max_turn_tokens, config.rollout.max_tokens)
    if config.data.skip_long:
        data = without_long(data, lambda question: limits.fits(len(dialect.prompt(question))))
    _check_questions(config, data, dialect, limits)
    scoring = _scoring(config, dialect, data.train)
    tools.check(data.train[0])
    given = NONE_GIVEN
    if config.sft.demonstrations and not weights:
        given = read_demonstrations(config.sft.demonstrations, dialect, config.rollout.max_tokens)
    if trained:
        _check_memory(config, len(words), ranks)
    lm = _load_model(config, weights, words, ranks)
    if not weights:
        if ranks.size > 1:  # the others then read what the first has trained
            ranks.first_alone(lambda: warm_start(config, lm, words, dialect, data, tools, sft_progress, given) and None)
        lm = warm_start(config, lm, words, dialect, data, tools, sft_progress, given)
    if config.model.gradient_checkpointing:
        model.recompute_layers(lm)
    warnings = (
        *settings_warnings(config),
        "" if uses_deepspeed(config, ranks) else _idle_sharding(config),
        *data.warnings,
        *(tool.caution for tool in tools),
        *given.warnings,
        model.check_positions(lm, config.rollout.max_tokens, scoring.answer_tokens + scoring.response_tokens),
    )
    engine = _make_engine(config, lm, words, ranks)
    if config.model.lora_rank and trained:
        m = config.model
        adapter.add(lm, m.lora_rank, m.lora_alpha, m.lora_targets, config.train.seed)
    agent = Agent(
        engine=engine,
        tools=tools,
        dialect=dialect,
        limits=limits,
        sampling=Sampling(temperature=config.rollout.temperature),
        seed=config.train.seed,
        concurrency=config.rollout.concurrency,
        outcome=outcome,
    )
    return Setup(config, data, words, lm, agent, scoring, tuple(filter(None, warnings)))


def _environment(config: Config) -> Environment | None:
    """The environment that gives questions, tools and outcomes; None where the data come from elsewhere."""
    if config.data.source != "verifiers":
        return None
    try:
        from igpo_fast.integrations.verifiers import Environment
    except ImportError as error:
        raise InputError(
            f"data.source=verifiers: verifiers does not import ({reason_of(error)}); install igpo-fast[verifiers]"
        ) from error
    return Environment(config)


def make_learner(config: Config, lm: PreTrainedModel, ranks: Ranks) -> Learner:
    """The owner of ``lm``'s weights in a run.

    Raises:
        InputError: several processes with ``distributed.engine=none``, or DeepSpeed is not installed.
    """
    train, recipe = config.train, recipe_of(config.algorithm)
    factor = partial(
        schedule_factor,
        warmup=train.warmup_steps * train.updates,
        total=train.steps * train.updates,
        schedule=train.lr_schedule,
    )
    made = partial(
        Learner, temperature=config.rollout.temperature, settings=loss_settings_of(config.algorithm),
        backend=config.model.kernels, lr=train.lr, factor=factor, betas=train.betas, weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm, critic=critic_settings_of(config, recipe), value_model=recipe.value_source,
    )  # fmt: skip
    if not uses_deepspeed(config, ranks):
        return made(lm)
    try:
        from igpo_fast.update.zero import ZeroLearner
    except ImportError as error:
        raise InputError(
            f"distributed.engine=deepspeed: DeepSpeed does not import ({reason_of(error)}); install "
            "igpo-fast[deepspeed]"
        ) from error
    distributed = config.distributed
    if distributed.zero_stage == 3 and recipe.value_source == "teacher":
        raise InputError(
            "algorithm.value_model=teacher keeps a whole model per process, which distributed.zero_stage=3 avoids; "
            "use zero_stage=2, or value_model=reference"
        )
    return ZeroLearner(lm, ranks=ranks, stage=distributed.zero_stage, offload=distributed.offload, **made.keywords)


def uses_deepspeed(config: Config, ranks: Ranks) -> bool:
    """Whether the learner is DeepSpeed's: by ``auto`` with several processes or on a GPU.

    Raises:
        InputError: several processes with ``distributed.engine=none``.
    """
    engine = config.distributed.engine
    if engine == "none" and ranks.size > 1:
        raise InputError(
            f"distributed.engine=none trains in one process, and {ranks.size} have started; use auto or deepspeed"
        )
    return memory.uses_deepspeed(config, ranks.size, model.device_of(config.model.device) != "cpu")


def _idle_sharding(config: Config) -> str:
    """A warning about keys that only DeepSpeed reads, where the plain learner trains; empty if there are none."""
    given, plain = config.distributed, Distributed()
    idle = [key for key in ("zero_stage", "offload") if getattr(given, key) != getattr(plain, key)]
    if not idle:
        return ""
    named = ", ".join(f"distributed.{key}={getattr(given, key)}" for key in idle)
    return (
        f"{named} does nothing here: one process trains without DeepSpeed; set distributed.engine=deepspeed, or --nproc"
    )


def make_updater(setup: Setup, learner: Learner, progress: Progress, ranks: Ranks) -> Updater:
    """What takes a batch's optimiser steps.

    Raises:
        InputError: a number of passes that the configuration cannot have.
    """
    config = setup.config
    recipe = recipe_of(config.algorithm, config.train.steps)
    passes = choose_passes(config, recipe, setup.scoring)
    least = least_budget(config, recipe, setup.scoring, passes)
    packer = Packer(learner, setup.scoring, recipe, passes, config.train.token_budget, ranks, least)
    return Updater(
        learner, packer, recipe, passes=passes, groups_per_pack=groups_per_pack(config, setup.scoring),
        updates=config.train.updates, aggregation=config.algorithm.aggregation,
        most_tokens=most_decision_tokens(config), mismatch_stop=config.rollout.mismatch_stop, progress=progress,
        critic=critic_settings_of(config, recipe),
        teacher_every=config.algorithm.teacher_every if recipe.value_source == "teacher" else 0,
    )  # fmt: skip


def _instructions(config: Config) -> str | None:
    """The instructions before a question: ``rollout.system``, or what ``rollout.system_file`` holds."""
    path = config.rollout.system_file
    if path is None:
        return config.rollout.system
    try:
        return Path(path).read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise InputError(
            f"rollout.system_file={path}: cannot read it ({error.strerror}); give an existing file"
        ) from None
    except ValueError:
        raise InputError(f"rollout.system_file={path}: not UTF-8 text; correct it") from None


def _check_memory(config: Config, vocab_size: int, ranks: Ranks) -> None:
    """Refuse a run that cannot fit, before its weights are loaded."""
    if shape := memory.known_shape(config, vocab_size):
        memory.check_fits(config, shape, memory.place_of(_device(config, ranks), ranks.size))


def _device(config: Config, ranks: Ranks) -> str:
    """The device of this rank."""
    device = model.device_of(config.model.device)
    return f"cuda:{ranks.local}" if device == "cuda" and ranks.size > 1 else device


def _load_model(
    config: Config, weights: str | None, tokenizer: PreTrainedTokenizerFast, ranks: Ranks
) -> PreTrainedModel:
    device = _device(config, ranks)
    if config.model.kernels == "triton" and device == "cpu" and not triton_variants.runs_on_cpu():
        raise InputError("model.kernels=triton: needs a GPU, and the model is on the CPU; use model.kernels=auto")
    dtype = getattr(torch, config.train.precision)
    if path := weights or config.model.path:
        source = f"checkpoint {weights}" if weights else None
        lm = model.load(path, dtype=dtype, device=device, check=False, source=source)
    else:
        lm = _small_model(config, len(tokenizer), tokenizer.eos_token_id).to(device, dtype)
    use_liger(lm, config.model.liger)
    return model.probe(lm) if config.model.probe else lm


def _make_engine(config: Config, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ranks: Ranks) -> Engine:
    engine = config.rollout.engine
    if engine == "vllm":
        return vllm.make_engine(config, lm, tokenizer.decode, ranks)
    if uses_deepspeed(config, ranks) and config.distributed.zero_stage == 3:
        lm = copy.deepcopy(lm)  # the learner's will hold a part of each weight only
    if engine != "torch":
        return made(engine, "rollout.engine", config, lm, tokenizer)
    slots, tokens = config.rollout.concurrency, config.rollout.max_tokens
    return TorchEngine(lm, decode=tokenizer.decode, max_slots=slots, max_tokens=tokens)


def _check_questions(config: Config, data: Data, dialect: Dialect, limits: Limits) -> None:
    """Refuse now questions that would end the run in some later step."""
    asked = config.train.questions + config.rollout.oversample
    question_order(len(data.train), asked, step=0, seed=config.train.seed)
    for name, questions in (("data.train", data.train), ("data.eval", data.eval)):
        check_known(dialect.tokenizer, (text for q in questions for text in (q.question, *q.answers)), name)
    for question in (*data.train, *data.eval):
        opening(question, dialect, limits)


def _kernels(config: Config, lm: PreTrainedModel) -> str:
    """The implementation of each op, in words."""
    names = model.kernels_of(lm, config.model.kernels)
    if config.model.kernels == "auto":
        sequences = automatic(lm.device, lm.dtype, *heads_of(lm), sequences=True)
        if sequences != names["tree_attention"]:
            names["tree_attention"] += f" ({sequences} for single sequences)"
    if len(set(names.values())) == 1:
        return next(iter(names.values()))
    return ", ".join(f"{op} {name}" for op, name in names.items())


def settings_warnings(config: Config) -> list[str]:
    """Warnings about settings without the effect that they suggest, one line each."""
    a, warnings = config.algorithm, []
    if a.ratio != "token" and config.train.updates == 1:
        equal = " (gspo then equals grpo)" * (a.name == "gspo")
        warnings.append(
            f"algorithm.ratio={a.ratio} with train.updates=1 never clips{equal}: all ratios are 1; raise "
            "train.updates, or use algorithm.ratio=token"
        )
    if a.surrogate != "clip" and config.train.updates == 1:
        warnings.append(
            f"algorithm.surrogate={a.surrogate} with train.updates=1 trains as surrogate=clip does: all ratios are 1; "
            "raise train.updates"
        )
    if a.adaptive_clip and ALGORITHMS[a.name].needs_values and config.train.updates == 1:
        warnings.append(
            f"algorithm.adaptive_clip={a.adaptive_clip:g} with train.updates=1 never acts: all ratios are 1; raise "
            "train.updates"
        )
    if a.ratio == "sequence" and ALGORITHMS[a.name].needs_values:
        warnings.append(
            "algorithm.ratio=sequence gives all tokens of a rollout the same gradient, so that gains do not tell its "
            "turns apart; use algorithm.ratio=turn"
        )
    if a.name not in CRITICS and (given := [k for k, v in config.critic if v != getattr(Critic(), k)]):
        named = ", ".join(f"critic.{key}={getattr(config.critic, key)}" for key in given)
        warnings.append(f"{named} does nothing: algorithm.name={a.name} has no critic; use ppo or ppo_ig")
    for keys, why in _idle_keys(a):
        if given := [f"algorithm.{key}={getattr(a, key)}" for key in keys if a.changed(key)]:
            warnings.append(f"{', '.join(given)} do{'es' * (len(given) == 1)} nothing: {why}")
    preset = PRESETS[a.preset]
    if a.ig_gate and a.basis != preset.get("basis", a.basis) and a.ig_gate == preset["ig_gate"]:
        warnings.append(
            f"algorithm.ig_gate={a.ig_gate:g} is preset {a.preset}'s, for basis={preset['basis']}; gains of "
            f"basis={a.basis} are in another unit: set algorithm.ig_gate, too (0 for none)"
        )
    return warnings


def _idle_keys(a: Algorithm) -> Iterator[tuple[Sequence[str], str]]:
    """Keys of section ``algorithm`` that do nothing beside its others, and why."""
    if a.surrogate in ("sapo", "vespo"):
        yield ("clip_low", "clip_high", "adaptive_clip"), f"algorithm.surrogate={a.surrogate} clips nothing"
    if a.outcome not in OF_ANSWERS:
        yield ("format_penalty",), f"algorithm.outcome={a.outcome} judges rollouts without an answer, too"
        if not a.has_gains or a.baseline == "masked":
            yield ("pseudo_answer",), "nothing is compared with answers"
    if not ALGORITHMS[a.name].needs_values:
        keys = [key for key in OF_GAINS if key not in ("gamma", *OF_GROUPS) or a.name not in CRITICS]
        yield keys, f"algorithm.name={a.name} has no gains"
        return
    if a.baseline == "masked":
        yield ("answers", "wrapper"), "baseline=masked scores no answers"
    if a.baseline != "random":
        yield ("baseline_samples",), f"baseline={a.baseline} draws no responses"
    if a.value_model != "teacher":
        yield ("teacher_every",), f"value_model={a.value_model} is no teacher"
    if a.name != "ppo_ig":
        yield ("ig_potential",), f"algorithm.name={a.name} has no critic; use ppo_ig"


def _scoring(config: Config, dialect: Dialect, questions: Sequence[Question]) -> Scoring:
    """What the algorithm scores beside the rollouts' own tokens."""
    a, recipe, search = config.algorithm, recipe_of(config.algorithm), config.search
    count = recipe.scored_answers

    def branches_of(question: Question) -> Sequence[Branch]:
        return () if count == 0 else dialect.branches(question)[:count]

    def tokens_of(question: Question) -> int:
        return sum(len(branch.ids) for branch in branches_of(question))

    most_answer = max(map(tokens_of, questions))
    if a.pseudo_answer == "majority" and count != 0:  # not known yet: the longest that may be, after the same wrapper
        (probe,) = dialect.branches(replace(questions[0], answers=(questions[0].question,)))
        most_answer = probe.start + SEAM + config.data.max_answer_tokens

    call = [Action(name, {}) for name in dialect.functions][:1]
    empty, _ = dialect.response(call, [ToolResult() for _ in call])
    baseline = a.baseline if recipe.needs_values else "previous"
    passages = search.top_k * (search.max_passage_tokens + 4)  # blank lines between passages, with a margin
    most = len(empty) + max(passages, config.tools.max_tokens if set(dialect.functions) != {SEARCH} else 0)
    return Scoring(
        branches_of,
        answer_tokens=most_answer,
        baseline=baseline,
        samples=a.baseline_samples,
        longest_response=min(most, config.rollout.max_tokens) if baseline == "random" else 0,
        masked_response=empty if baseline == "masked" else None,
        seed=config.train.seed,
    )


def _small_model(config: Config, vocab_size: int, eos_token_id: int | None) -> PreTrainedModel:
    m = config.model
    return model.build(
        vocab_size, hidden_size=m.hidden_size, layers=m.layers, heads=m.heads, kv_heads=m.kv_heads,
        ffn_size=m.ffn_size, max_tokens=config.rollout.max_tokens, tie_embeddings=m.tie_embeddings,
        seed=config.train.seed, eos_token_id=eos_token_id,
    )  # fmt: skip
