"""Trainings in pieces, with a stand-in for the trainer (trainer.py); one real comparison."""

import io
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from rich.console import Console

from igpo_fast.compare import board, runs
from igpo_fast.compare.compare import compare
from igpo_fast.compare.plan import make_plan
from igpo_fast.compare.results import runs_in
from igpo_fast.errors import InputError, RunError
from igpo_fast.files import lock
from igpo_fast.run.interrupt import Interrupted
from tests.tiny import SETTINGS, WORLD

STEPS = 4


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(runs, "POLL", 0.01)


class Comparison:
    """A comparison in ``folder`` whose trainer is the stand-in."""

    def __init__(self, folder: Path):
        self.folder, self.control = folder / "compared", folder
        self.program = (sys.executable, "-S", str(Path(__file__).with_name("trainer.py")), str(folder))

    def plan(self, algorithms="igpo,grpo", seeds="1-2", own=(), *overrides, steps=STEPS):
        overrides = [f"train.steps={steps}", "eval.every=2", *overrides]
        plan = make_plan(None, algorithms, seeds, own, overrides, self.folder)
        for variant in plan.variants:
            for seed in plan.seeds:
                text = plan.config_of(variant, seed).dump()
                (self.control / f"{variant}-{seed}.yaml").write_text(text)
        return plan

    def __call__(self, *arguments, jobs=2, **options):
        """The statistics; ``calls`` has what the stand-ins did."""
        plan = self.plan(*arguments, **options)
        (self.control / "calls").write_text("")
        return compare(self.folder, plan, jobs=jobs, program=self.program)

    def do(self, **what):
        (self.control / "do.json").write_text(json.dumps({name.replace("_", "-"): act for name, act in what.items()}))

    @property
    def calls(self):
        return (self.control / "calls").read_text().splitlines()

    @property
    def trained(self):
        return sorted(line.split(" threads")[0] for line in self.calls if line.startswith("train"))

    @property
    def rows(self):
        lines = (self.folder / "compare.jsonl").read_text().splitlines()
        return {f"{row['variant']}-{row['seed']}": row for row in map(json.loads, lines)}


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path)


def test_in_pieces(comparison):
    found = comparison()
    assert comparison.trained == [f"train {name} after -1" for name in ("grpo-1", "grpo-2", "igpo-1", "igpo-2")]
    assert sorted(line for line in comparison.calls if line.startswith("sft")) == ["sft 1", "sft 2"], "once per seed"
    assert found["baseline"] == "grpo" and found["pairs"]["igpo"]["steps"]["seeds"] == [1, 2]

    comparison("igpo,grpo", "1-3")
    assert comparison.trained == ["train grpo-3 after -1", "train igpo-3 after -1"]
    found = comparison("igpo,tips,grpo", "2-3")
    assert comparison.trained == ["train tips-2 after -1", "train tips-3 after -1"]
    assert not any(line.startswith("sft") for line in comparison.calls), "what one run needs it makes itself"
    assert found["pairs"]["igpo"]["steps"]["seeds"] == [1, 2, 3], "all runs of the folder count"
    assert list(found["variants"]) == ["igpo", "tips", "grpo"]

    more = dict(steps=6)
    with pytest.raises(InputError, match=r"-3: train.steps is 4 in this run and 6 in"):
        comparison("igpo,tips,grpo", "1-2", **more)
    comparison("igpo,tips,grpo", "1-3", **more)
    begun = {"tips-1": -1}
    names = [f"{name}-{seed}" for name in ("grpo", "igpo", "tips") for seed in (1, 2, 3)]
    assert comparison.trained == [f"train {name} after {begun.get(name, 4)}" for name in names]


