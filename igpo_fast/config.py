"""Every setting of a run: sections of plain values, two levels deep, validated when read.

``load(file, overrides)`` reads a YAML file, applies ``section.key=value`` overrides, fills the keys that
the chosen ``algorithm.preset`` sets and the user did not, and refuses unknown keys with the nearest known name. Rules
within one section stand in that section, rules across sections in ``Config``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator, model_validator

from igpo_fast import config_load, yaml12
from igpo_fast.config_types import (
    Beta,
    Concurrency,
    Count,
    Device,
    Difference,
    EmptyIsNone,
    EvalMetric,
    Extension,
    FilePath,
    Fraction,
    Hops,
    LearningRate,
    Megabytes,
    NonEmpty,
    NonNegative,
    Norm,
    OneIsAList,
    Outcome,
    Pause,
    PlainText,
    Positive,
    Retries,
    SearchUrl,
    Seconds,
    Seed,
    Share,
    Size,
    Temperature,
    Threads,
    Tokens,
    Url,
)  # fmt: skip
from igpo_fast.errors import masked
from igpo_fast.types import (
    CALCULATE,
    ENVIRONMENT,
    LOOKUP,
    OF_ANSWERS,
    OF_TOOLS,
    SEARCH,
    Accumulate,
    Aggregation,
    Answers,
    Baseline,
    Basis,
    Level,
    Normalisation,
    Pool,
    PseudoAnswer,
    Ratio,
    Surrogate,
    ValueModel,
)

SESSION = Field(json_schema_extra={"session": True})
"""Marks a key that a later session of a run may change: it changes neither the data nor, beyond
rounding, the computation.
eval.questions is not marked, because it can decide which training questions are held out."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool_as_number(cls, value, info):
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation not in (bool, bool | None):
            raise ValueError("this key takes no true or false")
        return value


def joined(value: str | list[str] | None) -> str | None:
    """A list of files as one source."""
    if value == []:
        raise ValueError("an empty list names no file; name one, or leave the key empty")
    return ",".join(value) if isinstance(value, list) else value


class Run(Section):
    dir: Annotated[FilePath, SESSION] = "runs/quickstart"
    """The run folder: config, metrics, rollouts, checkpoints. An existing one is resumed."""
    tracker: Annotated[tuple[Literal["tensorboard", "wandb", "trackio", "mlflow"], ...], SESSION] = ()
    """Trackers that get the metrics, in addition to metrics.jsonl: one name or a list; empty or `none` for none. They
    keep them in the run folder unless their own variables (WANDB_MODE, MLFLOW_TRACKING_URI, ...) say otherwise
    (docs/run-folder.md)."""
    cache: Annotated[FilePath, SESSION] = "runs/cache"
    """Folder of warm-started models, reused by runs with the same settings."""

    @field_validator("tracker", mode="before")
    @classmethod
    def _listed(cls, value):
        """One name, or several with commas, is a list."""
        if value in (None, "", "none"):
            return ()
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


class Model(Section):
    path: Annotated[FilePath | None, EmptyIsNone] = None
    """Hugging Face model directory or name. Empty builds a small random Qwen2 with the sizes below."""
    tokenizer: FilePath = "world"
    """`world` (words of the made-up world), `bpe` (byte-level BPE trained on the corpus), or a tokenizer
    directory. Ignored with `path`, which has its own."""
    vocab_size: Annotated[int, Field(ge=1, le=2**22)] = 8192
    """Size of a `bpe` tokenizer's vocabulary."""
    hidden_size: Size = 128
    """Width of the built model."""
    layers: Size = 2
    """Decoder layers of the built model."""
    heads: Size = 4
    """Attention heads of the built model."""
    kv_heads: Size = 4
    """Key and value heads of the built model; must divide `heads`."""
    ffn_size: Size = 320
    """Width of the built model's feed-forward layers."""
    tie_embeddings: bool = True
    """Share one matrix between embeddings and LM head of the built model."""
    lora_rank: Annotated[int, Field(ge=0, le=4096)] = 0
    """Rank of LoRA adapters, the only weights that are then trained; 0 trains all weights."""
    lora_alpha: Annotated[float, Field(gt=0, le=1e6)] = 32.0
    """Adapters count `lora_alpha` / `lora_rank` times."""
    lora_targets: NonEmpty | tuple[NonEmpty, ...] = "all-linear"
    """Layers that get adapters: ends of their names, like `[q_proj, v_proj]`; `all-linear` is every one but the LM
    head."""
    device: Annotated[Device, SESSION] = "auto"
    """`auto` takes CUDA if there is one; else `cpu`, `cuda` or `cuda:N`."""
    kernels: Literal["auto", "torch", "reference", "triton"] = "auto"
    """Implementation of igpo_kernels that runs; chosen once and logged."""
    liger: Literal["auto", "on", "off"] = "auto"
    """Liger's RMSNorm, RoPE and SwiGLU in the model, checked at load. `auto` takes them on a GPU where liger-kernel is
    installed and knows the model; its loss is never used."""
    gradient_checkpointing: Annotated[bool, SESSION] = False
    """Recompute activations in the backward, except attention (torch and Triton): less memory, one more forward."""
    probe: bool = True
    """Check at load that the architecture gives the same results in a packed tree as in separate passes."""

    @model_validator(mode="after")
    def _check_heads(self):
        if self.heads % self.kv_heads or self.hidden_size % self.heads:
            raise ValueError(
                f"model.heads={self.heads} must divide model.hidden_size={self.hidden_size}, and "
                f"model.kv_heads={self.kv_heads} must divide model.heads; change one of them"
            )
        if self.hidden_size // self.heads % 2:
            raise ValueError(
                f"model.hidden_size={self.hidden_size} over model.heads={self.heads} gives heads of "
                f"{self.hidden_size // self.heads} numbers; rotary positions need an even number"
            )
        return self


