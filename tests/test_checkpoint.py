import hashlib
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from igpo_fast import config
from igpo_fast.contents import contents
from igpo_fast.errors import InputError, StorageError
from igpo_fast.files import sha256
from igpo_fast.ranks import Ranks
from igpo_fast.run.checkpoint import RunFolder, Writer, load_checkpoint, open_run, rewind
from igpo_fast.run.records import record_of
from igpo_fast.types import ANSWER, SEARCH, Credit, Question, Rollout, Turn
from igpo_fast.update.critic import CriticSettings
from igpo_fast.update.learner import Learner
from tests.doing import doing

LEARNER = "learner-00000-of-00001.pt"


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def build(seed=0, dtype=torch.float32, critic=None):
    """A learner of a tiny tied model."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    lm = Qwen2ForCausalLM(Qwen2Config(vocab_size=32, num_key_value_heads=1, tie_word_embeddings=True, **sizes))
    return Learner(lm.to(dtype), lr=1e-2, factor=lambda step: 1 / (1 + step), weight_decay=0.01, critic=critic)


def update(learner):
    ids = torch.randint(32, (2, 8))
    loss = learner.lm(input_ids=ids, labels=ids).loss
    if head := learner.policy.critic:
        loss = loss + (head(learner.lm.model(input_ids=ids).last_hidden_state) - 1).square().mean()
    learner.backward(loss)
    learner.step()


def save(run, step, learner, extra=None):
    """Write a checkpoint to its end; its folder."""
    writer = Writer(run, Ranks())
    try:
        writer.save(step, learner, Tokenizer(), extra or {"cursor": step})
        writer.wait()
    finally:
        writer.close()
    return run.checkpoint(step)


def load(run, learner):
    """(step, extra) of the newest checkpoint; None if there is none."""
    newest = run.newest()
    return newest and load_checkpoint(newest, learner)


def settings_for(*overrides):
    return config.load(None, ["train.lr=0.01", *overrides])


def tree(folder):
    """Every file's bytes, to show that nothing was touched."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def begun(folder, config):
    """A run folder that a session began and left."""
    with open_run(folder, config) as run:
        run.begin()


@pytest.fixture
def run(tmp_path):
    with open_run(tmp_path / "run", settings_for()) as run:
        run.begin()
        yield run


# --- weights, optimiser, generators ---


