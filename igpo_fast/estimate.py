"""A step of a run before it runs: tokens, FLOPs, memory, traffic and time, from its configuration and assumptions.

What the code decides is asked of the code: packs are made by ``pack_within``, parameters are counted on the model,
passes are chosen by ``choose_passes``. The rest is assumed, and ``Estimate.assumptions`` says it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.table import Table

from igpo_fast.config import Config
from igpo_fast.errors import InputError
from igpo_fast.run import memory
from igpo_fast.run.memory import Place, Shape
from igpo_fast.update.advantages import recipe_of
from igpo_fast.update.passes import choose_passes
from igpo_fast.update.scoring import Scoring
from igpo_kernels import Branch, Fork, RolloutTokens, Tree, TreePlan, pack_within
from igpo_kernels.tree_attention.blocks import visible_area

EMPTY = 16
"""Tokens of a response to a search that found nothing."""


class Gpu(NamedTuple):
    """A GPU as its data sheet has it."""

    gb: float
    """Memory in 1e9 bytes."""
    bfloat16: float
    """Dense TFLOP/s with float32 sums."""
    float32: float
    """TFLOP/s outside the tensor cores."""
    memory: float
    """GB/s of its memory."""
    link: float
    """GB/s to another GPU of the host, one way."""
    network: float
    """GB/s to another host, one way."""


# NVIDIA's data sheets of H200 and H100 (SXM), A100 80GB (SXM) and L40S, and the Ada architecture's white paper (4090).
# Links are half of what they call NVLink's bandwidth, or PCIe 4.0 x16; networks are one adapter per GPU of 400 Gb/s, of
# 200 (A100), and a quarter of 100 for cards without NVLink.
GPUS = {
    "h200": Gpu(141, 989, 67, 4800, 450, 50),
    "h100": Gpu(80, 989, 67, 3350, 450, 50),
    "a100": Gpu(80, 312, 19.5, 2039, 300, 25),
    "l40s": Gpu(48, 362, 91.6, 864, 32, 3),
    "4090": Gpu(24, 165, 82.6, 1008, 32, 3),
}
ROOM = 0.95
"""Share of a GPU's memory that parts may fill: the CUDA context and the allocator's gaps take the rest."""


@dataclass(frozen=True)
class Assumed:
    """What a configuration does not say."""

    tokens: int
    """Mean length of a rollout."""
    turns: int
    """Mean number of turns."""
    prompt: int = 512
    """Tokens of a prompt, which a group shares."""
    answer: int = 32
    """Tokens of a forced answer with its wrapper."""
    mfu: float = 0.3
    """Share of the GPU's FLOP/s in passes over packs and prefills."""
    sampling: float = 0.6
    """Share of the memory's bandwidth while sampling."""
    traffic: float = 0.7
    """Share of links' and networks' bandwidth."""
    per_host: int = 8
    """GPUs per host."""
    host: float = 20.0
    """GB/s at which a rank's offloaded states are updated."""
    exchange: float = 1.0
    """GB/s at which a rank receives the others' rollouts."""
    rollout_bytes: int = 12
    """Bytes per token of a rollout between ranks: ids, log-probabilities and text."""


@dataclass(frozen=True)
class Work:
    """One pass over packs: what is read and multiplied."""

    tokens: float
    pairs: float
    """Visible (query, key) pairs."""
    decisions: float
    """Rows of the LM head that are trained."""
    answers: float
    """Rows of the LM head that are only scored."""

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, factor: float) -> Work:
        return Work(self.tokens * factor, self.pairs * factor, self.decisions * factor, self.answers * factor)


def work_of(plans: Sequence[TreePlan]) -> Work:
    """The work of a pass over ``plans``."""
    rows = [np.unique(plan.row[: plan.n_decisions]).size for plan in plans]
    all_rows = [np.unique(plan.row).size for plan in plans]
    return Work(
        sum(plan.n_tokens for plan in plans), sum(visible_area(plan) for plan in plans), sum(rows),
        sum(all_rows) - sum(rows),
    )  # fmt: skip


def forward_flops(shape: Shape, work: Work) -> float:
    """FLOPs of a forward: two per number of the linear layers and token, four per visible pair, head and its size."""
    return (
        2 * (shape.linear + shape.adapters) * work.tokens
        + _attention_flops(shape, work)
        + 2 * shape.head * (work.decisions + work.answers)
    )


