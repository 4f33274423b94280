"""The warm start: demonstrations written as rollouts, their loss, the cache."""

import asyncio
import json
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from igpo_fast import sft
from igpo_fast.config import load
from igpo_fast.data.load import load_data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.data.world import CLEAN, HARD, Demonstration, Noise, make_worlds
from igpo_fast.errors import InputError, StorageError
from igpo_fast.model import build
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL, Bm25Search, NoSearch
from igpo_fast.types import Question, answer_with, search_for
from igpo_fast.update.learner import Learner
from tests.parity import naive

SMALL = [
    "world.sft_worlds=2", "world.train_worlds=1", "world.eval_worlds=1", "eval.questions=4", "sft.batch_size=3",
    "sft.clean_steps=2", "sft.noisy_steps=1", "sft.hard_steps=1", "train.questions=4", "rollout.max_tokens=160",
]  # fmt: skip

SEARCHING = Tools([NoSearch()])
"""What a made-up world replaces by a search of its own."""


@pytest.fixture(scope="module")
def world():
    config = load(None, SMALL)
    data = load_data(config)
    tokenizer = load_tokenizer(config, data)
    dialect = make_dialect("tags", tokenizer, (SEARCH_TOOL,), max_passage_tokens=64, max_answer_tokens=8, max_answers=1)
    return config, data, tokenizer, dialect


def small_model(tokenizer, seed=0):
    return build(
        len(tokenizer), hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=24, max_tokens=160,
        tie_embeddings=True, seed=seed,
    )  # fmt: skip


def test_a_demonstration_is_written_as_the_rollout_it_stands_for(world):
    config, _, tokenizer, dialect = world
    some = make_worlds(config.world, "sft")[0]
    question = next(q for q in some.questions if q.hops == 1)
    query = question.steps[0]["question"]
    demonstration = Demonstration(question, (search_for(query), answer_with(question.answers[0])))
    tools = Tools([Bm25Search({some.name: some.passages}, 1)])
    ids, writer = asyncio.run(sft.write(demonstration, dialect, tools, 160))
    found = f"{query} {question.answers[0]} ."
    searched = f"<search> {query} </search> <information> {found} </information>"
    text = f"{question.question} {searched} <answer> {question.answers[0]} </answer>"
    assert tokenizer.decode(ids) == text
    words = text.split()
    who = {sft.PROMPT: [], sft.RESPONSE: [], sft.WRITTEN: []}
    for word, by in zip(words, writer, strict=True):
        who[by].append(word)
    assert " ".join(who[sft.PROMPT]) == question.question
    assert " ".join(who[sft.RESPONSE]) == f"<information> {found} </information>"
    assert dialect.parse(f"<search> {query} </search>") == (search_for(query),)


def test_the_loss_is_the_weighted_mean_of_plain_log_probabilities(world):
    _, _, tokenizer, _ = world
    lm = small_model(tokenizer)
    rng = np.random.default_rng(0)
    batch = []
    for length in (7, 12, 5):
        writer = np.where(np.arange(length) < 3, sft.PROMPT, rng.integers(0, 2, length))
        batch.append((rng.integers(0, len(tokenizer), length), writer))
    learner = Learner(lm, lr=1e-3, factor=lambda step: 1.0)
    loss = sft.demonstration_loss(learner, batch, 0.2)
    ours = torch.autograd.grad(loss, lm.model.embed_tokens.weight)[0]
    lm.set_attn_implementation("eager")
    total, weights = 0.0, 0.0
    for ids, writer in batch:
        logp = naive.logprobs(lm, ids)
        weight = torch.tensor([{-1: 0.0, 0: 0.2, 1: 1.0}[int(w)] for w in writer[1:]])
        total, weights = total - (weight * logp).sum(), weights + weight.sum()
    expected = total / weights
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-5)
    theirs = torch.autograd.grad(expected, lm.model.embed_tokens.weight)[0]
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_training_lowers_the_loss_and_repeats(world):
    config, data, tokenizer, dialect = world
    config = load(None, [*SMALL, "sft.clean_steps=40", "sft.noisy_steps=0", "sft.hard_steps=0"])
    runs = []
    for _ in range(2):
        lm, losses = small_model(tokenizer), []
        sft.train(config, lm, dialect, data, SEARCHING, lambda done, total, loss, losses=losses: losses.append(loss))
        runs.append((losses, lm.model.embed_tokens.weight.detach().clone()))
    (first, weight), (second, again) = runs
    assert first == second and torch.equal(weight, again)
    assert np.mean(first[-5:]) < first[0] - 0.4


def test_a_warm_start_is_kept_for_the_same_settings_only(world, tmp_path):
    _, data, tokenizer, dialect = world
    trained = []

    def start(*overrides):
        settings = load(None, [*SMALL, f"run.cache={tmp_path}", *overrides])
        count = len(trained)
        lm = sft.warm_start(
            settings, small_model(tokenizer), tokenizer, dialect, data, SEARCHING, lambda *a: trained.append(a)
        )
        return lm, len(trained) - count

    first, steps = start()
    again, none = start()
    assert (steps, none) == (4, 0)
    for name, p in first.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
    assert start("run.dir=elsewhere", "train.lr=1")[1] == 0  # nothing that the warm start depends on
    assert start("sft.lr=1e-3")[1] == 4
    assert start("train.seed=1")[1] == 4
    assert start("sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0")[1] == 0
    assert not list(tmp_path.glob(".*"))  # nothing half written is left


