"""A learner's part of a checkpoint: the model as transformers writes it, and what the optimiser holds per weight.

    model.safetensors, config.json, ...   weights in the precision that the trainer computes in
    learner-00000-of-00002.pt, ...        per weight its float32 master and Adam's moments, each in one of the files
    teacher.pt                            weights of a teacher (algorithm.value_model)

Tensors are whole and known by their weights' names. So the files depend neither on the number of processes that wrote
them nor on how a learner shares out its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from igpo_fast import adapter

States = Mapping[str, Mapping[str, torch.Tensor]]
"""Weight's name -> kind of state (master, exp_avg, exp_avg_sq, step) -> tensor."""


TEACHER = "teacher.pt"
Write = Callable[[Path], None]
"""Writes a learner's part of a checkpoint into a folder, from copies in the CPU's memory: in any thread, any time."""


def copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in the CPU's memory. A weight of two names is copied once: safetensors tells ties by their memory."""
    held: dict[int, torch.Tensor] = {}
    for tensor in tensors.values():
        if id(tensor) not in held:
            held[id(tensor)] = tensor.detach().to("cpu", copy=True)
    return {name: held[id(tensor)] for name, tensor in tensors.items()}


def write_weights(lm: PreTrainedModel, folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Write ``weights`` in a layout that ``from_pretrained`` loads, those of adapters as peft does."""
    if adapter.adapted(lm):
        adapter.save(lm, folder, weights)
    else:
        lm.save_pretrained(folder, state_dict=dict(weights))


def write_states(folder: Path, states: States, counts: Mapping[str, int], part: int = 0, parts: int = 1) -> None:
    """Write the file of number ``part`` of ``parts``.

    Args:
        counts: whole numbers that belong to all weights, the same in every part.
    """
    with open(folder / f"learner-{part:05d}-of-{parts:05d}.pt", "wb") as file:
        # Given a path, torch.save hides the operating system's error.
        torch.save({"states": {name: dict(state) for name, state in states.items()}, "counts": dict(counts)}, file)


def read_states(folder: Path, names: Iterable[str]) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, int]]:
    """The states of the weights ``names``, left on the disk until they are used, and the counts.

    Raises:
        ValueError: a part is missing, or the states are of other weights.
        Exception: whatever unpickling raises for a damaged file.
    """
    files = sorted(folder.glob("learner-*-of-*.pt"))
    if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
        raise ValueError("parts of the optimiser's state are missing")
    states, counts = {}, {}
    for file in files:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        states |= held["states"]
        counts = held["counts"]
    if unknown := sorted(set(names) ^ states.keys()):
        raise ValueError(f"the optimiser's state and the model differ in {unknown[0]}")
    return states, counts


def write_teacher(folder: Path, weights: Mapping[str, torch.Tensor] | None) -> None:
    """Write the teacher's weights, if there is one."""
    if weights is not None:
        with open(folder / TEACHER, "wb") as file:
            torch.save(dict(weights), file)


def read_teacher(folder: Path) -> dict[str, torch.Tensor]:
    """The teacher's weights, left on the disk until they are used.

    Raises:
        Exception: whatever unpickling raises for a damaged or missing file.
    """
    return torch.load(folder / TEACHER, map_location="cpu", weights_only=True, mmap=True)


def read_weights(lm: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The weights in ``folder`` (the adapters' of a model with adapters), in the dtype of ``lm``, by the names of its
    ``state_dict``.

    Raises:
        ValueError: the folder lacks a tensor, or has one of another shape.
        Exception: whatever transformers raises for a damaged folder.
    """
    if adapter.adapted(lm):
        return adapter.read(lm, folder)
    saved, about = type(lm).from_pretrained(folder, dtype=lm.dtype, output_loading_info=True)
    if unknown := sorted({*about["missing_keys"], *about["mismatched_keys"]}, key=str):
        raise ValueError(f"no tensor {unknown[0]}")
    return saved.state_dict()