class Data(Section):
    source: Literal["world", "files", "verifiers"] = "world"
    """`world` makes up a world (section `world`); `files` reads the paths below; `verifiers` takes questions,
    tools and rewards from `environment` (docs/verifiers.md)."""
    train: Annotated[FilePath | list[FilePath] | None, EmptyIsNone] = None
    """Training questions: .jsonl, .json (either with .gz) or .parquet (own, verl's, TRL's or the usual QA sets'
    columns), patterns (`train-*.parquet`) or a list of these, or a datasets-hub name with `:split` or
    `:config:split`."""
    eval: Annotated[FilePath | list[FilePath] | None, EmptyIsNone] = None
    """Evaluation questions, in the same forms; a list of `NAME=SOURCE` evaluates several data sets. Empty holds out the
    last `eval.questions` of `train`."""
    corpus: Annotated[FilePath | list[FilePath] | None, EmptyIsNone] = None
    """Passages for search, in the same file formats, with id, title and text; `contexts` takes the paragraphs that come
    with the questions (MuSiQue, HotpotQA, 2WikiMultiHopQA, SQuAD)."""
    environment: Annotated[NonEmpty | None, EmptyIsNone] = None
    """An environment of the verifiers library: the name of an installed one, or `package.module:name` or
    `path/to/file.py:name` of a `Taskset` or of a function that returns one."""
    environment_args: dict[NonEmpty, Any] = {}
    """Settings of the environment: fields of its `TasksetConfig`, or arguments of the function."""
    environment_eval: dict[NonEmpty, Any] = {}
    """What differs in them for the evaluation's questions, such as `{split: test}`. Empty holds out the last
    `eval.questions`."""
    skip_long: bool = False
    """Leave out questions too long for a turn within `rollout.max_tokens`, with a warning, instead of refusing the
    data set."""
    max_answer_tokens: Tokens = 64
    """Longest accepted answer in tokens; longer ones are cut for scoring."""
    max_answers: Positive = 4
    """Number of accepted answers that are scored, from the first; all count for F1."""

    @field_validator("train", "corpus")
    @classmethod
    def _joined(cls, value: str | list[str] | None) -> str | None:
        return joined(value)

    @field_validator("eval", mode="before")
    @classmethod
    def _check_sets(cls, value):
        if value == []:
            raise ValueError(
                "an empty list evaluates nothing; name a data set, or leave data.eval empty to hold out questions"
            )
        return value

    @model_validator(mode="after")
    def _check_source(self):
        given = [key for key in ("train", "eval", "corpus") if getattr(self, key) is not None]
        if self.source == "world" and given:
            raise ValueError(f"data.{given[0]} is not read with data.source=world; set data.source=files")
        if self.source == "files" and self.train is None:
            raise ValueError("data.train is needed with data.source=files; give data.train=FILE")
        if self.source == "verifiers" and given:
            raise ValueError(f"data.{given[0]} is not read with data.source=verifiers; leave it out")
        if (self.source == "verifiers") != (self.environment is not None):
            raise ValueError("data.environment and data.source=verifiers need each other; give both, or neither")
        return self


class World(Section):
    kind: Literal["knowledge", "tables"] = "knowledge"
    """`knowledge`: passages that search finds; `tables`: numbers to look up and calculate with, for which
    `rollout.tools` is `[lookup, calculate]` unless given."""
    rows: Positive = 20
    """Rows of each table of `kind=tables`; the four keys that follow are the knowledge world's."""
    persons: Positive = 40
    """Persons per world."""
    companies: Positive = 16
    """Companies per world."""
    cities: Positive = 16
    """Cities per world."""
    countries: Positive = 8
    """Countries per world."""
    min_hops: Hops = 3
    """Fewest facts per question; of `kind=tables`, calls of tools."""
    max_hops: Hops = 4
    """Most facts per question; of `kind=tables`, calls of tools."""
    seed: Seed = 7
    """Seed of the worlds: the same seed gives the same worlds."""
    sft_worlds: Positive = 300
    """Worlds for the warm start."""
    train_worlds: Positive = 20
    """Worlds for reinforcement learning."""
    eval_worlds: Positive = 4
    """Worlds for evaluation."""

    @model_validator(mode="after")
    def _check_hops(self):
        if self.min_hops > self.max_hops:
            raise ValueError(f"world.min_hops={self.min_hops} exceeds world.max_hops={self.max_hops}")
        return self


class Sft(Section):
    """Warm start: steps on imperfect demonstrations made from the questions, then on trajectories from files. Set all
    steps to 0 to skip it. With `model.path` or `demonstrations` the steps that are not given are 0; with `model.path`
    `lr` is 1e-5 unless given."""

    clean_steps: Count = 600
    """Steps on nearly clean demonstrations."""
    noisy_steps: Count = 300
    """Steps on demonstrations with wrong queries, early stops and wrong answers."""
    hard_steps: Count = 120
    """Steps on even noisier demonstrations: outcome-only training often stalls from such a start."""
    demonstrations: Annotated[FilePath | list[FilePath] | None, EmptyIsNone] = None
    """Trajectories to imitate, in the file formats of `data.train`: rows as `igpo-fast score` takes them, a run's own
    rollouts, `messages` alone, or ShareGPT's `conversations` (docs/data.md)."""
    steps: Count = 0
    """Steps on `demonstrations`, which are gone through in random order, again and again."""
    batch_size: Positive = 32
    """Demonstrations per step."""
    lr: LearningRate = 3e-3
    """Initial learning rate, which falls linearly to 0."""
    response_weight: NonNegative = 0.2
    """Loss weight of tokens that tools wrote."""

    @field_validator("demonstrations")
    @classmethod
    def _joined(cls, value: str | list[str] | None) -> str | None:
        return joined(value)

    @model_validator(mode="after")
    def _check_steps(self):
        if self.steps and self.demonstrations is None:
            raise ValueError("sft.steps are steps on sft.demonstrations; name a file, or give sft.clean_steps")
        if self.demonstrations is not None and not self.steps:
            raise ValueError("sft.demonstrations are not read without sft.steps; give sft.steps=N")
        return self


