"""cli.py and summary.py: what a user types, reads, and gets as exit code."""

import errno
import json
import math
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import igpo_fast.evaluate
import igpo_fast.train
from igpo_fast import __version__, cli, config
from igpo_fast.cli import app
from igpo_fast.errors import InputError, ToolError
from igpo_fast.rollouts.tools.search import Bm25Search, NoSearch
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.run.interrupt import Interrupted
from igpo_fast.run.summary import run_summary
from igpo_kernels import triton_variants

TINY = [
    "world.persons=12", "world.companies=6", "world.cities=6", "world.countries=4", "world.train_worlds=1",
    "world.eval_worlds=1", "world.sft_worlds=1", "eval.questions=4", "model.hidden_size=16", "model.heads=2",
    "model.kv_heads=2", "model.ffn_size=16", "rollout.group_size=2", "rollout.max_turns=2",
    "rollout.max_turn_tokens=6", "rollout.max_tokens=128", "sft.clean_steps=0", "sft.noisy_steps=0",
    "sft.hard_steps=0", "sft.batch_size=2", "train.steps=1", "train.questions=2",
]  # fmt: skip


def igpo_fast_(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def tiny(folder):
    return [*TINY, f"run.dir={folder / 'run'}", f"run.cache={folder / 'cache'}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder and what the command printed."""
    folder = tmp_path_factory.mktemp("cli")
    result = igpo_fast_("train", *tiny(folder))
    assert result.exit_code == 0, result.output
    return folder / "run", result.output


def refused(*arguments):
    """The one line that a command ends with."""
    result = igpo_fast_(*arguments)
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr


def test_train_ends_with_what_was_learned_and_what_next(run):
    folder, output = run
    summary = run_summary(RunFolder(folder).read_metrics(), folder, config.load(folder / "config.yaml"))
    assert summary.partition("try next")[0] in output
    assert f" train --config {folder}/config.yaml train.steps=2" in output


def test_the_suggested_command_goes_on(run):
    folder, _ = run
    result = igpo_fast_("train", "--config", folder / "config.yaml", "train.steps=2")
    assert result.exit_code == 0 and "resumed after step 1" in result.output
    assert [row["step"] for row in RunFolder(folder).read_metrics()] == [0, 1, 2]


def test_eval_of_a_run(run):
    folder, _ = run
    newest = list(RunFolder(folder).saved().values())[-1]
    result = igpo_fast_("eval", folder, "--json")
    found = json.loads(result.stdout)
    assert found["model"] == str(newest) and found["search"] is True and found["questions"] == 4
    last = RunFolder(folder).read_metrics()[-1]
    for key in ("eval/f1", "eval/em", "eval/turns"):
        assert found[key] == last[key]  # the same weights, questions and noise
    assert f"(4 questions, with search, {newest})" in igpo_fast_("eval", folder).stdout


def test_eval_without_search_and_with_fewer_questions(run, monkeypatch):
    tools, real = [], igpo_fast.evaluate.evaluate
    monkeypatch.setattr(
        igpo_fast.evaluate, "evaluate", lambda agent, *rest: tools.extend(agent.tools) or real(agent, *rest)
    )
    found = json.loads(igpo_fast_("eval", run[0], "--no-search", "--questions", 1, "--json").stdout)
    assert found["search"] is False and found["questions"] == 1
    igpo_fast_("eval", run[0])
    assert [type(tool) for tool in tools] == [NoSearch, Bm25Search]
    assert found["eval/f1_se"] is None  # JSON knows no NaN


def test_eval_of_a_model_directory(run):
    folder, _ = run
    newest = list(RunFolder(folder).saved().values())[-1]
    # The model brings its tokenizer, whatever the configuration says.
    of_model = ["eval", newest, "--config", folder / "config.yaml", "model.tokenizer=bpe", "--json"]
    found = json.loads(igpo_fast_(*of_model).stdout)
    of_run = json.loads(igpo_fast_("eval", folder, "--json").stdout)
    assert found == of_run
    assert "not a run folder; give --config" in refused("eval", newest)
    assert "leave --config out" in refused("eval", folder, "--config", folder / "config.yaml")


def test_eval_of_a_run_without_checkpoint(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 3}")
    assert "no checkpoint yet" in refused("eval", tmp_path)


def test_eval_never_asks_what_was_trained_on(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "data: {source: files, train: q.jsonl, corpus: c.jsonl}\nmodel: {tokenizer: bpe}\neval: {questions: 8}"
    )
    (tmp_path / "checkpoints" / "step_000001").mkdir(parents=True)
    assert "this run held out 8 and trained on the others" in refused("eval", tmp_path, "--questions", 9)


def test_sft_trains_once_then_finds_it(tmp_path):
    arguments = ["sft", *tiny(tmp_path), "sft.clean_steps=2"]
    first = igpo_fast_(*arguments)
    assert first.exit_code == 0 and "warm start 2/2  loss " in first.stderr
    (cached,) = (tmp_path / "cache").iterdir()
    assert first.stdout == f"the warm-started model is in {cached}\n"
    second = igpo_fast_(*arguments, "--output", tmp_path / "out")
    assert "loss" not in second.stderr and second.stdout.endswith(f" {tmp_path / 'out'}\n")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (cached, tmp_path / "out")]
    assert weights[0] == weights[1] and (tmp_path / "out" / "tokenizer.json").exists()
    assert "exists; give another --output" in refused(*arguments, "--output", tmp_path / "out")
    assert "no steps are configured" in refused("sft", *tiny(tmp_path))


def test_score(run, tmp_path):
    newest = list(RunFolder(run[0]).saved().values())[-1]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    turn = {"role": "assistant", "content": "<search> buga </search>"}
    row = {"question": "buga ?", "answers": ["tiza"], "messages": [turn, {"role": "tool", "content": "tiza"}, turn]}
    source.write_text(json.dumps(row) + "\n")
    arguments = ["score", "--model", newest, "--input", source, "--output", target]
    result = igpo_fast_(*arguments)
    assert result.exit_code == 0 and result.stdout == f"scored 1 trajectory into {target}\n"
    values = json.loads(target.read_text())["values"]
    assert len(values) == 2 and all(value < 0 for value in values)
    assert "--overwrite" in refused(*arguments)
    assert igpo_fast_(*arguments, "--overwrite", "--basis", "prob", "--answers", "max").exit_code == 0
    assert json.loads(target.read_text())["values"] == pytest.approx([math.exp(value) for value in values])
    assert igpo_fast_(*arguments, "--overwrite", "--baseline", "masked").exit_code == 0
    masked = json.loads(target.read_text())
    assert masked["values"][0] is None and len(masked["baselines"]) == 1 and masked["values"][1] != values[1]
    random = [*arguments, "--overwrite", "--baseline", "random"]
    assert "--baseline random takes responses from other questions" in refused(*random)
    answered = [[turn, {"role": "tool", "content": name}, turn] for name in ("buga", "tiza", "mavi")]
    source.write_text(
        "".join(json.dumps(row | {"question": f"{m[1]['content']} ?", "messages": m}) + "\n" for m in answered)
    )
    found = []
    for more in (1, 2), (1, 3), (2, 0), (1, 2):
        chosen = [part for pair in zip(("--baseline-samples", "--seed"), more, strict=True) for part in pair]
        assert igpo_fast_(*random, *chosen).exit_code == 0
        found.append([json.loads(line)["baselines"] for line in target.read_text().splitlines()])
    assert found[0] == found[3] and found[0] != found[1] != found[2] != found[0]
    source.write_text("{")
    assert f"{source} line 1: not JSON" in refused(*arguments, "--overwrite")


def test_doctor(monkeypatch):
    assert igpo_fast_("doctor").exit_code == 0
    monkeypatch.setattr(triton_variants, "runs_on_cpu", lambda: False)
    broken = igpo_fast_("doctor", "model.kernels=triton")
    assert broken.exit_code == 1 and "model.kernels=triton: needs a GPU" in broken.output


def test_version_and_usage():
    assert igpo_fast_("--version").stdout == f"igpo-fast {__version__}\n"
    for arguments in (["train", "--nonsense"], ["nonsense"], ["score"], ["score", "--dialect", "latin"]):
        result = igpo_fast_(*arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize("command", ["train", "sft", "doctor"])
def test_an_unknown_key_is_one_line(command):
    assert "did you mean train.steps?" in refused(command, "train.stepz=3")


def test_a_tool_error_is_one_line(run, monkeypatch, tmp_path):
    def fail(settings):
        raise ToolError("search.url=http://x: no answer; is the search server running there?")

    monkeypatch.setattr(igpo_fast.train, "train", fail)
    assert refused("train", *tiny(tmp_path)).startswith("error: search.url=http://x")


@pytest.mark.parametrize("stop", [Interrupted("stopped after step 3"), KeyboardInterrupt()])
def test_interrupted_is_130(monkeypatch, stop, tmp_path):
    def interrupted(settings):
        raise stop

    monkeypatch.setattr(igpo_fast.train, "train", interrupted)
    result = igpo_fast_("train", *tiny(tmp_path))
    assert result.exit_code == 130
    if not isinstance(stop, KeyboardInterrupt):
        assert result.stderr == "interrupted: stopped after step 3; the same command resumes from there\n"


def test_help_waits_for_no_library():
    code = "import sys, igpo_fast.cli; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


ROWS = [
    {"step": 0, "eval/f1": 0.02, "eval/f1_se": 0.005},
    *({"step": s, "reward/f1": 0.1 * s, "turns/mean": 2.0, "group/collapsed": None} for s in range(1, 7)),
    {"step": 7, "reward/f1": 0.7, "turns/mean": 4.0, "group/collapsed": 0.25, "eval/f1": 0.1, "eval/f1_se": 0.01},
    {"step": 8, "reward/f1": 0.8, "turns/mean": 4.0, "group/collapsed": 0.35, "eval/f1": 0.42, "eval/f1_se": None},
]


def questions_at_hand(folder, monkeypatch):
    """The working directory has configs/musique.yaml and what it names."""
    monkeypatch.chdir(folder)
    (folder / "configs").mkdir()
    (folder / "configs" / "musique.yaml").write_text(
        "data: {source: files, train: q.jsonl, corpus: c.jsonl}\nmodel: {tokenizer: bpe}"
    )
    for name in ("q.jsonl", "c.jsonl"):
        (folder / name).touch()


def test_summary_hand_worked(tmp_path, monkeypatch):
    questions_at_hand(tmp_path, monkeypatch)
    settings = config.load(None, ["train.steps=8", "train.lr_schedule=constant"])
    assert run_summary(ROWS, Path("runs/a b"), settings).splitlines() == [
        "results     eval f1 0.020 ± 0.005 -> 0.420  ▁▂█  steps 0 to 8",
        "            training f1 0.250 -> 0.650  turns 2.0 -> 3.0  collapsed groups 25% -> 35%",
        "run folder  runs/a b (config.yaml, metrics.jsonl, rollouts/, checkpoints/)",
        "try next    igpo-fast eval 'runs/a b' --no-search  # the same policy, search finds nothing",
        "            igpo-fast train --config 'runs/a b'/config.yaml train.steps=16  # go on",
        "            igpo-fast train --config configs/musique.yaml  # real questions",
    ]


def test_summary_offers_only_what_works():
    settings = config.load(
        None,
        ["train.lr_schedule=linear", "data.source=files", "data.train=q.jsonl", "data.corpus=c.jsonl",
         "model.tokenizer=bpe", "run.tracker=tensorboard"],
    )  # fmt: skip
    assert run_summary(ROWS[:1], Path("r"), settings).splitlines() == [
        "results     eval f1 0.020 ± 0.005 at step 0",
        "run folder  r (config.yaml, metrics.jsonl, rollouts/, checkpoints/)",
        "try next    igpo-fast eval r --no-search  # the same policy, search finds nothing",
        "            tensorboard --logdir r/tensorboard",
    ]
    assert "results" not in run_summary([], Path("r"), settings)


def test_a_single_step_has_no_first_and_last():
    assert "training f1 0.100  turns 2.0\n" in run_summary(ROWS[1:2], Path("r"), config.load())
    assert "training f1 0.100 -> 0.300  " in run_summary(ROWS[1:4], Path("r"), config.load())


def test_real_questions_are_offered_only_where_they_are(tmp_path, monkeypatch):
    questions_at_hand(tmp_path, monkeypatch)
    assert "musique" in run_summary([], Path("r"), config.load())
    (tmp_path / "c.jsonl").unlink()
    assert "musique" not in run_summary([], Path("r"), config.load())
    monkeypatch.chdir("/")
    assert "musique" not in run_summary([], Path("r"), config.load())


def test_no_command_is_offered_that_lacks_credentials():
    settings = config.load(None, ["search.url=http://me:secret@h/retrieve"])
    summary = run_summary([], Path("r"), settings)
    assert "secret" not in summary and "igpo-fast" not in summary


# --- what ends a command ---


def raising(monkeypatch, error):
    def fail(settings):
        raise error

    monkeypatch.setattr(igpo_fast.train, "train", fail)


@pytest.mark.parametrize(
    "error, line",
    [
        (OSError(errno.ENOSPC, "No space left on device", "r/x"), "error: r/x: No space left on device; check that"),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied; check that"),
        (ModuleNotFoundError("No module named 'bm25s'", name="bm25s"), "'bm25s'; pip install 'igpo-fast[train]'"),
        (MemoryError(), "error: out of memory (no details); lower train.token_budget"),
        (torch.OutOfMemoryError("CUDA out of\nmemory"), "error: out of memory (CUDA out of memory); lower"),
        (ToolError("http://me:secret@h: gone"), "error: http://***@h: gone"),
        (InputError("two\nlines"), "error: two lines\n"),
    ],
)
def test_what_is_no_bug_is_one_line(monkeypatch, tmp_path, error, line):
    raising(monkeypatch, error)
    assert line in refused("train", *tiny(tmp_path))


def test_a_bug_is_one_line_and_its_traceback_is_kept(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["igpo-fast", "train", *tiny(tmp_path)])
    raising(monkeypatch, KeyError("http://me:secret@h"))
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    signal.signal(signal.SIGINT, handler)
    (kept,) = tmp_path.glob("igpo-fast-*.log")
    line = capsys.readouterr().err
    assert ended.value.code == 1 and line.count("\n") == 1
    assert line.startswith("error: internal: KeyError: 'http://***@h'; this is a bug: please report it with")
    assert str(kept) in line and "raise error" in kept.read_text() and "secret" not in kept.read_text()


def test_a_refused_run_leaves_no_folder(tmp_path):
    line = refused("train", *tiny(tmp_path), f"run.dir={tmp_path}/new/run", "train.token_budget=5")
    assert "train.token_budget=5" in line and not (tmp_path / "new").exists()


def test_a_refused_run_leaves_a_folder_that_was_there(tmp_path):
    (tmp_path / "new").mkdir()
    refused("train", *tiny(tmp_path), f"run.dir={tmp_path}/new", "train.token_budget=5")
    assert (tmp_path / "new").exists()


def test_sft_checks_its_output_before_the_work(tmp_path, monkeypatch):
    def never(*args, **options):
        raise AssertionError("began to work")

    monkeypatch.setattr("igpo_fast.setup.set_up", never)
    (tmp_path / "file").touch()
    line = refused("sft", *tiny(tmp_path), "sft.clean_steps=2", "--output", tmp_path / "file" / "out")
    assert line == f"error: {tmp_path}/file/out: cannot be made (Not a directory); give another --output\n"


def test_a_refused_sft_leaves_no_output(tmp_path):
    line = refused("sft", *tiny(tmp_path), "sft.clean_steps=2", "model.path=/none", "--output", tmp_path / "a" / "out")
    assert "model.path=/none" in line and not (tmp_path / "a").exists()


def test_progress_is_logged_off_a_terminal(run):
    result = igpo_fast_("eval", run[0], "--json")
    assert "evaluation 100%\n" in result.stderr and len(result.stdout.splitlines()) == 1


def test_tilde_in_an_option_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert f"{tmp_path}/x.yaml: cannot read" in refused("train", "--config=~/x.yaml")


def test_data_that_evaluates_nothing_is_refused_at_once(tmp_path, monkeypatch):
    raising(monkeypatch, AssertionError("began to work"))
    assert "data.eval: an empty list" in refused("train", *tiny(tmp_path), "data.eval=[]")


@pytest.mark.parametrize("temperature", ["nan", "inf", "0", "1e-320", "1e30"])
def test_a_temperature_out_of_sense(tmp_path, temperature):
    arguments = ["--model", "m", "--input", tmp_path / "i", "--output", tmp_path / "o", "--temperature", temperature]
    result = igpo_fast_("score", *arguments)
    assert result.exit_code == 2 and "temperature" in result.stderr


# --- how it is called ---


def test_commands_are_shown_as_a_shell_can_run_them(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/igpo_fast/__main__.py"])
    monkeypatch.setattr(cli.shutil, "which", lambda name: None)
    assert cli._program() == f"{sys.executable} -m igpo_fast"
    monkeypatch.setattr(cli.shutil, "which", {"python": sys.executable}.get)
    assert cli._program() == "python -m igpo_fast"
    own = sys.executable  # any program that is there
    monkeypatch.setattr(sys, "argv", [own])
    monkeypatch.setattr(cli.shutil, "which", {own: own, Path(own).name: own}.get)
    assert cli._program() == Path(own).name
    monkeypatch.setattr(cli.shutil, "which", {own: own}.get)
    assert cli._program() == own


@pytest.mark.parametrize("missing", ["typer", "yaml"])
def test_without_the_extra_it_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['x', 'doctor']\n"
    code += "from igpo_fast.__main__ import main; main()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.endswith("; pip install 'igpo-fast[train]'\n") and missing in ended.stderr


def test_a_message_stays_short_whatever_it_quotes():
    line = str(InputError(f"model.device: {'x' * 5000!r} is no device; give cpu"))
    assert len(line) < 1100 and line.startswith("model.device: 'xx") and line.endswith("xx' is no device; give cpu")
