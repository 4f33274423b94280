"""The benches of whole steps: that their sides compute the same, run, and how their rows become the README's table."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("trl", exc_type=ImportError)

from bench import table, test_peers, test_peers_cost, test_step
from bench.recorded import Lengths, read, recorded
from bench.scoring import full_logits, kv_reuse
from bench.steps import Size, counts, updater
from igpo_fast.run.metrics import StepMetrics
from igpo_fast.types import Batch

spec = importlib.util.spec_from_file_location("cost", Path(__file__).parents[1] / "docs/cost.py")
spec.loader.exec_module(cost := importlib.util.module_from_spec(spec))
SIZE = Size(64, 2, vocab=64)
GROUP = Lengths(
    9, ((3, 2), (3, 4)), (((4, 6), (3, 0)), ((2, 7), (5, 6), (3, 0)), ((4, 0),), ((4, 5), (2, 0)))
)  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return recorded([GROUP, GROUP.equal()], SIZE.vocab)


def test_rollouts_have_the_recorded_lengths(data):
    assert GROUP.totals == [22, 32, 13, 20] and GROUP.equal().totals == [22] * 4
    assert [len(r.ids) for r in data.rollouts] == GROUP.totals + [22] * 4
    assert data.decision_tokens == 7 + 10 + 4 + 6 + 4 * 7
    first, second = data.groups
    assert all((r.prompt_ids == first.rollouts[0].prompt_ids).all() for r in first.rollouts)
    branches = data.branches[second.question.id]
    assert [(b.start, b.stop) for b in branches] == [(3, 5), (3, 7)]
    assert (branches[0].ids[:3] == branches[1].ids[:3]).all(), "answers share their wrapper"
    alone = recorded([GROUP], SIZE.vocab, own_prompts=True).rollouts
    assert len({r.prompt_ids.tobytes() for r in alone}) == 4


def test_token_counts():
    # The last token of a rollout is a label alone: the prompt's 9, 13 - 1 and 3. Behind each of 2 prefixes (the prompt
    # is one of both rollouts) the wrapper once, and of the answers all but the last token: 3 + 1 + 3.
    data = recorded([Lengths(9, ((3, 2), (3, 4)), (((4, 6), (3, 0)), ((4, 0),)))], 5000)
    assert counts(data) == {"decision_tokens": 11, "trunk_tokens": 24, "branch_tokens": 14, "largest_group": 38}


def test_musique_has_two_groups_of_eight():
    groups = read("musique", (1200, 1400))[:2]
    assert [len(group.rollouts) for group in groups] == [8, 8]
    assert all(turns[-1][1] == 0 and len(turns) > 1 for group in groups for turns in group.rollouts)


def gradients(data, **options):
    """Gradients of an update of ours, and the credits."""
    update, found = updater(SIZE, data, **options), {}
    learner = update._learner
    learner._step = lambda sound: found.update({n: p.grad.clone() for n, p in learner.lm.named_parameters()}) or 1.0
    return found, update(Batch(1, data.groups), {}, StepMetrics(1)).credits


def close(found, expected, bar):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= bar * gradient.abs().max() > 0, name


def test_one_pass_trains_as_two(data):
    one, two = (gradients(data, preset="paper", passes=passes) for passes in ("one", "two"))
    close(one[0], two[0], 1e-5)
    for a, b in zip(one[1], two[1], strict=True):
        np.testing.assert_allclose(a.advantages, b.advantages, rtol=1e-3, atol=1e-3)
        assert len(a.advantages) == 1 or np.ptp(a.advantages) > 0.01, "gains count"


@pytest.mark.parametrize("settings", [{}, {"micro": 2}, {"micro": 2, "generation": 4}])
def test_outcome_only_trains_as_grpo_trainer(data, settings, tmp_path):
    """Without a standard deviation, of which TRL's is unbiased and has 1e-4 added."""
    side = test_peers.grpo_trainer(SIZE, data, tmp_path, scale_rewards="none", **settings)
    side.backward()
    theirs = {name: p.grad for name, p in side.trainer.model.named_parameters()}
    close(gradients(data, algorithm="dr_grpo")[0], theirs, 1e-4)


def test_every_way_of_scoring_gives_our_values(data):
    lm = SIZE.lm().eval()
    branches_of = lambda rollout: data.branches[rollout.question.id]  # noqa: E731
    padded = full_logits(lm, data.rollouts, branches_of, at_once=3)
    ours = gradients(data)[1]
    for rollout, found, credit in zip(data.rollouts, padded, ours, strict=True):
        torch.testing.assert_close(found, kv_reuse(lm, rollout, branches_of(rollout)), atol=1e-5, rtol=0)
        np.testing.assert_allclose(credit.values, found.exp().amax(0), rtol=1e-4)


class Ran(list):
    """The fixture ``compare``: runs every side once."""

    def __call__(self, bench, shape, sides, rounds, *, tokens, long=False, sums=None):
        assert tokens > 0 and all(part in sides for parts in (sums or {}).values() for part in parts)
        for side in sides.values():
            side()
        self.append((bench, list(sides), shape))
        return {name: {"median": 2.0} for name in sides}


@pytest.fixture
def tiny(monkeypatch):
    """The benches on tiny shapes, with --full."""
    monkeypatch.setattr(test_peers, "read", lambda *_: [GROUP, GROUP.equal()])
    for name in ("SHAPES", "FULL"):
        for owner in (test_peers, test_step):
            monkeypatch.setattr(owner, name, dict.fromkeys(getattr(test_peers, name), SIZE))
    monkeypatch.setattr(test_peers, "SMALL", SIZE)
    monkeypatch.setattr(test_peers, "TRL", dict(micro=2, generation=4))
    monkeypatch.setattr(test_peers, "IN_TRL", dict(micro=4, generation=4))
    return SimpleNamespace(config=SimpleNamespace(getoption=lambda name: name == "--full"))


