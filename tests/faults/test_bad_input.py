"""Bad input: exit code 2, one line that names what, where and the remedy, and an earlier run left as it was."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from igpo_fast.cli import app
from tests.tiny import SETTINGS, files

INVISIBLE = "\u200b"  # the tokenizer below drops it
QUESTIONS = [{"id": f"q{i}", "question": f"Where was person {i} born?", "answers": [f"City {i}"]} for i in range(12)]
CORPUS = [{"id": f"p{i}", "title": f"Person {i}", "text": f"Person {i} was born in City {i}."} for i in range(12)]
CONFIG = """\
run: {dir: run}
data: {source: files, train: train.jsonl, eval: eval.jsonl, corpus: corpus.jsonl}
model: {tokenizer: tokenizer}
sft: {clean_steps: 0, noisy_steps: 0, hard_steps: 0}
rollout: {system: "", max_tokens: 256}
"""
TINY = [key for key in SETTINGS if not key.startswith(("train.steps", "eval.questions"))]
TINY += ["train.steps=2", "train.checkpoint_every=1", "eval.questions=3"]


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def save_tokenizer(folder):
    """Byte-level BPE that, like some real ones, drops characters that cannot be seen."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.Replace(INVISIBLE, "")
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([row["text"] for row in CORPUS], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>").save_pretrained(folder)


def run_train(*overrides, config="config.yaml"):
    return CliRunner().invoke(app, ["train", "--config", config, *TINY, *overrides])


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Data, tokenizer, configuration, and a run of two steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_tokenizer("tokenizer")
        write("train.jsonl", QUESTIONS[:8])
        write("eval.jsonl", QUESTIONS[8:])
        write("corpus.jsonl", CORPUS)
        Path("config.yaml").write_text(CONFIG)
        result = run_train()
        assert result.exit_code == 0, result.output
        assert "rollouts/step_000002.jsonl" in files(folder / "run")
    return folder


@pytest.fixture
def here(project, tmp_path, monkeypatch):
    """A copy of the project, as working directory."""
    shutil.copytree(project, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def refused(*overrides, **options):
    """The one line of a refusal that leaves ``run`` untouched and makes nothing of a ``new`` one."""
    before = files(Path("run"))
    result = run_train(*overrides, **options)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ") and "Traceback" not in result.output
    assert files(Path("run")) == before
    assert not Path("new").exists()
    return line.removeprefix("error: ")


# --- configuration ---


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["train.stepz=9"], r"unknown key train\.stepz; did you mean train\.steps\?"),
        (["training.steps=9"], r"unknown key training; did you mean \w+\?"),
        (["train.steps=many"], r"train\.steps: .*valid integer.*got 'many'"),
        (["train.steps=0"], r"train\.steps: .*greater than or equal to 1.*got 0"),
        (["model.probe=1.5"], r"model\.probe: .*boolean.*got 1\.5"),
        (["train.steps"], r"'train\.steps': overrides are written section\.key=value, like train\.steps=10"),
        (
            ["run.dir=new", "algorithm.passes=one", "train.updates=2"],
            r"algorithm\.passes=one: train\.updates=2 .*; use algorithm\.passes=two or auto",
        ),
        (
            ["run.dir=new", "algorithm.passes=one", "train.token_budget=600"],
            r"algorithm\.passes=one: a group may take \d+ tokens, over train\.token_budget=600; "
            r"use algorithm\.passes=two or auto",
        ),
        (
            ["run.dir=new", "train.token_budget=200"],
            r"train\.token_budget=200: a rollout .* may take \d+ tokens; raise it, or lower rollout\.max_tokens",
        ),
        (
            ["run.dir=new", "train.questions=5", "rollout.oversample=4", "rollout.skip_collapsed=true"],
            r"a step asks 9 questions \(train\.questions and rollout\.oversample\), the data set has 8 to train on; .*",
        ),
        (
            ["search.url=http://me:secret@h:99999/x"],
            r"search\.url: 'http://\*\*\*@h:99999/x' is not a URL \(Port out of .*",
        ),
        (["train.warmup_steps=3"], r"train\.warmup_steps=3 exceeds train\.steps=2, so train\.lr is never reached; .*"),
        (["rollout.group_size=1"], r"rollout\.group_size=1 with algorithm\.name=igpo leaves nothing to compare .*"),
        (["train.lr=0.5"], r"run: train\.lr was 0\.001 when this run began and is now 0\.5; .* another run\.dir="),
        (["run.dir=tokenizer"], r"tokenizer: not empty and not a run folder; give another run\.dir="),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_configuration(here, overrides, expected):
    before = files(here)
    assert re.fullmatch(rf"(config\.yaml with overrides: |command line: )?{expected}", refused(*overrides))
    assert files(here) == before


def test_a_configuration_without_its_option(here):
    assert refused("config.yaml").endswith("like train.steps=10; a file is given as --config config.yaml")


def test_too_few_numbers(here):
    assert refused("train.betas=[0.9]") == "command line: train.betas: too few numbers, got [0.9]"


def test_an_unknown_key_in_the_file(here):
    Path("config.yaml").write_text(CONFIG + "train: {learning_rate: 1}\n")
    assert refused().startswith("config.yaml: unknown key train.learning_rate; ")


@pytest.mark.parametrize("override", ["train.stepz=9", "training.steps=9"])
def test_an_unknown_key_of_the_command_line(here, override):
    assert refused(override).startswith("command line: unknown key train")


def test_missing_configuration(here):
    line = refused(config="absent.yaml")
    assert line == "absent.yaml: cannot read the configuration (No such file or directory); give an existing file"


# --- data ---


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl", "corpus.jsonl"])
def test_missing_file(here, name):
    Path(name).unlink()
    assert refused() == f"{name}: cannot read it (No such file or directory); give an existing file"


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl", "corpus.jsonl"])
def test_empty_file(here, name):
    Path(name).write_text("\n")
    assert re.fullmatch(rf"{name}: no (questions|passages); give at least one (row|line)", refused("run.dir=new"))


BROKEN = [
    (
        {"answers": []},
        r'train\.jsonl line 3: question without answers; fill "answers", remove it, or .*',
    ),
    (
        {"answers": [INVISIBLE]},
        r"question q2: its answer .* tokenises to nothing; remove it, or choose a tokenizer that covers it",
    ),
    (
        {"question": "Where? " * 200},
        r"question q2: its prompt of \d+ tokens and a turn of 8 exceed rollout\.max_tokens=256; raise it, or .*",
    ),
    ({"id": "q1"}, r"train\.jsonl line 3: id 'q1' occurs twice; make ids unique"),
]


@pytest.mark.parametrize("change, expected", BROKEN, ids=["no answers", "no tokens", "long prompt", "same id"])
def test_a_broken_question_is_found_before_training(here, change, expected):
    """Also one that this session would never have drawn. The run that the file was whole for only wants it back."""
    write("train.jsonl", [*QUESTIONS[:2], QUESTIONS[2] | change, *QUESTIONS[3:8]])
    assert re.fullmatch(expected, refused("run.dir=new"))
    for more in ([], ["train.steps=3"]):
        assert refused(*more).startswith("train.jsonl (data.train): holds something else than when run began; restore")


def test_a_long_prompt_among_the_evaluation_questions(here):
    write("eval.jsonl", [*QUESTIONS[8:], {"id": "long", "question": "Where? " * 200, "answers": ["City 1"]}])
    assert refused("run.dir=new", "eval.questions=99").startswith("question long: its prompt of ")


# --- checkpoints ---


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "name, harm, what",
    [
        ("model.safetensors", flip, "damaged"),
        ("state.pt", cut, "damaged"),
        ("manifest.json", Path.unlink, "missing or damaged"),
        ("tokenizer.json", Path.unlink, "missing from the checkpoint"),
    ],
)
def test_a_corrupt_checkpoint_changes_nothing(here, name, harm, what):
    """Not even the settings that a session may change, and not what a killed session left behind."""
    checkpoint = Path("run/checkpoints/step_000002")
    harm(checkpoint / name)
    Path("run/.metrics.jsonl.tmp").write_text("half")
    line = refused("train.steps=4", "eval.every=1")
    assert line.startswith(f"{checkpoint / name}: {what}")
    assert line.endswith(f"; delete {checkpoint} to go on from step 1")

    shutil.rmtree(checkpoint)
    assert run_train("train.steps=4").exit_code == 0
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_metrics_that_somebody_edited(here):
    lines = Path("run/metrics.jsonl").read_text().splitlines()
    Path("run/metrics.jsonl").write_text("\n".join([lines[0], "seems fine", *lines[1:], ""]))
    assert refused() == "run/metrics.jsonl:2: not a metrics row; delete or repair the line"


