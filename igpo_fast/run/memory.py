"""Memory of a run, part by part, from the configuration alone (docs/recipes.md derives the formulas)."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config

from igpo_fast import adapter
from igpo_fast.config import CRITICS, Config
from igpo_fast.errors import InputError
from igpo_fast.pretrained import read_config
from igpo_kernels.workspace import workspace_bytes

FFN = ("intermediate_size", "ffn_dim", "n_inner")
"""Names of the feed-forward width in configurations; without one it is four times the hidden size."""
BUCKET = 500_000_000
"""Most numbers that DeepSpeed reduces at a time; on a GPU its buffer is always as large."""
GATHERED = 1_000_000_000
"""Most numbers of weights that DeepSpeed's stage 3 keeps whole at a time."""
CGROUP = Path("/sys/fs/cgroup/memory.max")
"""A container's limit."""

Phase = Literal["rollouts", "packs", "step"]
ALWAYS: tuple[Phase, ...] = ("rollouts", "packs", "step")
TRAINING: tuple[Phase, ...] = ("packs", "step")


class Part(NamedTuple):
    """Memory of one rank that one thing takes."""

    name: str
    size: int
    """Bytes."""
    phases: tuple[Phase, ...] = ALWAYS
    """When it is held: while rollouts are sampled, while packs are read, in the optimiser's step."""
    host: bool = False
    """Whether it is in the CPU's memory although the model is on a GPU."""


Counted = Callable[..., list[Part]]
"""``busiest`` or ``certain``."""


@dataclass(frozen=True)
class Shape:
    """Sizes of a model that memory and time depend on, counted on the model itself without its weights."""

    lm: PretrainedConfig
    """The decoder's configuration."""
    base: int
    """Numbers of the model without adapters."""
    adapters: int
    """Numbers of the adapters."""
    linear: int
    """Numbers of the decoder's linear layers, each of which meets every token; without adapters and LM head."""
    largest: int
    """Numbers of the largest trained tensor."""

    @property
    def weights(self) -> int:
        return self.base + self.adapters

    @property
    def trained(self) -> int:
        """Numbers that the optimiser updates."""
        return self.adapters or self.base

    @property
    def head(self) -> int:
        """Numbers of the LM head."""
        return self.lm.vocab_size * self.lm.hidden_size


def shape_of(config: Config, lm: PretrainedConfig) -> Shape:
    """The shape of a model, adapters included if the configuration has them.

    Args:
        lm: the decoder's configuration; no weights are needed.
    Raises:
        InputError: the model has no layers of ``model.lora_targets``, or peft is missing.
    """
    m = config.model
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(lm, trust_remote_code=False)
        base = sum(p.numel() for p in model.parameters())
        head = model.get_output_embeddings()
        layers = [x for x in model.modules() if isinstance(x, torch.nn.Linear) and x is not head]
        linear = sum(layer.weight.numel() for layer in layers)
        if m.lora_rank:
            adapter.add(model, m.lora_rank, m.lora_alpha, m.lora_targets)
    adapters = sum(p.numel() for name, p in model.named_parameters() if adapter.is_adapter(name))
    largest = max(p.numel() for p in model.parameters() if p.requires_grad)
    return Shape(lm, base, adapters, linear, largest)


def decoder_config(config: Config, vocab_size: int) -> PretrainedConfig:
    """The decoder's configuration.

    Args:
        vocab_size: of the model that is built without ``model.path``.
    Raises:
        InputError: ``model.path`` has none.
    """
    m = config.model
    if m.path:
        return read_config(m.path).get_text_config()
    return Qwen2Config(
        vocab_size=vocab_size, hidden_size=m.hidden_size, num_hidden_layers=m.layers, num_attention_heads=m.heads,
        num_key_value_heads=m.kv_heads, intermediate_size=m.ffn_size, tie_word_embeddings=m.tie_embeddings,
    )  # fmt: skip


