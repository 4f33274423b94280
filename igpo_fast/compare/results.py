"""A row per training: what compare.jsonl says of a run folder."""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import fmean

from igpo_fast import __version__
from igpo_fast.config import Config, session_keys, values_of
from igpo_fast.errors import InputError
from igpo_fast.files import atomic, storage
from igpo_fast.jsonl import finite, json_line, json_rows, json_value, number_of
from igpo_fast.run.checkpoint import RunFolder

NAME = r"[A-Za-z0-9][A-Za-z0-9_.+-]*"
"""Matches the name of a variant; a run's folder is VARIANT-SEED."""
START = {"model", "data", "world", "sft", "search", "tools", "eval"}
"""Sections that decide from what weights, questions and tools a run starts and how it is evaluated."""
STARTING = {
    "train.steps", "train.questions", "train.precision", "algorithm.f1_normalisation",
    "rollout.tools", "rollout.dialect", "rollout.system", "rollout.system_file",
    "rollout.thinking", "rollout.max_turns", "rollout.max_turn_tokens", "rollout.max_tokens",
}  # fmt: skip
"""Other keys that all variants of a comparison share."""
SPEED = {
    "model.device", "model.gradient_checkpointing", "rollout.concurrency", "rollout.tensor_parallel", "train.threads",
    "train.token_budget", "distributed.engine", "distributed.zero_stage", "distributed.offload",
}  # fmt: skip
"""Keys that a session may change and that decide how fast a run is: the page shows them where runs differ."""


@dataclass(frozen=True)
class Run:
    """A run folder of a comparison."""

    variant: str
    seed: int
    folder: RunFolder

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"


def runs_in(folder: Path) -> list[Run]:
    """The runs that have begun in a comparison's folder, by seed and variant. igpo-01 is none."""
    begun = [path.parent for path in folder.glob("*/config.yaml")]
    named = [(re.fullmatch(rf"({NAME})-(0|[1-9][0-9]*)", path.name), path) for path in begun]
    runs = [Run(match[1], int(match[2]), RunFolder(path)) for match, path in named if match]
    return sorted(runs, key=lambda run: (run.seed, run.variant))


def check_alike(runs: Iterable[Run], expected: dict[str, Config], planned: Container[str] = ()) -> None:
    """Check that runs were made with the settings that this comparison would make them with.

    Runs of a variant may differ by seed alone, and runs of different variants by anything but start, questions,
    evaluation and number of steps. What a later session of a run may change makes no difference, but for the steps of
    its evaluations.

    Args:
        expected: settings of each variant, whatever the seed; a variant that is not among them gets those of its first
            run.
        planned: names of the runs that will be trained as far as their variant's settings say: they may have fewer
            steps, unless the learning rate depends on the number.
    Raises:
        InputError: a run differs; names it and the key.
    """
    held: dict[tuple[str, str], str] = {}
    for run in runs:
        config = run.folder.config
        if config.train.seed != run.seed:
            raise _differs(run, "train.seed", config.train.seed, run.seed)
        theirs = expected.setdefault(run.variant, config)
        first = next(iter(expected.values()))
        constant = run.name in planned and config.train.lr_schedule == "constant"
        shorter = constant and config.train.steps < theirs.train.steps
        for own, other in ((False, theirs), (True, first)):
            for key, value, wanted in different(config, other, shared_only=own):
                if not (key == "train.steps" and shorter):
                    raise _differs(run, key, value, wanted)
        for key, digest in _contents(run).items():
            if held.setdefault(key, digest) != digest:
                raise InputError(
                    f"{run.folder.path}: {key[0]} holds something else than in the other runs; restore it and "
                    "delete this run, or give another --dir"
                )


def _contents(run: Run) -> dict[tuple[str, str], str]:
    """(key, variant) -> digest of what the run read; the variant is empty for what all variants share."""
    path = run.folder.path / "contents.json"
    found = json_value(path.read_bytes(), path) if path.exists() else {}
    own = lambda key: not (key.partition(".")[0] in START or key.startswith("rollout.tools"))  # noqa: E731
    return {(key, run.variant if own(key) else ""): digest for key, digest in found.items()}


def different(config: Config, other: Config, shared_only: bool = False) -> list[tuple[str, object, object]]:
    """The keys whose values differ, with both values, without the seed and keys that a session may change; of these
    only ``eval.every`` counts.

    Args:
        shared_only: only keys that all variants share.
    """
    ours, theirs = values_of(config), values_of(other)
    return [
        (key, value, theirs[key])
        for key, value in ours.items()
        if value != theirs[key]
        and key not in session_keys() - {"eval.every"} | {"train.seed"}
        and not (shared_only and key.partition(".")[0] not in START and key not in STARTING)
    ]


def _differs(run: Run, key: str, value: object, wanted: object) -> InputError:
    return InputError(
        f"{run.folder.path}: {key} is {value!r} in this run and {wanted!r} in the comparison; give the same settings, "
        f"delete {run.folder.path} to have it made anew, or give another --dir"
    )