def test_a_row_has_what_a_run_spent(comparison):
    comparison("igpo,grpo", "1", jobs=1)
    row = comparison.rows["igpo-0"]
    assert row["finished"] and row["trained_steps"] == 4
    assert row["steps"] == [0, 2, 4] and row["eval/f1"] == [0.0, 0.02, 0.04] and row["eval/f1_se"] == [0.02] * 3
    assert row["seconds"] == [0, 4, 8] and row["tokens"] == [0, 30, 60] and row["collapsed"] == [None, 0.5, 0.5]
    assert row["settings"]["train.steps"] == 4 and "run.dir" not in row["settings"]
    assert set(row["versions"]) == {"igpo-fast", "torch", "transformers"}
    comparison("igpo,grpo", "1")
    assert comparison.trained == [] and comparison.rows["igpo-0"]["versions"] == row["versions"]


def test_runs_of_a_seed_train_side_by_side(comparison):
    comparison.do(
        igpo_1="wait for grpo-1", grpo_1="wait for igpo-1", igpo_2="wait for grpo-2", grpo_2="wait for igpo-2"
    )
    comparison()
    assert len(comparison.trained) == 4


def test_the_order_of_what_begins(comparison):
    """The warm starts of as many seeds as there are jobs, then their runs, seed by seed."""
    order = lambda jobs: [task.name for task in runs.tasks_of(comparison.plan("igpo,grpo", "1-3"), jobs)]  # noqa: E731
    warm = [f"warm start of seed {seed}" for seed in (1, 2, 3)]
    trained = [[f"igpo-{seed}", f"grpo-{seed}"] for seed in (1, 2, 3)]
    assert order(2) == [*warm[:2], *trained[0], *trained[1], warm[2], *trained[2]]
    assert order(1) == [name for seed in range(3) for name in (warm[seed], *trained[seed])]
    tasks = {task.name: task for task in runs.tasks_of(comparison.plan("igpo,grpo", "1-1"), 1)}
    assert tasks["grpo-1"].after is tasks[warm[0]]
    cold = comparison.plan("igpo,grpo", "1-1", (), "sft.clean_steps=0", "sft.noisy_steps=0", "sft.hard_steps=0")
    assert [task.name for task in runs.tasks_of(cold, 2)] == trained[0]


def test_none_overtakes_the_runs_of_an_earlier_seed(comparison):
    comparison.do(sft_1="slow", igpo_1="wait for grpo-1", grpo_1="wait for igpo-1")
    comparison()
    begun = [line.split()[1] for line in comparison.calls if line.startswith("train")]
    assert {*begun[:2]} == {"igpo-1", "grpo-1"}


