"""The command line: ``igpo-fast train | sft | eval | compare | report | play | score | search | doctor | plan``."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer.core import TyperGroup

from igpo_fast import __version__
from igpo_fast.errors import InputError, StorageError, masked
from igpo_fast.run.crash import line_of, report

# torch and transformers are imported inside the commands: --help must not wait for them.
if TYPE_CHECKING:
    from igpo_fast.config import Config

INTERRUPTED = 130
INDICES = Path("runs/cache/search")


class Commands(TyperGroup):
    """Turns errors that end a command into one line and exit code 2; our own bugs are left to ``main``."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except Exception as error:
            line = line_of(error)
            if line is None:
                raise
            typer.echo(f"error: {masked(' '.join(line.split()))}", err=True)
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


def _path(text: str) -> Path:
    """Expand ``~``, which shells leave alone in ``--option=~/file``."""
    return Path(os.path.expanduser(text))


path_option = partial(typer.Option, parser=_path)

ConfigFile = Annotated[Path | None, path_option("--config", metavar="FILE", help="A YAML configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Override keys of the configuration; docs/config.md lists them."),
]
Checkpoint = Annotated[
    str, typer.Option("--checkpoint", metavar="newest|best|STEP", help="Of a run; best is by train.keep_best.")
]


def main() -> None:
    """Run the command line. A bug ends it with one line, too, and its traceback is kept for a report."""
    sys.stdout.reconfigure(errors="backslashreplace")  # no locale may make a finished run fail
    try:
        app(prog_name=_program())
    except Exception as error:
        typer.echo(f"error: {report(error)}", err=True)
        sys.exit(1)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while Python shuts down prints no traceback