def test_a_run_goes_on_with_the_data_that_it_began_with(here):
    """Edited in place, under the same name: the stored configuration tells nothing."""
    write("corpus.jsonl", [row | {"text": row["text"].upper()} for row in CORPUS])
    assert refused("train.steps=4").startswith("corpus.jsonl (data.corpus): holds something else than when run began;")
    write("corpus.jsonl", CORPUS)
    stored = Path("run/config.yaml")
    stored.write_text(stored.read_text().replace("gamma: 1.0", "gamma: 0.5"))
    result = CliRunner().invoke(app, ["train", "--config", str(stored)])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: run: algorithm.gamma was 1.0 when this run began and is now 0.5; keep it")


def test_a_damaged_checkpoint_is_not_evaluated(here):
    flip(Path("run/checkpoints/step_000002/model.safetensors"))
    result = CliRunner().invoke(app, ["eval", "run"])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: run/checkpoints/step_000002/model.safetensors: damaged")


# --- models ---


def test_model_path_without_a_model(here):
    Path("empty").mkdir()
    line = refused("run.dir=new", "model.path=empty")
    assert line.startswith("model.path=empty: ") and "; give " in line


def test_model_path_with_a_tokenizer_only(here):
    line = refused("run.dir=new", "model.path=tokenizer")
    assert line.startswith("model.path=tokenizer: no causal LM loads from there (")


@pytest.mark.parametrize("harm", [cut, lambda path: path.write_bytes(b"{}"), Path.unlink], ids=["cut", "text", "gone"])
def test_model_path_with_damaged_weights(here, harm):
    shutil.copytree("run/checkpoints/step_000002", "model")
    harm(Path("model/model.safetensors"))
    line = refused("run.dir=new", "model.path=model")
    assert line.startswith("model.path=model: no causal LM loads from there (")


def test_model_of_a_refused_architecture(here):
    """Bloom's ALiBi puts a bias on attention that a packed tree cannot see."""
    BloomForCausalLM(BloomConfig(vocab_size=301, hidden_size=32, n_layer=2, n_head=4)).save_pretrained("bloom")
    save_tokenizer("bloom")
    line = refused("run.dir=new", "model.path=bloom")
    assert re.fullmatch(r"BloomForCausalLM cannot run packed: BloomAttention .*; use a model .*", line)


# --- what a shell sees ---


def test_the_command_prints_one_line_and_exits_with_2(here):
    flip(Path("run/checkpoints/step_000002/model.safetensors"))
    command = [sys.executable, "-c", "from igpo_fast.cli import main; main()", "train", "--config", "config.yaml"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run([*command, *TINY], capture_output=True, text=True, env=environment, timeout=120)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: run/checkpoints/step_000002/model.safetensors: damaged")