def test_threads_are_one_unless_given(comparison, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    comparison("igpo", "1-1")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    before = comparison.calls
    comparison("igpo", "2-2")
    assert [line.split()[5] for line in before + comparison.calls] == ["1", "3"]


def test_a_failed_run_stops_no_other(comparison):
    comparison.do(grpo_1="fail", igpo_2="killed", grpo_2="early")
    with pytest.raises(RunError) as failed:
        comparison()
    said = str(failed.value)
    assert said.startswith("3 of the trainings failed (") and said.count("\n") == 0
    assert "grpo-1: out of memory; lower it" in said and "igpo-2: killed by SIGKILL" in said
    assert "grpo-2: ended before its last step" in said and "the same command goes on" in said
    assert {name for name, row in comparison.rows.items() if row["finished"]} == {"igpo-1"}
    comparison.do()
    comparison()
    assert comparison.trained == ["train grpo-1 after 1", "train grpo-2 after 1", "train igpo-2 after 1"]


def test_the_reason_is_what_the_process_itself_said(comparison):
    """After kill -9 of a comparison its runs still train, lock their folders and write into the same logs."""
    comparison.do(igpo_1="fail", grpo_1="refused beside another")
    with pytest.raises(RunError, match="grpo-1: another process trains here"):
        comparison("igpo,grpo", "1-1")
    comparison.do(igpo_1="crash", grpo_1="early")
    with pytest.raises(RunError, match=r"igpo-1: ZeroDivisionError[;)]"):
        comparison("igpo,grpo", "1-1")


def test_runs_do_not_begin_without_their_warm_start(comparison):
    comparison.do(sft="fail")
    with pytest.raises(RunError, match=r"6 of the trainings failed \(warm start of seed [12]: no warm start; "):
        comparison()
    assert comparison.trained == []


def test_ctrl_c_saves_and_goes_on(comparison, capfd):
    comparison.do(igpo_1="interrupt with grpo-1", grpo_1="until stopped")
    with pytest.raises(Interrupted, match="0 of 4 runs ended, the others go on"):
        comparison()
    assert {"stopped grpo-1", "stopped igpo-1"} < {*comparison.calls}
    assert "asked again grpo-1" not in comparison.calls, "a second signal would end it before it has saved"
    assert len(comparison.trained) == 2, "no other began"
    assert "finishing this step" in capfd.readouterr().err
    comparison.do()
    comparison()
    assert comparison.trained[:3] == ["train grpo-1 after 1", "train grpo-2 after -1", "train igpo-1 after 1"]


def test_a_second_ctrl_c_ends_them_at_once(comparison):
    comparison.do(igpo_1="interrupt twice")
    with pytest.raises(Interrupted, match="at once"):
        comparison("igpo", "1-2", jobs=1)
    assert comparison.calls[-1] == "stopped igpo-1"


def test_runs_have_a_process_group_of_their_own(comparison):
    """A terminal sends Ctrl-C to the whole group of the command, which passes it on once."""
    comparison("igpo", "1-1")
    group = next(int(line.split("group ")[1]) for line in comparison.calls if line.startswith("train"))
    assert group != os.getpgrp()


def test_what_ended_before_ctrl_c_keeps_what_made_it(comparison):
    comparison.do(igpo_2="interrupt")
    with pytest.raises(Interrupted, match="1 of 2 runs ended"):
        comparison("igpo", "1-2", jobs=1)
    assert comparison.rows["igpo-1"]["versions"] and "versions" not in comparison.rows["igpo-2"]


def test_runs_made_by_hand_count(comparison):
    """What a session may change is no difference: where it keeps its files, how many threads it has."""
    plan = comparison.plan("igpo,grpo", "1-1", (), "run.cache=elsewhere", "run.tracker=tensorboard", "train.threads=1")
    run = comparison.folder / "igpo-1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(plan.config_of("igpo", 1).dump())
    rows = [{"step": s, "eval/f1": 0.5, "time/step": 1.0, "tokens/rollout": 1, "tokens/packed": 1} for s in (0, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison("igpo,grpo", "1-1")
    assert comparison.trained == ["train grpo-1 after -1"]
    assert comparison.rows["igpo-1"]["settings"]["train.threads"] == 1, "shown, for it changes the speed"
    assert comparison.rows["igpo-1"]["steps"] == [0, 4] and "versions" not in comparison.rows["igpo-1"]


@pytest.mark.parametrize(
    ("again", "line"),
    [
        (dict(overrides=["train.lr=0.5"]), r"-1: train.lr is 1e-06 in this run and 0.5 in the comparison; give "),
        (dict(own=["grpo:train.lr=0.5"]), r"grpo-1: train.lr is 1e-06 in this run and 0.5 in"),
        (dict(overrides=["world.rows=9"], algorithms="rloo"), r"-1: world.rows is 20 in this run and 9 in"),
        (dict(overrides=["eval.every=1"]), r"-1: eval.every is 2 in this run and 1 in"),
        (dict(overrides=["eval.questions=1"]), r"-1: eval.questions is 128 in this run and 1 in"),
        (dict(steps=3), r"-1: train.steps is 4 in this run and 3 in"),
        (dict(steps=5, overrides=["train.lr_schedule=linear"]), r"-1: train.(lr_schedule|steps) is"),
    ],
    ids=[
        "lr",
        "lr of one",
        "start of others",
        "evaluations",
        "their questions",
        "fewer steps",
        "more steps under a schedule",
    ],
)
def test_runs_made_with_other_settings_are_refused(comparison, again, line):
    comparison("igpo,grpo", "1-1")
    before = comparison.rows
    again = dict(algorithms="igpo,grpo", own=(), overrides=()) | again
    rest = {key: value for key, value in again.items() if key == "steps"}
    with pytest.raises(InputError, match=line):
        comparison(again["algorithms"], "1-2", again["own"], *again["overrides"], **rest)
    assert comparison.calls == [] and comparison.rows == before


def test_a_folder_of_another_seed_or_with_other_data_is_refused(comparison):
    comparison("igpo,grpo", "1-1")
    first, other = (comparison.folder / name for name in ("igpo-1", "grpo-1"))
    for run, digest in ((first, "a"), (other, "b")):
        (run / "contents.json").write_text(json.dumps({"data.train": digest, "algorithm.gain": digest}))
    with pytest.raises(InputError, match=r"igpo-1: data.train holds something else than in the other runs"):
        comparison("igpo,grpo", "1-1")
    (other / "contents.json").write_text(json.dumps({"data.train": "a", "algorithm.gain": "b"}))
    comparison("igpo,grpo", "1-1")
    first.rename(comparison.folder / "igpo-7")
    with pytest.raises(InputError, match=r"igpo-7: train.seed is 1 in this run and 7 in"):
        comparison("igpo,grpo", "1-1")


def test_evaluations_come_as_often_as_in_the_runs_of_the_folder(comparison):
    """A twelfth of more steps would be another number."""
    comparison("igpo", "1-1")
    asked = make_plan(None, "igpo", "1-2", (), ["train.steps=120"], comparison.folder)
    assert asked.config_of("igpo", 2).eval.every == 2


def test_one_comparison_at_a_time(comparison):
    comparison("igpo", "1-1")
    with open(comparison.folder / ".lock", "a+") as held:
        assert lock(held)
        with pytest.raises(InputError, match="another comparison runs here"):
            comparison("igpo", "1-1")


def test_without_training(comparison, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        compare(tmp_path / "nothing", None)
    comparison("igpo,dr_grpo,grpo", "1-1")
    (comparison.folder / "notes-1").mkdir()  # no run
    page = comparison.folder / "compare.html"
    page.unlink()
    found = compare(comparison.folder, None)
    assert found["baseline"] == "grpo" and list(found["variants"]) == ["dr_grpo", "igpo", "grpo"] and page.exists()
    assert list(compare(comparison.folder, None, baseline="igpo")["pairs"]) == ["dr_grpo", "grpo"]
    with pytest.raises(InputError, match="--baseline tips: not among dr_grpo, grpo, igpo; give one of them"):
        compare(comparison.folder, None, baseline="tips")
    before = page.read_bytes(), comparison.rows
    with pytest.raises(InputError, match="no finished run has eval/reward"):
        compare(comparison.folder, None, score="eval/reward")
    assert before == (page.read_bytes(), comparison.rows)
    assert [run.name for run in runs_in(comparison.folder)] == ["dr_grpo-1", "grpo-1", "igpo-1"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (dict(score="group/collapsed"), "--score group/collapsed: not a number of the evaluations; give one of theirs"),
        (dict(score="time/train"), "--score time/train: not a number"),
        (dict(at=float("nan")), "--at nan: not a score; give a finite number"),
        (dict(stalled=float("inf")), "--stalled inf: not a score"),
        ({}, "compared: no run is here, a folder VARIANT-SEED like igpo-1 with a config.yaml"),
    ],
)
def test_a_refused_folder_is_left_as_it_was(comparison, options, line):
    (comparison.folder / "igpo-01").mkdir(parents=True)
    (comparison.folder / "igpo-01" / "config.yaml").touch()  # beside igpo-1 it would be the same run
    with pytest.raises(InputError) as refused:
        compare(comparison.folder, None, **options)
    assert line in str(refused.value)
    assert [path.name for path in comparison.folder.iterdir()] == ["igpo-01"]


@pytest.mark.parametrize("line", ["5", "{", '{"seed": "1", "step": 1.5}'])
@pytest.mark.parametrize("file", ["compare.jsonl", "grpo-1/metrics.jsonl"])
def test_files_that_cannot_be_read_are_named_before_any_training(comparison, file, line):
    comparison("igpo,grpo", "1-1")
    path = comparison.folder / file
    path.write_text(path.read_text().partition("\n")[0] + f"\n\n{line}\n")
    with pytest.raises(InputError) as refused:
        comparison("igpo", "2-2")
    assert str(refused.value).startswith(f"{path}:3: not ") and "\n" not in str(refused.value)
    assert comparison.calls == []


def test_values_that_are_no_numbers_are_missing(comparison):
    comparison("igpo,grpo", "1-1")
    with (comparison.folder / "igpo-1/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "eval/f1": "high", "time/step": [], "tokens/packed": null, "group/collapsed": {}}\n')
    found = compare(comparison.folder, None)
    assert found["not_counted"] == {"igpo-1": "no eval/f1 at its last step"}
    assert found["sentences"][:2] == [
        "Runs of grpo alone count: nothing is compared.",
        "Not counted: igpo-1 (no eval/f1 at its last step).",
    ]


def test_without_a_run_of_the_baseline_the_page_says_so(comparison):
    comparison("igpo,grpo", "1-1")
    comparison.do(rloo_1="fail", rloo_2="refuse")
    with pytest.raises(
        RunError, match=r"made anew, with other settings too, once its folder .*/VARIANT-SEED is deleted"
    ):
        comparison("igpo,rloo", "1-2")
    found = json.loads((comparison.folder / "compare.json").read_text())
    assert found["pairs"] == {} and found["sentences"][:2] == [
        "No run of rloo counts: nothing is compared.",
        "Not counted: rloo-1 (unfinished), rloo-2 (not begun).",
    ]
    page = (comparison.folder / "compare.html").read_text()
    assert found["sentences"][0] in page and "Differences from" not in page
    assert not (comparison.folder / "differences.svg").exists(), "an old one would speak of other runs"
    comparison.do()
    with pytest.raises(InputError, match=r"rloo-1: train.lr is .* give the same settings, delete .*rloo-1 to have it"):
        comparison("igpo,rloo", "1-2", ["rloo:train.lr=0.5"])
    shutil.rmtree(comparison.folder / "rloo-1")
    assert comparison("igpo,rloo", "1-2", ["rloo:train.lr=0.5"])["pairs"]["igpo"]["steps"]["seeds"] == [1, 2]


def test_nothing_but_failures_is_a_page_too(comparison):
    comparison.do(igpo_1="refuse", grpo_1="refuse")
    with pytest.raises(RunError, match="2 of the trainings failed"):
        comparison("igpo,grpo", "1-1")
    page = (comparison.folder / "compare.html").read_text()
    assert "No run of grpo counts" in page and "Not counted: grpo-1 (not begun), igpo-1 (not begun)." in page


def test_an_unfinished_run_is_shown_and_not_counted(comparison):
    comparison.do(grpo_2="fail")
    with pytest.raises(RunError):
        comparison()
    assert "grpo-2 (unfinished, not counted)" in (comparison.folder / "compare.html").read_text()
    found = json.loads((comparison.folder / "compare.json").read_text())
    assert found["pairs"]["igpo"]["steps"]["seeds"] == [1] and found["variants"]["grpo"]["runs"] == 1


def test_a_run_with_fewer_steps_than_others_is_unfinished(comparison):
    comparison("igpo,grpo", "1-1")
    comparison.do(grpo_1="refuse")
    with pytest.raises(RunError, match="1 of the trainings failed \\(grpo-1: no data\\)"):
        comparison("igpo,grpo", "1-1", steps=6)
    assert {name: row["finished"] for name, row in comparison.rows.items()} == {"igpo-1": True, "grpo-1": False}


def test_progress_as_lines(comparison):
    """At 1 s a step: two runs of 4 steps, of which one has done 1 before."""
    clock, out = [0.0], io.StringIO()
    comparison.do(igpo_1="fail")
    with pytest.raises(RunError):
        comparison("igpo", "1-1")
    plan = comparison.plan("igpo", "1-2")
    tasks = runs.tasks_of(plan, jobs=1)
    with board.Board(tasks, "eval/f1", Console(file=out, width=200), lambda: clock[0]) as shown:
        shown.began(tasks[0])
        shown.show(tasks[:1])
        metrics = comparison.folder / "igpo-1" / "metrics.jsonl"
        with metrics.open("a") as file:
            file.write('{"step": 2, "eval/f1": 0.25}\n{"step": 3, "eval/f1": null}\n')
        clock[0] = 70.0
        shown.show(tasks[:1])
        shown.ended(tasks[0], "")
        shown.ended(tasks[1], "failed: no")
    assert out.getvalue().splitlines() == [
        "igpo-1 begins",
        "igpo-1 3/4  eval/f1 0.250  (0 of 2 ended, 2:55 left)",  # 2 steps took 70 s, 1 and 4 are left
        "igpo-1: 3 steps  eval/f1 0.250  (1 of 2, 2:55 left)",
        "igpo-2: failed: no  (2 of 2, 35 s left)",
    ]


def test_progress_in_a_terminal(comparison):
    """Bars are redrawn in place, and an ended run leaves a line; a name is no markup."""
    out = io.StringIO()
    tasks = runs.tasks_of(comparison.plan("igpo,grpo", "1-1"), jobs=1)
    with board.Board(tasks, "eval/f1", Console(file=out, width=100, force_terminal=True)) as shown:
        for task in tasks:
            shown.began(task)
        shown.show(tasks)
        shown.ended(tasks[0], "")
        shown.ended(tasks[1], "failed: [bold]no[/bold]")
    text = out.getvalue()
    assert "warm start of seed 1" in text and "0/4" in text and "begins" not in text
    assert "igpo-1: failed: [bold]no[/bold]  (1 of 2" in text


@pytest.mark.parametrize(
    ("seeds", "start"),
    [("1-1", ["sft.clean_steps=0"]), pytest.param("1-2", [], marks=pytest.mark.slow)],
    ids=["without warm start", "two seeds"],
)
def test_real_ones(tmp_path, capsys, seeds, start):
    """IGPO and GRPO, two steps each: the same start, another course."""
    overrides = [*SETTINGS, *WORLD, *start, "train.steps=2", "eval.every=1", "eval.questions=4"]
    plan = make_plan(None, "igpo,grpo", seeds, ["igpo:algorithm.preset=robust"], overrides, tmp_path)
    found = compare(tmp_path, plan, jobs=2)
    for budget in ("steps", "seconds", "tokens"):
        assert found["pairs"]["igpo"][budget]["seeds"] == list(plan.seeds)
    rows = {f"{row['variant']}-{row['seed']}": row for row in map(json.loads, (tmp_path / "compare.jsonl").open())}
    for seed in plan.seeds:
        igpo, grpo = rows[f"igpo-{seed}"], rows[f"grpo-{seed}"]
        assert igpo["steps"] == [0, 1, 2] and 0 < igpo["seconds"][1] < igpo["seconds"][2]
        first = [(tmp_path / f"{name}-{seed}/rollouts/eval_000000.jsonl").read_bytes() for name in ("igpo", "grpo")]
        assert first[0] == first[1], "the same start and questions"
        assert igpo["tokens"][1] != grpo["tokens"][1], "answers are scored"
    capsys.readouterr()
    compare(tmp_path, plan, jobs=2)
    assert not capsys.readouterr().out, "nothing is trained again"
