"""The one seam to transformers: any causal LM whose attention goes through AttentionInterface.

``hidden_states`` runs the decoder on one flat row of tokens under igpo_kernels' attention implementation, which hands
each layer's attention to ``attend``: a packed tree when training (``TreeAttend``), slots of a key-value cache when
sampling (engines/torch.py). There are no per-model patches; ``probe`` refuses at load architectures for which a flat
row is not equal to separate sequences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    GradientCheckpointingLayer,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from igpo_fast import adapter
from igpo_fast.errors import InputError, reason_of
from igpo_fast.pretrained import read_model
from igpo_kernels import Branch, RolloutTokens, Tree, TreePlan, pack
from igpo_kernels.backend import chosen
from igpo_kernels.huggingface import (
    ATTENTION,
    Attend,
    TreeAttend,
    heads_of,
    keep_attention,
    read_in_parts,
    read_rows_in_last_layer,
)
from igpo_kernels.tree_attention import CHOOSE_ROWS, automatic, backend_for


def hidden_states(
    lm: PreTrainedModel, input_ids: torch.Tensor, position_ids: torch.Tensor, attend: Attend
) -> torch.Tensor:
    """The decoder's last hidden states.

    Args:
        lm: a causal LM made by ``load``. input_ids, position_ids: int64 [S].
    Returns:
        [S, H], in the model's dtype; under a ``TreeAttend`` with ``rows_read`` the rows that some pair reads, [U, H],
        for which the last layer computes only what those need (igpo_kernels.huggingface.read_rows_in_last_layer).
    Raises:
        ValueError: ``lm`` is not set to run under ``attend``; other attention would silently ignore it.
        InputError: a layer asks of its attention what packed attention refuses (windows in a mask alone, unknown
            keywords, values of another head size).
    """
    if lm.config._attn_implementation != ATTENTION:
        raise ValueError(f"hidden_states: attention is {lm.config._attn_implementation!r}; call use_attend(lm) first")
    try:
        out = _decoder(lm)(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False, plan=attend)
    except ValueError as error:
        if not str(error).startswith(f"{ATTENTION}: "):
            raise
        raise InputError(f"{type(lm).__name__} cannot run packed: {error}") from error
    hidden = out.last_hidden_state[0]
    return attend.last_of(hidden) if isinstance(attend, TreeAttend) else hidden


def attention_of(lm: PreTrainedModel, plan: TreePlan, backend: str) -> str:
    """The attention implementation that ``backend`` is for a plan: decided once, so call it as soon as the plan is
    built."""
    return backend_for(plan, lm.device, lm.dtype, *heads_of(lm)) if backend == "auto" else backend


def hidden_states_of_loss(
    lm: PreTrainedModel, plan: TreePlan, backend: str = "auto", *, in_parts: bool = True
) -> tuple[torch.Tensor, torch.Tensor, TreePlan]:
    """The decoder's last hidden states for a loss on a plan's decision tokens, and for the values of its answers: in
    parts if a backward is to come and attention computes only the rows of each (``CHOOSE_ROWS``), else in one forward.

    Args:
        in_parts: False is one forward in any case.
    Returns:
        Those that the returned plan reads, whose decision pairs are those of ``plan``; without gradient those that
        ``plan`` reads; and that plan. (Rows by ``pairs(rows_read=True)`` of each.)
    """
    in_parts = in_parts and torch.is_grad_enabled() and plan.n_decisions and len(plan.rows_read_without_gradient)
    if in_parts and attention_of(lm, plan, backend) in CHOOSE_ROWS:
        return *read_in_parts(partial(hidden_states, lm), plan, lm.device, backend), plan.with_gradient
    hidden = hidden_states(lm, *plan.tokens(lm.device), TreeAttend(plan, backend, rows_read=True))
    return hidden, hidden.detach(), plan


@dataclass(frozen=True)
class LmHead:
    """The map from hidden states to logits: ``softcap(hidden @ weight.T + bias)``."""

    weight: torch.Tensor
    """[V, H]"""
    bias: torch.Tensor | None
    """[V]"""
    softcap: float
    """0 is none."""


def lm_head(lm: PreTrainedModel) -> LmHead:
    head = lm.get_output_embeddings()
    return LmHead(head.weight, head.bias, getattr(_text(lm), "final_logit_softcapping", None) or 0.0)


def kernels_of(lm: PreTrainedModel, backend: str) -> dict[str, str]:
    """Implementation of each op that reads the model's tensors: op -> name."""
    names = chosen(backend, lm.device, lm.dtype, lm_head(lm).weight.dtype)
    if backend == "auto":
        names["tree_attention"] = automatic(lm.device, lm.dtype, *heads_of(lm))
    return names