@pytest.mark.parametrize("name, peers", test_peers.CASES[:4])
def test_peers_run(name, peers, tiny, tmp_path):
    ran = Ran()
    test_peers.test_peers(name, peers, ran, tiny, tmp_path)
    ((bench, sides, shape),) = ran
    assert bench == "peers" and sides == ["ours", *test_peers.PEERS[peers]] and shape["lengths"] == name


def test_settings_and_steps_run(tiny, tmp_path, capsys, monkeypatch):
    ran = Ran()
    modes = {name: options for name, options in test_peers.SETTINGS["modes"].items() if name != "compiled"}
    monkeypatch.setitem(test_peers.SETTINGS, "modes", modes)  # compiling takes minutes
    test_peers.test_trl_settings("modes", ran, tiny, tmp_path)
    test_step.test_step("musique", ran, tiny, capsys)
    assert [(bench, len(sides)) for bench, sides, _ in ran] == [("trl_settings", 5), ("step", 2)]
    shape = ran[-1][2]
    assert shape["bar"] == pytest.approx(1 + 1.25 * shape["branch_tokens"] / shape["trunk_tokens"], abs=1e-3)


@pytest.mark.parametrize("sweep", test_peers_cost.SWEEPS)
def test_costs_run(sweep, tiny, monkeypatch):
    monkeypatch.setattr(test_peers_cost, "SIZE", SIZE)
    ran = Ran()
    test_peers_cost.test_cost(sweep, 2, ran, tiny)
    shape = ran[0][2]
    assert shape["sweep"] == sweep and shape[sweep] == 2


def row(bench, lengths="musique", ratio=4.0, **rest):
    figures = {"median": 2000.0, "peak_bytes": 1.5e9, "tokens_per_s": 1000.0}
    theirs = {**figures, "median": 2000.0 * ratio, "tokens_per_s": 1000.0 / ratio}
    side = bench.split("/")[1]
    found = {"bench": bench, "shape": {"lengths": lengths, **rest}, "ours": figures, "peers": {side: theirs}}
    return found | {"ratio": ratio, "ratio_spread": [ratio - 0.5, ratio + 0.5]}


def test_the_table_shows_the_newest_row_of_every_side():
    rows = [row("peers/trl", ratio=9.0), row("peers/trl"), row("peers/trl", "large", 2.0), row("peers/two_passes")]
    rows[-1]["ours"] = {**rows[-1]["ours"], "median": 3000.0}  # of another run
    said = table.peers(rows, "musique").splitlines()
    assert said[2:] == [
        "| **IGPO, one pass** | 1,000 | 2.0 | 1 | 1.50 |",
        "| IGPO, two passes | 250 | 8.0 | 4.00 (3.50-4.50) | 1.50 |",
        "| TRL's `GRPOTrainer`, no gains | 250 | 8.0 | 4.00 (3.50-4.50) | 1.50 |",
    ]
    rows += [row("step/igpo_vs_grpo", ratio=0.8, bar=1.3), row("peers/recomputed", "large", 1.25)]
    assert table.shapes(rows).splitlines()[2:] == [
        "| 16 rollouts | 1,000, 250 | 4.00 (3.50-4.50) | 1.50, 1.50 |  |",
        "| 8 rollouts, H 512 x 8 layers | 1,000, 500 | 2.00 (1.50-2.50) | 1.50, 1.50 | 1.60, 1.50 |",
    ]
    assert table.bars(rows).splitlines()[2:] == ["| 16 rollouts | 1.250 (0.77-3.33) | 1.300 |"]
    assert table.peers([], "musique") == ""


def test_costs_are_drawn_over_the_outcome_only_update(tmp_path, monkeypatch, capsys):
    rows = [
        {"bench": f"cost/{peer}", "peer": peer, "shape": {"sweep": "turns", "turns": turns}, "ratio": ratio}
        for turns, outcome_only, full in ((1, 1.0, 2.0), (4, 0.9, 7.0), (4, 0.8, 4.0))
        for peer, ratio in (("outcome_only", outcome_only), ("igpo_full_logits", full), ("full_logits", 3.0))
    ]
    times = cost.times(rows, "turns")
    assert times["ours"] == {1: 1.0, 4: 1.25} and times["igpo_full_logits"] == {1: 2.0, 4: 5.0}, "the newest rows"
    assert times["igpo_kv_reuse"] == {} and cost.times(rows, "answers")["ours"] == {}
    for sweep in ("rollouts", "answers"):
        rows += [row | {"shape": {"sweep": sweep, sweep: row["shape"]["turns"]}} for row in rows[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(cost, "ROWS", tmp_path / "rows.jsonl")
    cost.main()
    said = capsys.readouterr().out
    assert said.startswith("<svg") and said.count("<polyline") == 6 and "accepted answers" in said


def test_the_table_of_the_committed_rows(capsys):
    table.main()
    said = capsys.readouterr().out
    assert "GRPOTrainer" in said and "linear_cross_entropy / ours" in said and "loss | from lm_head" in said


def test_the_tables_of_the_readme_and_the_docs_are_those_of_the_committed_rows():
    rows, root = table.read(), Path(__file__).parents[1]
    readme, measured = (root / "README.md").read_text(), (root / "docs/measured.md").read_text()
    assert table.peers(rows, "musique") in readme and table.shapes(rows) in readme
    assert all(part in measured for part in (table.peers(rows, "musique"), table.shapes(rows), table.bars(rows)))