class ToolLimits(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    calls: Count | None = None
    seconds: Seconds | None = None
    max_characters: Positive | None = None


class Rollout(Section):
    engine: Literal["torch", "vllm"] | Extension = "torch"
    """Engine that samples: `torch` runs the trainer's own model with a KV cache; `vllm` runs vLLM, in this process or
    on `server`; `package.module:name` is one of your own (docs/extending.md)."""
    server: Annotated[tuple[Url, ...], SESSION] = ()
    """URLs of replicas that `python -m igpo_fast.engines.vllm.serve` started; empty runs vLLM in this process."""
    server_timeout: Annotated[Seconds, SESSION] = 300.0
    """Seconds that a turn on a replica may take, and that a batch waits if no replica answers."""
    transfer: Annotated[Literal["auto", "http", "broadcast"], SESSION] = "auto"
    """How replicas get weights: as bytes over HTTP, or by a broadcast in a process group of trainer and replica (NCCL
    between GPUs, so none may be shared; gloo between CPUs). `auto` is `broadcast` where the trainer is on a GPU."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of vLLM; `auto` is `train.precision`. Weights are rounded to it when they are sent. With a
    lower precision than the trainer's, log-probabilities differ (`mismatch/*`): set `algorithm.importance`."""
    tensor_parallel: Annotated[Positive, SESSION] = 1
    """Workers (GPUs) over which vLLM splits each weight, in a run of one process without `server`. Replicas are started
    with `--tensor-parallel-size`."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1), SESSION] = 0.5
    """Share of the GPU that vLLM in this process takes for weights and cache; while training it sleeps."""
    mismatch_warn: Annotated[float, Field(gt=0, le=1e6), SESSION] = 0.1
    """Warn if the engine's and the trainer's log-probabilities differ by more than this, as a mean over a step's
    tokens."""
    mismatch_stop: Annotated[Difference, SESSION] = 0.0
    """Stop before the update if they differ by more than this; 0 never stops."""
    group_size: Positive = 8
    """Rollouts per question."""
    max_turns: Positive = 6
    """Turns after which a rollout ends, answered or not."""
    max_turn_tokens: Tokens = 24
    """Tokens that the policy may sample per turn."""
    max_tokens: Tokens = 512
    """Tokens per rollout, prompt and responses included."""
    temperature: Temperature = 1.0
    """Divides the logits, in sampling and in every log-probability of the step."""
    tools: Annotated[tuple[NonEmpty, ...], OneIsAList, Field(min_length=1)] = ("search",)
    """Tools that the policy may call: `search`, `visit` (a whole passage), `python` (a program), `lookup` (a cell of a
    table), `calculate` (exact arithmetic), and functions or classes of your own (docs/extending.md). With
    `data.source=verifiers`, `environment` by default: the environment's own."""
    dialect: Literal["tags", "chat"] | Extension = "tags"
    """Format of turns: Search-R1 tags, the model's own chat template and tool calls, or `package.module:name`
    (docs/extending.md)."""
    system: PlainText | None = None
    """Instructions before the question; null takes the dialect's own, an empty text (`rollout.system=`) gives none."""
    system_file: Annotated[FilePath | None, EmptyIsNone] = None
    """File that holds the instructions, in place of `system`: for long ones, with examples."""
    thinking: bool | None = None
    """Value of a chat template's `enable_thinking` (Qwen3's: `false` opens each turn with an empty thought); null keeps
    the template's default."""
    concurrency: Annotated[Concurrency, SESSION] = 256
    """Rollouts that the engine samples at a time. With `engine=torch` a rollout keeps its slot while it waits for a
    tool, so waiting rollouts count."""
    overlap: bool = True
    """With two passes: score finished groups while the others wait for their tools (and while replicas of `server`
    sample). Deadlines are paused while scoring runs; a vLLM in this process stays loaded. `false` scores once at the
    end, in fuller packs; results differ by rounding only."""
    oversample: Count = 0
    """Questions sampled beyond `train.questions`. The first ones whose groups are complete and, with `skip_collapsed`,
    not collapsed are trained on."""
    keep: Literal["order", "arrival"] = "order"
    """Groups of an over-sampled step that are kept: the first questions, or the first to finish. `arrival` cancels the
    rest: faster, but it prefers short rollouts, and the run is not reproducible."""
    skip_collapsed: bool = False
    """Prefer groups with an advantage other than 0 (dynamic sampling); collapsed groups only fill up. Gains count, so
    groups of equal outcomes are kept if their gains differ."""
    straggler_share: Share = 1.0
    """Share of a step's rollouts after which the rest have limited time; one that exceeds it is left out of its group.
    1 waits for all. Below 1 the run depends on the clock and is not reproducible."""
    straggler_factor: Annotated[float, Field(ge=1, le=1e6)] = 3.0
    """Time limit of stragglers: this factor times the median duration of finished rollouts."""

    @model_validator(mode="after")
    def _check_engine(self):
        if self.server and self.engine != "vllm":
            raise ValueError("rollout.server needs rollout.engine=vllm; set it, or leave the servers out")
        if self.transfer != "auto" and not self.server:
            raise ValueError("rollout.transfer is for the replicas of rollout.server; give them, or leave it at auto")
        if self.dtype != "auto" and self.engine != "vllm":
            raise ValueError("rollout.dtype needs rollout.engine=vllm; set it, or leave the dtype at auto")
        if self.tensor_parallel > 1 and (self.server or self.engine != "vllm"):
            raise ValueError(
                "rollout.tensor_parallel is for a vLLM without rollout.server; set rollout.engine=vllm, or start the "
                "replicas with --tensor-parallel-size"
            )
        return self

    @model_validator(mode="after")
    def _check_system(self):
        if self.system is not None and self.system_file is not None:
            raise ValueError("rollout.system and rollout.system_file both give instructions; leave one of them out")
        return self

    @model_validator(mode="after")
    def _check_choice(self):
        if self.oversample and not (self.skip_collapsed or self.straggler_share < 1 or self.keep == "arrival"):
            raise ValueError(
                "rollout.oversample needs something to choose by; set rollout.skip_collapsed, rollout.straggler_share "
                "or rollout.keep=arrival"
            )
        if not self.oversample and (self.skip_collapsed or self.keep == "arrival"):
            raise ValueError(
                "rollout.skip_collapsed and rollout.keep=arrival choose among spare groups; set rollout.oversample, too"
            )
        if self.skip_collapsed and self.keep == "arrival":
            raise ValueError(
                "rollout.keep=arrival ends a step before gains are known; leave rollout.skip_collapsed out"
            )
        return self

    @field_serializer("server", when_used="json")
    def _masked(self, server: tuple[str, ...]) -> list[str]:
        return [masked(url) for url in server]


class Tools(Section):
    """Limits of the tools of `rollout.tools`, and what they read. Searches have section `search`, too."""

    table: Annotated[FilePath | None, EmptyIsNone] = None
    """Table for `lookup` with `data.source=files`: .csv with a line of column names, or the formats of `data.corpus`.
    The first column names the rows."""

    calls: Count = 0
    """Most calls of a tool per rollout; further ones get a text that says so. 0 sets no limit."""
    seconds: Annotated[Seconds, SESSION] = 30.0
    """Seconds per call of a tool other than `search`."""
    max_characters: Positive = 65536
    """Longest result of a call in characters; longer ones count as failed."""
    max_tokens: Tokens = 512
    """Longest result in tokens that the policy sees; longer ones are cut."""
    limits: dict[NonEmpty, ToolLimits] = {}
    """Limits of single tools, by name: `{python: {calls: 3, seconds: 5}}`."""


class Search(Section):
    url: Annotated[SearchUrl | None, EmptyIsNone, SESSION] = None
    """URL of a server that speaks Search-R1's retrieval protocol, like `http://127.0.0.1:8000/retrieve`, with
    `user:password@` before the host if it wants them (config.yaml holds `***@` instead). Empty searches `data.corpus`
    in process."""
    top_k: Positive = 2
    """Passages per search."""
    max_passage_tokens: Tokens = 128
    """Longest passage in tokens; longer ones are cut."""
    timeout: Annotated[Seconds, SESSION] = 30.0
    """Seconds per attempt; a search takes at most `retries` + 1 attempts and the back-offs."""
    retries: Annotated[Retries, SESSION] = 5
    """Most retries of an attempt that ends in a timeout, a lost connection, 408, 429 or 5xx."""
    backoff: Annotated[Pause, SESSION] = 0.5
    """Seconds before the first retry, doubled before each later one, plus a jitter of up to 50 % derived from the
    query. A server's Retry-After may ask for more. At most 30."""
    concurrency: Annotated[Concurrency, SESSION] = 64
    """Most concurrent requests; further searches wait."""
    max_response_mb: Annotated[Megabytes, SESSION] = 4.0
    """Largest answer in 1e6 bytes; larger ones are refused."""
    on_failure: Annotated[Literal["text", "stop"], SESSION] = "text"
    """If all attempts of a search fail, `text` shows the policy `failure_text`, counts it (`tool/failures`) and warns,
    and the run stops only if every search of a step failed; `stop` ends the run at the first."""
    failure_text: NonEmpty = "The search service did not answer."
    """Text that the policy is then shown in place of passages."""

    @field_serializer("url", when_used="json")
    def _masked(self, url: str | None) -> str | None:
        return url and masked(url)


class Algorithm(Section):
    name: Literal["igpo", "ig_only", "grpo", "dr_grpo", "rloo", "reinforce_pp", "gspo", "ppo", "ppo_ig"] = "igpo"
    """Algorithm. `ig_only` is igpo without the outcome, `ppo_ig` is ppo with gains as rewards; all others but igpo are
    outcome-only. `ppo` and `ppo_ig` have a critic (section `critic`)."""
    preset: Literal[
        "paper", "paper_v1", "robust", "a2tgpo", "tips", "ig_search", "infopo", "dr_venus", "stepsearch"
    ] = "paper"
    """Preset for keys of this section, unless they are given; docs/algorithms.md says where each comes from."""
    basis: Basis = "log_prob"
    """Definition of a value: mean log-probability of the answer's tokens, or its exp."""
    pool: Pool = "separate"
    """Normalisation of gains and outcomes: in separate pools of a group, in a joint one, separate with gains brought to
    the outcomes' size (`scaled_separate`), gains of each turn number among themselves (`turn_index`), or gains as they
    are (`raw`)."""
    ig_gate: NonNegative = 0.0
    """Gains smaller than this count as 0. Its unit is that of `basis`: `robust`'s 0.02 is a probability; with
    `log_prob` it would be nats. The size of true gains depends on the model: `reward/ig_gated` is the share that is
    dropped."""
    ig_center: bool = True
    """Subtract the mean gain of the group."""
    ig_min_std: NonNegative = 1e-6
    """Added to the standard deviation of gains; with `pool=joint` to the one of all rewards."""
    outcome_min_std: NonNegative = 1e-6
    """Added to the standard deviation of outcomes; not used with `pool=joint`."""
    min_var: NonNegative = 1e-8
    """Added to the variance of gains, of outcomes and of a joint pool, before its square root is taken."""
    format_penalty: Annotated[float, Field(ge=-100, le=100)] = -2.0
    """Outcome of a rollout without a well-formed answer."""
    kl: NonNegative = 0.001
    """Coefficient of the k3 KL to the reference; 0 removes the reference model and its forward."""
    entropy: NonNegative = 0.001
    """Coefficient of the entropy bonus."""
    outcome: Outcome = "f1"
    """Reward of the last turn: word-level F1 (`f1`), exact match (`em`), what the tools say (`tools`), or a function of
    your own, `package.module:function` or `path/to/file.py:function`, called with each rollout (docs/algorithms.md)."""
    pseudo_answer: PseudoAnswer = "none"
    """Ground truth of questions: their `answers` (`none`); the answer that most rollouts of the group give
    (`majority`), so that questions need none; or a long text (`reference`), whose first `data.max_answer_tokens` are
    scored and whose F1 is the outcome."""
    f1_normalisation: Normalisation = "igpo"
    """`igpo`: lower case, punctuation to spaces. `squad`: also drops articles, and punctuation outright (1,000 is
    1000). `hotpot`: like `squad`, and yes and no match only themselves."""
    answers: Answers = "first"
    """Accepted answers that a value is computed from."""
    value_model: ValueModel = "policy"
    """Model that gives the values: the policy itself, in the pass that trains it; the `reference`, in the forward that
    `kl` needs anyway; or a `teacher`, a copy of the policy that is refreshed every `teacher_every` steps."""
    teacher_every: Positive = 200
    """Steps between refreshes of the teacher."""
    gain: Literal["information"] | Extension = "information"
    """What a turn earns: the increase of the value (`information`), or what a function of your own makes of the
    rollout's values, `package.module:name` (docs/extending.md)."""
    baseline: Baseline = "previous"
    """What a value is compared with: the value before the turn (`previous`); the value with responses that searches for
    other questions of the batch got (`random`); or nothing (`none`). `masked` needs no answers: the probability of the
    rollout's own next turn is compared with the one after an empty response."""
    baseline_samples: Positive = 3
    """Responses per turn with `baseline=random`; their mean counts."""
    wrapper: str | None = None
    """Text around a forced answer, which replaces `{}`. null takes the released code's,
    `\\nNow there's enough information to answer\\n</think>\\n<answer>\\n{}\\n</answer>`, after the `<think>` with which
    that code opens every turn (left out if a chat template opens the thought; after a thought that the template
    closed, the answer stands in `<answer>` alone)."""
    accumulate: Accumulate = "sum"
    """What a turn's advantage holds of later turns: the discounted `sum` of their rewards; the discounted sum of gains
    over the square root of their number, and the outcome (`sum_over_sqrt`); or the outcome alone (`none`)."""
    ig_weight: NonNegative = 1.0
    """Weight of normalised gains; of outcomes it is 1."""
    ig_weight_end: NonNegative | None = None
    """Weight of gains in the last step, to which `ig_weight` leads in equal parts; null keeps it."""
    ig_potential: bool = False
    """With `ppo_ig`: the outcome pays back the value that the last turn begins with, so that gains say when a rollout
    earns but not how much in all (TIPS; exact with `gamma=1` and `ig_gate=0`)."""
    ig_spread: NonNegative = 0.0
    """Gains count `sigmoid(-s / ig_spread)` times, where s is the standard deviation of the group's outcomes: most
    where outcomes tell its rollouts apart least (InfoPO); 0 counts them alike."""
    credit: Literal["turn", "query"] = "turn"
    """Tokens that a gain acts on: all of its turn; or those of the tool call alone, over their number (`query`), which
    needs `accumulate=none`."""
    ig_tools: tuple[NonEmpty, ...] = ()
    """Tools whose turns earn gains. Other turns share the advantage of the next that does; empty is all turns."""
    ig_every: Positive = 1
    """Only every so many turns earn a gain, for all turns since the last that did."""
    turn_format_penalty: NonNegative = 0.0
    """What a malformed turn pays in place of its gain; 0 leaves it its gain. For the last turn there is
    `format_penalty`."""
    redundancy_penalty: NonNegative = 0.0
    """Times the share of a response's passages that the rollout has seen before, subtracted from advantages."""
    adaptive_clip: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Clip ranges of a turn are up to so much wider or narrower by its normalised gain (A2TGPO); 0 leaves them."""
    gamma: Fraction = 1.0
    """Discount of later turns' rewards; outcome-only algorithms use 1. With a critic (`ppo`, `ppo_ig`) it is the
    discount of later steps, 1 unless given whatever the preset."""
    passes: Literal["auto", "one", "two"] = "auto"
    """Passes over a rollout's tokens per update."""
    ratio: Ratio = "token"
    """Tokens that share one policy ratio, the exp of their mean log ratio: each alone, those of a turn, or all of a
    rollout. `sequence` is the default of `name=gspo`."""
    surrogate: Surrogate = "clip"
    """What becomes of the ratio: PPO's `clip`; `cispo`, a clipped weight without gradient; `sapo`, a soft gate;
    `vespo`, a soft weight of whole turns or rollouts, which needs `ratio=turn` or `sequence`."""
    clip_low: Fraction = 0.2
    """Ratios below 1 - clip_low are clipped. With `ratio=turn` 0.003, with `ratio=sequence` 0.0003 unless given."""
    clip_high: NonNegative = 0.2
    """Ratios above 1 + clip_high are clipped. With `ratio=turn` 0.004, with `ratio=sequence` 0.0004 unless given."""
    dual_clip: Annotated[float, Field(gt=1, le=1e6)] | None = None
    """Bound on the loss of tokens with negative advantage (usually 3.0)."""
    aggregation: Aggregation = "seq_mean_token_mean"
    """Aggregation of token losses. `seq_mean_token_sum_norm` divides a rollout's sum by the most tokens that a rollout
    may have; it is the default of `name=dr_grpo`."""
    importance: Literal["none", "token", "sequence", "geometric"] = "none"
    """Importance weights that correct for an engine whose probabilities differ from the trainer's: the quotient of the
    token's probabilities, of the rollout's (their product over its tokens), or the geometric mean over its tokens."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """Treatment of importance weights outside `importance_floor` and `importance_cap`: `truncate` to the nearer bound,
    or `mask` the loss of their token or rollout. Masked tokens still count in `aggregation` (verl leaves them out)."""
    importance_cap: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """Largest importance weight."""
    importance_floor: Fraction = 0.0
    """Smallest importance weight; 0 sets none."""

    @model_validator(mode="before")
    @classmethod
    def _fill_preset(cls, values):
        if not isinstance(values, dict):
            return values
        preset = values.get("preset", "paper")
        chosen = PRESETS.get(preset, {}) if isinstance(preset, str) else {}
        name = values.get("name", chosen.get("name"))
        own = OWN_LOSS.get(name, {}) if isinstance(name, str) else {}
        values = {**chosen, **own, **values}
        ratio = values.get("ratio")
        return {**(CLIP_OF_RATIO.get(ratio, {}) if isinstance(ratio, str) else {}), **values}

    @model_validator(mode="after")
    def _check_gains(self):
        if self.ig_weight == 0 and not self.ig_weight_end:
            raise ValueError(
                "algorithm.ig_weight=0 leaves outcomes alone; use algorithm.name=grpo, which scores no answers"
            )
        if self.adaptive_clip and self.pool == "raw":
            raise ValueError(
                "algorithm.adaptive_clip follows normalised gains, and pool=raw normalises none; choose another pool"
            )
        if self.adaptive_clip and self.ratio == "sequence":
            raise ValueError(
                "algorithm.adaptive_clip gives each turn a clip range, and ratio=sequence has one ratio for all turns; "
                "use ratio=turn or token"
            )
        if self.surrogate == "vespo" and self.ratio == "token":
            raise ValueError("algorithm.surrogate=vespo weighs whole turns or rollouts; set ratio=turn or sequence")
        if self.surrogate != "clip" and self.dual_clip is not None:
            raise ValueError(f"algorithm.dual_clip bounds surrogate=clip, not {self.surrogate}; leave it empty")
        return self

    @property
    def has_gains(self) -> bool:
        """Whether turns earn gains."""
        return self.name in WITH_GAINS

    @property
    def needs_answers(self) -> bool:
        """Whether every question must have an accepted answer."""
        scored = self.has_gains and self.baseline != "masked"
        return self.pseudo_answer != "majority" and (scored or self.outcome in OF_ANSWERS)

    @model_validator(mode="after")
    def _check_pseudo_answer(self):
        if self.pseudo_answer == "reference" and self.outcome == "em":
            raise ValueError(
                "algorithm.outcome=em with algorithm.pseudo_answer=reference rewards only who writes the whole text; "
                "use algorithm.outcome=f1, or a function of your own"
            )
        return self

    def changed(self, key: str) -> bool:
        """Whether a key has another value than preset and algorithm give it."""
        default = {key: type(self).model_fields[key].default} | CLIP_OF_RATIO.get(self.ratio, {})
        usual = default | PRESETS[self.preset] | OWN_LOSS.get(self.name, {})
        return getattr(self, key) != usual[key]

    @model_validator(mode="after")
    def _check_credit(self):
        if self.credit == "query" and self.name in CRITICS:
            raise ValueError(
                f"algorithm.credit=query needs advantages that are compared within groups; algorithm.name={self.name} "
                "has a critic; use igpo"
            )
        if self.credit == "query" and self.accumulate != "none":
            raise ValueError(
                f"algorithm.credit=query gives each gain to its own tool call alone, and accumulate={self.accumulate} "
                "to earlier turns, too; set algorithm.accumulate=none"
            )
        return self

    @model_validator(mode="after")
    def _check_potential(self):
        if (
            self.name == "ppo_ig"
            and self.ig_potential
            and (self.gain, self.baseline, self.gamma, self.ig_gate) != ("information", "previous", 1, 0)
        ):
            raise ValueError(
                "algorithm.ig_potential pays back the sum of gains, which is a value only with gain=information, "
                "baseline=previous, gamma=1 and ig_gate=0; set these, or leave it out"
            )
        return self

    @model_validator(mode="after")
    def _check_idle(self):
        if self.name not in CRITICS:
            return self
        for key in OF_GROUPS:
            if self.changed(key):
                raise ValueError(
                    f"algorithm.{key} does nothing with algorithm.name={self.name}, whose rewards are compared with a "
                    "critic's values and not within groups; leave it out"
                )
        return self

    @model_validator(mode="after")
    def _check_bounds(self):
        sides = {
            "importance_cap": "above 1; raise the cap (2 is usual)",
            "importance_floor": "below 1; lower the floor",
        }
        for key, side in sides.items():
            if self.importance_mode == "mask" and getattr(self, key) == 1:
                raise ValueError(f"algorithm.{key}=1 with importance_mode=mask drops tokens whose weight rounds {side}")
        return self


PRESETS: dict[str, dict] = {
    "robust": dict(
        basis="prob", pool="separate", ig_gate=0.02, ig_center=False, ig_min_std=0.05, outcome_min_std=0.0,
        min_var=0.0, format_penalty=0.0, kl=0.0, entropy=0.0,
    ),
    "paper": dict(
        basis="log_prob", pool="separate", ig_gate=0.0, ig_center=True, ig_min_std=1e-6, outcome_min_std=1e-6,
        min_var=1e-8, format_penalty=-2.0, kl=0.001, entropy=0.001,
    ),
    "paper_v1": dict(
        basis="prob", pool="joint", ig_gate=0.0, ig_center=True, ig_min_std=1e-6, outcome_min_std=1e-6,
        min_var=1e-8, format_penalty=-2.0, kl=0.001, entropy=0.001,
    ),
    "a2tgpo": dict(
        basis="prob", pool="turn_index", ig_gate=0.0, ig_center=True, ig_min_std=0.0, outcome_min_std=0.0,
        min_var=0.0, format_penalty=-1.0, kl=0.0, entropy=0.0, outcome="em", accumulate="sum_over_sqrt",
        adaptive_clip=0.3, ratio="turn",
    ),
    "tips": dict(
        name="ppo_ig", basis="log_prob", answers="sum", value_model="teacher", teacher_every=200, ig_weight=0.02,
        ig_potential=True, ig_gate=0.0, outcome="em", format_penalty=-0.2, kl=0.001, entropy=0.0,
    ),
    "ig_search": dict(
        basis="log_prob", baseline="random", baseline_samples=3, pool="raw", accumulate="none", credit="query",
        ig_weight=0.3, ig_gate=0.0, ig_center=True, ig_min_std=1e-6, outcome_min_std=1e-6, min_var=0.0, outcome="em",
        format_penalty=0.0, kl=0.001, entropy=0.0,
    ),
    "infopo": dict(
        basis="log_prob", baseline="masked", pool="separate", accumulate="none", ig_weight=0.5, ig_spread=0.5,
        ig_gate=0.0, ig_center=True, ig_min_std=1e-6, outcome_min_std=1e-6, min_var=0.0, format_penalty=0.0, kl=0.0,
        entropy=0.001,
    ),
    "dr_venus": dict(
        basis="log_prob", pool="scaled_separate", ig_gate=0.0, ig_center=True, ig_min_std=1e-6, outcome_min_std=1e-6,
        min_var=1e-8, format_penalty=-1.0, kl=0.001, entropy=0.0, turn_format_penalty=1.0, gamma=0.95,
    ),
    "stepsearch": dict(
        name="ppo", redundancy_penalty=0.6, format_penalty=-1.0, kl=0.001, entropy=0.001,
    ),
}  # fmt: skip

OWN_LOSS: dict[str, dict] = {
    "dr_grpo": dict(aggregation="seq_mean_token_sum_norm"),
    "gspo": dict(ratio="sequence"),
    "ppo": dict(gamma=1.0, adaptive_clip=0.0),
    "ppo_ig": dict(gamma=1.0, adaptive_clip=0.0),
}
"""Defaults that come with ``algorithm.name``."""
WITH_GAINS = ("igpo", "ig_only", "ppo_ig")
"""Algorithms whose turns earn gains."""
CRITICS = ("ppo", "ppo_ig")
"""Algorithms with a critic."""
OF_GAINS = (
    "basis", "answers", "wrapper", "gain", "baseline", "baseline_samples", "value_model", "teacher_every", "pool",
    "ig_gate", "ig_center", "ig_min_std", "accumulate", "ig_weight", "ig_weight_end", "ig_potential", "ig_spread",
    "credit", "ig_tools", "ig_every", "turn_format_penalty", "adaptive_clip", "gamma",
)  # fmt: skip
"""Keys of ``algorithm`` about gains, which outcome-only algorithms do not have."""
OF_GROUPS = (
    "pool", "ig_center", "ig_min_std", "outcome_min_std", "min_var", "accumulate", "adaptive_clip", "ig_spread",
)  # fmt: skip
"""Keys of ``algorithm`` about normalised rewards, which a critic's algorithms do not have."""
CLIP_OF_RATIO: dict[str, dict] = {
    "turn": dict(clip_low=3e-3, clip_high=4e-3),
    "sequence": dict(clip_low=3e-4, clip_high=4e-4),
}
"""Defaults that come with ``algorithm.ratio``: a mean over tokens stays closer to 1."""


class Critic(Section):
    """The critic of `algorithm.name=ppo` and `ppo_ig`: a value head on the policy's hidden states. Unused otherwise."""

    lr: LearningRate = 0.05
    """Learning rate of the head, about the farthest that one update moves a value, whatever the model: its unit is that
    of rewards. Warm-up and schedule are section `train`'s."""
    coefficient: NonNegative = 0.1
    """Weight of the value loss in the model's layers, beside the policy's; 0 trains the head alone."""
    level: Level = "token"
    """Steps of advantage estimation: decision tokens, or turns, whose value is that of their first token."""
    gae_lambda: Fraction = 1.0
    """Weight of later steps' errors in an advantage: 1 compares the whole return with the value (no bias), less trusts
    the values of the next steps (less variance)."""
    clip: NonNegative = 0.5
    """Farthest that a value moves from the one before the update; 0 sets no limit. It acts with `train.updates` above
    1."""
    whiten: bool = True
    """Bring advantages to mean 0 and standard deviation 1 over the batch's decision tokens."""


class Train(Section):
    steps: Positive = 100
    """Steps of the whole run."""
    seed: Seed = 0
    """Seed of sampling, question order and initial weights."""
    questions: Positive = 16
    """Questions per step, each with `rollout.group_size` rollouts."""
    updates: Positive = 1
    """Optimiser updates per batch, each on its share of the questions."""
    token_budget: Annotated[Tokens, SESSION] = 16384
    """Most packed tokens per forward. If memory does not suffice, one process halves it, once per session, and repeats
    the update."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype that the trainer computes in. The weights that AdamW updates, its states and the sums of gradients are
    float32 in both; bfloat16 weights are those, rounded after each update."""
    lr: LearningRate = 1e-6
    """Peak learning rate of AdamW."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: `constant`, or falling to 0, which the update after the last would have."""
    warmup_steps: Count = 0
    """Steps of linear warm-up: with 10, the first step has a tenth of `lr` and the tenth all of it."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's."""
    weight_decay: NonNegative = 0.0
    """AdamW's."""
    max_grad_norm: Norm = 1.0
    """Largest gradient norm; larger gradients are scaled down to it."""
    checkpoint_every: Annotated[Positive, SESSION] = 20
    """Steps between checkpoints; the last step has one, too."""
    keep_checkpoints: Annotated[Positive, SESSION] = 2
    """Number of newest checkpoints to keep."""
    keep_best: Annotated[EvalMetric, SESSION] = ""
    """A number of the evaluation, like `eval/f1` or `eval/NAME/f1`: the checkpoint with its largest value is kept, too.
    A step that exceeds it is saved, whatever `checkpoint_every` says. Empty keeps the newest only."""
    threads: Annotated[Threads, SESSION] = 0
    """CPU threads of torch; 0 keeps torch's own choice."""

    @model_validator(mode="after")
    def _check_steps(self):
        if self.questions % self.updates:
            raise ValueError(f"train.updates={self.updates} must divide train.questions={self.questions}")
        if self.warmup_steps > self.steps:
            raise ValueError(
                f"train.warmup_steps={self.warmup_steps} exceeds train.steps={self.steps}, so train.lr is never "
                "reached; lower train.warmup_steps"
            )
        return self


class Distributed(Section):
    engine: Annotated[Literal["auto", "none", "deepspeed"], SESSION] = "auto"
    """Owner of the weights: plain torch in one process (`none`), or DeepSpeed's ZeRO in any number. `auto` takes
    DeepSpeed on GPUs and with several processes."""
    zero_stage: Annotated[Literal[1, 2, 3], SESSION] = 2
    """What DeepSpeed shares out over the processes: optimiser states and masters (1; in bfloat16 as 2), gradients too
    (2), weights too (3)."""
    offload: Annotated[Literal["none", "optimizer", "all"], SESSION] = "none"
    """What DeepSpeed keeps in the CPU's memory: optimiser states and masters, or with `all` and `zero_stage=3` the
    weights too."""

    @model_validator(mode="after")
    def _check_offload(self):
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError("distributed.offload=all keeps weights elsewhere, which needs distributed.zero_stage=3")
        return self


class Eval(Section):
    every: Annotated[Count, SESSION] = 20
    """Steps between evaluations; 0 evaluates at the start and the end only."""
    questions: Positive = 128
    """Questions per evaluation and data set; of a larger data set a fixed random part."""
    temperature: Annotated[float, Field(ge=0, le=1e3)] = 1.0
    """0 is greedy."""
    top_p: Share = 1.0
    """Sample from the smallest set of tokens with this probability."""
    top_k: Count = 0
    """Sample from the k likeliest tokens; 0 keeps all."""
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10)] = 1.0
    """Penalty on tokens already present (divides their score); 1 is none."""

    @field_validator("temperature")
    @classmethod
    def _check_temperature(cls, value):
        if 0 < value < 1e-3:
            raise ValueError("below 0.001 is as good as greedy; give 0 for greedy")
        return value


