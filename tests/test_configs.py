"""Every file in configs/ loads today, and the recipes say what the paper's run was."""

from pathlib import Path

import pytest

from igpo_fast.config import load
from igpo_fast.data.load import NAMED_SOURCE

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAPER = sorted((ROOT / "configs").glob("qwen2.5-*-search.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads(path):
    config = load(path)
    assert config.run.dir.startswith("runs/")


def test_the_recipes_are_there():
    assert [path.stem for path in PAPER] == ["qwen2.5-3b-search", "qwen2.5-7b-search"]


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_settings(path):
    c = load(path)
    assert c.model.path == f"Qwen/Qwen2.5-{path.stem[8].upper()}B-Instruct"
    assert (c.train.questions, c.rollout.group_size, c.train.lr, c.train.updates) == (32, 16, 1e-6, 1)
    assert (c.rollout.temperature, c.rollout.max_turns, c.rollout.max_turn_tokens) == (1.0, 10, 2000)
    assert c.rollout.max_tokens - c.rollout.max_turn_tokens == 30_767
    a = c.algorithm
    assert (a.preset, a.kl, a.entropy, a.basis, a.format_penalty) == ("paper", 0.001, 0.001, "log_prob", -2.0)
    assert c.rollout.engine == "vllm" and c.search.url.startswith("http://")
    assert c.sft.clean_steps + c.sft.noisy_steps + c.sft.hard_steps == 0
    # A rollout of full length and an answer of data.max_answer_tokens after each turn fit a pack.
    assert c.rollout.max_tokens + c.rollout.max_turns * (c.data.max_answer_tokens + 32) <= c.train.token_budget


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_the_papers_evaluation_sets(path):
    named = dict(NAMED_SOURCE.fullmatch(entry).groups() for entry in load(path).data.eval)
    assert list(named) == ["NQ", "TriviaQA", "HotpotQA", "2Wiki", "MuSiQue", "Bamboogle", "PopQA"]
    documented = (ROOT / "docs" / "recipes.md").read_text()
    assert all(f"`{source}`" in documented for source in named.values())
