"""bench/credit.py: rank correlations of credit with what turns changed, hand-worked."""

import json

import numpy as np
import pytest

from bench import collapse, credit
from bench.credit import Points, changes, chosen, draw_turns, measure, rank_correlation, spearman, success, summary
from igpo_fast.data.load import question_order
from igpo_fast.engines.base import Sampling
from igpo_fast.jsonl import json_line
from igpo_fast.rollouts.rollout import Agent, Limits
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.setup import set_up
from igpo_fast.train import train
from igpo_fast.types import Rollout, Turn
from tests import tiny
from tests.scripted import ScriptedEngine, ScriptedTool
from tests.test_rollout import ASKED, DIALECT, FOUND, ids_of

SAMPLES = 8
TURN = Turn(np.array(ids_of("<search> A </search>")), np.zeros(3), "", (), np.array(ids_of(FOUND)))
LAST = Turn(np.array(ids_of("<answer> A </answer>")), np.zeros(3), "", (), np.zeros(0, np.int32))


def rollout_of(turns, index=0, question=ASKED):
    return Rollout(question, index, DIALECT.prompt(question), (*[TURN] * (turns - 1), LAST))


def test_turns_are_drawn_once_each_of_those_with_a_response():
    rollouts = [rollout_of(1), rollout_of(3), rollout_of(2)]
    assert draw_turns(rollouts, 9, seed=0) == [(1, 1), (1, 2), (2, 1)]
    drawn = [draw_turns(rollouts, 2, seed) for seed in range(20)]
    assert all(len(turns) == 2 and turns == sorted(turns) for turns in drawn) and len(set(map(tuple, drawn))) == 3
    assert draw_turns(rollouts, 2, seed=5) == drawn[5]


def test_what_a_turn_changes():
    """A policy that is right from the prompt in a quarter of the samples, after one turn in half, after two always."""
    limits, indices = Limits(max_turns=4, max_turn_tokens=6, max_tokens=64), []

    def script(key, turn):
        place, sample = divmod(key[3], SAMPLES)
        indices.append(key[3])
        right = sample % [4, 2, 1][place % limits.max_turns] == 0
        return f"<answer> {'C D' if right else 'A'} </answer>"

    agent = Agent(ScriptedEngine(script), Tools([ScriptedTool()]), DIALECT, limits, Sampling(), seed=3, concurrency=5)
    rollouts = [rollout_of(3), rollout_of(3, index=1)]
    turns = [(0, 1), (1, 1), (1, 2)]
    ends = [(0, 0), (0, 1), (1, 0), (1, 1), (1, 1), (1, 2)]
    scores = success(agent, rollouts, ends, SAMPLES, "igpo")
    assert {prefix: found.mean() for prefix, found in scores.items()} == {
        (0, 0): 0.25, (0, 1): 0.5, (1, 0): 0.25, (1, 1): 0.5, (1, 2): 1.0,
    }  # fmt: skip
    assert changes(scores, turns).tolist() == [0.25, 0.25, 0.5]
    assert changes(scores, turns, slice(0, None, 2)).tolist() == [0.5, 0.5, 0.0]
    assert changes(scores, turns, slice(1, None, 2)).tolist() == [0.0, 0.0, 1.0]
    assert len(indices) == len(set(indices)) == 5 * SAMPLES, "every continuation has noise of its own"


def test_rank_correlation_by_hand():
    # Ranks 1 2.5 2.5 4 and 1 3 2 4: covariance 4.5, variances 4.5 and 5.
    x, y = np.array([1.0, 2, 2, 3]), np.array([10.0, 30, 20, 40])
    assert spearman(x, y) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    rising = np.arange(20.0)
    assert rank_correlation(rising, rising**3, np.arange(20)) == pytest.approx((1.0, 1.0, 1.0))


def test_points_of_a_rollout_stay_together():
    """Five rollouts with twenty equal points each are five points: the interval is as wide as theirs."""
    x, y = np.array([1.0, 2, 3, 4, 5]), np.array([2.0, 1, 4, 3, 5])
    few = rank_correlation(x, y, np.arange(5))
    many = rank_correlation(np.repeat(x, 20), np.repeat(y, 20), np.repeat(np.arange(5), 20))
    alone = rank_correlation(np.repeat(x, 20), np.repeat(y, 20), np.arange(100))
    assert many == pytest.approx(few) and alone[2] - alone[1] < 0.5 * (few[2] - few[1])


