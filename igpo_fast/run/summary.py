"""The last lines of a training run: results, folder, commands to try next."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from igpo_fast.config import Config, load
from igpo_fast.errors import InputError, masked
from igpo_fast.jsonl import finite
from igpo_fast.run.display import evaluated, sparkline
from igpo_fast.types import SEARCH

SPAN = 5
"""Steps over which first and last training numbers are averaged, because they are noisy; half of a short run."""
REAL_QUESTIONS = Path("configs/musique.yaml")
TRAINING = (
    ("reward/f1", "training f1", ".3f"),
    ("turns/mean", "turns", ".1f"),
    ("group/collapsed", "collapsed groups", ".0%"),
)


def run_summary(rows: Sequence[Mapping], folder: Path, config: Config, program: str = "igpo-fast") -> str:
    """A run's results in a few lines.

    Args:
        rows: of metrics.jsonl, in order; null and missing numbers are left out.
        folder: the run folder.
        program: the command that calls this program.
    """
    lines = [("results", text) for text in (_evaluation(rows), _training(rows)) if text]
    lines.append(("run folder", f"{folder} (config.yaml, metrics.jsonl, rollouts/, checkpoints/)"))
    lines += [("try next", command) for command in _commands(folder, config, program)]
    shown = ["" if i and lines[i - 1][0] == label else label for i, (label, _) in enumerate(lines)]
    return "\n".join(f"{label:<12}{text}" for label, (_, text) in zip(shown, lines, strict=True))


def _evaluation(rows: Sequence[Mapping]) -> str:
    """F1, or where nothing is known the reward, on held-out questions, first -> last."""
    key = next(filter(None, map(evaluated, rows)), None)
    if key is None:
        return ""
    with_it = [row for row in rows if _known(row, key)]
    first, last, name = with_it[0], with_it[-1], key.replace("/", " ")
    if first is last:
        return f"{name} {_with_error(first, key)} at step {first['step']:g}"
    curve = sparkline([row[key] for row in with_it])
    steps = f"steps {first['step']:g} to {last['step']:g}"
    return f"{name} {_with_error(first, key)} -> {_with_error(last, key)}  {curve}  {steps}"


def _training(rows: Sequence[Mapping]) -> str:
    """Reward, turns and collapsed groups of the training rollouts, first -> last."""
    parts = []
    for key, name, form in TRAINING:
        values = [row[key] for row in rows if _known(row, key)]
        span = min(SPAN, len(values) // 2)
        if span:
            parts.append(f"{name} {_mean(values[:span]):{form}} -> {_mean(values[-span:]):{form}}")
        elif values:
            parts.append(f"{name} {values[0]:{form}}")
    return "  ".join(parts)


def _commands(folder: Path, config: Config, program: str) -> Iterable[str]:
    run = shlex.quote(str(folder))
    servers = (config.search.url or "", *config.rollout.server)
    if any(masked(url) != url for url in servers):
        yield f"tail {run}/metrics.jsonl  # to go on, repeat the command: config.yaml keeps no credentials"
        return
    if SEARCH in config.rollout.tools:
        yield f"{program} eval {run} --no-search  # the same policy, search finds nothing"
    if config.train.lr_schedule == "constant":  # else the learning rate depends on the number of steps
        yield f"{program} train --config {run}/config.yaml train.steps={2 * config.train.steps}  # go on"
    if config.data.source == "world" and _can_run(REAL_QUESTIONS):
        yield f"{program} train --config {REAL_QUESTIONS}  # real questions"
    if "tensorboard" in config.run.tracker:
        yield f"tensorboard --logdir {run}/tensorboard"


def _can_run(file: Path) -> bool:
    """Whether a configuration and the files that it names exist; data sets of the datasets hub count as existing."""
    try:
        data = load(file).data
    except InputError:
        return False
    named = [path for path in (data.train, data.corpus) if path and path != "contexts" and ":" not in path]
    return all(Path(path).exists() for path in named)


def _with_error(row: Mapping, key: str) -> str:
    error = f" ± {row[f'{key}_se']:.3f}" if _known(row, f"{key}_se") else ""
    return f"{row[key]:.3f}{error}"


def _known(row: Mapping, key: str) -> bool:
    return finite(row.get(key)) is not None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