def known_shape(config: Config, vocab_size: int) -> Shape | None:
    """The shape of the configured model; None if it cannot be made: loading it comes next and says why."""
    try:
        return shape_of(config, decoder_config(config, vocab_size))
    except Exception:  # the folder may hold anything
        return None


@dataclass(frozen=True)
class Place:
    """The ranks of a run, and the memory that each has."""

    ranks: int
    gpu: bool
    device_bytes: float = math.inf
    """Memory of a rank's GPU; without one, of the host, shared by its ranks."""
    host_bytes: float = math.inf
    on_host: int = 1
    """Ranks per host."""

    @property
    def room(self) -> float:
        """Bytes per rank on its device."""
        return self.device_bytes if self.gpu else self.host_bytes / self.on_host


def uses_deepspeed(config: Config, ranks: int, gpu: bool) -> bool:
    """Whether DeepSpeed owns the weights: with ``auto``, if there are several processes or a GPU."""
    engine = config.distributed.engine
    return engine == "deepspeed" or (engine == "auto" and (ranks > 1 or gpu))


def parts_of(config: Config, shape: Shape, place: Place) -> list[Part]:
    """Memory of one rank, largest estimates where sizes depend on the data.

    Args:
        shape: of ``shape_of``.
    """
    n, d = place.ranks, config.distributed
    size = getattr(torch, config.train.precision).itemsize
    stage = d.zero_stage if uses_deepspeed(config, n, place.gpu) else 0
    stage = 2 if stage == 1 and size == 2 else stage
    offload = stage > 0 and d.offload != "none"
    trained = 4 * shape.trained
    weights_of = n if stage == 3 else 1
    states_of = n if stage else 1
    own_masters = size == 2 or stage in (1, 2) or offload
    a = config.algorithm
    reference = (a.kl or a.value_model == "reference") and not shape.adapters
    parts = [
        Part("weights", shape.weights * size // weights_of, host=offload and d.offload == "all"),
        Part("float32 masters", trained // states_of if own_masters else 0, host=offload),
        *_gradients(trained, size, stage, n, offload),
        Part("Adam states", 2 * trained // states_of, host=offload),
        Part("reference", shape.base * size // weights_of if reference else 0, host=offload and d.offload == "all"),
        Part("teacher", (shape.base + shape.adapters) * size if a.value_model == "teacher" else 0),
        *_engine(config, shape, place, size, stage),
        *_buffers(shape, size, stage, place),
        *_pack(config, shape.lm, size, place.gpu),
        _step(shape, stage, n, place.gpu, offload),
    ]
    return [part for part in parts if part.size]


def _gradients(trained: int, size: int, stage: int, n: int, offload: bool) -> Iterable[Part]:
    """float32 sums. Stage 3 keeps their memory between updates; stage 2 in bfloat16 offloads them at the end."""
    share = trained // (n if stage >= 2 else 1)
    if stage == 3:
        yield Part("gradients", share, ALWAYS, host=offload)
    elif not offload:
        yield Part("gradients", share, TRAINING)
    else:
        yield Part("gradients", share if size == 2 else 0, TRAINING)
        yield Part("gradients", trained // n * (1 if size == 2 else 2), host=True)
        yield Part("weights on their way", trained // 4 * size // n, host=True)


def _engine(config: Config, shape: Shape, place: Place, size: int, stage: int) -> Iterable[Part]:
    rollout = config.rollout
    if rollout.server:
        return
    if rollout.engine == "vllm":
        if place.gpu and math.isfinite(place.device_bytes):  # its weights and its cache; it sleeps in training
            yield Part("vLLM", int(rollout.gpu_memory * place.device_bytes), ("rollouts",))
        else:
            dtype = config.train.precision if rollout.dtype == "auto" else rollout.dtype
            phases: tuple[Phase, ...] = ("rollouts",) if place.gpu else ALWAYS
            yield Part("vLLM's weights", shape.base * getattr(torch, dtype).itemsize, phases)
        return
    if stage == 3:
        yield Part("engine's copy of the weights", shape.base * size)
    asked = config.train.questions + rollout.oversample
    slots = min(rollout.concurrency, math.ceil(asked / place.ranks) * rollout.group_size)
    dtype = getattr(torch, config.train.precision)
    yield Part("keys and values", slots * rollout.max_tokens * kv_bytes_per_token(shape.lm, dtype), ("rollouts",))
    if size == 2:
        yield Part("engine's LM head in float32", 4 * shape.head, ("rollouts",))


def _buffers(shape: Shape, size: int, stage: int, place: Place) -> Iterable[Part]:
    """What DeepSpeed reduces and gathers through. On a CPU only what is written of a buffer takes memory, and those of
    stages 1 and 2 are written as activations go."""
    filled = min(BUCKET, shape.trained)
    bucket = BUCKET if place.gpu else filled
    if stage in (1, 2):
        phase: Phase = "packs" if place.gpu else "step"
        yield Part("reduction buffers", bucket * size + filled * (4 if size == 2 else 0), (phase,))
    if stage == 3:
        yield Part("reduction buffer", 4 * bucket)
        yield Part("reduction copy", 4 * filled, ("packs",))
        if place.ranks > 1:
            yield Part("gathered weights", min(GATHERED, shape.weights) * size, ("packs",))


def _pack(config: Config, lm: PretrainedConfig, size: int, gpu: bool) -> Iterable[Part]:
    hidden, layers = lm.hidden_size, lm.num_hidden_layers
    ffn = next((width for name in FFN if (width := getattr(lm, name, None))), 4 * hidden)
    ffn = ffn if isinstance(ffn, int) else max(ffn)  # Gemma 3n has one width per layer
    token = size * config.train.token_budget  # bytes of one number per packed token
    saved = 4 * ffn + (9 if size == 4 else 11) * hidden  # numbers per token that a layer keeps for backward
    last = 6 * ffn + 12 * hidden  # the same, and gradients on their way
    if config.model.gradient_checkpointing:  # until the answers are read, the trunk's keys and values stay
        last = max(last, kv_bytes_per_token(lm, getattr(torch, config.train.precision)) // size)
    recomputed = layers * hidden + _width(lm, "num_attention_heads")  # a layer's input and its attention's output
    kept = token * (recomputed + last if config.model.gradient_checkpointing else (layers - 1) * saved + last)
    yield Part("activations of a pack", kept, ("packs",))
    if config.algorithm.name in CRITICS:  # hidden states of decision tokens, and three float32 copies in backward
        yield Part("critic", token * hidden + 3 * 4 * config.train.token_budget * hidden, ("packs",))
    workspace = workspace_bytes(torch.device("cuda" if gpu else "cpu"))
    yield Part("LM head", 2 * token * hidden + workspace, ("packs",))


def _step(shape: Shape, stage: int, n: int, gpu: bool, offload: bool) -> Part:
    """AdamW's temporaries: the root of the second moment, on a GPU of all weights at a time; on a CPU a quotient, too,
    of a tensor at a time, which under ZeRO is all of a rank's."""
    if gpu and not offload:
        return Part("AdamW's temporaries", 4 * shape.trained // (n if stage else 1), ("step",))
    return Part("AdamW's temporaries", 8 * (shape.trained // n if stage else shape.largest), ("step",), host=offload)


def busiest(parts: Sequence[Part], *, host: bool = False) -> list[Part]:
    """The parts on the device, or in the CPU's memory, of the phase that needs most."""
    return max((held(parts, phase, host=host) for phase in ALWAYS), key=total)


def certain(parts: Sequence[Part], *, host: bool = False) -> list[Part]:
    """The parts that training needs whatever the data are."""
    return [part for part in parts if set(TRAINING) <= set(part.phases) and part.host == host]


def held(parts: Sequence[Part], phase: Phase, *, host: bool = False) -> list[Part]:
    """The parts on the device, or in the CPU's memory, in a phase."""
    return [part for part in parts if phase in part.phases and part.host == host]


def total(parts: Iterable[Part]) -> int:
    """Their bytes."""
    return sum(part.size for part in parts)


def kv_bytes_per_token(lm: PretrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * _width(lm, "num_key_value_heads") * dtype.itemsize


def _width(lm: PretrainedConfig, which: str) -> int:
    """Numbers per token of the heads that ``which`` counts, in all layers."""
    count = lm.num_hidden_layers
    layers = lm.per_layer_config if getattr(lm, "is_heterogeneous", False) else [lm] * count

    def width(layer: PretrainedConfig) -> int:
        heads = layer.num_attention_heads
        size = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        return size * (getattr(layer, which, None) or heads)

    return sum(width(layers[i]) for i in range(count))


def place_of(device: str, ranks: int) -> Place:
    """The place of a run whose ranks have this machine's memory.

    Args:
        device: of torch, like ``cuda:0`` or ``cpu``.
    """
    gpu = device != "cpu"
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    there = torch.cuda.mem_get_info(device)[1] if gpu else math.inf
    return Place(ranks, gpu, there, host_bytes(), on_host)


def host_bytes() -> int:
    """Memory of this machine, or of the container that this process runs in."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = CGROUP.read_text().strip() if CGROUP.exists() else "max"
    return there if limit == "max" else min(there, int(limit))


def check_fits(config: Config, shape: Shape, place: Place) -> None:
    """Refuse a run whose certain parts exceed the memory that the machine has, in use or not.

    Raises:
        InputError: names the largest part, and settings that make the run fit.
    """
    if reason := excess(parts_of(config, shape, place), place, certain):
        raise InputError(f"memory: {reason}; {remedy(config, shape.lm, place, certain)}")


def excess(parts: Sequence[Part], place: Place, counted: Counted = busiest) -> str | None:
    """What does not fit, in words; None if all does."""
    for host in (False, True):
        mine = counted(parts, host=host)
        on_gpu = place.gpu and not host
        there = place.room if not host else place.host_bytes / place.on_host
        if total(mine) > there:
            largest, where = max(mine, key=lambda part: part.size), "its GPU" if on_gpu else "the CPU"
            return (
                f"a rank takes {total(mine) / 1e9:.1f} GB of {there / 1e9:.1f} GB on {where}, "
                f"{largest.size / 1e9:.1f} of them {largest.name}"
            )
    return None


def remedy(config: Config, lm: PretrainedConfig, place: Place, counted: Counted = busiest) -> str:
    """Settings of which each makes a run fit, in words."""
    deepspeed = uses_deepspeed(config, place.ranks, place.gpu)
    shared, moved = deepspeed and place.ranks > 1, deepspeed and place.gpu
    changes: list[tuple[bool, dict[str, dict]]] = [
        (shared, {"distributed": {"zero_stage": 3}}),
        (moved, {"distributed": {"offload": "optimizer"}}),
        (moved, {"distributed": {"zero_stage": 3, "offload": "all"}}),
        (True, {"model": {"lora_rank": 16}}),
        (True, {"model": {"gradient_checkpointing": True}}),
        (True, {"train": {"token_budget": config.train.token_budget // 2}}),
    ]
    helpful = []
    for possible, change in changes:
        changed = config.model_copy(
            update={name: getattr(config, name).model_copy(update=keys) for name, keys in change.items()}
        )
        if not possible or changed == config:
            continue
        if excess(parts_of(changed, shape_of(changed, lm), place), place, counted) is None:
            pairs = [(f"{name}.{key}", value) for name, keys in change.items() for key, value in keys.items()]
            helpful.append(" ".join(f"{name}={str(value).lower()}" for name, value in pairs))
    if helpful:
        return f"set {', or '.join(helpful)}"
    return "no single setting mends that: use more GPUs with distributed.zero_stage=3, or a smaller model"
