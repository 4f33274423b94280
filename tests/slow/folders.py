"""Targets of the sweep that are configurations, runs, and folders of models and tokenizers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import yaml

from igpo_fast import config as configuration
from igpo_fast import model
from igpo_fast.data.load import Data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.errors import RunError
from igpo_fast.files import write_manifest
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.run.checkpoint import open_run, rewind
from igpo_fast.train import train
from tests.families import tokenizer_of
from tests.slow.odd import DEEP, LONG, VALUES, changed, damaged, harm, written
from tests.slow.sweep import Case
from tests.test_checkpoint import build, load, save, settings_for, update
from tests.tiny import SETTINGS, WORLD, Recorder

# --- configuration ---

SECTIONS = {section: f.annotation.model_fields for section, f in configuration.Config.model_fields.items()}
KEYS = [f"{section}.{key}" for section, keys in SECTIONS.items() for key in keys]

NUMBERS = (
    "0", "1", "2", "3", "5", "-1", "0.001", "0.3", "0.999", "1e-9", "1000", "1e9", "1e36", "1e-320", "65536",
)  # fmt: skip
ODD_TEXTS = [repr(text) for text in ("", " ", "x", "./x", "{}", "[]", "a,b", "é", "http://127.0.0.1:9/x", "null")]


def config(folder: Path) -> Case:
    """A YAML file with odd values, or damaged; or odd overrides. What is accepted is written and read again."""
    path, good = folder / "config.yaml", configuration.load().dump()

    def case(random):
        overrides = []
        how = random.randrange(4)
        if how == 0:
            path.write_bytes(damaged(random, good.encode()))
        elif how == 1:
            values = changed(random, yaml.safe_load(good), random.choice([1, 1, 2]))
            path.write_bytes(written(values))  # JSON is YAML
        else:
            path.write_text(good if random.randrange(2) else "")
            for _ in range(random.choice([1, 1, 2])):
                odd = random.choice(random.choice([VALUES, NUMBERS, ODD_TEXTS]))
                text = odd if isinstance(odd, str) else random.choice([repr, str, json.dumps])(odd)
                text = text.replace(DEEP, "[" * 3000).replace(LONG, "7" * 5000)
                overrides.append(f"{random.choice(KEYS)}{random.choice(['='] * 9 + ['.x='])}{text}")
        loaded = configuration.load(path, overrides)
        path.write_text(loaded.dump(), encoding="utf-8")
        assert configuration.load(path) == loaded

    return case


SMALL = [key for key in (*SETTINGS, *WORLD) if not key.startswith(("sft", "train.steps", "train.questions", "eval."))]
SMALL += ["train.steps=1", "train.questions=2", "eval.every=0", "eval.questions=2", "sft.clean_steps=0"]
SMALL += ["sft.noisy_steps=0", "sft.hard_steps=0", "search.retries=0"]
HUGE = {
    "layers",
    "hidden_size",
    "ffn_size",
    "steps",
    "persons",
    "companies",
    "cities",
    "countries",
    "vocab_size",
    "threads",
}
HUGE |= {
    "train_worlds",
    "eval_worlds",
    "sft_worlds",
    "clean_steps",
    "noisy_steps",
    "hard_steps",
    "group_size",
    "questions",
}
HUGE |= {"max_turns", "max_turn_tokens", "max_tokens", "oversample", "batch_size", "heads", "retries"}
"""Keys whose large values are not odd: they ask for hours, or for memory."""


def whole_run(folder: Path) -> Case:
    """A whole run of a step with one key of every section's type set to what its type allows, or nearly."""

    def options(name):
        section, key = name.split(".")
        if key == "dir":
            return []
        known = configuration.Config.model_fields[section].annotation.model_fields[key].annotation
        if known is configuration.Rollout.model_fields["engine"].annotation:
            return ["torch"]  # vLLM has tests of its own, and a process can hold it once
        literals = [str(v) for v in getattr(known, "__args__", ()) if isinstance(v, str)]
        numbers = [n for n in NUMBERS if key not in HUGE or float(n) <= 5]
        return literals or (["true", "false"] if known is bool else [*numbers, *ODD_TEXTS])

    settable = [name for name in KEYS if options(name)]

    def case(random):
        name = random.choice(settable)
        value, run = random.choice(options(name)), folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        settings = configuration.load(None, [*SMALL, f"run.dir={run}", "run.cache=cache", f"{name}={value}"])
        try:
            train(settings, Recorder())
        finally:
            assert not list(run.rglob(".*.tmp"))
        assert len((run / "metrics.jsonl").read_text().splitlines()) == 2

    return case