def build(
    vocab_size: int, *, hidden_size: int, layers: int, heads: int, kv_heads: int, ffn_size: int, max_tokens: int,
    tie_embeddings: bool, seed: int, eos_token_id: int | None = None,
) -> PreTrainedModel:  # fmt: skip
    """A small random Qwen2 in float32, its weights drawn from ``seed`` alone.

    Raises:
        InputError: the sizes do not divide into heads of an even size.
    """
    if heads % kv_heads or hidden_size % heads or hidden_size // heads % 2:
        raise InputError(
            f"model.hidden_size={hidden_size}, model.heads={heads}, model.kv_heads={kv_heads}: kv_heads must divide "
            "heads, and hidden_size / heads must be an even number, because RoPE turns pairs"
        )
    config = Qwen2Config(
        vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=ffn_size, max_position_embeddings=max_tokens,
        tie_word_embeddings=tie_embeddings, bos_token_id=None, eos_token_id=eos_token_id, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)
    return use_attend(lm.eval())


def load(
    path: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", check: bool = True, source: str | None = None
) -> PreTrainedModel:
    """A causal LM from a Hugging Face directory or name, set to run under ``hidden_states``.

    Args:
        path: or a checkpoint that holds an adapter, which is merged into its base model.
        check: run ``probe``.
        source: how messages name the folder; ``model.path=PATH`` if None.
    Raises:
        InputError: nothing loads from there, or the probe refuses the architecture.
    """
    base = adapter.base_of(Path(path)) if Path(path, adapter.CONFIG).exists() else path
    lm = read_model(AutoModelForCausalLM, base, dtype=dtype, source=source)
    lm = (lm if base == path else adapter.merge(lm, Path(path))).to(device).eval()
    return probe(lm) if check else use_attend(lm)


def device_of(name: str) -> str:
    """The device that ``model.device`` names: ``auto`` is CUDA if there is one.

    Raises:
        InputError: no such device here.
    """
    count = torch.cuda.device_count()
    if name == "auto":
        return "cuda" if count else "cpu"
    here = ["cpu", *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if name not in here:
        raise InputError(f"model.device={name}: no such device here; use model.device=auto or one of {', '.join(here)}")
    return name


def check_positions(lm: PreTrainedModel, max_tokens: int, answer_tokens: int = 0) -> str | None:
    """Check that ``lm`` has positions for rollouts of ``max_tokens`` and an answer of ``answer_tokens`` after them.

    Returns:
        A warning if RoPE goes beyond the positions that the model was trained for.
    Raises:
        InputError: learned positions end earlier.
    """
    text = _text(lm)
    most = getattr(text, "max_position_embeddings", None)
    if most is None:
        return None
    where = f"rollout.max_tokens={max_tokens}: {type(lm).__name__} has {most} positions"
    if _has_rope(lm):
        return f"{where}; beyond them answers get worse; lower rollout.max_tokens" if max_tokens > most else None
    if max_tokens + answer_tokens > most:
        raise InputError(f"{where}, and forced answers take {answer_tokens}; use at most {most - answer_tokens}")
    return None


def use_attend(lm: PreTrainedModel) -> PreTrainedModel:
    """Set ``lm`` to run under ``hidden_states``; InputError, naming the layer type, if that is impossible."""
    lm.set_attn_implementation(ATTENTION)
    if lm.config._attn_implementation != ATTENTION:
        raise InputError(
            f"{type(lm).__name__} cannot run packed: {_mixers(lm)[0]} does not go through transformers' attention "
            "interface; use a model whose every layer is softmax attention"
        )
    read_rows_in_last_layer(lm)
    return lm


def recompute_layers(lm: PreTrainedModel) -> None:
    """Gradient checkpointing: each decoder layer keeps only its input and its attention's output, and runs again in the
    backward pass without computing attention again. (The last also keeps its keys and values, which its hook makes.)

    transformers does so only for layers in training mode, where some drop out; here none is.

    Raises:
        InputError: the model has no layers that support it.
    """
    layers = [module for module in lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"model.gradient_checkpointing: {type(lm).__name__} does not support it; set it to false")
    for layer in layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, context_fn=keep_attention
        )


