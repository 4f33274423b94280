"""Reads models from Hugging Face folders: complete, finite, able to be saved again, and without running their code."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import AutoConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

from igpo_fast.errors import InputError, reason_of


def read_model(model_class: type, path: str, *, dtype: torch.dtype, source: str | None = None) -> PreTrainedModel:
    """``model_class.from_pretrained(path)`` on the CPU, with every weight from the files and none initialised.

    Code in the folder (``auto_map``) is never run. A generation_config.json that could not be saved again is corrected.

    Args:
        source: how messages name the folder; ``model.path=PATH`` if None.
    Raises:
        InputError: nothing loads from there, or tensors are missing, unknown, of another shape or not finite.
    """
    source = source or f"model.path={path}"
    try:
        lm, info = model_class.from_pretrained(
            path, dtype=dtype, attn_implementation="eager", trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,  # the check below then names them all
        )  # fmt: skip
    except Exception as error:  # the files may hold anything, and other libraries read them
        raise InputError(
            f"{source}: no causal LM loads from there ({reason_of(error)}); give the folder of a model"
        ) from error
    faults = {
        "missing": info["missing_keys"],
        "of another shape": {name for name, *_ in info["mismatched_keys"]},
        "unknown to the model": info["unexpected_keys"],
        "unreadable": info["error_msgs"],
        "not finite": [name for name, tensor in lm.state_dict().items() if not _finite(tensor)],
    }
    found = [f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names]
    if found:
        raise InputError(
            f"{source}: its tensors are not those of a {type(lm).__name__}, or damaged: {'; '.join(found)}; "
            "copy the folder anew, or correct its config.json"
        )
    if getattr(lm, "generation_config", None) is not None:
        lm.generation_config = _valid(lm.generation_config)
    return lm


def read_config(path: str) -> PretrainedConfig:
    """The configuration of a Hugging Face directory or name. Raises InputError where there is none."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the file may hold anything, and other libraries read it
        raise InputError(
            f"model.path={path}: no configuration loads from there ({reason_of(error)}); give the folder of a model"
        ) from error


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _valid(generation: GenerationConfig) -> GenerationConfig:
    """``generation`` without fields that would prevent saving it, such as a temperature without do_sample; sampling
    here reads none of them."""
    kept: dict = {}
    fields = generation.to_diff_dict()
    for name in sorted(fields, key=lambda name: name not in ("do_sample", "num_beams")):  # other fields depend on it
        try:
            GenerationConfig(**kept, **{name: fields[name]}).validate(strict=True)
        except (ValueError, TypeError):
            continue
        kept[name] = fields[name]
    return GenerationConfig(**kept)
