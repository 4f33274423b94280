"""A whole run in about a second: a made-up world of a few dozen facts, a 22,000-parameter model, six steps."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from igpo_fast import config
from igpo_fast.config import Config
from igpo_fast.run.display import Display

STEPS = 6
SETTINGS = (
    "model.device=cpu", "model.hidden_size=48", "model.layers=1", "model.heads=3", "model.kv_heads=1",
    "model.ffn_size=64",
    "rollout.group_size=4", "rollout.max_turns=3", "rollout.max_turn_tokens=8",
    f"train.steps={STEPS}", "train.questions=4", "train.lr=1e-3", "train.checkpoint_every=2", "train.threads=1",
    "eval.every=2", "eval.questions=8",
)  # fmt: skip
WORLD = (
    "world.persons=6", "world.companies=4", "world.cities=4", "world.countries=3", "world.min_hops=1",
    "world.max_hops=2", "world.sft_worlds=4", "world.train_worlds=2", "world.eval_worlds=2",
    "sft.clean_steps=120", "sft.noisy_steps=0", "sft.hard_steps=0", "sft.batch_size=16", "sft.lr=1e-2",
    "rollout.max_tokens=96",
)  # fmt: skip


def settings(folder: Path, cache: Path, *overrides: str) -> Config:
    """A run in ``folder`` whose policy has learnt the format but hardly any answer; warm start kept in ``cache``."""
    return config.load(None, [*SETTINGS, *WORLD, f"run.dir={folder}", f"run.cache={cache}", *overrides])


class Recorder(Display):
    """Shows nothing; ``text`` is what would have been printed."""

    def __init__(self):
        self._file = io.StringIO()
        super().__init__(STEPS, console=Console(file=self._file))

    @property
    def text(self) -> str:
        return self._file.getvalue()


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what depends on the machine."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(("time/", "memory/"))}
        for line in lines
    ]


def files(folder: Path) -> dict[str, bytes]:
    """Every file's bytes but the lock's, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