def test_a_row_by_hand():
    gain, outcome = np.array([0.0, 0.6, 0.1, 0.7, 0.2]), np.array([1.0, 1.0, -1.0, -1.0, 0.0])
    points = Points(
        rollout=np.array([0, 0, 1, 1, 2]), turn=np.array([1, 2, 1, 2, 1]), credits={"gain": gain, "outcome": outcome},
        change=np.array([0.0, 0.5, 0.25, 1.0, 0.5]),
        halves=np.array([[0.0, 0.5, 0.5, 1.0, 0.25], [0.0, 0.5, 0.25, 1.0, 0.75]]),
    )  # fmt: skip
    row = summary(points)
    assert row["by_turn"]["1"] == {
        "turns": 3, "gain": 0.1, "change": 0.25, "change_se": 0.1443, "spearman/gain": 1.0, "spearman/outcome": -0.5,
    }  # fmt: skip
    assert row["by_turn"]["2"]["change"] == 0.75 and row["by_turn"]["2"]["spearman/outcome"] == -1.0
    assert {name: (part["turns"], part["change"]) for name, part in row["by_gain"].items()} == {
        "-0.02 to 0.02": (1, 0.0), "0.02 to 0.5": (2, 0.375), "0.5 to": (2, 0.75),
    }  # fmt: skip
    assert row["spearman"]["gain"][0] == pytest.approx(0.975, abs=1e-3)  # ranks 1 4 2 5 3 and 1 3.5 2 5 3.5
    assert row["points"]["turn"] == [1, 2, 1, 2, 1] and json_line(row)


def test_a_runs_own_gains(cache, tmp_path):
    config = tiny.settings(tmp_path / "run", cache, "train.steps=3", "eval.every=0", "train.lr=2e-3")
    train(config, tiny.Recorder())
    run = RunFolder(tmp_path / "run")
    assert chosen(run, None) == (3, 2) and chosen(run, 1) == (1, 2)
    setup = set_up(config, weights=str(run.saved()[2]))
    recorded = list(run.read_rollouts("step_000003"))
    points, again = (measure(setup, [rollout for rollout, _ in recorded], 1, 12, 8, seed=1) for _ in range(2))
    own = [recorded[i][1].gains[t - 1] for i, t in zip(points.rollout, points.turn, strict=True)]
    np.testing.assert_allclose(points.credits["gain"], own, atol=1e-4)
    trained = [recorded[i][1].advantages[t - 1] for i, t in zip(points.rollout, points.turn, strict=True)]
    np.testing.assert_allclose(points.credits["advantage"], trained, atol=1e-2)
    np.testing.assert_equal(vars(points), vars(again))
    assert points.change.any()
    outcomes = {i: credit.outcome for i, (_, credit) in enumerate(recorded)}
    size = config.rollout.group_size
    for i, z in zip(points.rollout, points.credits["outcome"], strict=True):
        group = np.array([outcomes[j] for j in range(i - i % size, i - i % size + size)])
        assert np.sign(z) == np.sign(outcomes[i] - group.mean()) or group.std() < 1e-6


def test_the_commands(cache, tmp_path, monkeypatch, capsys):
    config = tiny.settings(tmp_path / "run", cache, "train.steps=1", "eval.every=0")
    train(config, tiny.Recorder())

    def command(module, *arguments):
        monkeypatch.setattr("sys.argv", ["bench", *map(str, arguments)])
        module.main()
        return json.loads((tmp_path / f"{module.__name__}.jsonl").read_text().splitlines()[-1]), capsys.readouterr().out

    into = lambda module: ["--results", tmp_path / f"{module.__name__}.jsonl"]  # noqa: E731
    given = [tmp_path / "run", "--prefixes", 5, "--samples", 4, *into(credit), "train.token_budget=2000"]
    row, said = command(credit, *given)
    assert (row["step"], row["checkpoint"], len(row["points"]["turn"])) == (1, 1, 5) and "halves" in said
    _, said = command(credit, "--table", *into(credit))
    assert "| `igpo` 0, step 1 | " in said
    start = ["a start", "--config", tmp_path / "run/config.yaml", "--questions", 2, *into(collapse), "run.dir=x/y"]
    row, said = command(collapse, *start, "algorithm.ig_gate=0.05")
    assert (row["groups"], row["gate"], row["overrides"]) == (2, 0.05, ["algorithm.ig_gate=0.05"])
    shares = (row[key] for key in ("group/collapsed_outcome", "group/collapsed", "ungated", "alike"))
    figures = " | ".join(f"{share:.0%}" for share in shares)
    assert said.endswith(f"| a start | 2 x 4 | {row['reward/f1']:.3f} | {figures} |\n")


def test_groups_at_the_start_are_those_of_a_runs_first_step(cache, tmp_path):
    config = tiny.settings(tmp_path / "run", cache, "train.steps=1", "algorithm.ig_gate=0.05")
    run = train(config, tiny.Recorder())
    setup = set_up(config)
    order = question_order(len(setup.data.train), config.train.questions, 0, config.train.seed)
    found = collapse.measure(setup, collapse.sample(setup, [setup.data.train[i] for i in order]))
    row = run.read_metrics()[-1]
    assert {key: found[key] for key in collapse.KEYS} == {
        key: pytest.approx(row[key], abs=1e-3) for key in collapse.KEYS
    }
    assert found["alike"] <= found["ungated"] <= found["group/collapsed"] <= found["group/collapsed_outcome"] <= 1