def training_flops(shape: Shape, work: Work, checkpointing: bool) -> float:
    """FLOPs of a forward and its backward.

    The backward multiplies for inputs and for weights, of which frozen ones have none; attention's does five products
    for the forward's two. Checkpointing repeats the decoder's forward, but for its attention.
    """
    layers = shape.linear + shape.adapters
    updated = shape.adapters or shape.linear
    attention = _attention_flops(shape, work)
    decoder = 2 * (layers + updated) * work.tokens + 2.5 * attention
    head = 2 * shape.head * work.decisions * (1 if shape.adapters else 2)
    again = 2 * layers * work.tokens if checkpointing else 0.0
    return forward_flops(shape, work) + decoder + head + again


def _attention_flops(shape: Shape, work: Work) -> float:
    lm = shape.lm
    size = getattr(lm, "head_dim", None) or lm.hidden_size // lm.num_attention_heads
    return 4.0 * lm.num_attention_heads * size * lm.num_hidden_layers * work.pairs


def group_tree(config: Config, assumed: Assumed, scored: bool) -> Tree:
    """A group of the assumed lengths. Its rollouts share the prompt alone.

    Raises:
        InputError: the assumed rollout does not fit ``rollout.max_tokens`` or ``max_turns``, or is too short.
    """
    length, turns, p, rollout = assumed.tokens, assumed.turns, assumed.prompt, config.rollout
    if length > rollout.max_tokens or turns > rollout.max_turns:
        raise InputError(
            f"--tokens-per-rollout={length} --turns={turns}: more than rollout.max_tokens={rollout.max_tokens} and "
            f"rollout.max_turns={rollout.max_turns}; give less, or raise these"
        )
    if length < p + 2 * turns:
        raise InputError(
            f"--tokens-per-rollout={length}: no room for --prompt-tokens={p} and --turns={turns}; give more, or less "
            "of these"
        )
    boundaries = p + (length - p) * np.arange(turns) // turns
    ends = np.append(boundaries[1:], length)
    response = config.search.top_k * config.search.max_passage_tokens
    turn = np.full(length, -1)
    for t, (start, stop) in enumerate(zip(boundaries, ends, strict=True)):
        turn[start : stop if t == turns - 1 else max(start + 1, stop - response)] = t
    ids = np.where(np.arange(length) < p, 0, 1 + np.arange(rollout.group_size)[:, None])
    if not scored:
        return Tree([RolloutTokens(i, ids[i], turn, boundaries) for i in range(rollout.group_size)])
    scoring = _scoring(config, assumed)
    branches = scoring.branches_of(None)

    def forks_of(i: int) -> Iterator[Fork]:
        """As ``Scoring.forks``, of the assumed lengths; no two begin alike."""
        for t in range(turns - 1):
            end = int(np.flatnonzero(turn == t)[-1]) + 1
            for sample in range(scoring.samples if scoring.baseline == "random" else scoring.baseline == "masked"):
                replaced = np.full(scoring.response_tokens, -1 - sample - scoring.samples * (t + turns * i)) % 2**31
                if scoring.baseline == "masked":
                    following = ids[i][turn == t + 1]
                    both = np.concatenate([replaced, following])
                    yield Fork(end, both, len(replaced), len(both), t)
                for branch in branches:
                    both = np.concatenate([replaced, branch.ids])
                    yield Fork(end, both, len(replaced) + branch.start, len(both), t)

    rollouts = [RolloutTokens(i, ids[i], turn, boundaries, tuple(forks_of(i))) for i in range(rollout.group_size)]
    return Tree(rollouts, branches)


