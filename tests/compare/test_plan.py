"""What a user may ask of a comparison, and the lines that refuse the rest."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from igpo_fast.cli import app
from igpo_fast.compare.plan import make_plan, parse_seeds, parse_variants
from igpo_fast.config import load
from igpo_fast.errors import InputError


def plan(algorithms="igpo,grpo", seeds="1-2", own=(), overrides=(), config=None):
    return make_plan(config, algorithms, seeds, own, overrides, Path("compared"))


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("3", (5, 6, 7)), ("201-203", (201, 202, 203)), ("4,2", (4, 2)), ("0-1, 9 - 10", (0, 1, 9, 10)), ("7-7", (7,))],
)
def test_seeds(text, seeds):
    assert parse_seeds(text, first=5) == seeds


@pytest.mark.parametrize("text", ["", "0", "201", "a", "-1", "3-1", "1,1", "1-2,2", "1.5", "1-2-3", "0-99999999", "³"])
def test_no_seeds(text):
    with pytest.raises(InputError, match="--seeds"):
        parse_seeds(text, first=0)


@given(st.text("0123456789,- ", max_size=12))
def test_any_text_gives_seeds_or_a_line(text):
    try:
        seeds = parse_seeds(text, first=0)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert len(set(seeds)) == len(seeds) > 0


def test_seeds_are_counted_from_the_runs_own_on():
    assert plan(seeds="2", overrides=["train.seed=9"]).seeds == (9, 10)
    with pytest.raises(InputError, match=r"train.seed=-1: seeds of a comparison are counted from 0 on"):
        plan(seeds="2", overrides=["train.seed=-1"])


def test_variants_are_algorithms_presets_and_other_names_for_them():
    assert parse_variants("igpo, tips,slow=igpo") == {
        "igpo": ("algorithm.name=igpo",),
        "tips": ("algorithm.preset=tips",),
        "slow": ("algorithm.name=igpo",),
    }


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("igpo,grop", "'grop' is no algorithm or preset; did you mean grpo?"),
        ("GRPO", "'GRPO' is no algorithm or preset; did you mean grpo?"),
        ("gprox", "'gprox' is no algorithm or preset; did you mean igpo or gspo or grpo?"),
        ("", "'' is no algorithm or preset; give some of igpo"),
        ("igpo,igpo", "igpo is there twice; name one of them otherwise, other=igpo"),
        ("../x=igpo", "'../x' cannot name a folder"),
        ("a/b=igpo", "cannot name a folder"),
        ("-x=igpo", "cannot name a folder"),
    ],
)
def test_no_variants(text, line):
    with pytest.raises(InputError) as refused:
        parse_variants(text)
    assert line in str(refused.value)


def test_what_each_run_gets():
    """Settings of all, then a variant's own, then what the comparison says."""
    asked = plan("igpo,slow=grpo", "4", ["slow:train.lr=0.5"], ["train.lr=0.25", "train.steps=120", "train.seed=7"])
    fast, slow = asked.config_of("igpo", 8), asked.config_of("slow", 8)
    assert asked.seeds == (7, 8, 9, 10)
    assert (fast.train.lr, slow.train.lr, slow.algorithm.name) == (0.25, 0.5, "grpo")
    assert (fast.train.seed, fast.run.dir, fast.run.cache) == (8, "compared/igpo-8", "compared/cache")
    assert fast.eval.every == 10, "12 evaluations"
    assert plan(overrides=["train.steps=5", "eval.every=4"]).config_of("igpo", 1).eval.every == 4
    assert plan(overrides=["train.steps=5"]).config_of("igpo", 1).eval.every == 1
    assert load(None, asked.arguments("slow", 9)) == asked.config_of("slow", 9)


def test_the_quickstart_has_its_file(tmp_path):
    file = Path(__file__).parents[2] / "configs/quickstart.yaml"
    asked = plan("igpo,paper", "301-304", config=file)
    assert asked.arguments("igpo", 301)[:2] == ["--config", str(file)]
    assert [asked.config_of(name, 301).algorithm.preset for name in asked.variants] == ["robust", "paper"]
    assert asked.config_of("igpo", 301).eval.every == 10, "not the file's"


