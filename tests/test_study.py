"""bench/study.py: which rows are kept, and that docs/study.md shows them."""

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import answers, smollm2, study
from igpo_fast.cli import app
from igpo_fast.compare import compare as comparing
from tests.compare.rows import row as made_up

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize(
    ("name", "table"),
    [
        *((name, study.table) for name in study.COMPARISONS),
        ("smollm2_nq", smollm2.table),
    ],
)
def test_the_tables_are_those_of_the_rows(name, table):
    shown = (DOCS / "study.md").read_text()
    assert [line for line in table(study.rows_of(name)).splitlines() if line not in shown] == []


def test_the_table_of_answers_is_that_of_its_rows():
    rows = list(map(json.loads, answers.ROWS.read_text().splitlines()))
    assert answers.table(rows) in (DOCS / "study.md").read_text()


@pytest.mark.parametrize("name", study.PAIRED)
def test_what_is_said_of_the_pairs_is_in_the_docs(name):
    shown = (DOCS / "study.md").read_text()
    assert [line for line in study.ahead(study.rows_of(name)).splitlines() if line not in shown] == []


@pytest.mark.parametrize("name", study.COMPARISONS)
def test_the_commands_make_the_runs_of_the_rows(name, monkeypatch):
    asked = []
    monkeypatch.chdir(study.ROOT)
    monkeypatch.setattr(comparing, "compare", lambda folder, plan, **options: asked.append(plan) or {"sentences": []})
    assert CliRunner().invoke(app, ["compare", *shlex.split(study.COMPARISONS[name])]).exit_code == 0
    config, rows = asked[0].config_of(next(iter(asked[0].variants)), asked[0].seeds[0]), study.rows_of(name)
    assert {(row["variant"], row["seed"]) for row in rows} <= {
        (v, s) for v in asked[0].variants for s in asked[0].seeds
    }
    assert all(row["steps"] == [*range(0, config.train.steps + 1, config.eval.every)] for row in rows)


def test_a_run_has_a_row_per_commit(tmp_path, monkeypatch):
    made = [
        {"variant": v, "seed": 1, "finished": v == "igpo", "commit": "a", "eval/f1": [0, 1]} for v in ("igpo", "grpo")
    ]

    def train(command, **options):
        cache = f"run.cache={tmp_path / 'runs/cache'}"
        assert command[3:] == ["compare", "--dir", str(tmp_path / "runs/mine"), "--jobs", "2", cache, "--seeds", "1-1"]
        (tmp_path / "runs/mine").mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/mine/compare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(subprocess, "run", train)
    study.results("mine").parent.mkdir(parents=True)
    study.results("mine").write_text('{"algorithm": "igpo", "seed": 1, "overrides": ["train.lr=1"]}\n')
    more = lambda row, run: {"run": run.name}  # noqa: E731
    status = 0
    for _ in range(2):
        (row,) = study.compare("mine", ["--seeds", "1-1"], more=more)
    assert row["run"] == "igpo-1" and row["bench"] == "mine" and row["overrides"] == []
    made[0] |= {"commit": "b", "eval/f1": [0, 0.5]}
    status = 2
    with pytest.raises(subprocess.CalledProcessError):  # some run failed
        study.compare("mine", ["--seeds", "1-1"], more=more)
    (row,) = study.rows_of("mine")
    assert row["eval/f1"] == [0, 0.5] and len(study.results("mine").read_text().splitlines()) == 3


def test_what_is_said_of_pairs():
    """Two pairs have no interval, a variant that never learned no median of steps."""
    rows = [made_up("igpo", seed, [0, 0.25, 0.5, 0.75, 1]) for seed in (1, 2)]
    rows += [made_up("grpo", seed, [0, 0, 0.25, 0.25, 0.25 * seed]) for seed in (1, 2)]
    said = study.ahead(rows)
    assert "| `igpo`, F1 at step 30 | +0.500 | - | | |" in said and "step 20" not in said and "step 40" not in said
    assert "| `igpo`, F1 at equal steps | +0.625 | - | 0.5 | 2 of 2 |" in said
    assert "| `igpo` | 2 | 1.000 | 0 | 25% | 2 | 20 | 40 | 2,000 |" in said
    assert "| `grpo` | 2 | 0.375 ± 0.125 | 0 | 25% | 1 | - | - | - |" in said
    assert "| +0.625 | +" in study.ahead(
        [made_up(v, s, [0, f]) for s in range(6) for v, f in (("igpo", 1), ("grpo", 0.375 + s / 1e9))]
    )