def _program() -> str:
    """The command that calls this program again: the one it was called by, if a shell finds it."""
    called = shutil.which(sys.argv[0])
    if called and Path(called).stem != "__main__":
        found = shutil.which(Path(called).name)
        return Path(called).name if found and os.path.samefile(found, called) else shlex.quote(called)
    python = shutil.which("python")
    same = python and os.path.samefile(python, sys.executable)
    return f"{'python' if same else shlex.quote(sys.executable)} -m igpo_fast"


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
def train(
    overrides: Overrides = None,
    config: ConfigFile = None,
    nproc: Annotated[
        int,
        typer.Option(min=1, metavar="N", help="Processes on this host, one per GPU; on several, torchrun."),
    ] = 1,
) -> None:
    """Train in run.dir, or resume training there."""
    settings = _load(config, overrides)
    if nproc > 1 and "RANK" not in os.environ:
        from igpo_fast.run.launch import launch

        raise typer.Exit(launch([sys.executable, "-m", "igpo_fast", *sys.argv[1:]], nproc, Path(settings.run.dir)))
    from igpo_fast.run.interrupt import Interrupted
    from igpo_fast.run.summary import run_summary
    from igpo_fast.train import train as run_training

    try:
        with _nothing_empty_left(Path(settings.run.dir)):
            run = run_training(settings)
    except Interrupted as stop:
        typer.echo(f"interrupted: {stop}; the same command resumes from there", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if run is not None:
        typer.echo(run_summary(run.read_metrics(), run.path, settings, _program()))


@app.command()
def sft(
    overrides: Overrides = None,
    config: ConfigFile = None,
    output: Annotated[Path | None, path_option(metavar="DIR", help="Save the model here too.")] = None,
) -> None:
    """Train the warm-started model, or find it in run.cache, and print its folder."""
    settings = _load(config, overrides)
    from igpo_fast.run.display import bar
    from igpo_fast.setup import set_up
    from igpo_fast.sft import steps_of

    if not steps_of(settings):
        raise InputError("sft: no steps are configured; give sft.clean_steps, noisy_steps, hard_steps or steps")
    with _new_folder(output), bar("warm start", log=False) as advance:

        def progress(done: int, total: int, loss: float) -> None:
            advance(done, total)
            if done % max(1, total // 5) == 0:
                typer.echo(f"warm start {done}/{total}  loss {loss:.3f}", err=True)

        setup = set_up(settings, sft_progress=progress)
        folder = setup.lm.name_or_path  # the model was read back from the cache
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
    checkpoint: Checkpoint = "newest",
) -> None:
    """Sampled F1 on held-out questions, for a run's checkpoint or a model with --config."""
    overrides = [*(overrides or ()), *([f"eval.questions={questions}"] if questions else ())]
    settings, weights = _evaluated(target, config, overrides, checkpoint)
    from igpo_fast.evaluate import evaluate as run_evaluation
    from igpo_fast.evaluate import set_names
    from igpo_fast.jsonl import json_bytes
    from igpo_fast.rollouts.tools.search import NoSearch
    from igpo_fast.run.display import bar
    from igpo_fast.setup import set_up
    from igpo_fast.types import SEARCH

    if no_search and SEARCH not in settings.rollout.tools:
        raise InputError(f"--no-search: {target} has no tool search; leave the option out")
    setup = set_up(settings, weights=weights, search=NoSearch() if no_search else None)
    agent = setup.eval_agent
    for warning in setup.warnings:
        typer.echo(f"warning: {warning}", err=True)
    agent.engine.load_weights(setup.lm.state_dict().items())
    with bar("evaluation") as advance:
        found = run_evaluation(agent, setup.data.eval, settings.algorithm.f1_normalisation, advance).metrics
    count = len(setup.data.eval)
    if as_json:
        typer.echo(json_bytes({"model": weights, "search": not no_search, "questions": count, **found}).decode())
        return
    for name in set_names(found):
        typer.echo(f"{name:<16} {_scores(found, f'eval/{name}')}")
    failures = found.get("eval/search_failures", 0)
    tools = ", ".join(settings.rollout.tools)
    search = "no search" if no_search else f"{failures:.0f} searches failed" if failures else f"with {tools}"
    typer.echo(f"eval {_scores(found, 'eval')}  ({count} questions, {search}, {weights})")


def _scores(found: Mapping[str, float], at: str) -> str:
    """The numbers of an evaluation under ``at`` in words: F1 and EM where there is ground truth, then a reward if
    outcomes were asked for, and turns."""
    parts = [f"f1 {found[f'{at}/f1']:.3f} ± {found[f'{at}/f1_se']:.3f}"] if f"{at}/f1" in found else []
    parts += [f"{key} {found[f'{at}/{key}']:.3f}" for key in ("em", "reward") if f"{at}/{key}" in found]
    return "  ".join([*parts, f"turns {found[f'{at}/turns']:.1f}"])


@app.command()
def play(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run folder or a model directory.")],
    overrides: Overrides = None,
    config: ConfigFile = None,
    question: Annotated[
        str, typer.Option(metavar="N|ID", help="A held-out question by its number, or any by its id.")
    ] = "1",
    checkpoint: Checkpoint = "newest",
) -> None:
    """Be the policy: type turns, and see after each how probable the model now holds the right answer."""
    settings, weights = _evaluated(target, config, list(overrides or ()), checkpoint)
    from rich.console import Console

    from igpo_fast.play import find_question
    from igpo_fast.play import play as run_play
    from igpo_fast.setup import set_up

    with suppress(ImportError):
        import readline  # noqa: F401 (gives typed lines a history and editing)
    setup = set_up(settings, weights=weights)
    for warning in setup.warnings:
        typer.echo(f"warning: {warning}", err=True)
    chosen = find_question(setup.data, question)
    setup.agent.engine.load_weights(setup.lm.state_dict().items())
    run_play(setup, chosen, Console(highlight=False))


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=_path, help="A run folder.")],
    output: Annotated[Path, typer.Argument(metavar="DIR", parser=_path, help="A new folder.")],
    checkpoint: Checkpoint = "newest",
) -> None:
    """Write a run's checkpoint as a Hugging Face folder, adapters merged, for transformers and vLLM."""
    from igpo_fast.run.checkpoint import RunFolder

    folder = RunFolder(run)
    chosen = folder.chosen(checkpoint)  # verified: a damaged one is refused
    import torch

    from igpo_fast.data.load import Data
    from igpo_fast.data.tokenizer import load_tokenizer
    from igpo_fast.model import load as load_model

    _quiet()
    with _new_folder(output):
        precision = getattr(torch, folder.config.train.precision)
        lm = load_model(str(chosen), dtype=precision, check=False, source=f"checkpoint {chosen}")
        lm.save_pretrained(output)
        load_tokenizer(folder.config, Data((), (), {}), str(chosen)).save_pretrained(output)
    typer.echo(f"{chosen}, {sum(p.numel() for p in lm.parameters()):,} parameters in {lm.dtype}, is in {output}")