def probe(lm: PreTrainedModel) -> PreTrainedModel:
    """Set ``lm`` to run under ``hidden_states`` after verifying that a packed tree equals separate sequences.

    Two trees with shared prompts and branches, one of them beyond RoPE's original length, run once packed and path
    by path through the model's own eager attention, with attention logits of real size (random weights give tiny
    ones, which hide faults) and with windows and chunks shorter than the paths. A layer that does not attend
    through the interface, or results that differ, mean that state leaks between branches (recurrent layers), or that
    the mask or the frequencies depend on more than the path (ALiBi, sinks, dynamic RoPE, windows that only the mask
    of transformers knows).

    Raises:
        InputError: the model differs or does not run, naming the layer type or what its code raised.
    """
    try:
        with torch.no_grad():
            _probe(lm)
    except InputError:
        raise
    except Exception as error:  # the model's code is not ours and may raise anything
        raise InputError(
            f"{type(lm).__name__} cannot run packed: {type(error).__name__} in the probe ({reason_of(error)}); "
            "use another model"
        ) from error
    return use_attend(lm)


def _probe(lm: PreTrainedModel) -> None:
    use_attend(lm)
    trees = _probe_trees(_text(lm).vocab_size)
    plan = pack(trees)
    offset = _beyond_rope(lm)
    in_second = plan.tree_start > 0
    plan = replace(plan, position_ids=plan.position_ids + offset * in_second)
    recorder = _Recorder(TreeAttend(plan))
    hidden_states(lm, *plan.tokens(lm.device), recorder)
    silent = [name for i, name in enumerate(_mixers(lm)) if i not in recorder.layers]
    if silent:
        raise InputError(
            f"{type(lm).__name__} cannot run packed: {silent[0]} does not attend through transformers' attention "
            "interface, so branches would see each other; use a model whose every layer is softmax attention"
        )
    with _scaled_logits(lm, recorder.largest), _short_windows(lm) as windows:
        read = hidden_states(lm, *plan.tokens(lm.device), TreeAttend(plan, rows_read=True))
        _, in_parts = read_in_parts(partial(hidden_states, lm), plan, lm.device)
        rows = plan.pairs(rows_read=True).on(lm.device).rows
        packed = read[rows]
        separate, logits = separate_passes(lm, trees, offset)
    head = lm_head(lm)
    ours = packed @ head.weight.T + (0 if head.bias is None else head.bias)
    ours = head.softcap * torch.tanh(ours / head.softcap) if head.softcap else ours
    tolerance = 1e-4 if packed.dtype == torch.float32 else 5e-2
    differences = torch.stack([packed - separate, in_parts[rows] - separate])
    error = float(differences.abs().max() / separate.abs().max())
    if not error <= tolerance:
        raise InputError(
            f"{type(lm).__name__} cannot run packed: {_mixers(lm)[0]}{_rope_type(lm)}{windows} gives hidden states "
            f"that differ by {error:.1e} (relative) from separate sequences; its attention depends on more than the "
            "visible path; use another model"
        )
    head_error = float((ours - logits).abs().max() / logits.abs().max())
    if not head_error <= tolerance:
        raise InputError(
            f"{type(lm).__name__}: its logits differ by {head_error:.1e} (relative) from hidden @ weight + bias; "
            f"the LM head {type(lm.get_output_embeddings()).__name__} does more than that; use another model"
        )


class _Recorder:
    """An Attend that records the layers that called it and a bound on their logits."""

    def __init__(self, inner: Attend):
        self.inner, self.layers, self.largest = inner, set(), 0.0

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        self.layers.add(layer)
        norms = q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max() * scale
        self.largest = max(self.largest, float(norms))
        return self.inner(layer, q, k, v, scale=scale, softcap=softcap, window=window)


@contextmanager
def _scaled_logits(lm: PreTrainedModel, largest: float) -> Iterator[None]:
    """Scale attention logits to about 10 through each attention's ``scaling``."""
    modules = [m for m in lm.modules() if isinstance(getattr(m, "scaling", None), float)]
    factor = max(1.0, 10 / max(largest, 1e-6))
    before = [m.scaling for m in modules]
    for m in modules:
        m.scaling *= factor
    try:
        yield
    finally:
        for m, scaling in zip(modules, before, strict=True):
            m.scaling = scaling


_WINDOW = re.compile(r"^(?!use_|max_|mamba_).*(window|chunk|local_attention)(_size)?$|floor_scale$")
"""Names of attention's limits on distances or positions, in configurations and modules."""
_SHORT = 7


