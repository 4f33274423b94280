"""Rollouts over real passages: how much area attention's tiles visit beside what is visible, and how evenly ranks share
their trees out.

Scripted ones, made here. And sampled ones where IGPO_ROLLOUTS names files that a run of configs/musique.yaml wrote:
IGPO_ROLLOUTS=runs/musique/rollouts/step_000001.jsonl (several with colons between).
"""

import asyncio
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from igpo_fast.config import load
from igpo_fast.data.load import load_data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL, make_search
from igpo_fast.run.records import record_of
from igpo_fast.sft import NOISY, WRITTEN, _from_steps, write
from igpo_fast.types import Group, Question, Rollout, Turn
from igpo_fast.update.balance import shares, tree_cost
from igpo_fast.update.policy import make_trees
from igpo_kernels import RolloutTokens, Tree, pack
from igpo_kernels.tree_attention.blocks import block_lists, visible_area
from tests.doing import doing
from tests.kernels.test_blocks import shipped_tiles, visits
from tests.test_balance import HEAVY, RANKS

ROOT = Path(__file__).parents[2]
MUSIQUE = ROOT.parent / "shared" / "data" / "musique"


SAMPLED = [Path(entry) for entry in os.environ.get("IGPO_ROLLOUTS", "").split(":") if entry]


def read_rollout(record):
    """What ``rollout_record`` wrote, as far as packing reads it."""
    turns = [
        Turn(
            np.array(turn["ids"]), np.array(turn["logp"]), turn["text"], doing(turn["action"], turn["argument"]),
            np.array(turn["response_ids"], int),
        )
        for turn in record["turns"]
    ]  # fmt: skip
    question = Question(record["id"], record["question"], tuple(record["answers"]))
    return Rollout(question, record["index"], np.array(record["prompt_ids"]), tuple(turns))


def sampled(path, dialect):
    """A step's groups, each a tree with the branches that the dialect makes of its question."""
    groups = {}
    for line in path.read_text().splitlines():
        rollout = read_rollout(json.loads(line))
        groups.setdefault(rollout.question, []).append(rollout)
    groups = [Group(question, tuple(rollouts)) for question, rollouts in groups.items()]
    branches = [dialect.branches(group.question) for group in groups]
    return make_trees(groups, branches, [range(len(group.rollouts)) for group in groups])


@pytest.fixture(scope="module", params=["scripted", *SAMPLED], ids=str)
def musique_trees(request):
    """A tree per question: rollouts of configs/musique.yaml. Scripted: four per group, with its tokenizer, dialect,
    search and limits, and its warm start's policy (a sampled one strays more, so its groups share less and its rollouts
    are shorter)."""
    if not MUSIQUE.exists():
        pytest.skip("needs shared/data/musique")
    files = [f"data.train={MUSIQUE / 'questions.jsonl'}", f"data.corpus={MUSIQUE / 'corpus.jsonl'}"]
    config = load(ROOT / "configs" / "musique.yaml", files)
    data = load_data(config)
    dialect = make_dialect(
        config.rollout.dialect, load_tokenizer(config, data), (SEARCH_TOOL,), system=config.rollout.system,
        max_passage_tokens=config.search.max_passage_tokens, max_answer_tokens=config.data.max_answer_tokens,
        max_answers=config.data.max_answers,
    )  # fmt: skip
    if request.param != "scripted":
        return sampled(request.param, dialect)
    tools = Tools([make_search(config, data)])
    rng = random.Random(0)
    trees = []
    for question in data.train[:64]:
        rollouts = []
        for index in range(4):
            demonstration = _from_steps([question], NOISY, rng)
            ids, writer = asyncio.run(write(demonstration, dialect, tools, config.rollout.max_tokens))
            ends = np.flatnonzero((writer[:-1] != WRITTEN) & (writer[1:] == WRITTEN)) + 1
            rollouts.append(RolloutTokens(index, ids, np.where(writer == WRITTEN, 0, -1), ends))
        trees.append(Tree(rollouts, dialect.branches(question)))
    return trees


@pytest.mark.parametrize(("queries", "keys"), shipped_tiles())
def test_area_of_musique_rollouts(musique_trees, queries, keys):
    plan = pack(musique_trees[:16])
    pairs = visits(block_lists(plan, None, queries, keys))
    assert 1 <= pairs * queries * keys / visible_area(plan) <= 2


def test_ranks_are_even_on_musique_rollouts(musique_trees):
    costs = [tree_cost(tree, HEAVY) for tree in musique_trees]
    totals = [sum(costs[number] for number in numbers) for numbers in shares(costs, RANKS)]
    assert max(totals) <= 1.10 * np.mean(totals)


def test_a_record_packs_as_the_rollout_it_is_of():
    turn = Turn(np.array([7, 8]), np.zeros(2), "", doing("search", "q"), np.array([9, 10, 11]))
    last = Turn(np.array([12]), np.zeros(1), "", doing("answer", "a"), np.array([], int))
    rollout = Rollout(Question("q", "why", ("so",)), 3, np.array([1, 2, 3]), (turn, last))
    read = read_rollout(json.loads(json.dumps(record_of(rollout))))
    assert (read.question, read.index) == (rollout.question, 3)
    for name in ("ids", "turn_of_token", "boundaries"):
        assert np.array_equal(getattr(read, name), getattr(rollout, name))