def _scoring(config: Config, assumed: Assumed) -> Scoring:
    """What is scored, with responses as long as ``search.top_k`` passages."""
    recipe = recipe_of(config.algorithm)
    count = recipe.scored_answers
    branch = Branch(np.zeros(assumed.answer, np.int32), assumed.answer - 1, assumed.answer)
    branches = [branch] * (config.data.max_answers if count is None else count)
    baseline = recipe.baseline if recipe.needs_values else "previous"
    response = config.search.top_k * config.search.max_passage_tokens
    return Scoring(
        lambda question: branches, answer_tokens=len(branches) * assumed.answer, baseline=baseline,
        samples=config.algorithm.baseline_samples,
        longest_response=min(response, config.rollout.max_tokens) if baseline == "random" else 0,
        masked_response=np.zeros(EMPTY, np.int32) if baseline == "masked" else None,
    )  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """One step of a run, by the numbers of its slowest rank where ranks differ."""

    gpus: int
    rollouts: int
    passes: str
    tokens: dict[str, float]
    """Tokens of a step."""
    flops: dict[str, float]
    """FLOPs of a step, all ranks together."""
    parts: list[memory.Part]
    fits: bool
    host_bytes: float
    """Bytes of the CPU's memory that the ranks of one host take: offloaded parts, and the step's rollouts in each."""
    traffic: dict[str, float]
    """Bytes that a rank sends or receives per step."""
    seconds: dict[str, float]
    """Predicted time, by the trainer's phases (``time/*``)."""

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        parts = [part._asdict() | {"phases": list(part.phases)} for part in self.parts]
        return vars(self) | {"parts": parts}


def estimate(config: Config, shape: Shape, gpus: int, gpu: Gpu, assumed: Assumed) -> Estimate:
    """A step of ``config`` on ``gpus`` GPUs.

    Raises:
        InputError: the configuration cannot run so (``choose_passes``, ``group_tree``).
    """
    n, train, rollout = gpus, config.train, config.rollout
    if n > 1 and config.distributed.engine == "none":
        raise InputError(f"distributed.engine=none trains in one process, not on {n} GPUs; use auto or deepspeed")
    place = Place(n, True, gpu.gb * 1e9)
    parts = memory.parts_of(config, shape, place)
    recipe = recipe_of(config.algorithm)
    scoring = _scoring(config, assumed)
    passes = choose_passes(config, recipe, scoring)
    scored, plain = (_plans(config, group_tree(config, assumed, branches)) for branches in (True, False))
    whole = recipe.needs_whole_groups(passes)  # then values come from the pass that trains
    trained = scored if whole else plain
    first = [scored] * (passes == "two" or recipe.values_apart) + [plain] * (passes == "two" and recipe.values_apart)
    mine = math.ceil(train.questions / n)  # groups of the rank that has most

    group = {"score": sum(map(work_of, first), Work(0, 0, 0, 0)), "train": work_of(trained)}
    referred = config.algorithm.kl and recipe.value_source != "reference"
    of_group = {
        "score": forward_flops(shape, group["score"]),
        "train": training_flops(shape, group["train"], config.model.gradient_checkpointing)
        + (forward_flops(shape, group["train"]) if referred else 0.0),
    }
    rollouts = train.questions * rollout.group_size
    kept = rollouts * assumed.tokens * assumed.rollout_bytes
    sampled = plain[0].n_decisions // np.unique(plain[0].rollout[: plain[0].n_decisions]).size
    sampling = 2 * (shape.base + shape.adapters) * rollouts * assumed.tokens
    traffic = _traffic(config, shape, n, passes, _packs(train.token_budget, mine, trained))
    traffic["rollouts to every rank"] = kept * (n - 1) / n
    peak = 1e12 * (gpu.bfloat16 if train.precision == "bfloat16" else gpu.float32)
    speed = peak * assumed.mfu
    wire = 1e9 * assumed.traffic * (gpu.link if n <= assumed.per_host else min(gpu.link, gpu.network))
    seconds = {
        "rollout": _rollout_seconds(config, shape, place, gpu, assumed, sampled, speed),
        "exchange": traffic["rollouts to every rank"] / (1e9 * assumed.exchange),
        "score": mine * of_group["score"] / speed,
        "train": mine * of_group["train"] / speed
        + (traffic["gradients reduced"] + traffic["weights gathered"]) / wire
        + _adam_seconds(config, shape, place, gpu, assumed),
        "sync": _sync_seconds(config, shape, place, gpu, wire),
    }
    trunk = work_of(plain).tokens
    return Estimate(
        gpus=n, rollouts=rollouts, passes=passes,
        tokens={
            "of rollouts": float(rollouts * assumed.tokens), "sampled": float(rollouts * sampled),
            "trunk, prompts shared": float(train.questions * trunk),
            "branches": float(train.questions * (work_of(scored).tokens - trunk)),
            "read in all passes": float(train.questions * (group["score"].tokens + group["train"].tokens)),
        },
        flops={"rollout": float(sampling)} | {name: train.questions * value for name, value in of_group.items()},
        parts=parts, fits=memory.excess(parts, Place(n, True, ROOM * gpu.gb * 1e9)) is None,
        host_bytes=min(n, assumed.per_host) * (memory.total(memory.busiest(parts, host=True)) + kept), traffic=traffic,
        seconds=seconds | {"step": sum(seconds.values())},
    )  # fmt: skip