GROUP_NORMALISED = ("igpo", "grpo", "dr_grpo", "rloo", "gspo")
"""Algorithms whose advantages compare a rollout with the rest of its group."""
GIVEN_SFT = dict(clean_steps=0, noisy_steps=0, hard_steps=0)
"""Defaults of section ``sft`` with demonstrations from files."""
LOADED_MODEL_SFT = dict(**GIVEN_SFT, lr=1e-5)
"""Defaults of section ``sft`` with ``model.path``: made-up demonstrations are too simple for a pretrained model."""
OF_ENVIRONMENTS: dict[str, dict] = {
    "rollout": dict(tools=(ENVIRONMENT,)),
    "algorithm": dict(outcome=OF_TOOLS),
    "sft": GIVEN_SFT,
}
"""Defaults that come with ``data.source=verifiers``."""


class Config(Section):
    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    world: World = World()
    sft: Sft = Sft()
    rollout: Rollout = Rollout()
    tools: Tools = Tools()
    search: Search = Search()
    algorithm: Algorithm = Algorithm()
    critic: Critic = Critic()
    train: Train = Train()
    eval: Eval = Eval()
    distributed: Distributed = Distributed()

    renamed: ClassVar[dict[str, str]] = {"model.dtype": "train.precision"}
    """Keys of earlier versions, for messages."""

    @model_validator(mode="before")
    @classmethod
    def _no_made_up_demonstrations(cls, values):
        model, sft = (values.get(key, {}) for key in ("model", "sft")) if isinstance(values, dict) else ({}, {})
        model, sft = (s.model_dump(exclude_unset=True) if isinstance(s, Section) else s for s in (model, sft))
        if not (isinstance(model, dict) and isinstance(sft, dict)):
            return values
        defaults = LOADED_MODEL_SFT if model.get("path") else GIVEN_SFT if sft.get("demonstrations") else {}
        return values | {"sft": defaults | sft}

    @model_validator(mode="before")
    @classmethod
    def _what_an_environment_brings(cls, values):
        data = values.get("data", {}) if isinstance(values, dict) else {}
        source = data.source if isinstance(data, Data) else data.get("source") if isinstance(data, dict) else None
        if source != "verifiers":
            return values
        for name, defaults in OF_ENVIRONMENTS.items():
            given = values.get(name, {})
            given = given.model_dump(exclude_unset=True) if isinstance(given, Section) else given
            if isinstance(given, dict):
                values = values | {name: defaults | given}
        return values

    @model_validator(mode="before")
    @classmethod
    def _tools_of_tables(cls, values):
        world, rollout = (values.get(key, {}) for key in ("world", "rollout")) if isinstance(values, dict) else ({}, {})
        world, rollout = (s.model_dump(exclude_unset=True) if isinstance(s, Section) else s for s in (world, rollout))
        if not (isinstance(world, dict) and isinstance(rollout, dict) and world.get("kind") == "tables"):
            return values
        return values | {"rollout": {"tools": (LOOKUP, CALCULATE)} | rollout}

    @model_validator(mode="after")
    def _check_data(self):
        if self.data.source == "world" and self.tools.table is not None:
            raise ValueError("tools.table is not read with data.source=world; set data.source=files")
        if SEARCH in self.rollout.tools and self.data.source == "files" and not (self.data.corpus or self.search.url):
            own = "or data.corpus=contexts for the questions' own paragraphs"
            raise ValueError(f"data.corpus is needed with data.source=files; give data.corpus=FILE, {own}")
        lacking = {"search", "visit"} & set(self.rollout.tools)
        if self.data.source == "verifiers" and lacking and not self.search.url:
            raise ValueError(
                f"rollout.tools: {min(lacking)} has no passages with data.source=verifiers; give search.url, or leave "
                "it out"
            )
        if self.model.path is None and self.model.tokenizer == "world" and self.data.source != "world":
            raise ValueError(
                "model.tokenizer=world knows only the made-up world; use model.tokenizer=bpe or model.path=DIR"
            )
        return self

    @model_validator(mode="after")
    def _check_group(self):
        name = self.algorithm.name
        if self.algorithm.baseline == "random" and self.train.questions == 1:
            raise ValueError(
                "algorithm.baseline=random takes responses from other questions of the batch; give train.questions=2 "
                "or more"
            )
        if self.rollout.group_size == 1 and name in GROUP_NORMALISED:
            raise ValueError(
                f"rollout.group_size=1 with algorithm.name={name} leaves nothing to compare a rollout with; "
                "give 2 or more, or algorithm.name=reinforce_pp or ppo"
            )
        if self.rollout.group_size == 1 and self.algorithm.pseudo_answer == "majority":
            raise ValueError(
                "rollout.group_size=1 with algorithm.pseudo_answer=majority calls every answer right; give 3 or more"
            )
        if self.rollout.max_turns == 1 and name == "ig_only":
            raise ValueError(
                "rollout.max_turns=1 with algorithm.name=ig_only leaves nothing to reward, for only turns before the "
                "last have gains; give 2 or more"
            )
        return self

    def dump(self) -> str:
        """The configuration as YAML, with every default, and credentials in URLs masked."""
        return yaml12.write(self.model_dump(mode="json"))


def values_of(config: Config) -> dict[str, object]:
    """``section.key`` -> value."""
    return {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}


def session_keys() -> set[str]:
    """``section.key`` of every key that is marked ``SESSION``."""
    return {
        f"{section}.{key}"
        for section, sub in Config.model_fields.items()
        for key, field in sub.annotation.model_fields.items()
        if (field.json_schema_extra or {}).get("session")
    }


def load(file: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        file: a YAML file of sections; None takes the defaults.
        overrides: ``section.key=value`` strings; later ones win. A text is taken as it is written, unless quoted;
            other values are YAML.
    Raises:
        InputError: missing or malformed file, unknown key, wrong type or value.
    """
    return config_load.load(Config, file, overrides)
