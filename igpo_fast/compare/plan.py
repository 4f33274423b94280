"""What a comparison trains: variants, seeds, and the settings of each run."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from igpo_fast.compare.results import NAME, different, runs_in
from igpo_fast.config import PRESETS, Algorithm, Config, load
from igpo_fast.errors import InputError

ALGORITHMS = typing.get_args(Algorithm.model_fields["name"].annotation)
EVALUATIONS = 12
"""Evaluations of a run after the first, unless ``eval.every`` is given or the folder has runs."""
MOST_SEEDS = 100
"""Of a count; a larger one is taken for a seed."""


@dataclass(frozen=True)
class Plan:
    """Runs of every variant with every seed.

    ``variants`` has each variant's own ``section.key=value`` settings, ``overrides`` those of all.
    """

    folder: Path
    config: Path | None
    overrides: tuple[str, ...]
    variants: dict[str, tuple[str, ...]]
    seeds: tuple[int, ...]

    def path(self, variant: str, seed: int) -> Path:
        """The run's folder."""
        return self.folder / f"{variant}-{seed}"

    def arguments(self, variant: str, seed: int) -> list[str]:
        """What ``igpo-fast train`` gets for a run."""
        file = ["--config", str(self.config)] if self.config else []
        return [*file, *self._settings(variant, seed)]

    def config_of(self, variant: str, seed: int) -> Config:
        return load(self.config, self._settings(variant, seed))

    def _settings(self, variant: str, seed: int) -> list[str]:
        return [
            *self.overrides, *self.variants[variant], f"run.dir={self.path(variant, seed)}", f"train.seed={seed}",
        ]  # fmt: skip


def make_plan(
    config: Path | None, algorithms: str, seeds: str, own: Sequence[str], overrides: Sequence[str], folder: Path
) -> Plan:
    """A plan from the command line.

    Args:
        algorithms: ``igpo,grpo``: algorithms and presets, each under its own name or, as ``slow=igpo``, under another.
        seeds: a count (from ``train.seed`` on), or ranges and lists: ``201-204,301``.
        own: ``VARIANT:section.key=value``.
        overrides: ``section.key=value`` for all variants.
    Raises:
        InputError: a name, a seed or a setting that cannot be, or one that would give a variant another start, other
            questions or another number of steps than the rest.
    """
    base = load(config, overrides)
    variants = parse_variants(algorithms)
    for text in own:
        variant, colon, setting = text.partition(":")
        if not colon or variant not in variants or "=" not in setting:
            raise InputError(
                f"--for {text}: give VARIANT:section.key=value, where VARIANT is one of {', '.join(variants)}"
            )
        variants[variant] += (setting,)
    owned = sum(variants.values(), ())
    taken = [text for text in (*overrides, *owned) if text.startswith("run.dir=")]
    taken += [text for text in owned if text.startswith("train.seed=")]
    if taken:
        raise InputError(f"{taken[0]}: the comparison sets this key of each run; give --dir and --seeds")
    begun = [run.folder.config.eval.every for run in runs_in(folder)]
    every = begun[0] if begun else max(1, round(base.train.steps / EVALUATIONS))
    common = (f"run.cache={folder / 'cache'}", f"eval.every={every}", *overrides)
    plan = Plan(folder, config, common, variants, parse_seeds(seeds, base.train.seed))
    (first, shared), *others = ((name, plan.config_of(name, plan.seeds[0])) for name in variants)
    for name, settings in others:
        for key, *_ in different(settings, shared, shared_only=True):
            # Whose --for it was: of the two, only one may have been given a value.
            pair = [name, first]
            pair.sort(key=lambda one: not any(text.startswith(f"{key}=") for text in variants[one]))
            raise InputError(
                f"--for {pair[0]}: {key} would differ from that of {pair[1]}, but variants must have the same start, "
                "questions, steps and evaluations; give it without --for"
            )
    return plan


def parse_variants(text: str) -> dict[str, tuple[str, ...]]:
    """Variant -> the setting that makes it.

    >>> parse_variants("tips,slow=igpo")
    {'tips': ('algorithm.preset=tips',), 'slow': ('algorithm.name=igpo',)}
    """
    variants: dict[str, tuple[str, ...]] = {}
    for part in text.split(","):
        name, _, base = part.strip().partition("=")
        base = base or name
        if base not in (known := (*ALGORITHMS, *PRESETS)):
            wanted = base.lower()
            near = [wanted] if wanted in known else difflib.get_close_matches(wanted, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"give some of {', '.join(known)}"
            raise InputError(f"--algorithms {text}: {base!r} is no algorithm or preset; {hint}")
        if not re.fullmatch(NAME, name):
            raise InputError(f"--algorithms {text}: {name!r} cannot name a folder; use letters, digits and _ . + -")
        if name in variants:
            raise InputError(f"--algorithms {text}: {name} is there twice; name one of them otherwise, other={base}")
        variants[name] = (f"algorithm.{'preset' if base in PRESETS else 'name'}={base}",)
    return variants


def parse_seeds(text: str, first: int) -> tuple[int, ...]:
    """The seeds that a count, or a list of seeds and ranges, stands for.

    >>> parse_seeds("3", 0), parse_seeds("201-203,301", 0)
    ((0, 1, 2), (201, 202, 203, 301))
    """
    parts = [re.fullmatch(r"\s*(\d{1,18})(?:\s*-\s*(\d{1,18}))?\s*", part) for part in text.split(",")]
    if None in parts:
        raise InputError(f"--seeds {text}: give a count, or seeds and ranges like 201-204,301")
    if len(parts) == 1 and parts[0][2] is None:
        count = int(text)
        if not 0 < count <= MOST_SEEDS:
            raise InputError(
                f"--seeds {text}: one number is a count of seeds, from 1 to {MOST_SEEDS}; the seed {text} alone is "
                f"{text}-{text}"
            )
        if first < 0:
            raise InputError(f"train.seed={first}: seeds of a comparison are counted from 0 on; give --seeds A-B")
        return tuple(range(first, first + count))
    ends = [(int(match[1]), int(match[2] or match[1])) for match in parts]
    if any(high < low or high - low >= 10 * MOST_SEEDS for low, high in ends):
        raise InputError(f"--seeds {text}: a range goes from the lower to the higher seed, of at most 1,000")
    seeds = tuple(seed for low, high in ends for seed in range(low, high + 1))
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {text}: a seed is there twice; name each once")
    return seeds