@pytest.mark.parametrize(
    ("own", "overrides", "line"),
    [
        (
            ["igop:train.lr=1"],
            [],
            "--for igop:train.lr=1: give VARIANT:section.key=value, where VARIANT is one of igpo, ",
        ),
        (["train.lr=1"], [], "--for train.lr=1: give VARIANT"),
        (["grpo:train.lr"], [], "--for grpo:train.lr: give VARIANT:section.key=value"),
        (["igpo:"], [], "--for igpo:: give VARIANT:section.key=value"),
        (["grpo:train.lt=1"], [], "unknown key train.lt"),
        (["grpo:model.layers=1"], [], "--for grpo: model.layers would differ from that of igpo"),
        (["igpo:train.steps=7"], [], "--for igpo: train.steps would differ from that of grpo"),
        (["igpo:train.steps=7", "grpo:train.steps=8"], [], "--for grpo: train.steps would differ from that of igpo"),
        (["igpo:eval.every=1"], [], "--for igpo: eval.every would differ"),
        (["grpo:rollout.max_turns=2"], [], "rollout.max_turns would differ"),
        (["grpo:train.seed=7"], [], "train.seed=7: the comparison sets this key"),
        ([], ["run.dir=elsewhere"], "run.dir=elsewhere: the comparison sets this key"),
        (["grpo:run.dir=elsewhere"], [], "run.dir=elsewhere: the comparison sets this key"),
    ],
)
def test_no_settings(own, overrides, line):
    with pytest.raises(InputError) as refused:
        plan(own=own, overrides=overrides)
    assert line in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--algorithms", "grop"], "did you mean grpo?"),
        (["--seeds", "300"], "the seed 300 alone is 300-300"),
        (["--config", "absent.yaml"], "absent.yaml: cannot read the configuration"),
        (["--baseline", "rloo", "--dir", "new"], "--baseline rloo: not among igpo, grpo"),
        (["--report-only", "--dir", "absent"], "absent: no such folder"),
        (["--report-only", "--seeds", "3"], "--report-only: --seeds says what to train"),
        (["--report-only", "train.lr=1"], "--report-only: section.key=value says what to train"),
        (["train.stps=3"], "unknown key train.stps; did you mean train.steps?"),
    ],
)
def test_refused_on_the_command_line(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["compare", *arguments])
    assert result.exit_code == 2 and not result.stdout
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and line in result.stderr
    assert not [*tmp_path.iterdir()], "nothing is left"


def test_the_command_line_says_what_was_found(tmp_path, monkeypatch):
    import igpo_fast.compare.compare as module
    from igpo_fast.run.interrupt import Interrupted

    asked = {}

    def comparison(folder, plan, **options):
        asked.update(folder=folder, plan=plan, **options)
        if plan is None:
            raise Interrupted("2 of 4 runs ended")
        return {"sentences": ["igpo ended higher."]}

    monkeypatch.setattr(module, "compare", comparison)
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 24}")
    run = lambda *more: CliRunner().invoke(app, ["compare", "--config", str(file), *more])  # noqa: E731
    result = run(
        "--seeds", "2", "--for", "igpo:train.lr=0.5", "--for", "grpo:train.lr=0.1", "--at", "0.7", "--jobs", "3"
    )
    assert result.exit_code == 0 and result.stdout.startswith("igpo ended higher.\nthe page is runs/compare/mine/")
    assert asked["folder"] == Path("runs/compare/mine") and (asked["at"], asked["jobs"]) == (0.7, 3)
    assert asked["plan"].config_of("igpo", 0).train.lr == 0.5 and asked["plan"].config_of("grpo", 0).eval.every == 2
    result = run("--report-only")
    assert result.exit_code == 130 and result.stderr == "interrupted: 2 of 4 runs ended; the same command goes on\n"