@pytest.mark.parametrize("critic", [None, CriticSettings(lr=0.1)], ids=["", "critic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_updates_equal_uninterrupted_ones(run, dtype, critic):
    learner = build(dtype=dtype, critic=critic)
    update(learner)
    save(run, 1, learner, {"cursor": 7, "order": [3, 1, 2]})
    update(learner)
    wanted = {name: p.clone() for name, p in learner.policy.state_dict().items()}

    fresh = build(seed=1, dtype=dtype, critic=critic)
    assert load(run, fresh) == (1, {"cursor": 7, "order": [3, 1, 2]})
    update(fresh)
    for name, tensor in fresh.policy.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
        assert tensor.dtype == dtype
    assert fresh.lr == learner.lr
    # Each group has its own rate: 1e-2 and the critic's, halved in the second update.
    assert [group["lr"] for group in fresh.optimizer.param_groups] == pytest.approx([0.005, 0.05][: 1 + bool(critic)])


def test_tied_embeddings_stay_one_tensor_and_transformers_loads_the_folder(run):
    learner = build()
    folder = save(run, 1, learner)
    fresh = build(seed=1)
    load(run, fresh)
    lm = fresh.lm
    assert lm.lm_head.weight is lm.model.embed_tokens.weight
    assert lm.lm_head.weight in set(fresh.optimizer.param_groups[0]["params"])
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(6)[None]
    assert torch.equal(loaded(ids).logits, learner.lm(ids).logits)


def test_no_checkpoint_is_none(run):
    assert load(run, build()) is None


def test_extra_that_could_not_be_read_back_fails_when_saved(run):
    with pytest.raises(Exception, match="Weights only load failed"):
        save(run, 1, build(), {"path": run.path})
    assert run.saved() == {}


def test_newest_wins_and_old_ones_are_pruned(run):
    learner = build()
    for step in (2, 4, 10):
        save(run, step, learner)
    assert list(run.saved()) == [4, 10]
    assert load(run, learner)[0] == 10


def test_the_best_stays_beside_the_newest(tmp_path):
    """The first of equal ones; a row without the number, or with none, counts as not evaluated."""
    values = {1: 0.1, 2: 0.5, 3: float("nan"), 4: 0.5, 5: None, 6: 0.2, 7: 0.6, 8: 0.3, 9: 0.4}
    kept = {4: [2, 3, 4], 6: [2, 5, 6], 8: [7, 8], 9: [7, 8, 9]}
    with open_run(tmp_path, settings_for("train.keep_best=eval/f1")) as run:
        run.begin()
        learner = build()
        for step, value in values.items():
            run.append_metrics({"step": step} | ({} if value is None else {"eval/f1": value}))
            save(run, step, learner)
            assert list(run.saved()) == kept.get(step, list(run.saved()))
    reader = RunFolder(tmp_path)
    for which, step in (("best", 7), ("newest", 9), ("8", 8)):
        assert reader.chosen(which) == run.checkpoint(step)
    for which in ("6", "last", "-1"):
        with pytest.raises(InputError, match=f"--checkpoint {which}: not there; .* has newest and steps 7, 8, 9"):
            reader.chosen(which)
    flip(tmp_path / "checkpoints/step_000007/state.pt")
    with pytest.raises(InputError, match=r"damaged .*; restore it, or name another checkpoint"):
        reader.chosen("best")


def test_no_best_without_a_number_for_it(run):
    run.append_metrics({"step": 1, "eval/f1": 0.5})
    save(run, 1, build())
    assert run.best() is None
    with pytest.raises(InputError, match=r"--checkpoint best: no evaluated checkpoint; train with train"):
        run.chosen("best")


def test_saving_a_step_twice_leaves_the_first(run):
    learner = build()
    before = tree(save(run, 1, learner))
    assert tree(save(run, 1, learner)) == before


# --- damage ---


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "state.pt", LEARNER, "config.json", "manifest.json", "tokenizer.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_checkpoint_is_named_and_never_passed_over(run, name, harm):
    learner = build()
    save(run, 1, learner)
    path = save(run, 2, learner) / name
    if harm == "flip" and name == "manifest.json":
        path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    elif harm == "flip":
        flip(path)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    weights = {key: value.clone() for key, value in learner.lm.state_dict().items()}
    with pytest.raises(InputError) as error:
        load(run, learner)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    assert f"delete {path.parent} to go on from step 1" in message
    assert all(torch.equal(weights[key], value) for key, value in learner.lm.state_dict().items())


def test_the_only_checkpoint_damaged_says_from_the_start(run):
    learner = build()
    flip(save(run, 1, learner) / "state.pt")
    with pytest.raises(InputError, match="to go on from the start"):
        load(run, learner)


def forge(folder, name, content):
    """Put something else in the checkpoint, and into its manifest."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def torch_file(value):
    torch.save(value, buffer := io.BytesIO())
    return buffer.getvalue()


def of_another_model(state):
    for entry in state["states"].values():
        entry["exp_avg"] = torch.zeros(3)
    return state


@pytest.mark.parametrize(
    "name, content",
    [
        ("state.pt", lambda state: torch_file({})),
        (LEARNER, lambda state: torch_file({})),
        ("state.pt", lambda state: torch_file([1])),
        (LEARNER, lambda state: torch_file(state | {"states": {}})),
        (LEARNER, lambda state: torch_file(of_another_model(state))),
        ("state.pt", lambda state: torch_file(state | {"rng": {"cpu": torch.zeros(3), "cuda": []}})),
        ("state.pt", lambda state: torch_file(state | {"extra": 3})),
        ("state.pt", lambda state: b"no zip"),
        ("state.pt", lambda state: b""),
        ("model.safetensors", lambda state: b"x" * 64),
        ("model.safetensors", lambda state: safetensors.torch.save({"a": torch.zeros(3)}, {"format": "pt"})),
        ("config.json", lambda state: b"{"),
        ("config.json", lambda state: b"[]"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(run, name, content):
    learner = build()
    update(learner)
    folder = save(run, 1, learner)
    forge(folder, name, content(torch.load(folder / (name if name.endswith(".pt") else "state.pt"))))
    with pytest.raises(InputError) as error:
        load(run, learner)
    assert str(error.value).startswith(f"{folder}: undamaged, but not a state of this run's model and optimiser (")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"[" * 5000, b"9" * 5000, b"[]", b'{"files": 3}', b'{"files": {"a": 1}}', b"\xff"])
def test_a_manifest_of_something_else_is_damage(run, content):
    folder = save(run, 1, build())
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.json: missing or damaged; delete"):
        run.newest()


def test_files_of_a_checkpoint_have_the_modes_of_new_files(run):
    before = os.umask(0o027)
    try:
        folder = save(run, 1, build())
    finally:
        os.umask(before)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o640"}


# --- the folder ---


def test_configuration_is_stored_whole_and_survives(tmp_path):
    wanted = settings_for("algorithm.preset=robust", "run.dir=elsewhere")
    begun(tmp_path, wanted)
    assert RunFolder(tmp_path).config == wanted
    assert "ig_gate: 0.02" in (tmp_path / "config.yaml").read_text()


@pytest.mark.parametrize(
    "override, key",
    [("train.lr=0.02", "train.lr"), ("eval.questions=7", "eval.questions"), ("train.seed=5", "train.seed")],
)
def test_another_configuration_is_refused_and_changes_nothing(tmp_path, override, key):
    begun(tmp_path, settings_for())
    before = tree(tmp_path)
    with pytest.raises(InputError) as error:
        open_run(tmp_path, settings_for("train.steps=999", override))
    old = getattr(getattr(settings_for(), key.split(".")[0]), key.split(".")[1])
    assert f"{tmp_path}: {key} was {old!r}" in str(error.value) and override.split("=")[1] in str(error.value)
    assert "another run.dir=" in str(error.value) and "\n" not in str(error.value)
    assert tree(tmp_path) == before


def test_keys_of_a_session_may_change_and_are_stored(tmp_path):
    begun(tmp_path, settings_for())
    changed = settings_for("train.steps=999", "train.keep_checkpoints=5", "eval.every=1", "run.tracker=tensorboard")
    begun(tmp_path, changed)
    assert RunFolder(tmp_path).config == changed


def test_an_edit_of_the_stored_configuration_is_refused(tmp_path):
    """``train --config RUN/config.yaml`` reads the very file that was edited."""
    begun(tmp_path, settings_for())
    stored = tmp_path / "config.yaml"
    stored.write_text(stored.read_text().replace("lr: 0.01\n", "lr: 0.02\n").replace(" every: 20\n", " every: 5\n"))
    edited = config.load(stored)
    assert (edited.train.lr, edited.eval.every) == (0.02, 5)
    with pytest.raises(InputError, match=r"train\.lr was 0\.01 when this run began and is now 0\.02; keep it"):
        open_run(tmp_path, edited)
    stored.write_text(stored.read_text().replace("lr: 0.02\n", "lr: 0.01\n"))
    open_run(tmp_path, config.load(stored)).close()  # eval.every may change


def file_settings(folder, *overrides):
    """A run that reads a file of each kind; ``folder`` gets them."""
    row = json.dumps({"id": "1", "question": "Who?", "answers": ["me"], "title": "T", "text": "me"})
    for name in ("train.jsonl", "corpus.jsonl", "one.jsonl", "two.jsonl"):
        (folder / name).write_text(row + "\n")
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    return settings_for(
        "data.source=files", f"data.train={folder}/train.jsonl", f"data.corpus={folder}/corpus.jsonl",
        f"data.eval=[one={folder}/one.jsonl, {folder}/two.jsonl]", f"model.tokenizer={folder}/tokenizer", *overrides,
    )  # fmt: skip


CONTENTS = {
    "train.jsonl": "data.train", "corpus.jsonl": "data.corpus", "one.jsonl": "data.eval[0]",
    "two.jsonl": "data.eval[1]", "tokenizer/tokenizer.json": "model.tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("name", CONTENTS)
def test_data_edited_in_place_are_refused(tmp_path, name):
    wanted = file_settings(tmp_path)
    begun(tmp_path / "run", wanted)
    begun(tmp_path / "run", wanted)
    path, before = tmp_path / name, tree(tmp_path / "run")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"e", b"E") + b" ")
    with pytest.raises(InputError) as error:
        open_run(tmp_path / "run", wanted)
    source = path.parent if path.parent.name == "tokenizer" else path
    assert str(error.value).startswith(f"{source} ({CONTENTS[name]}): holds something else than when ")
    assert "\n" not in str(error.value) and tree(tmp_path / "run") == before
    path.write_bytes(content)
    os.utime(path, (1, 1))
    open_run(tmp_path / "run", wanted).close()


def test_names_of_the_hub_are_told_by_fingerprint_and_commit(monkeypatch):
    loaded = lambda *name, split: SimpleNamespace(_fingerprint=f"{name} {split}")  # noqa: E731
    monkeypatch.setattr("datasets.load_dataset", loaded)
    found = lambda name, file: f"/hub/{name}/snapshots/c0ffee/{file}"  # noqa: E731
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    overrides = [
        "data.source=files",
        "data.train=some/set:main:train",
        "data.corpus=gone.jsonl",
        "model.path=some/model",
    ]
    assert contents(settings_for(*overrides)) == {
        "data.train": "('some/set', 'main') train",
        "model.path": "c0ffee",
    }


def test_a_made_up_world_reads_no_files():
    assert contents(settings_for("data.source=world", "model.tokenizer=world")) == {}


def test_the_digest_of_a_file_is_its_sha256_and_of_a_folder_that_of_its_files(tmp_path):
    found = contents(file_settings(tmp_path))
    assert found["data.train"] == hashlib.sha256((tmp_path / "train.jsonl").read_bytes()).hexdigest()
    before = found["model.tokenizer"]
    (tmp_path / "tokenizer" / ".cache").mkdir()
    (tmp_path / "tokenizer" / ".cache" / "times").write_text("x")  # what downloads leave there
    assert contents(file_settings(tmp_path))["model.tokenizer"] == before
    (tmp_path / "tokenizer" / "tokenizer.json").rename(tmp_path / "tokenizer" / "other.json")
    assert sha256(tmp_path / "tokenizer") != before


def test_steps_may_not_change_where_the_learning_rate_follows_them(tmp_path):
    begun(tmp_path, settings_for("train.lr_schedule=linear"))
    with pytest.raises(InputError, match=r"train\.steps was 100"):
        open_run(tmp_path, settings_for("train.lr_schedule=linear", "train.steps=200"))


def test_no_key_that_changes_the_training_is_a_session_s():
    sections = {}
    for section, key in (name.split(".") for name in sorted(config.session_keys())):
        sections.setdefault(section, []).append(key)
    assert sections == {
        "distributed": ["engine", "offload", "zero_stage"], "eval": ["every"],
        "model": ["device", "gradient_checkpointing"],
        "rollout": [
            "concurrency", "gpu_memory", "mismatch_stop", "mismatch_warn", "server", "server_timeout",
            "tensor_parallel", "transfer",
        ],
        "run": ["cache", "dir", "tracker"],
        "search": ["backoff", "concurrency", "max_response_mb", "on_failure", "retries", "timeout", "url"],
        "tools": ["seconds"],
        "train": ["checkpoint_every", "keep_best", "keep_checkpoints", "threads", "token_budget"],
    }  # fmt: skip


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="not empty and not a run folder"):
        open_run(tmp_path, settings_for())
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_session_killed_when_only_ranks_had_written_is_no_hindrance(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank_1.log").write_text("x")
    (tmp_path / ".config.yaml.tmp").write_text("train:")
    begun(tmp_path, settings_for())
    assert RunFolder(tmp_path).config == settings_for()


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_the_way(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match=r"cannot be a run folder \(.*\); give another"):
        open_run(file / "run" if below else file, settings_for())


def test_opening_writes_nothing(tmp_path):
    begun(tmp_path, settings_for())
    (tmp_path / ".metrics.jsonl.tmp").write_text("half")
    before = tree(tmp_path)
    open_run(tmp_path, settings_for("train.steps=999")).close()
    assert tree(tmp_path) == before
    begun(tmp_path, settings_for("train.steps=999"))
    assert RunFolder(tmp_path).config == settings_for("train.steps=999")
    assert not (tmp_path / ".metrics.jsonl.tmp").exists()


def test_nothing_behind_a_link_is_deleted(tmp_path):
    """Only temporaries of our own names go, and of links the link itself."""
    run, other = tmp_path / "run", tmp_path / "other"
    begun(run, settings_for())
    theirs = [".notes.tmp", ".step_000001.tmp", ".step_000001.jsonl.tmp", ".metrics.jsonl.tmp"]
    for name in theirs:
        (other / name).mkdir(parents=True)
        (other / name / "thesis.tex").write_text("x")
    (run / "notes").symlink_to(other)
    (run / ".notes.tmp").mkdir()
    (run / ".config.yaml.tmp").symlink_to(other)
    (run / "checkpoints" / ".step_000009.tmp").symlink_to(other)
    (run / "rollouts").rmdir()
    (run / "rollouts").symlink_to(other)
    (run / "discarded").mkdir()
    (run / "discarded" / "1").symlink_to(other)
    ours = run / "checkpoints" / ".step_000002.tmp"
    ours.mkdir()
    begun(run, settings_for())
    assert sorted(path.name for path in other.iterdir()) == sorted(theirs)
    assert all((other / name / "thesis.tex").exists() for name in theirs)
    assert (run / ".notes.tmp").is_dir() and not ours.exists() and not (run / ".config.yaml.tmp").is_symlink()


@pytest.mark.parametrize("kind", ["step", "eval"])
def test_half_written_rollouts_of_a_killed_session_go(run, kind):
    half = run.rollouts / f".{kind}_000003.jsonl.tmp"
    half.write_text("half")
    run.close()
    begun(run.path, settings_for())
    assert not half.exists()


@pytest.mark.parametrize("name", ["rollouts", "checkpoints", "discarded", "metrics.jsonl"])
def test_something_else_of_the_name_of_a_part_is_one_line(tmp_path, name):
    begun(tmp_path, settings_for())
    path = tmp_path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.mkdir() if name == "metrics.jsonl" else path.write_text("x")

    def go_on():
        with open_run(tmp_path, settings_for()) as run:
            run.begin()
            fill(run, 2)
            rewind(run, 1)

    with pytest.raises(StorageError) as error:
        go_on()
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value) and "move it" in str(error.value)


def test_one_process_at_a_time(run):
    with pytest.raises(InputError, match="another process trains here"):
        open_run(run.path, settings_for())
    child = (
        "import sys; from igpo_fast import config; from igpo_fast.run.checkpoint import open_run;"
        "open_run(sys.argv[1], config.load(None, ['train.lr=0.01']))"
    )
    ended = subprocess.run([sys.executable, "-c", child, run.path], capture_output=True, text=True)
    assert ended.returncode == 1 and "another process trains here" in ended.stderr
    run.close()
    open_run(run.path, settings_for()).close()


# --- metrics, rollouts, rewind ---


def test_rows_are_json_whatever_the_numbers(run):
    run.append_metrics({"step": 1, "a": np.float32(0.5), "b": float("nan"), "c": torch.tensor(2.0), "d": np.inf})
    assert run.metrics.read_text() == '{"step":1,"a":0.5,"b":null,"c":2.0,"d":null}\n'
    path = run.write_rollouts(1, [{"gains": np.array([0.25, np.nan]), "text": "né\n"}])
    assert path.name == "step_000001.jsonl"
    assert path.read_text() == '{"gains":[0.25,null],"text":"né\\n"}\n'


def test_rollouts_that_fail_half_way_leave_no_file(run):
    def records():
        yield {"a": 1}
        raise RuntimeError("engine died")

    with pytest.raises(RuntimeError):
        run.write_rollouts(1, records())
    assert list(run.rollouts.glob("*.jsonl")) == []


def test_rollouts_are_read_as_they_were_written(run):
    def turn(text, action):
        return Turn(np.array([3, 4]), np.array([-0.5, -1.0]), text, doing(action, text), np.array([5]), "r")

    question = Question("q", "Who?", ("a", "b"), dataset="NQ")
    turns = turn("Who", SEARCH), turn("a", ANSWER)
    rollouts = [Rollout(question, i, np.array([1, 2]), turns) for i in range(2)]
    scores = Credit(np.array([-2.0, -1.5]), np.array([0.5]), 1.0, 1.0, 0.0, np.array([0.25, -1.0]))
    run.write_rollouts(7, [record_of(rollout, scores) for rollout in rollouts])
    run.write_rollouts(7, [record_of(rollouts[0])], "eval")
    read = list(RunFolder(run.path).read_rollouts("step_000007"))
    assert [(r.question, r.index, r.answer, c.gains.tolist()) for r, c in read] == [
        (question, 0, "a", [0.5]), (question, 1, "a", [0.5]),
    ]  # fmt: skip
    assert [record_of(*pair) for pair in read] == [record_of(rollout, scores) for rollout in rollouts]
    ((rollout, credit),) = run.read_rollouts("eval_000007")
    assert credit is None and record_of(rollout) == record_of(rollouts[0])


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"id": 1, "turns": 2}', '{"version": 2}', '{"version": "x"}'])
def test_what_is_no_rollout_is_named(run, line):
    path = run.rollouts / "step_000001.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputError) as error:
        list(run.read_rollouts("step_000001"))
    assert str(error.value).startswith(f"{path}:1: not ") and "\n" not in str(error.value)
    with pytest.raises(InputError, match=r"step_000002\.jsonl: not there; give the name of a file in "):
        list(run.read_rollouts("step_000002"))


def fill(run, last, torn=b""):
    for step in range(last + 1):
        run.append_metrics({"step": step})
        run.write_rollouts(step, [{"step": step}])
        run.write_rollouts(step, [{"step": step}], "eval")
    with open(run.metrics, "ab") as file:
        file.write(torn)


@given(last=st.integers(0, 5), step=st.integers(0, 5), cut=st.integers(0, 12))
@settings(max_examples=30, deadline=None)
def test_rewind_keeps_up_to_the_step_and_loses_nothing(tmp_path_factory, last, step, cut):
    with open_run(tmp_path_factory.mktemp("rewind"), settings_for()) as run:
        run.begin()
        torn = b'{"step": 99}'[:cut]
        fill(run, last, torn)
        folder = rewind(run, step)
        kept = min(step, last)
        names = lambda steps: [f"{kind}_{s:06d}.jsonl" for kind in ("eval", "step") for s in steps]  # noqa: E731
        assert [row["step"] for row in run.read_metrics()] == list(range(kept + 1))
        assert sorted(p.name for p in run.rollouts.iterdir()) == names(range(kept + 1))
        assert run.metrics.read_bytes()[-1:] == b"\n"
        assert (folder is None) == (kept == last and not torn)
        if folder:
            late = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
            assert late == [b'{"step":%d}' % s for s in range(kept + 1, last + 1)] + [torn] * bool(torn)
            assert sorted(p.name for p in (folder / "rollouts").iterdir()) == names(range(kept + 1, last + 1))
        assert rewind(run, step) is None


@pytest.mark.parametrize(
    "kept, line",
    [
        ([0, 1, 2, 4, 5], "no rows of steps 3 to 3,"),
        ([0, 1, 2], "no rows of steps 3 to 5,"),
        ([2, 3, 4, 5], "no rows of steps 0 to 1,"),
        ([], "no rows of steps 0 to 5,"),
        ([0, 1, 2, 3, 3, 4, 5], "metrics.jsonl:5: a row of step 3 after one of step 3;"),
        ([0, 1, 3, 2, 4, 5], "no rows of steps 2 to 2,"),
        ([1, 0, 2, 3, 4, 5], "metrics.jsonl:2: a row of step 0 after one of step 1;"),
    ],
)
def test_rows_that_are_not_those_of_the_checkpoint_are_refused(run, kept, line):
    learner = build()
    for step in range(6):
        run.append_metrics({"step": step})
        if step in (2, 5):
            save(run, step, learner)
    run.metrics.write_text("".join(f'{{"step": {step}}}\n' for step in kept))
    before = tree(run.path)
    with pytest.raises(InputError) as error:
        rewind(run, 5)
    assert line in str(error.value) and "\n" not in str(error.value) and tree(run.path) == before
    if kept == [0, 1, 2]:
        assert f"delete step_000005 in {run.checkpoints} to go on from step 2" in str(error.value)
        shutil.rmtree(run.checkpoints / "step_000005")
        rewind(run, 2)


def test_a_checkpoint_older_than_its_row_asks_for_no_row(run):
    """Where the evaluation after a step failed, the checkpoint holds the row, and who resumes appends it."""
    run.append_metrics({"step": 0})
    save(run, 1, build(), {"row": {"step": 1}})
    assert rewind(run, 1) is None
    run.append_metrics({"step": 1})
    assert rewind(run, 1) is None


def test_a_number_that_is_none_is_no_step(run):
    for line in ('{"step": NaN}', '{"step": true}', '{"step": "1"}', '{"step": 1.5}', "[1]", "[" * 9999, "9" * 5000):
        run.metrics.write_text(f'{line}\n{{"step": 1}}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl:1: not a metrics row"):
            rewind(run, 1)


def test_rollouts_that_are_gone_are_told(run):
    fill(run, 9)
    assert run.missing_rollouts(9) is None
    for step in (2, 3, 5, 8):
        (run.rollouts / f"step_{step:06d}.jsonl").unlink()
    told = f"{run.rollouts}: the rollouts of step 2, step 3, step 5 and 1 more are gone; training goes on without them"
    assert run.missing_rollouts(9) == told


def test_a_second_rewind_gets_its_own_folder(run):
    fill(run, 2)
    assert rewind(run, 1).name == "1"
    run.append_metrics({"step": 2})
    assert rewind(run, 1).name == "2"


def test_a_broken_line_in_the_middle_is_not_swept_away(run):
    run.metrics.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not a metrics row"):
        rewind(run, 1)
    assert run.metrics.read_text().count("\n") == 3


def test_a_reader_skips_the_line_being_written(run):
    fill(run, 1, b'{"step": 2, "x"')
    assert RunFolder(run.path).read_metrics() == [{"step": 0}, {"step": 1}]


# --- kill -9 ---


def die_at(call, name):
    """Replace os.``name`` by one that kills the process at its ``call``-th use, before it takes effect."""
    real, count = getattr(os, name), [0]

    def wrapper(*arguments, **options):
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)

    setattr(os, name, wrapper)


def in_child(work):
    """``work``'s exit code in a forked process, which starts in milliseconds: torch is imported already."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join(60)
    return child.exitcode


def session(folder, last, fault=None):
    """Train up to step ``last`` from wherever the folder stands, with a checkpoint a step."""
    torch.set_num_threads(1)
    if fault:
        die_at(*fault)
    with open_run(folder, settings_for()) as run:
        learner = build()
        done = load(run, learner)
        run.begin()
        step = done[0] if done else 0
        rewind(run, step)
        while step < last:
            step += 1
            update(learner)
            run.write_rollouts(step, [{"step": step}] * 3)
            run.append_metrics({"step": step, "norm": float(learner.lm.lm_head.weight.norm())})
            save(run, step, learner)


# These calls fall on the configuration, rollouts, the row, the checkpoint's files, its rename, the pruning.
FAULTS = [(call, "replace") for call in range(1, 11)] + [(call, "fsync") for call in range(1, 45, 3)]
FAULTS += [(1, "unlink"), (5, "unlink"), (1, "rmdir")]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[1]}{fault[0]}")
def test_killed_anywhere_then_resumed_equals_uninterrupted(tmp_path, uninterrupted, fault):
    folder = tmp_path / "run"
    assert in_child(lambda: session(folder, 4, fault)) == -signal.SIGKILL
    assert in_child(lambda: session(folder, 4)) == 0
    assert list(folder.rglob(".*.tmp")) == []
    assert (folder / "metrics.jsonl").read_bytes() == (uninterrupted / "metrics.jsonl").read_bytes()
    for kind in ("rollouts", "checkpoints"):
        names = sorted(p.name for p in (folder / kind).iterdir())
        assert names == sorted(p.name for p in (uninterrupted / kind).iterdir())
    weights = "checkpoints/step_000004/model.safetensors"
    assert (folder / weights).read_bytes() == (uninterrupted / weights).read_bytes()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert in_child(lambda: session(folder, 4)) == 0
    return folder


def test_what_a_run_read_and_is_edited_since_is_told_by_name(tmp_path):
    """To who evaluates: questions from elsewhere are none of the run's."""
    settings = file_settings(tmp_path)
    with open_run(tmp_path / "run", settings) as run:
        run.begin()
        assert run.changed_contents(settings) == []
        source = pathlib.Path(settings.data.train)
        source.write_text(source.read_text() + "\n")
        (changed,) = run.changed_contents(settings)
        assert changed.startswith(f"{source} (data.train): holds something else than when ")
        other = tmp_path / "other.jsonl"
        other.write_text(source.read_text())
        elsewhere = settings.model_copy(update={"data": settings.data.model_copy(update={"train": str(other)})})
        assert run.changed_contents(elsewhere) == []


@pytest.mark.parametrize("step", [1, 0])
def test_a_row_that_stands_twice_is_named_when_rows_are_read(tmp_path, step):
    run = RunFolder(tmp_path)
    run.metrics.write_text('{"step": 0}\n{"step": 1}\n' + json.dumps({"step": step}) + "\n")
    with pytest.raises(InputError, match=rf"metrics\.jsonl:3: step {step} after step 1; delete or repair the line"):
        run.read_metrics()
