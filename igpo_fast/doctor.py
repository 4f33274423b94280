"""A report on this machine: versions, device, kernels, and whether packed and separate passes agree."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedModel

from igpo_fast import __version__
from igpo_fast.config import Config
from igpo_fast.engines import vllm
from igpo_fast.errors import InputError, RunError
from igpo_fast.model import build, device_of, kernels_of, probe, separate_passes
from igpo_fast.run import memory
from igpo_fast.setup import set_up
from igpo_fast.update.policy import Policy
from igpo_kernels import Branch, LossSettings, RolloutTokens, Tree, pack, triton_variants
from igpo_kernels.backend import chosen

NEEDED = ("torch", "transformers", "numpy", "bm25s")
OPTIONAL = ("triton",)


@dataclass(frozen=True)
class Check:
    """A line of the report."""

    name: str
    found: str
    ok: bool = True


def diagnose(config: Config, *, configured: bool, ranks: int = 1) -> Iterator[Check]:
    """Versions, device, chosen kernels, and packed against separate passes.

    Args:
        config: names the device and the kernels.
        configured: also set up its data, tokenizer and model (without warm start), and check them.
        ranks: the processes that a run will have, for its memory.
    """
    yield from _versions()
    yield _vllm()
    yield from _device(config.model.device)
    try:
        device = torch.device(device_of(config.model.device))
    except InputError:
        return
    if not configured:
        dtype = getattr(torch, config.train.precision)
        yield from _kernels(chosen(config.model.kernels, device, dtype), device)
    yield _parity("parity, a tiny Qwen2", lambda: probe(_tiny().to(device)), config.model.kernels)
    if configured:
        yield from _configured(config, ranks)


def table(checks: list[Check]) -> Table:
    """The report as a table for people."""
    out = Table("", "found", show_edge=False)
    for check in checks:
        out.add_row(Text(check.name), Text(check.found, style="" if check.ok else "bold red"))
    return out


@torch.no_grad()
def packed_error(lm: PreTrainedModel, backend: str) -> float:
    """Largest difference between the log-probabilities of a pack and of separate passes, relative to the largest.

    The pack has two rollouts of one prompt, and an answer after two prefixes of each; each of its sequences then has a
    forward of its own under the model's eager attention.
    """
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, lm.config.get_text_config().vocab_size, n)  # noqa: E731
    prompt, branch = draw(6), Branch(draw(5), 2, 5)
    rollouts = []
    for index, length in enumerate((9, 13)):
        turn = np.repeat([-1, 0], [len(prompt), length])
        rollouts.append(RolloutTokens(index, np.concatenate([prompt, draw(length)]), turn, np.array([6, 10])))
    trees = [Tree(rollouts, [branch])]
    plan = pack(trees)
    scored = Policy(lm, 1.0, LossSettings(), backend)(plan)
    packed = np.concatenate([scored.decision_logp, scored.scored_logp])
    _, logits = separate_passes(lm, trees)
    logp = logits.float().log_softmax(-1)
    separate = logp.gather(1, plan.tensor("label", lm.device)[:, None])[:, 0].cpu().numpy()
    return float(np.abs(packed - separate).max() / np.abs(separate).max())


def _versions() -> Iterator[Check]:
    yield Check("igpo-fast", __version__)
    yield Check("python", platform.python_version())
    for name in (*NEEDED, *OPTIONAL):
        try:
            yield Check(name, importlib.import_module(name).__version__)
        except ImportError as error:
            yield Check(name, f"not importable ({error})", ok=name in OPTIONAL)


def _vllm() -> Check:
    """vLLM's version, and whether it can get the trainer's weights."""
    if find_spec("vllm") is None:
        return Check("vllm", "not installed; rollout.engine=torch needs none")
    vllm.prepare()
    try:
        version = importlib.import_module("vllm").__version__
        vllm.check_version()
        return Check("vllm", version)
    except ImportError as error:
        return Check("vllm", f"not importable ({error})")
    except InputError as error:
        return Check("vllm", f"{version}: {error}")


def _device(name: str) -> Iterator[Check]:
    count = torch.cuda.device_count()
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(count)) or "none"
    yield Check("CUDA", f"{torch.version.cuda or 'not built in'}; devices: {names}")
    try:
        yield Check("device", device_of(name))
    except InputError as error:
        yield Check("device", str(error), ok=False)
    yield Check("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors")


def _kernels(names: dict[str, str], device: torch.device) -> Iterator[Check]:
    """The implementation of each op."""
    for op, name in names.items():
        implementations = importlib.import_module(f"igpo_kernels.{op}").IMPLEMENTATIONS
        if name not in implementations:
            yield Check(f"op {op}", f"no {name}; choose one of {', '.join(implementations)}", ok=False)
        elif name == "triton" and device.type == "cpu" and not triton_variants.runs_on_cpu():
            yield Check(f"op {op}", "triton needs a GPU; use model.kernels=auto", ok=False)
        else:
            yield Check(f"op {op}", name)


def _parity(name: str, load, backend: str) -> Check:
    """Whether packed and separate passes agree for the probed model that ``load`` gives."""
    try:
        lm = load()
        error = packed_error(lm, backend)
    except (RunError, ValueError) as refusal:
        return Check(name, f"FAILED: {refusal}", ok=False)
    bound = 1e-4 if lm.dtype == torch.float32 else 5e-2
    ok = error <= bound
    verdict = "ok" if ok else "FAILED"
    return Check(name, f"{verdict}: packed and separate differ by {error:.1e} (at most {bound:g})", ok)


def _memory(config: Config, vocab_size: int, ranks: int) -> Iterator[Check]:
    """Memory of a rank, by part; nothing if the model cannot be made."""
    shape = memory.known_shape(config, vocab_size)
    if shape is None:
        return
    place = memory.place_of(device_of(config.model.device), ranks)
    parts = memory.parts_of(config, shape, place)
    refusal = memory.excess(parts, place)
    advice = f"; {memory.remedy(config, shape.lm, place)}" if refusal else ""
    training = max((memory.held(parts, phase) for phase in memory.TRAINING), key=memory.total)
    yield Check("memory in training", _listed(training, place.room) + advice, ok=refusal is None)
    dtype = config.train.precision if config.rollout.dtype == "auto" else config.rollout.dtype
    kv = memory.kv_bytes_per_token(shape.lm, getattr(torch, dtype)) / 1e6
    sampling = _listed(memory.held(parts, "rollouts"), place.room)
    yield Check("memory in rollouts", f"{sampling}; 1,000 tokens take {kv:.2g} GB of keys and values")
    if on_host := memory.busiest(parts, host=True):
        yield Check("memory on the CPU", _listed(on_host, place.host_bytes / place.on_host))


def _listed(parts: list[memory.Part], there: float) -> str:
    listed = ", ".join(f"{part.name} {part.size / 1e9:.1f}" for part in parts)
    return f"{memory.total(parts) / 1e9:.1f} of {there / 1e9:.1f} GB per rank: {listed}"


def _configured(config: Config, ranks: int) -> Iterator[Check]:
    if config.model.path:  # before the model is loaded
        yield from _memory(config, 0, ranks)
    untrained = config.sft.model_copy(update=dict.fromkeys(("clean_steps", "noisy_steps", "hard_steps", "steps"), 0))
    probed = config.model.model_copy(update={"probe": True})
    try:
        setup = set_up(config.model_copy(update={"sft": untrained, "model": probed}))
    except RunError as error:
        yield Check("configuration", f"FAILED: {error}", ok=False)
        return
    data, lm = setup.data, setup.lm
    passages = sum(map(len, data.collections.values()))
    cells = sum(map(len, data.tables.values()))
    read = f"{passages:,} passages" + f", {cells:,} cells of tables" * bool(cells)
    yield Check("data", f"{len(data.train):,} train, {len(data.eval):,} eval questions, {read}")
    if not config.model.path:
        yield from _memory(config, lm.config.vocab_size, ranks)
    size = sum(parameter.numel() for parameter in lm.parameters())
    yield Check("model", f"{type(lm).__name__}, {size:,} parameters, {lm.dtype} on {lm.device}")
    yield from _kernels(kernels_of(lm, config.model.kernels), lm.device)
    yield _parity("parity, the configured model", lambda: lm, config.model.kernels)


def _tiny() -> PreTrainedModel:
    lm = build(
        97, hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, max_tokens=64, tie_embeddings=True,
        seed=0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter *= 10  # initial weights make attention so flat that a wrong mask would not show
    return lm
