import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from igpo_fast import config_docs
from igpo_fast.config import PRESETS, Algorithm, Config, load
from igpo_fast.errors import InputError

DOCS = Path(__file__).parents[1] / "docs" / "config.md"


def fields():
    """(section, key, field) of every setting."""
    return [
        (section, key, field)
        for section, outer in Config.model_fields.items()
        for key, field in outer.annotation.model_fields.items()
    ]


def refusal(*overrides, file=None):
    with pytest.raises(InputError) as error:
        load(file, overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def write(folder, text):
    path = folder / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- what is read ---


def test_a_file_then_overrides_the_last_wins(tmp_path):
    file = write(tmp_path, "train: {steps: 5, seed: 3}\nmodel:\n# nothing set\n")
    config = load(file, ["train.steps=7", "train.lr=1e-4", "train.steps=9", "data.train=", "run.dir=runs/a=b"])
    assert (config.train.steps, config.train.seed, config.train.lr) == (9, 3, 1e-4)
    assert config.data.train is None and config.run.dir == "runs/a=b"
    assert config.model == Config().model


def test_an_empty_file_is_the_defaults(tmp_path):
    assert load(write(tmp_path, "")) == load() == Config()


def test_dump_reads_back_the_same_and_shows_every_key(tmp_path):
    config = load(None, ["algorithm.preset=robust", "algorithm.kl=0.5", "train.betas=[0.5, 0.75]", "train.lr=3e-7"])
    assert load(write(tmp_path, config.dump())) == config
    shown = yaml.safe_load(config.dump())
    assert {(section, key) for section in shown for key in shown[section]} == {(s, k) for s, k, _ in fields()}


@given(lr=st.floats(1e-12, 1e3), seed=st.integers(-(2**40), 2**40), system=st.text(max_size=20))
@example(lr=1.0, seed=0, system="\x85")  # a line break to YAML
def test_any_values_survive_the_stored_file(tmp_path_factory, lr, seed, system):
    config = Config(train={"lr": lr, "seed": seed}, rollout={"system": system})
    assert load(write(tmp_path_factory.mktemp("dump"), config.dump())) == config


# --- presets ---


def test_presets_are_the_table_of_algorithm_md():
    floors = ("ig_min_std", "outcome_min_std", "min_var")
    keys = ("basis", "pool", "ig_gate", "ig_center", *floors, "format_penalty", "kl", "entropy")
    released = (1e-6, 1e-6, 1e-8)  # sqrt(var + 1e-8) + 1e-6
    table = {
        "robust": ("prob", "separate", 0.02, False, 0.05, 0, 0, 0, 0, 0),
        "paper": ("log_prob", "separate", 0, True, *released, -2, 0.001, 0.001),
        "paper_v1": ("prob", "joint", 0, True, *released, -2, 0.001, 0.001),
    }
    assert {name: tuple(values[key] for key in keys) for name, values in PRESETS.items()} == table
    assert all(set(values) == set(keys) for values in PRESETS.values())
    assert set(typing.get_args(Algorithm.model_fields["preset"].annotation)) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fills_its_keys_however_the_section_is_made(name, tmp_path):
    file = write(tmp_path, f"algorithm: {{preset: {name}}}")
    for algorithm in (
        load(file).algorithm,
        load(None, [f"algorithm.preset={name}"]).algorithm,
        Config(algorithm=Algorithm(preset=name)).algorithm,
    ):
        assert {key: getattr(algorithm, key) for key in PRESETS[name]} == PRESETS[name]


def test_a_key_that_is_given_wins_over_the_preset(tmp_path):
    file = write(tmp_path, "algorithm: {ig_gate: 0.5}")
    algorithm = load(file, ["algorithm.preset=robust", "algorithm.kl=0.25"]).algorithm
    assert (algorithm.ig_gate, algorithm.kl, algorithm.ig_min_std) == (0.5, 0.25, 0.05)


def test_a_names_own_loss_comes_with_it_unless_given(tmp_path):
    def of(*overrides):
        a = load(None, [f"algorithm.{override}" for override in overrides]).algorithm
        return a.aggregation, a.clip_low, a.clip_high

    plain = ("seq_mean_token_mean", 0.2, 0.2)
    assert {name: of(f"name={name}") for name in ("igpo", "grpo", "rloo", "reinforce_pp", "ig_only")} == dict.fromkeys(
        ("igpo", "grpo", "rloo", "reinforce_pp", "ig_only"), plain
    )
    assert of("name=dr_grpo") == ("seq_mean_token_sum_norm", 0.2, 0.2)
    assert of("name=gspo") == of("preset=robust", "name=gspo") == ("seq_mean_token_mean", 3e-4, 4e-4)
    assert of("name=dr_grpo", "aggregation=token_mean") == ("token_mean", 0.2, 0.2)
    assert of("name=gspo", "clip_low=0.1") == ("seq_mean_token_mean", 0.1, 4e-4)
    stored = load(None, ["algorithm.name=gspo", "algorithm.clip_high=0.2"])
    assert load(write(tmp_path, stored.dump())) == stored


def test_defaults_are_the_papers():
    assert {key: getattr(Config().algorithm, key) for key in PRESETS["paper"]} == PRESETS["paper"]


# --- what is refused ---


@pytest.mark.parametrize(
    "override, near",
    [
        ("train.stps=3", "train.stps; did you mean train.steps?"),
        ("train.group_size=3", "train.group_size; did you mean rollout.group_size?"),
        ("algorithm.gate=1", "algorithm.gate; did you mean algorithm.ig_gate?"),
        ("trian.steps=3", "trian; did you mean train?"),
        ("qqq.zzz=3", "qqq; see docs/config.md"),
    ],
)
def test_unknown_keys_get_the_nearest_name(override, near):
    assert f"unknown key {near}" in refusal(override)


@pytest.mark.parametrize(
    "override, key",
    [
        ("train.steps=abc", "train.steps"),
        ("train.steps=2.5", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.steps=true", "train.steps"),
        ("train.steps=", "train.steps"),
        ("train.lr=.nan", "train.lr"),
        ("train.lr=.inf", "train.lr"),
        ("train.betas=[0.9, 1.0]", "train.betas"),
        ("train.betas=[0.9]", "train.betas"),
        ("eval.top_p=0", "eval.top_p"),
        ("algorithm.preset=[paper]", "algorithm.preset"),
        ("algorithm.preset=best", "algorithm.preset"),
        ("algorithm.dual_clip=1", "dual_clip"),
        ("algorithm.dual_clip=.nan", "algorithm.dual_clip"),
        ("run.dir=2024", "run.dir"),
        ("rollout.top_k=5", "rollout.top_p, top_k"),
        ("train.updates=3", "train.updates=3 must divide train.questions=16"),
        ("world.max_hops=2", "world.min_hops=3 exceeds world.max_hops=2"),
        ("model.kv_heads=3", "model.kv_heads"),
        ("model.tokenizer=world data.source=files data.train=q data.corpus=c", "model.tokenizer=world"),
        ("model.tokenizer=bpe data.source=files data.corpus=c", "data.train is needed"),
        ("model.tokenizer=bpe data.source=files data.train=q", "data.corpus is needed"),
    ],
)
def test_wrong_values_are_named(override, key):
    parts = [override] if "[" in override else override.split(" ")
    assert key in refusal(*parts)


@pytest.mark.parametrize("override", ["steps=3", "train.steps", "=3", "train.steps 3"])
def test_malformed_overrides_show_the_form(override):
    assert "section.key=value, like train.steps=10" in refusal(override)


def test_an_override_that_is_no_yaml():
    assert "not a YAML value; quote it" in refusal("run.dir=[a")


@pytest.mark.parametrize(
    "text, what",
    [
        ("train: [", "not valid YAML"),
        (b"\xff\xfe\x00bin", "not valid YAML"),
        ("steps: 3", "sections of key: value"),
        ("[1, 2]", "sections of key: value"),
        ("train: 0", "sections of key: value"),
        ("train: {steps: x}", "train.steps"),
    ],
)
def test_bad_files_are_named(tmp_path, text, what):
    file = write(tmp_path, text)
    message = refusal(file=file)
    assert message.startswith(f"{file}: ") and what in message


def test_missing_files_are_named(tmp_path):
    assert refusal(file=tmp_path / "none.yaml").startswith(f"{tmp_path}/none.yaml: cannot read")
    assert "cannot read" in refusal(file=tmp_path)


def test_files_need_no_corpus_with_a_search_server():
    overrides = ["data.source=files", "data.train=q", "model.tokenizer=bpe", "search.url=http://localhost:1"]
    assert load(None, overrides).data.corpus is None


def test_sections_do_not_change_after_birth():
    with pytest.raises(Exception, match="frozen"):
        Config().train.steps = 3


# --- the documentation ---


def test_every_key_is_explained():
    assert [(section, key) for section, key, field in fields() if not field.description] == []


def test_docs_are_up_to_date():
    assert DOCS.read_text(encoding="utf-8") == config_docs.render(), "run: python -m igpo_fast.config_docs"


def test_docs_show_every_key_in_its_section():
    page = config_docs.render()
    for section, key, _ in fields():
        part = page.split(f"\n## {section}\n")[1].split("\n## ")[0]
        assert f"\n| `{key}` | " in part


@pytest.mark.parametrize(
    "row",
    [
        "| `lr` | number > 0 | `1e-06` | Peak learning rate of AdamW. |",
        "| `betas` | list of 2: number ≥ 0, < 1 | `[0.9, 0.999]` | AdamW's. |",
        "| `dtype` | `float32`, `bfloat16` | `float32` |",
        "| `path` | string or empty | empty |",
        "| `gamma` | number ≥ 0, ≤ 1 | `1.0` |",
        "| `robust` | `prob` | `separate` | `0.02` | `false` | `0.05` | `0.0` | `0.0` | `0.0` | `0.0` | `0.0` |",
    ],
)
def test_docs_say_type_bounds_and_default(row):
    assert row in config_docs.render()


def test_docs_are_tables_that_render():
    for line in config_docs.render().splitlines():
        if line.startswith("|"):
            columns = line.replace("\\|", "").count("|") - 1
            assert columns in (4, 1 + len(PRESETS["paper"])), line
