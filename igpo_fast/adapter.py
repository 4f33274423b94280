"""LoRA (Hu et al., arXiv 2106.09685): low-rank adapters on a model's linear layers, through peft.

An adapted layer computes ``x W^T + (alpha / rank) x A^T B^T``; A and B are trained, all else is frozen. B begins at 0,
so an untrained adapter changes nothing. The engine and ``export`` get merged weights under the names of the model
without adapters; a checkpoint holds the adapter as peft writes it, beside the name of its base model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from igpo_fast.errors import InputError, reason_of

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
"""peft's name of the only adapter."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""peft's files."""
PREFIX = "base_model.model."
"""peft's prefix of names in its file."""


def add(lm: PreTrainedModel, rank: int, alpha: float, targets: str | list[str], seed: int = 0) -> PreTrainedModel:
    """Give ``lm`` adapters, in place, and freeze its own weights.

    Args:
        targets: ends of the layers' names; ``all-linear`` is every linear layer but the LM head.
        seed: draws A.
    Raises:
        InputError: no layer has such a name.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise InputError(
            f"model.lora_rank={rank}: peft does not import ({reason_of(error)}); install igpo-fast[lora]"
        ) from error
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=targets if isinstance(targets, str) else list(targets),
        lora_dropout=0.0, bias="none", task_type="CAUSAL_LM", base_model_name_or_path=lm.name_or_path,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _inject(config, lm, f"model.lora_targets={targets}")
    return lm


def _inject(config: LoraConfig, lm: PreTrainedModel, where: str) -> None:
    from peft import inject_adapter_in_model

    try:
        inject_adapter_in_model(config, lm, NAME)
    except ValueError as error:
        raise InputError(f"{where}: {reason_of(error)}; name linear layers of {type(lm).__name__}") from error
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(is_adapter(name))
        if is_adapter(name):
            parameter.data = parameter.data.to(lm.dtype)
    lm.eval()


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter's."""
    return ".lora_" in name


def adapted(lm: torch.nn.Module) -> bool:
    """Whether ``lm`` has adapters."""
    return any(is_adapter(name) for name, _ in lm.named_parameters())


@contextmanager
def off(lm: torch.nn.Module) -> Iterator[None]:
    """A context in which ``lm`` is what it was without adapters."""
    layers = [module for module in lm.modules() if hasattr(module, "lora_A")]
    trained = [parameter for parameter in lm.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter in trained:  # peft freezes what it switches off
            parameter.requires_grad_(True)


Whole = Callable[[list[torch.Tensor]], AbstractContextManager]
"""A context in which some parameters are whole (ZeRO-3)."""


@torch.no_grad()
def merged(lm: torch.nn.Module, whole: Whole = lambda parameters: nullcontext()) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of the model without adapters, by its name there, with the adapters added in float32."""
    for name, weight in lm.state_dict(keep_vars=True).items():
        if is_adapter(name):
            continue
        path = re.match(r"(.*)\.base_layer\.weight$", name)
        layer = lm.get_submodule(path[1]) if path else None
        low = [layer.lora_A[NAME].weight, layer.lora_B[NAME].weight] if path else []
        with whole([weight, *low]):
            value = weight.detach()
            if low:
                delta = (low[1].float() @ low[0].float()) * layer.scaling[NAME]
                value = (value.float() + delta).to(value.dtype)
            yield name.replace(".base_layer.", "."), value


def save(lm: PreTrainedModel, folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write the adapter into ``folder`` as peft does.

    Args:
        tensors: the adapters' parameters by their names in ``lm``.
    """
    lm.peft_config[NAME].save_pretrained(folder)
    save_file({_in_file(name): tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read(lm: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The adapter in ``folder``, by the names of ``lm``'s parameters and in their dtype.

    Raises:
        ValueError: another adapter's tensors.
        Exception: whatever safetensors raises for a damaged file.
    """
    own = {name: p for name, p in lm.named_parameters() if is_adapter(name)}
    held = load_file(folder / WEIGHTS)
    named = {name: held.get(_in_file(name)) for name in own}
    if bad := [name for name, value in named.items() if value is None]:
        raise ValueError(f"no tensor {bad[0]}")
    if len(held) != len(own):
        raise ValueError("its adapter has other layers than this run's")
    return {name: value.to(own[name].dtype) for name, value in named.items()}


def _in_file(name: str) -> str:
    """A parameter's name in peft's file."""
    return PREFIX + name.replace(f".{NAME}.", ".")


def base_of(folder: Path) -> str:
    """The base model of the adapter in ``folder``.

    Raises:
        InputError: its configuration does not say.
    """
    try:
        base = json.loads((folder / CONFIG).read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / CONFIG}: names no base model ({reason_of(error)}); restore the file") from None
    if not isinstance(base, str) or not base:
        raise InputError(f"{folder / CONFIG}: names no base model; restore the file")
    return base


@torch.no_grad()
def merge(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``base`` with the adapter in ``folder`` added to its weights.

    Raises:
        InputError: the folder holds no adapter of this model.
    """
    from peft import LoraConfig

    names = set(base.state_dict())
    try:
        _inject(LoraConfig.from_pretrained(str(folder)), base, str(folder))
        for name, value in read(base, folder).items():
            base.get_parameter(name).copy_(value)
        weights = dict(merged(base))
    except Exception as error:  # the files may hold anything, and other libraries read them
        raise InputError(f"{folder}: no adapter of {type(base).__name__} ({reason_of(error)}); give another") from error
    assert weights.keys() == names
    plain = type(base)._from_config(base.config, dtype=base.dtype)
    plain.load_state_dict(weights)
    plain.generation_config = base.generation_config
    return plain.eval()