@app.command()
def score(
    model: Annotated[str, typer.Option(metavar="DIR", help="A Hugging Face causal LM.")],
    source: Annotated[Path, path_option("--input", metavar="FILE", help="Trajectories, JSON lines.")],
    target: Annotated[Path, path_option("--output", metavar="FILE", help="With values and info_gain.")],
    dialect: Annotated[Literal["tags", "chat"], typer.Option(help="Format of turns.")] = "tags",
    temperature: Annotated[float, typer.Option(min=1e-3, max=1e3, help="Divides the logits.")] = 1.0,
    basis: Annotated[
        Literal["log_prob", "prob"], typer.Option(help="The answer's mean log-probability, or its exp.")
    ] = "log_prob",
    answers: Annotated[
        Literal["first", "max", "mean"], typer.Option(help="Accepted answers that a value is computed from.")
    ] = "first",
    baseline: Annotated[
        Literal["previous", "random", "masked", "none"],
        typer.Option(
            help="What a value is compared with: the previous one; the one after random responses of other questions "
            "of the input (a first pass keeps at most 1,024); with masked, where values are those of the next turn, "
            "the one after a search that found nothing; or none."
        ),
    ] = "previous",
    baseline_samples: Annotated[int, typer.Option(min=1, help="Responses per turn with random.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Of these draws, with a line's place in the input.")] = 0,
    token_budget: Annotated[int, typer.Option(min=1, help="Most packed tokens per forward.")] = 16384,
    device: Annotated[str, typer.Option(help="auto takes CUDA if there is one.")] = "auto",
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the weights.")] = "float32",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output file.")] = False,
) -> None:
    """Information gain of each turn of given trajectories.

    A line of the input is {"question", "answers", "messages": [{"role", "content"}, ...]}.
    """
    from igpo_fast.run.display import bar
    from igpo_fast.score import load_scorer, score_file

    if math.isnan(temperature):
        raise InputError("--temperature nan: not a number; give one between 0.001 and 1000")
    _quiet()
    make_scorer = partial(
        load_scorer, model, device=device, dtype=dtype, dialect=dialect, temperature=temperature, basis=basis,
        answers=answers, token_budget=token_budget, baseline=baseline, samples=baseline_samples, seed=seed,
    )  # fmt: skip
    with bar("score") as advance:
        count = score_file(source, target, make_scorer, overwrite=overwrite, progress=advance)
    typer.echo(f"scored {count:,} {'trajectory' if count == 1 else 'trajectories'} into {target}")


@app.command("report")
def report_run(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=_path, help="A run folder.")],
    output: Annotated[Path | None, path_option(metavar="FILE", help="RUN/report.html if not given.")] = None,
    rollouts: Annotated[int, typer.Option(metavar="N", min=1, help="How many the page holds at most.")] = 500,
    steps: Annotated[str | None, typer.Option(metavar="N[,N]", help="Only rollouts of these steps.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Serve the page here and follow the run; Ctrl-C ends.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --live; 0 takes a free port.")] = 0,
) -> None:
    """A run's curves and rollouts in one HTML file, with the gain and advantage of each turn."""
    if steps is not None and not re.fullmatch(r"[0-9]{1,9}(,[0-9]{1,9})*", steps):
        raise InputError(f"--steps {steps}: give a step, or several like 1,60,120")
    if live and output is not None:
        raise InputError("--output: --live writes no file; leave one of them out")
    from igpo_fast.report.live import serve
    from igpo_fast.report.page import Report

    _quiet()
    page = Report(run, rollouts, None if steps is None else [int(step) for step in steps.split(",")])
    if live:
        serve(page, port, lambda url: typer.echo(f"serving the report of {run} at {url}; Ctrl-C ends", err=True))
        return
    target = output or run / "report.html"
    page.write(target)
    typer.echo(f"{target}: open it in a browser; it holds the texts of rollouts, and needs no network")