@contextmanager
def _short_windows(lm: PreTrainedModel) -> Iterator[str]:
    """Set windows, chunks and position scales to 7 tokens, which the probe's paths exceed as rollouts exceed the real
    ones: in the configuration, where transformers' masks read them, and in modules that keep a copy.

    Yields their names and sizes, for a message.
    """
    text = _text(lm)
    sizes = {name: size for name, size in vars(text).items() if _is_window(name, size)}
    owners = [(text, name, size) for name, size in sizes.items()]
    for module in _decoder(lm).modules():
        attributes = vars(module).items()
        owners += [(module, n, v) for n, v in attributes if _is_window(n, v) and v in sizes.values()]
    for owner, name, _ in owners:
        setattr(owner, name, _SHORT)
    try:
        yield "".join(f" with {name}={size}" for name, size in sizes.items())
    finally:
        for owner, name, size in owners:
            setattr(owner, name, size)


def _is_window(name: str, value) -> bool:
    return type(value) is int and value > _SHORT and bool(_WINDOW.search(name))


def _probe_trees(vocab: int) -> list[Tree]:
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, vocab, n)  # noqa: E731
    trees = []
    for prompt_length in (5, 9):
        prompt, shared_turn = draw(prompt_length), draw(4)
        first = np.concatenate([prompt, shared_turn, draw(11)])
        second = np.concatenate([prompt, shared_turn, draw(7)])
        boundaries = np.array([prompt_length, prompt_length + 4])
        turn = lambda ids, p=prompt_length: np.where(np.arange(len(ids)) < p, -1, 0)  # noqa: E731
        rollouts = [RolloutTokens(i, ids, turn(ids), boundaries) for i, ids in enumerate((first, second))]
        trees.append(Tree(rollouts, [Branch(draw(6), 2, 6), Branch(draw(5), 3, 5)]))
    return trees


def separate_passes(lm: PreTrainedModel, trees: list[Tree], offset: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [M, H] and logits [M, V] of the pairs of ``pack(trees)``, each of its sequences in a forward of its
    own under the model's eager attention. Positions of all trees but the first begin at ``offset``."""
    lm.set_attn_implementation("eager")
    decisions, answers = [], []

    def run(ids, rows, start):
        position = torch.arange(len(ids), device=lm.device)[None] + start
        out = lm(
            input_ids=torch.as_tensor(ids, device=lm.device)[None], position_ids=position, use_cache=False,
            output_hidden_states=True,
        )  # fmt: skip
        return out.hidden_states[-1][0, rows], out.logits[0, rows]

    for number, tree in enumerate(trees):
        start = offset if number else 0
        for rollout in tree.rollouts:
            token = np.flatnonzero(rollout.turn >= 0)
            decisions.append(run(rollout.ids[: token[-1]], token - 1, start))
    for number, tree in enumerate(trees):
        start = offset if number else 0
        for rollout in tree.rollouts:
            for boundary in rollout.boundaries:
                for branch in tree.branches:
                    ids = np.concatenate([rollout.ids[:boundary], branch.ids])
                    rows = boundary + np.arange(branch.start, branch.stop) - 1
                    answers.append(run(ids, rows, start))
    use_attend(lm)
    return tuple(torch.cat(parts) for parts in zip(*decisions, *answers, strict=True))


def _beyond_rope(lm: PreTrainedModel) -> int:
    """A position offset with which the second probe tree crosses RoPE's original length; 0 without RoPE."""
    return max(0, _text(lm).max_position_embeddings - 8) if _has_rope(lm) else 0


def _has_rope(lm: PreTrainedModel) -> bool:
    return hasattr(_text(lm), "rope_parameters")


def _rope_type(lm: PreTrainedModel) -> str:
    rope = getattr(_text(lm), "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    return "" if kind == "default" else f" with {kind} RoPE"


def _text(lm: PreTrainedModel) -> PretrainedConfig:
    """The decoder's configuration, which is a part of a multimodal model's."""
    return lm.config.get_text_config()


def _decoder(lm: PreTrainedModel) -> PreTrainedModel:
    """The decoder, which gives the hidden states, without the LM head."""
    return lm.base_model if lm.base_model is not lm else lm.model


def _mixers(lm: PreTrainedModel) -> list[str]:
    """The class name of each decoder layer's token mixer: its attention, or its replacement."""
    decoder = getattr(_decoder(lm), "language_model", _decoder(lm))
    layers = next(m for m in decoder.modules() if isinstance(m, torch.nn.ModuleList))
    names = []
    for layer in layers:
        children = [type(child).__name__ for child in layer.children()]
        mixers = [n for n in children if "Attention" in n or "Delta" in n or "Mamba" in n or "SSM" in n]
        names.append(mixers[0] if mixers else children[0])
    return names
