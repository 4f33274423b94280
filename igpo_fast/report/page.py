"""The page of a run: one HTML file without network, whose text is never markup.

Rollouts travel as JSON in script elements of type application/json, which browsers do not run; the page's own script
shows them by ``textContent``. A Content-Security-Policy allows this script and style by their digests and nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from markupsafe import Markup

from igpo_fast import __version__
from igpo_fast.config import Config
from igpo_fast.data.load import Data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.errors import InputError
from igpo_fast.files import atomic
from igpo_fast.jsonl import json_bytes
from igpo_fast.report.chart import draw
from igpo_fast.report.choice import choose
from igpo_fast.report.contents import FAILURES, Contents
from igpo_fast.report.curves import curves
from igpo_fast.report.frame import policy, template
from igpo_fast.run.checkpoint import RunFolder

HERE = Path(__file__).parent
WIDTH, HEIGHT = 340, 200
"""Of a chart, in units of its view box."""
PLAIN = "turns are shown as text, not token by token"
_ESCAPES = str.maketrans({char: f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"})


class Report:
    """The page of a run, made anew at each call of ``html``.

    Args:
        path: the run folder.
        rollouts: how many the page holds at most.
        steps: only rollouts of these.
    Raises:
        InputError: not a run folder.
    """

    def __init__(self, path: Path, rollouts: int = 500, steps: list[int] | None = None):
        if not (path / "config.yaml").is_file():
            what = "not a run folder" if path.exists() else "no such run folder"
            raise InputError(f"{path}: {what}; give the run.dir of a run")
        self.path, self.most, self.steps = path, rollouts, steps
        self._decode: Callable[[list[int]], str] | None = None

    def write(self, target: Path) -> None:
        """Write the page.

        Raises:
            InputError: the target is a folder; what ``html`` raises.
            StorageError: the operating system refuses.
        """
        if target.is_dir():
            raise InputError(f"--output {target}: a folder; give a file, like {target / 'report.html'}")
        page = self.html()
        with atomic(target) as file:
            file.write(page)

    def html(self, version: str = "") -> bytes:
        """The page, UTF-8.

        Args:
            version: of a page that follows the run: it asks for ``version`` and loads itself anew when that differs.
        Raises:
            InputError: a damaged file of the run, or one of a later version; no rollouts of the steps asked for.
            StorageError: the operating system refuses to read.
        """
        run = RunFolder(self.path)
        config, rows = run.config, run.read_metrics()
        groups, told = choose(run, self.most, self.steps)
        decode, plain = self._tokens(run)
        contents = Contents(config.algorithm.f1_normalisation, decode)
        index = {
            "rollouts": contents.index(groups),
            "failures": FAILURES,
            "basis": config.algorithm.basis,
            "baseline": config.algorithm.baseline,
        }
        style, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        text = template(HERE).render(
            name=self.path.resolve().name,
            path=self.path,
            about=about(config, rows),
            config=config.dump(),
            sections={
                section: [Markup(draw([chart], width=WIDTH, height=HEIGHT, in_page=True)) for chart in charts]
                for section, charts in curves(rows).items()
            },
            told=[*told, plain] if groups and plain else told,
            index=_embedded(index),
            groups={group[0].key: _embedded(contents.detail(group)) for group in groups},
            style=Markup(style),
            script=Markup(script),
            policy=policy(live=bool(version), style=style, script=script),
            version=version,
            made=f"igpo-fast {__version__}, {datetime.now():%Y-%m-%d %H:%M}",
        )
        return text.encode(errors="replace")

    def version(self) -> str:
        """Differs when the run's files do."""
        run, found = RunFolder(self.path), []
        for file in (run.path / "config.yaml", run.metrics, *sorted(run.rollouts.glob("*.jsonl"))):
            with suppress(FileNotFoundError):
                at = file.stat()
                found.append((file.name, at.st_mtime_ns, at.st_size))
        return hashlib.sha256(repr(found).encode()).hexdigest()[:16]

    def _tokens(self, run: RunFolder) -> tuple[Callable[[list[int]], str] | None, str]:
        """Token ids to text, by the tokenizer of the newest checkpoint; or None, and why."""
        if self._decode is None:
            if not (saved := run.saved()):
                return None, f"{PLAIN}: the run has no checkpoint, whose tokenizer this needs"
            newest = [*saved.values()][-1]
            try:
                tokenizer = load_tokenizer(run.config, Data((), (), {}), str(newest))
            except InputError:
                return None, f"{PLAIN}: the tokenizer in {newest} is damaged"
            self._decode = partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return self._decode, ""


def about(config: Config, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What run it is, in words."""
    model, data, train = config.model, config.data, config.train
    made_up = f"made here, {model.layers} layers, hidden size {model.hidden_size}"
    source = f"a made-up world ({config.world.kind})" if data.source == "world" else data.train or data.source
    done = max((row["step"] for row in rows), default=0)
    return {
        "algorithm": f"{config.algorithm.name}, preset {config.algorithm.preset}",
        "outcome": config.algorithm.outcome,
        "model": model.path or made_up,
        "data": source,
        "tools": ", ".join(config.rollout.tools),
        "a step": f"{train.questions} questions x {config.rollout.group_size} rollouts",
        "steps": f"{done:,} of {train.steps:,}",
        "seed": str(train.seed),
    }


def _embedded(value: Any) -> Markup:
    """``value`` as JSON that cannot end the script element which holds it, whatever its texts say."""
    return Markup(json_bytes(value).decode().translate(_ESCAPES))