@search.command("serve")
def search_serve(
    corpus: Annotated[Path, path_option(metavar="FILE", help="Passages, JSON lines of id, title, text.")],
    host: Annotated[str, typer.Option(help="0.0.0.0 lets other machines connect.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8000,
    index: Annotated[Path, path_option(metavar="DIR", help="Folder of built indices.")] = INDICES,
    topk: Annotated[int, typer.Option(min=1, help="Passages per query if a request gives no topk.")] = 3,
    dense: Annotated[
        Path | None, path_option(metavar="DIR", help="Directory of a sentence-transformer; BM25 if not given.")
    ] = None,
    query_prompt: Annotated[str | None, typer.Option(help="Prefix of queries, like 'query: ' for E5.")] = None,
    passage_prompt: Annotated[str | None, typer.Option(help="Prefix of passages, like 'passage: ' for E5.")] = None,
) -> None:
    """Serve a corpus over HTTP in Search-R1's protocol; its index is built once and kept."""
    try:
        from igpo_fast.search_server.server import bind, serve
    except ImportError as error:
        raise InputError(f"search serve: {error}; pip install 'igpo-fast[search]'") from None
    from igpo_fast.run.display import bar
    from igpo_fast.search_server.dense import Dense, SentenceEncoder
    from igpo_fast.search_server.index import Bm25, open_index

    if dense is None and (query_prompt, passage_prompt) != (None, None):
        raise InputError("--query-prompt and --passage-prompt need a dense index; give --dense DIR, or leave them out")
    if dense:
        _quiet()
    with bind(host, port) as listener:
        retriever = Dense(SentenceEncoder(dense, (query_prompt, passage_prompt))) if dense else Bm25()
        found = open_index(corpus, retriever, index, bar)
        about = f"{len(found.documents):,} passages ({retriever.kind}, {found.folder})"
        serve(found, listener, topk, lambda url: typer.echo(f"serving {about} at {url}", err=True))


@app.command()
def doctor(
    overrides: Overrides = None,
    config: ConfigFile = None,
    nproc: Annotated[int, typer.Option(min=1, metavar="N", help="Processes of the run, for its memory.")] = 1,
) -> None:
    """Versions, device, chosen kernels, parity; with a configuration, its data, model and memory too."""
    settings = _load(config, overrides)
    from rich.console import Console

    from igpo_fast.doctor import diagnose, table

    checks = list(diagnose(settings, configured=bool(config or overrides), ranks=nproc))
    Console().print(table(checks))
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


@app.command()
def plan(
    overrides: Overrides = None,
    config: ConfigFile = None,
    gpus: Annotated[str, typer.Option(metavar="N[,N]", help="Numbers of GPUs, one column each.")] = "8",
    gpu: Annotated[str, typer.Option(help="Their kind: h200, h100, a100, l40s or 4090.")] = "h200",
    tokens_per_rollout: Annotated[
        int | None, typer.Option(min=1, help="Mean; a quarter of rollout.max_tokens if not given.")
    ] = None,
    turns: Annotated[int | None, typer.Option(min=1, help="Mean; half of rollout.max_turns if not given.")] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean; 512, or a quarter of a rollout if that is less.")
    ] = None,
    mfu: Annotated[float, typer.Option(min=0.001, max=1, help="Share of the GPU's FLOP/s that passes reach.")] = 0.3,
    questions_per_gpu: Annotated[int | None, typer.Option(min=1, help="In place of train.questions.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Tokens, FLOPs, memory, traffic and predicted time of a step on GPUs that need not be here."""
    settings = _load(config, overrides)
    from rich.console import Console

    from igpo_fast import estimate
    from igpo_fast.jsonl import json_bytes
    from igpo_fast.run.memory import decoder_config, shape_of

    if gpu not in estimate.GPUS:
        raise InputError(f"--gpu={gpu}: not known; give one of {', '.join(estimate.GPUS)}")
    counts = gpus.split(",")
    if not all(count.isdecimal() and int(count) for count in counts):
        raise InputError(f"--gpus={gpus}: give a number of GPUs, or several like 8,64,512")
    tokens = tokens_per_rollout or settings.rollout.max_tokens // 4
    prompt = prompt_tokens or min(512, max(1, tokens // 4))
    assumed = estimate.Assumed(tokens, turns or -(-settings.rollout.max_turns // 2), prompt=prompt, mfu=mfu)
    shape = shape_of(settings, decoder_config(settings, settings.model.vocab_size))
    estimates = [
        estimate.estimate(estimate.asking(settings, questions_per_gpu, n), shape, n, estimate.GPUS[gpu], assumed)
        for n in map(int, counts)
    ]
    said = estimate.assumptions(settings, gpu, estimate.GPUS[gpu], assumed)
    if as_json:
        typer.echo(json_bytes({"steps": [found.as_dict() for found in estimates], "assumptions": said}).decode())
        return
    console = Console()
    if not console.is_terminal:
        console.width = 40 + 20 * len(estimates)  # nothing is cut or broken in a pipe
    console.print(estimate.table(estimates, markdown=not console.is_terminal))
    for line in said:
        typer.echo(f"assumed: {line}")


@app.command()
def compare(
    context: typer.Context,
    overrides: Overrides = None,
    config: ConfigFile = None,
    algorithms: Annotated[
        str,
        typer.Option(metavar="A,B", help="Algorithms and presets; NAME=A gives one another name, for --for."),
    ] = "igpo,grpo",
    seeds: Annotated[
        str, typer.Option(metavar="N|A-B,C", help="A count from train.seed on, or ranges and lists of seeds.")
    ] = "8",
    own: Annotated[
        list[str] | None,
        typer.Option("--for", metavar="VARIANT:section.key=value", help="A setting of one variant; may be repeated."),
    ] = None,
    folder: Annotated[
        Path | None, path_option("--dir", metavar="DIR", help="Of the runs; runs/compare/CONFIG if not given.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, metavar="N", help="Runs at a time, a core each.")] = 2,
    score: Annotated[str, typer.Option(metavar="KEY", help="The number of the evaluation to compare.")] = "eval/f1",
    at: Annotated[float, typer.Option(help="The score whose steps, seconds and tokens are told.")] = 0.5,
    stalled: Annotated[float, typer.Option(help="A run that ends below this score has stalled.")] = 0.15,
    baseline: Annotated[
        str | None, typer.Option(metavar="VARIANT", help="What the others are compared with; the last if not given.")
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Train nothing, tell what the folder has.")
    ] = False,
) -> None:
    """Train algorithms from the same starts, seed by seed, and compare them (docs/compare.md)."""
    from igpo_fast.compare.compare import compare as run_comparison
    from igpo_fast.compare.plan import make_plan
    from igpo_fast.run.interrupt import Interrupted

    given = [
        name
        for name in ("algorithms", "seeds", "own", "overrides")
        if context.get_parameter_source(name).name != "DEFAULT"
    ]
    if report_only and given:
        names = {"own": "--for", "overrides": "section.key=value"}
        raise InputError(
            f"--report-only: {names.get(given[0], f'--{given[0]}')} says what to train, and the page is about all runs "
            "of the folder; leave one of them out"
        )
    folder = folder or Path("runs/compare") / (config.stem if config else "default")
    plan = None if report_only else make_plan(config, algorithms, seeds, own or (), overrides or (), folder)
    _quiet()
    try:
        found = run_comparison(folder, plan, jobs=jobs, score=score, at=at, stalled=stalled, baseline=baseline)
    except Interrupted as stop:
        typer.echo(f"interrupted: {stop}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED) from None
    for sentence in found["sentences"]:
        typer.echo(sentence)
    typer.echo(f"the page is {folder / 'compare.html'}, its numbers are in compare.json and compare.jsonl beside it")


def _load(file: Path | None, overrides: list[str] | None) -> Config:
    from igpo_fast.config import load

    settings = load(file, overrides or ())
    _quiet()
    return settings


def _evaluated(target: str, file: Path | None, overrides: list[str], checkpoint: str) -> tuple[Config, str]:
    """The configuration to evaluate with, and the weights."""
    if not (Path(target) / "config.yaml").exists():
        if file is None:
            what = "not a run folder" if Path(target).exists() else "no such run folder"
            raise InputError(f"{target}: {what}; give --config FILE beside a model")
        if checkpoint != "newest":
            raise InputError(f"--checkpoint {checkpoint}: {target} is a model; leave it out")
        return _load(file, [*overrides, f"model.path={json.dumps(target)}"]), target
    if file is not None:
        raise InputError(f"{target}: a run folder has its own configuration; leave --config out")
    settings = _load(Path(target) / "config.yaml", overrides)
    from igpo_fast.run.checkpoint import RunFolder

    run = RunFolder(target)
    if not run.saved():
        raise InputError(f"{run.checkpoints}: no checkpoint yet; train for longer")
    held_out = run.config.eval.questions
    data = settings.data
    splits = {"files": data.eval is None, "verifiers": not data.environment_eval}.get(data.source, False)
    if splits and settings.eval.questions > held_out:
        raise InputError(
            f"{target}: {settings.eval.questions} questions wanted, but this run held out {held_out} and "
            "trained on the others; ask for fewer, or give data.eval=FILE or data.environment_eval"
        )
    for changed in run.changed_contents(settings):
        typer.echo(f"warning: {changed}", err=True)
    return settings, str(run.chosen(checkpoint))  # verified: a damaged one is refused


@contextmanager
def _new_folder(path: Path | None) -> Iterator[None]:
    """Make the folder before the long work whose result it will hold."""
    if path is None:
        yield
        return
    with _nothing_empty_left(path):
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise InputError(f"{path}: exists; give another --output") from None
        except OSError as error:
            raise StorageError(f"{path}: cannot be made ({error.strerror}); give another --output") from None
        yield


@contextmanager
def _nothing_empty_left(path: Path) -> Iterator[None]:
    """If the block fails, remove the folders up to ``path`` that it made and left empty."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            if new and [entry.name for entry in path.iterdir()] == [".lock"]:
                (path / ".lock").unlink()
            for folder in new:
                folder.rmdir()
        raise


def _quiet() -> None:
    """Silence transformers' bars and advice, which are not meant for our users."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