@pytest.fixture
def start_on_files(tmp_path):
    """Starts a warm start on the files that it writes; returns the steps that were trained, and its folder."""
    rows = [{"id": str(i), "question": f"Who is {i}?", "answers": [f"Ann {i}"]} for i in range(6)]
    passages = [{"id": str(i), "title": "T", "text": f"Ann {i} is {i}."} for i in range(6)]

    def start(*overrides, rows=rows, passages=passages, folder="data", tokenizer=None):
        for name, content in (("train", rows), ("corpus", passages)):
            path = tmp_path / folder / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in content))
        config = load(None, [
            *SMALL, f"run.cache={tmp_path / 'cache'}", "data.source=files", "model.tokenizer=bpe",
            "model.vocab_size=300", "eval.questions=2", "rollout.max_tokens=512",
            *(f"data.{name}={tmp_path / folder / name}.jsonl" for name in ("train", "corpus")), *overrides,
        ])  # fmt: skip
        data, steps = load_data(config), []
        tokenizer = tokenizer or load_tokenizer(config, data)
        dialect = make_dialect(
            "tags", tokenizer, (SEARCH_TOOL,), max_passage_tokens=64, max_answer_tokens=8, max_answers=1
        )
        tools = Tools([Bm25Search(data.collections, 1)])
        lm = sft.warm_start(config, small_model(tokenizer), tokenizer, dialect, data, tools, lambda *a: steps.append(a))
        return len(steps), Path(lm.name_or_path)

    start.rows, start.passages = rows, passages
    return start


def test_a_warm_start_belongs_to_what_its_files_hold(start_on_files, world):
    start = partial(start_on_files, tokenizer=load_tokenizer(*world[:2]))  # a bpe one would change with the files
    rows, passages = start_on_files.rows, start_on_files.passages
    answers = [row["answers"] for row in rows]
    assert start()[0] == 4
    assert start()[0] == 0 and start(folder="moved")[0] == 0
    permuted = [row | {"answers": answer} for row, answer in zip(rows, answers[1:] + answers[:1], strict=True)]
    assert start(rows=permuted)[0] == 4
    assert start(passages=[passage | {"text": passage["text"].upper()} for passage in passages])[0] == 4
    assert start("eval.questions=3")[0] == 4  # one question less to train on
    assert start()[0] == 0


def test_a_warm_start_belongs_to_its_tokenizer(start_on_files, world):
    assert start_on_files()[0] == 4
    other = load_tokenizer(*world[:2])
    assert start_on_files(tokenizer=other)[0] == 4
    other.chat_template = "{{ messages }}"
    assert start_on_files(tokenizer=other)[0] == 4


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
def test_a_damaged_warm_start_is_refused(start_on_files, name):
    folder = start_on_files()[1]
    content = bytearray((folder / name).read_bytes())
    content[0] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        start_on_files()
    assert str(error.value).startswith(f"{folder / name}: ") and "damaged" in str(error.value)
    assert str(error.value).endswith(f"; delete {folder}, and the warm start is trained again")
    shutil.rmtree(folder)
    assert start_on_files() == (4, folder)


def test_a_cache_that_cannot_be_written_is_found_before_the_training(start_on_files, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("x")
    monkeypatch.setattr(sft, "train", lambda *a: pytest.fail("trained for nothing"))
    with pytest.raises(StorageError, match=r"cache: cannot write \(File exists\)"):
        start_on_files()


MUSIQUE = Question(
    "m", "Where was the founder of X born?", ("Rome",), 2,
    ({"question": "Who founded X?", "answer": "Ann Lee"}, {"question": "Where was #1 born?", "answer": "Rome"}),
)  # fmt: skip


def test_a_decomposition_becomes_a_demonstration():
    flawless = Noise(0, 0, 0)
    demonstration = sft._from_steps([MUSIQUE], flawless, random.Random(0))
    assert demonstration.turns == (
        search_for("Who founded X?"), search_for("Where was Ann Lee born?"), answer_with("Rome"),
    )  # fmt: skip
    plain = Question("p", "Who?", ("me",), 1, ({"passage_id": "7"}, {"passage_id": "8"}))
    assert sft._from_steps([plain], flawless, random.Random(0)).turns == (search_for("Who?"), answer_with("me"))


def test_mistakes_are_made_as_often_as_asked():
    other = Question("o", "Something else?", ("nothing",))
    rng = random.Random(0)
    for noise in (CLEAN, HARD):
        made = [sft._from_steps([MUSIQUE, other], noise, rng) for _ in range(2000)]
        made = [d for d in made if d.question is MUSIQUE]
        wrong = np.mean([d.turns[-1].text != "Rome" for d in made])
        assert wrong == pytest.approx(noise.wrong_answer / 2, abs=0.05)  # half of the others are itself