# --- run folders, models, tokenizers ---


def run_folder(folder: Path) -> Case:
    """A run of three steps with two checkpoints, one of its files damaged (a checkpoint's with or without a manifest
    that agrees), then resumed. A refusal leaves the folder as it was; a resume loses no row and doubles none."""
    good, bad = folder / "good", folder / "run"
    with open_run(good, settings_for()) as run:
        run.begin()
        learner = build()
        for step in (1, 2, 3):
            update(learner)
            run.write_rollouts(step, [{"step": step}] * 2)
            run.append_metrics({"step": step, "norm": learner.lm.lm_head.weight.norm().item()})
            if step < 3:
                save(run, step, learner)
    names = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file() and path.name != ".lock")

    def case(random):
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(good, bad)
        path = bad / random.choice(names)
        harm(random, path)
        if path.parent.parent.name == "checkpoints" and path.name != "manifest.json" and random.randrange(2):
            _agree(path.parent)
        before, lines = _files(bad), _lines(bad / "metrics.jsonl")
        try:
            with open_run(bad, settings_for()) as run:
                learner = build(seed=1)
                done = load(run, learner)
                run.begin()
                step = done[0] if done else 0
                rewind(run, step)
                update(learner)
                save(run, step + 1, learner)
        except RunError:
            if path.name != "metrics.jsonl":  # whose lines are checked last, after the configuration is written
                assert _files(bad) == before
            raise
        assert not list(bad.rglob(".*.tmp"))
        kept = [
            line for file in (bad / "metrics.jsonl", *bad.glob("discarded/*/metrics.jsonl")) for line in _lines(file)
        ]
        assert Counter(kept) == Counter(lines)

    return case


def _agree(checkpoint: Path) -> None:
    """A manifest of what is there now: damage that happened before it was written."""
    about = json.loads((checkpoint / "manifest.json").read_bytes())
    about.pop("files")
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint, **about)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def _lines(path: Path) -> list[bytes]:
    return [line for line in (path.read_bytes() if path.is_file() else b"").split(b"\n") if line.strip()]


def _model_folder(folder: Path) -> Path:
    good = folder / "good"
    words = tokenizer_of("qwen2.5")
    sizes = dict(hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=16, max_tokens=256)
    model.build(len(words), tie_embeddings=True, seed=0, **sizes).save_pretrained(good)
    words.save_pretrained(good)
    return good


def _damaged_copy(random: Random, good: Path, bad: Path, kinds: tuple[str, ...]) -> None:
    shutil.rmtree(bad, ignore_errors=True)
    shutil.copytree(good, bad)
    names = sorted(path.name for path in good.iterdir() if path.name.startswith(kinds))
    for name in random.sample(names, random.choice([1, 1, min(2, len(names))])):
        harm(random, bad / name)


def tokenizers(folder: Path) -> Case:
    """A tokenizer's folder with damaged files, or odd values in them. What is accepted encodes, and is saved."""
    good, bad = _model_folder(folder), folder / "bad"
    (good / "config.json").unlink()
    settings = configuration.load(None, [f"model.tokenizer={bad}"])

    def case(random):
        _damaged_copy(random, good, bad, ("tokenizer", "chat_template", "special"))
        words = load_tokenizer(settings, Data((), (), {}))
        dialect = make_dialect(
            random.choice(["tags", "chat"]),
            words,
            (SEARCH_TOOL,),
            max_passage_tokens=32,
            max_answer_tokens=8,
            max_answers=2,
        )
        dialect.check()
        words.save_pretrained(folder / "saved")

    return case


def models(folder: Path) -> Case:
    """A model's folder with damaged files, or odd values in them. What is accepted passes the probe, and is saved."""
    good, bad = _model_folder(folder), folder / "bad"

    def case(random):
        _damaged_copy(random, good, bad, ("config", "generation", "model"))
        model.load(str(bad)).save_pretrained(folder / "saved")

    return case
