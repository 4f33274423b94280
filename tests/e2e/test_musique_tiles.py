"""How much area attention's tiles visit beside what is visible, on rollouts over real passages."""

import asyncio
import random
from pathlib import Path

import numpy as np
import pytest

from igpo_fast.config import load
from igpo_fast.data import load_data
from igpo_fast.dialect import make_dialect
from igpo_fast.sft import NOISY, WRITTEN, _from_steps, write
from igpo_fast.tokenizer import load_tokenizer
from igpo_fast.tools.search import make_search
from igpo_kernels import RolloutTokens, Tree, pack
from igpo_kernels.tree_attention.blocks import block_lists, visible_area
from tests.kernels.test_blocks import shipped_tiles

ROOT = Path(__file__).parents[2]
MUSIQUE = ROOT.parent / "shared" / "data" / "musique"


@pytest.fixture(scope="module")
def musique_plan():
    """Rollouts of configs/musique.yaml, four a group: its tokenizer, dialect, search and limits, its warm start's
    policy (a sampled one strays more, so its groups share less and its rollouts are shorter)."""
    if not MUSIQUE.exists():
        pytest.skip("needs shared/data/musique")
    files = [f"data.train={MUSIQUE / 'questions.jsonl'}", f"data.corpus={MUSIQUE / 'corpus.jsonl'}"]
    config = load(ROOT / "configs" / "musique.yaml", files)
    data = load_data(config)
    dialect = make_dialect(
        config.rollout.dialect, load_tokenizer(config, data), system=config.rollout.system,
        max_passage_tokens=config.search.max_passage_tokens, max_answer_tokens=config.data.max_answer_tokens,
        max_answers=config.data.max_answers,
    )  # fmt: skip
    tool = make_search(config, data)
    rng = random.Random(0)
    trees = []
    for question in data.train[:16]:
        rollouts = []
        for index in range(4):
            demonstration = _from_steps([question], NOISY, rng)
            ids, writer = asyncio.run(write(demonstration, dialect, tool, config.rollout.max_tokens))
            ends = np.flatnonzero((writer[:-1] != WRITTEN) & (writer[1:] == WRITTEN)) + 1
            rollouts.append(RolloutTokens(index, ids, np.where(writer == WRITTEN, 0, -1), ends))
        trees.append(Tree(rollouts, dialect.branches(question)))
    return pack(trees)


@pytest.mark.parametrize(("queries", "keys"), shipped_tiles())
def test_area_of_musique_rollouts(musique_plan, queries, keys):
    visits = block_lists(musique_plan, None, queries, keys).visits
    assert 1 <= visits * queries * keys / visible_area(musique_plan) <= 2