def row_of(run: Run, score: str, steps: int) -> dict:
    """What compare.jsonl says of a run, finished after ``steps``. Lists have a number per evaluation, null where it is
    not known.

    ``seconds`` is the sum of ``time/step`` so far: rollouts, scoring, update and sync, without evaluation, warm start,
    start-up and steps that a killed session lost. ``tokens`` is what the engine read and sampled (``tokens/rollout``)
    and what the passes of the update read (``tokens/packed``). ``collapsed`` is the mean share of collapsed groups
    since the evaluation before.
    """
    rows = run.folder.read_metrics()
    trained = [row for row in rows if row["step"] > 0]
    evaluated = [row for row in rows if number_of(row.get(score)) is not None]
    at = [row["step"] for row in evaluated]
    seconds = _spent(trained, ("time/step",))
    tokens = _spent(trained, ("tokens/rollout", "tokens/packed"))
    mean = lambda key, of=trained: _mean(row.get(key) for row in of)  # noqa: E731
    since = [[row for row in trained if before < row["step"] <= step] for before, step in pairwise([-1, *at])]
    defaults = values_of(Config())
    return {
        "variant": run.variant,
        "seed": run.seed,
        "finished": is_finished(run, steps),
        "trained_steps": rows[-1]["step"] if rows else 0,
        "settings": {
            key: value
            for key, value in values_of(run.folder.config).items()
            if value != defaults[key] and key not in session_keys() - SPEED - {"eval.every"}
        },
        "steps": at,
        score: [_rounded(row[score], 6) for row in evaluated],
        f"{score}_se": [_rounded(row.get(f"{score}_se"), 6) for row in evaluated],
        "seconds": [_rounded(seconds.get(step), 2) for step in at],
        "tokens": [tokens.get(step) for step in at],
        "collapsed": [_rounded(mean("group/collapsed", of), 4) for of in since],
        "turns": _rounded(evaluated[-1].get("eval/turns") if evaluated else None, 2),
        "group/collapsed": _rounded(mean("group/collapsed"), 3),
        "tokens/packed": _rounded(mean("tokens/packed"), 0),
        "tokens/scored": _rounded(mean("tokens/scored"), 0),
        "time/train": _rounded(mean("time/train"), 2),
        "step_seconds": _rounded(mean("time/step"), 3),
    }


def is_finished(run: Run, steps: int) -> bool:
    """Whether the run has trained so many steps."""
    rows = run.folder.read_metrics()
    return bool(rows) and rows[-1]["step"] >= steps


def rows_in(folder: Path) -> list[dict]:
    """The rows that an earlier comparison wrote; InputError, naming file and line, if a line is none."""
    path = folder / "compare.jsonl"
    with storage(path, "read"):
        return json_rows(path.read_bytes() if path.exists() else b"", path, "seed")


def _spent(rows: Sequence[Mapping], keys: Sequence[str]) -> dict[int, float | None]:
    """Step -> the sum of ``keys`` up to it, 0 at the start; unknown once a row lacks one."""
    number = lambda value: math.nan if number_of(value) is None else value  # noqa: E731
    costs = [sum(number(row.get(key)) for key in keys) for row in rows]
    sums = accumulate(costs, initial=0)
    return {step: finite(total) for step, total in zip([0, *(row["step"] for row in rows)], sums, strict=True)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if number_of(value) is not None]
    return fmean(known) if known else None


def _rounded(number: float | None, digits: int) -> float | None:
    return None if (number := number_of(number)) is None else round(number, digits) if digits else round(number)


def about() -> dict:
    """What made the runs that this process trains: versions, and the commit of the sources if they are under git."""
    found = {"igpo-fast": __version__}
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return {"versions": found} | ({"commit": commit} if (commit := _commit()) else {})


def _commit() -> str:
    root = Path(__file__).parents[2]
    git = lambda *arguments: subprocess.run(  # noqa: E731
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()
    try:
        git("ls-files", "--error-unmatch", str(Path(__file__).relative_to(root)))  # a virtual environment in another's
        return git("describe", "--always", "--dirty", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_rows(folder: Path, rows: Sequence[dict], before: Sequence[dict], trained: Sequence[str]) -> list[dict]:
    """Write compare.jsonl; returns its rows.

    Args:
        before: what it said.
        trained: names of the runs that this process has trained. What made the others is what the rows before said.
    """
    name = lambda row: f"{row.get('variant')}-{row['seed']}"  # noqa: E731
    known = {name(row): {key: row[key] for key in ("versions", "commit") if key in row} for row in before}
    known |= dict.fromkeys(trained, about() if trained else {})
    told = [row | known.get(name(row), {}) for row in rows]
    with atomic(folder / "compare.jsonl") as file:
        file.writelines(map(json_line, told))
    return told
