"""The command line: ``igpo-fast train | sft | eval | score | search | doctor``."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.core import TyperGroup

from igpo_fast import __version__
from igpo_fast.errors import InputError, RunError

# torch and transformers are imported inside the commands: --help must not wait for them.
if TYPE_CHECKING:
    from igpo_fast.config import Config

INTERRUPTED = 130
INDICES = Path("runs/cache/search")
LOG_SECONDS = 10.0
"""Between lines of a log that tell of progress."""


class Commands(TyperGroup):
    """Turns a user's error into one line and exit code 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except RunError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reinforcement learning for multi-turn agents with information-gain turn rewards.",
)

search = typer.Typer(no_args_is_help=True, help="Search servers.")
app.add_typer(search, name="search")

ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="A YAML configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Laid over the configuration; docs/config.md has all."),
]


def main() -> None:
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"igpo-fast {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Train in run.dir, or go on training there."""
    settings = _load(config, overrides)
    from igpo_fast.interrupt import Interrupted
    from igpo_fast.summary import run_summary
    from igpo_fast.train import train as run_training

    try:
        run = run_training(settings)
    except Interrupted as stop:
        typer.echo(f"interrupted: {stop}; the same command goes on from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    program = "igpo-fast" if shutil.which("igpo-fast") else sys.argv[0]
    typer.echo(run_summary(run.read_metrics(), run.path, settings, program))


@app.command()
def sft(
    overrides: Overrides = None,
    config: ConfigFile = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Save the model here too.")] = None,
) -> None:
    """Train the warm-started model, or find it in run.cache, and say where it is."""
    settings = _load(config, overrides)
    from igpo_fast.setup import set_up
    from igpo_fast.sft import steps_of

    if not steps_of(settings):
        raise InputError("sft: no steps are configured; give sft.clean_steps, noisy_steps or hard_steps")
    if output and output.exists():
        raise InputError(f"{output}: exists; give another --output")
    with _bar("warm start") as advance:

        def progress(done: int, total: int, loss: float) -> None:
            advance(done, total)
            if done % max(1, total // 5) == 0:
                typer.echo(f"warm start {done}/{total}  loss {loss:.3f}", err=True)

        setup = set_up(settings, sft_progress=progress)
    folder = setup.lm.name_or_path  # it was read back from the cache
    if output:
        setup.lm.save_pretrained(output)
        setup.tokenizer.save_pretrained(output)
        folder = output
    typer.echo(f"the warm-started model is in {folder}")


@app.command("eval")
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a model directory.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    no_search: Annotated[bool, typer.Option("--no-search", help="Search finds nothing.")] = False,
    questions: Annotated[int | None, typer.Option(metavar="N", min=1, help="As eval.questions=N.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sampled F1 on held-out questions: of a run's newest checkpoint, or of a model with --config."""
    overrides = [*(overrides or ()), *([f"eval.questions={questions}"] if questions else ())]
    settings, weights = _evaluated(target, config, overrides)
    from igpo_fast.evaluate import evaluate as run_evaluation
    from igpo_fast.evaluate import set_names
    from igpo_fast.records import json_bytes
    from igpo_fast.setup import set_up
    from igpo_fast.tools.search import NoSearch

    setup = set_up(settings, weights=weights)
    agent = replace(setup.eval_agent, tool=NoSearch()) if no_search else setup.eval_agent
    for warning in setup.warnings:
        typer.echo(f"warning: {warning}", err=True)
    agent.engine.load_weights(setup.lm.state_dict().items())
    with _bar("evaluation") as advance:
        found = run_evaluation(agent, setup.data.eval, settings.algorithm.f1_normalisation, advance).metrics
    count = len(setup.data.eval)
    if as_json:
        typer.echo(json_bytes({"model": weights, "search": not no_search, "questions": count, **found}).decode())
        return
    for name in set_names(found):
        f1, se, em, turns = (found[f"eval/{name}/{key}"] for key in ("f1", "f1_se", "em", "turns"))
        typer.echo(f"{name:<16} f1 {f1:.3f} ± {se:.3f}  em {em:.3f}  turns {turns:.1f}")
    failures = found.get("eval/search_failures", 0)
    search = "no search" if no_search else f"{failures:.0f} searches failed" if failures else "with search"
    typer.echo(
        f"eval f1 {found['eval/f1']:.3f} ± {found['eval/f1_se']:.3f}  em {found['eval/em']:.3f}  "
        f"turns {found['eval/turns']:.1f}  ({count} questions, {search}, {weights})"
    )


@app.command()
def score(
    model: Annotated[str, typer.Option(metavar="DIR", help="A Hugging Face causal LM.")],
    source: Annotated[Path, typer.Option("--input", metavar="FILE", help="Trajectories, JSON lines.")],
    target: Annotated[Path, typer.Option("--output", metavar="FILE", help="With values and info_gain.")],
    dialect: Annotated[Literal["tags", "chat"], typer.Option(help="How the policy writes turns.")] = "tags",
    temperature: Annotated[float, typer.Option(min=1e-6, help="Divides the logits.")] = 1.0,
    basis: Annotated[
        Literal["log_prob", "prob"], typer.Option(help="The answer's mean log-probability, or its exp.")
    ] = "log_prob",
    answers: Annotated[
        Literal["first", "max", "mean"], typer.Option(help="Which accepted answers a value is of.")
    ] = "first",
    token_budget: Annotated[int, typer.Option(min=1, help="Most packed tokens a forward reads.")] = 16384,
    device: Annotated[str, typer.Option(help="auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Information gain of each turn of trajectories from anywhere.

    A line of the input is {"question", "answers", "messages": [{"role", "content"}, ...]}.
    """
    from igpo_fast.score import load_scorer, score_file

    _quiet()
    make_scorer = partial(
        load_scorer, model, device=device, dtype=dtype, dialect=dialect, temperature=temperature, basis=basis,
        answers=answers, token_budget=token_budget,
    )  # fmt: skip
    with _bar("score") as advance:
        count = score_file(source, target, make_scorer, overwrite=overwrite, progress=advance)
    typer.echo(f"scored {count:,} trajectories into {target}")


@search.command("serve")
def search_serve(
    corpus: Annotated[Path, typer.Option(metavar="FILE", help="Passages, JSON lines of id, title, text.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 for other machines.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    index: Annotated[Path, typer.Option(metavar="DIR", help="Where built indices are kept.")] = INDICES,
    topk: Annotated[int, typer.Option(min=1, help="Passages a query gets where a request names no number.")] = 3,
    dense: Annotated[Path | None, typer.Option(metavar="DIR", help="A sentence-transformer; BM25 without one.")] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Precedes queries, as 'query: ' for E5.")] = None,
    passage_prompt: Annotated[str | None, typer.Option(help="Precedes passages, as 'passage: ' for E5.")] = None,
) -> None:
    """Serve a corpus over HTTP, speaking Search-R1's protocol; its index is built once and kept."""
    try:
        from igpo_fast.tools.server import bind, serve
    except ImportError as error:
        raise InputError(f"search serve: {error}; pip install 'igpo-fast[search]'") from None
    from igpo_fast.tools.dense import Dense, SentenceEncoder
    from igpo_fast.tools.index import Bm25, open_index

    if dense is None and (query_prompt, passage_prompt) != (None, None):
        raise InputError("--query-prompt, --passage-prompt: BM25 takes none; give --dense DIR")
    if dense:
        _quiet()
    with bind(host, port) as listener:
        retriever = Dense(SentenceEncoder(dense, (query_prompt, passage_prompt))) if dense else Bm25()
        found = open_index(corpus, retriever, index, partial(_bar, log=True))
        about = f"{len(found.documents):,} passages ({retriever.kind}, {found.folder})"
        serve(found, listener, topk, lambda url: typer.echo(f"serving {about} at {url}", err=True))


@app.command()
def doctor(overrides: Overrides = None, config: ConfigFile = None) -> None:
    """Versions, device, chosen kernels, parity; with a configuration, its data and model too."""
    settings = _load(config, overrides)
    from rich.console import Console

    from igpo_fast.doctor import diagnose, table

    checks = list(diagnose(settings, configured=bool(config or overrides)))
    Console().print(table(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _load(file: Path | None, overrides: list[str] | None) -> Config:
    from igpo_fast.config import load

    settings = load(file, overrides or ())
    _quiet()
    return settings


def _evaluated(target: str, file: Path | None, overrides: list[str]) -> tuple[Config, str]:
    """The configuration to evaluate with, and the weights."""
    if not (Path(target) / "config.yaml").exists():
        if file is None:
            raise InputError(f"{target}: not a run folder; to evaluate it as a model, give --config FILE")
        return _load(file, [*overrides, f"model.path={json.dumps(target)}"]), target
    if file is not None:
        raise InputError(f"{target}: a run folder brings its configuration; leave --config out")
    settings = _load(Path(target) / "config.yaml", overrides)
    from igpo_fast.checkpoint import RunFolder

    run = RunFolder(target)
    if not run.saved():
        raise InputError(f"{run.checkpoints}: no checkpoint yet; train for longer")
    held_out = run.config.eval.questions
    if settings.data.source == "files" and settings.data.eval is None and settings.eval.questions > held_out:
        raise InputError(
            f"{target}: {settings.eval.questions} questions wanted, but this run held out {held_out} and "
            "trained on the others; ask for fewer, or give data.eval=FILE"
        )
    return settings, str(run.newest())  # verified: a damaged one is refused


def _quiet() -> None:
    """transformers' bars and advice are not for our users."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _bar(name: str, log: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that takes (done, total); where that is no terminal nothing, or with ``log`` a line at times."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if log and not console.is_terminal:
        yield _log_line(name)
        return
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _log_line(name: str) -> Callable[[int, int], None]:
    """Prints the first, the last, and every tenth second's progress."""
    last = -math.inf

    def show(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last >= LOG_SECONDS:
            last = time.monotonic()
            typer.echo(f"{name} {done / total:.0%}", err=True)

    return show