def asking(config: Config, per_gpu: int | None, gpus: int) -> Config:
    """``config`` with ``per_gpu`` questions per GPU and step; None leaves it as it is."""
    if per_gpu is None:
        return config
    return config.model_copy(update={"train": config.train.model_copy(update={"questions": per_gpu * gpus})})


def _plans(config: Config, tree: Tree) -> list[TreePlan]:
    try:
        return pack_within([tree], config.train.token_budget, split=True)
    except ValueError as error:
        raise InputError(f"train.token_budget={config.train.token_budget}: {error}") from None


def _packs(budget: int, groups: int, plans: Sequence[TreePlan]) -> int:
    """Packs of a rank that reads as many groups."""
    largest = max(plan.n_tokens for plan in plans)
    return math.ceil(groups * len(plans) / max(1, budget // largest))


def _traffic(config: Config, shape: Shape, ranks: int, passes: str, packs: int) -> dict[str, float]:
    """Bytes that a rank's updates send per step, if it reads as many packs.

    DeepSpeed reduces gradients in every backward, for a rank's sum is never whole under stages 2 and 3. Under stage 3 a
    pass gathers the weights in its forward and again in its backward.
    """
    others = (ranks - 1) / ranks
    size = getattr(torch, config.train.precision).itemsize
    if config.distributed.zero_stage == 3:
        referred = config.algorithm.kl or recipe_of(config.algorithm).value_source == "reference"
        gathered = shape.weights * packs * (2 + bool(referred) + (passes == "two"))
    else:
        gathered = shape.trained * config.train.updates
    return {
        "gradients reduced": 4 * shape.trained * others * packs,
        "weights gathered": gathered * size * others,
    }


def _rollout_seconds(
    config: Config, shape: Shape, place: Place, gpu: Gpu, assumed: Assumed, sampled: int, speed: float
) -> float:
    """A token of every running rollout costs one reading of the weights and of the rollouts' keys and values. One that
    ends makes room for one that waits."""
    rollout = config.rollout
    precision = config.train.precision if rollout.dtype == "auto" else rollout.dtype
    dtype = getattr(torch, precision)
    kv = memory.kv_bytes_per_token(shape.lm, dtype) * assumed.tokens
    weights = shape.base * dtype.itemsize
    engines = len(rollout.server) or place.ranks
    count = math.ceil((config.train.questions + rollout.oversample) / engines) * rollout.group_size
    room = gpu.gb * 1e9 * (0.9 if rollout.server else rollout.gpu_memory) - weights
    at_once = min(rollout.concurrency, count, max(1, int(room / kv)) if rollout.engine == "vllm" else count)
    token = max((weights + at_once * kv / 2) / (1e9 * gpu.memory * assumed.sampling), 2 * shape.base * at_once / speed)
    prefill = 2 * shape.base * count * (assumed.tokens - sampled) / speed
    return count / at_once * sampled * token + prefill


def _adam_seconds(config: Config, shape: Shape, place: Place, gpu: Gpu, assumed: Assumed) -> float:
    """AdamW reads and writes 28 bytes per number: master, gradient, two moments."""
    rate = assumed.host if config.distributed.offload != "none" else gpu.memory * assumed.sampling
    return config.train.updates * 28 * shape.trained / place.ranks / (1e9 * rate)


def _sync_seconds(config: Config, shape: Shape, place: Place, gpu: Gpu, wire: float) -> float:
    """Replicas get weights over HTTP: 0.1 s per 64 MiB to encode once, as much to send to each (docs/recipes.md)."""
    size = getattr(torch, config.train.precision).itemsize
    weights = shape.base * size
    if config.rollout.server:
        return weights / (64 << 20) * 0.1 * (1 + len(config.rollout.server))
    gathered = weights * (place.ranks - 1) / place.ranks / wire if config.distributed.zero_stage == 3 else 0.0
    return gathered + 2 * weights / (1e9 * gpu.memory)


def assumptions(config: Config, gpu_name: str, gpu: Gpu, assumed: Assumed) -> list[str]:
    """Everything that is assumed, one line each, with its source."""
    answers = len(_scoring(config, assumed).branches_of(None))
    return [
        f"rollouts of {assumed.tokens:,} tokens and {assumed.turns} turns (--tokens-per-rollout, --turns; else a "
        "quarter of rollout.max_tokens and half of rollout.max_turns)",
        f"prompts of {assumed.prompt:,} tokens (--prompt-tokens), {answers} forced answers of {assumed.answer} tokens "
        "per prefix, wrapper included; responses of search.top_k * search.max_passage_tokens",
        f"{gpu_name}: {gpu.gb:g} GB, {gpu.bfloat16:g} TFLOP/s in bfloat16 and {gpu.float32:g} in float32, "
        f"{gpu.memory:g} GB/s of memory, {gpu.link:g} GB/s to GPUs of the host and {gpu.network:g} to other hosts "
        f"(data sheets); parts may fill {ROOM:.0%} of its memory",
        f"{assumed.mfu:.0%} of these FLOP/s in passes and prefills (--mfu; prime-rl reports 22 % at 16k tokens and "
        "37 % at 64k, for Qwen3-4B with LoRA on one H100)",
        f"{assumed.sampling:.0%} of the memory's bandwidth in sampling, {assumed.traffic:.0%} of links and networks, "
        f"{assumed.per_host} GPUs per host, no overlap of traffic with work: guesses",
        f"offloaded states updated at {assumed.host:g} GB/s per rank, rollouts exchanged at {assumed.exchange:g} GB/s "
        f"per rank with {assumed.rollout_bytes} bytes per token: guesses",
        "the last layer counted whole: the rows that nothing reads are left out there, up to 1 / layers of a pass",
        "no time for tools, evaluation, checkpoints and packing; no stragglers",
    ]


def table(estimates: Sequence[Estimate], *, markdown: bool) -> Table:
    """One column per estimate."""
    out = Table("", *(f"{e.gpus:,} GPU{'s' * (e.gpus > 1)}" for e in estimates))
    out.box, out.show_edge = (box.MARKDOWN, True) if markdown else (box.SIMPLE_HEAD, False)
    for column in out.columns[1:]:
        column.justify = "right"
    for name, cells in _rows(estimates):
        out.add_row(name, *cells)
    return out


def _rows(estimates: Sequence[Estimate]) -> Iterator[tuple[str, list[str]]]:
    first = estimates[0]
    yield "rollouts", [f"{e.rollouts:,}" for e in estimates]
    yield "passes", [e.passes for e in estimates]
    for name in first.tokens:
        yield f"tokens {name}", [_count(e.tokens[name]) for e in estimates]
    for name in first.flops:
        yield f"FLOPs, {name}", [_count(e.flops[name]) for e in estimates]
    for name in dict.fromkeys(part.name for e in estimates for part in e.parts if not part.host):
        sizes = [[p.size for p in e.parts if p.name == name and not p.host] for e in estimates]
        yield f"GB per GPU, {name}", list(map(_gb, sizes))
    for phase in memory.ALWAYS:
        yield f"GB per GPU, all in {phase}", [_gb(p.size for p in memory.held(e.parts, phase)) for e in estimates]
    yield "fits", ["yes" if e.fits else "no" for e in estimates]
    yield "GB of CPU memory per host", [_gb([e.host_bytes]) for e in estimates]
    for name in first.traffic:
        yield f"GB per rank and step, {name}", [_gb([e.traffic[name]]) for e in estimates]
    for name in first.seconds:
        yield f"seconds, {name}", [f"{e.seconds[name]:,.3g}" for e in estimates]
    yield "rollouts per second", [f"{e.rollouts / e.seconds['step']:.3g}" for e in estimates]


def _gb(sizes: Iterable[float]) -> str:
    size = sum(sizes) / 1e9
    return f"{size:,.1f}" if size >= 0.05 or not size else f"{size:.2g}"


def _count(number: float) -> str:
    """A large number with the prefix of its thousands."""
    for prefix, power in zip("EPTGMk", (18, 15, 12, 9, 6, 3), strict=True):
        if number >= 10**power:
            return f"{number / 10**power:.3g} {prefix}"
    return f"{number:.3g}"
