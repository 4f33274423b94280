import re
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from igpo_fast import config_docs, yaml12
from igpo_fast.config import CRITICS, PRESETS, Algorithm, Config, Model, load
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


@given(
    lr=st.floats(1e-12, 1e3),
    seed=st.integers(-(2**40), 2**40),
    system=st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)
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
    assert {name: tuple(PRESETS[name][key] for key in keys) for name in table} == table
    assert all(set(PRESETS[name]) == set(keys) for name in table)
    assert all(set(values) >= set(keys) for values in PRESETS.values() if values.get("name") not in CRITICS)
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
    assert of("name=gspo", "ratio=token") == plain
    assert of("name=gspo", "ratio=turn") == of("ratio=turn") == ("seq_mean_token_mean", 3e-3, 4e-3)
    assert of("ratio=sequence") == ("seq_mean_token_mean", 3e-4, 4e-4)
    assert of("ratio=turn", "clip_high=0.2") == ("seq_mean_token_mean", 3e-3, 0.2)
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
        ("algorithm.dual_clip=3 algorithm.surrogate=sapo", "algorithm.dual_clip bounds surrogate=clip, not sapo"),
        ("algorithm.surrogate=vespo", "algorithm.surrogate=vespo weighs whole turns or rollouts; set ratio=turn"),
        ("rollout.top_k=5", "rollout.top_k; did you mean search.top_k or eval.top_k?"),
        ("rollout.repetition_penalty=1", "did you mean eval.repetition_penalty?"),
        ("model.dtype=bfloat16", "unknown key model.dtype; it is train.precision now"),
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
    assert re.fullmatch(r"'train.betas=\[0.9': not a YAML value \(.*\); quote it", refusal("train.betas=[0.9"))


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


# --- YAML 1.2, and texts as they are written ---


@pytest.mark.parametrize(
    "written, value",
    [
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("-3", -3), ("1e-4", 1e-4), (".5", 0.5), ("1:30", "1:30"),
        ("yes", "yes"), ("2024-01-01", "2024-01-01"), ("0x_", "0x_"), ("1_000", "1_000"), ("true", True), ("~", None),
        ("a#b", "a#b"),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(written, value):
    assert (found := yaml12.read(f"key: {written}")["key"]) == value and type(found) is type(value)
    assert yaml12.read_argument(written) == value


@pytest.mark.parametrize("text", ["0o17", "1e5", "yes", "010", "1:30", "2024-01-01", "~", "", "#x", "a: b", "true"])
def test_texts_are_written_so_that_both_versions_read_texts(text):
    written = yaml12.write({"key": text})
    assert yaml12.read(written) == yaml.safe_load(written) == {"key": text}


@pytest.mark.parametrize(
    "override, value",
    [
        ("rollout.system=Use #1 tag", "Use #1 tag"),
        ("rollout.system=", ""),
        ("rollout.system=''", ""),
        ("rollout.system=null", None),
        ("rollout.system=' x #y'", " x #y"),
        ("rollout.system=say: [x", "say: [x"),
        ("run.dir=2024", "2024"),
        ("run.dir=2024-13-45", "2024-13-45"),
        ("run.dir=!!timestamp x", "!!timestamp x"),
        ("run.dir=true", "true"),
        ("data.train=", None),
        ("train.seed=010", 10),
    ],
)
def test_a_text_is_taken_as_it_is_written(override, value):
    section, key = override.partition("=")[0].split(".")
    assert getattr(getattr(load(None, [override]), section), key) == value


@pytest.mark.parametrize(
    "text, what",
    [
        ("train: {steps: 3}\nrun: {dir: x}\ntrain: {lr: 1}", "line 3: the key 'train' occurs twice"),
        ("train:\n  steps: 3\n  steps: 4", "line 3: the key 'steps' occurs twice"),
        ("run: {dir: 2024}", "run.dir: Input should be a valid string, got 2024"),
        ("train: {seed: 1:30}", "train.seed: Input should be a valid integer"),
        ("train: {steps: !!bool x}", "line 1: not of type bool"),
        ("train: {steps: !!timestamp x}", "line 1: the type 'tag:yaml.org,2002:timestamp' is not used here"),
        ("train: !!python/object/apply:os.getcwd []", "is not used here"),
        ("train: !!map x", "line 1: not of type map"),
        (f"train: {{seed: {'9' * 5000}}}", "a number of 5,000 digits"),
        (f"train: {'[' * 3000}", "nested too deeply"),
        ("train: {betas: &a [*a]}", "recursive"),
        ("1: {steps: 3}", "line 1: a key that is not text"),
        ("train: {[1]: 3}", "line 1: a key that is not text"),
        ("train: {<<: {steps: 3}}", "unknown key train.<<"),
        ("run: {dir: 'a\0b'}", "not valid YAML"),
    ],
)
def test_surprises_of_yaml_are_refused_in_a_line(tmp_path, text, what):
    assert what in refusal(file=write(tmp_path, text))


def test_an_alias_bomb_is_a_short_line(tmp_path):
    lists = [f"&l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 30)]
    file = write(tmp_path, "data: {eval: [&l0 [x], " + ", ".join(lists) + "]}")
    assert len(refusal(file=file)) < 400


@pytest.mark.parametrize(
    "override", ["rollout.keep=order # x", "train.steps=5 #6", "train.betas=[0.9, 0.99] #1", "data.eval=[a, b] #2"]
)
def test_a_comment_in_an_override_drops_nothing_in_silence(override):
    try:
        value = load(None, ["data.source=files", "data.train=q", "data.corpus=c", "model.tokenizer=bpe", override])
    except InputError:
        return
    assert value.data.eval == "[a, b] #2"


def test_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        None,
        ["run.dir=~/x", "run.cache=~", "data.source=files", "data.train=~/q", "data.eval=[NQ=~/a,b~/c]",
         "model.path=~/m", "data.corpus=d/~/c"],
    )  # fmt: skip
    assert (config.run.dir, config.run.cache, config.data.train) == ("/home/me/x", "/home/me", "/home/me/q")
    assert (config.data.eval, config.model.path) == (["NQ=/home/me/a", "b~/c"], "/home/me/m")
    assert config.data.corpus == "d/~/c"


# --- values out of sense ---


@pytest.mark.parametrize(
    "overrides, what",
    [
        ("search.retries=3000", "search.retries"),
        ("search.url=http://h:99999/x", "Port out of range"),
        ("search.url=http://h:0/x", "is not a URL"),
        ("search.url=localhost:8000", "is not a URL"),
        ("search.url=http://[::", "is not a URL"),
        ("rollout.engine=vllm rollout.server=[http://h:65536]", "Port out of range"),
        ("train.seed=10000000000000000000000000", "train.seed"),
        ("world.seed=-10000000000000000000000000", "world.seed"),
        ("train.threads=2147483648", "train.threads"),
        ("rollout.concurrency=2147483647", "rollout.concurrency"),
        ("algorithm.clip_low=1e308", "algorithm.clip_low"),
        ("algorithm.clip_low=1.5", "algorithm.clip_low"),
        ("algorithm.clip_high=1e308", "algorithm.clip_high"),
        ("rollout.temperature=1e-320", "rollout.temperature"),
        ("rollout.temperature=1e30", "rollout.temperature"),
        ("eval.temperature=1e-320", "eval.temperature: below 0.001"),
        ("eval.temperature=1e30", "eval.temperature"),
        ("train.lr=1e-320", "train.lr"),
        ("sft.lr=1e-320", "sft.lr"),
        ("train.weight_decay=1e308", "train.weight_decay"),
        ("algorithm.importance_cap=0.5", "algorithm.importance_cap"),
        ("algorithm.importance_cap=1 algorithm.importance_mode=mask", "importance_cap=1 with importance_mode=mask"),
        ("algorithm.importance_floor=1.5", "algorithm.importance_floor"),
        ("algorithm.importance_floor=1 algorithm.importance_mode=mask", "importance_floor=1 with importance_mode=mask"),
        ("algorithm.ratio=word", "algorithm.ratio"),
        ("algorithm.ratio=[turn]", "algorithm.ratio"),
        ("algorithm.kl=1e30", "algorithm.kl"),
        ("algorithm.entropy=1e30", "algorithm.entropy"),
        ("train.warmup_steps=11 train.steps=10", "train.warmup_steps=11 exceeds train.steps=10"),
        ("algorithm.name=ig_only rollout.max_turns=1", "leaves nothing to reward"),
        ("data.eval=[]", "an empty list evaluates nothing"),
        ("eval.repetition_penalty=1e-30", "eval.repetition_penalty"),
        ("model.hidden_size=6 model.heads=2 model.kv_heads=2", "heads of 3 numbers"),
        ("model.hidden_size=2 model.heads=2 model.kv_heads=2", "heads of 1 numbers"),
        ("model.device=gpu", "'gpu' is not a device"),
        ("model.device=mps", "'mps' is not a device"),
        ("model.device=meta", "'meta' is not a device"),
        ("model.device=", "'' is not a device"),
        ("run.dir=", "run.dir"),
        ("run.dir=a\0b", "NUL"),
        ("run.dir=\udc80", "valid string"),
        ("rollout.system=\udc80", "UTF-8"),
        *((f"algorithm.name={name} rollout.group_size=1", f"algorithm.name={name} leaves nothing to compare")
          for name in ("igpo", "grpo", "dr_grpo", "rloo", "gspo")),
    ],
)  # fmt: skip
def test_values_out_of_sense_are_refused(overrides, what):
    assert what in refusal(*overrides.split(" "))


@pytest.mark.parametrize(
    "overrides",
    [
        "algorithm.name=reinforce_pp rollout.group_size=1", "algorithm.name=ig_only rollout.group_size=1",
        "train.warmup_steps=10 train.steps=10", "algorithm.importance_cap=1", "train.lr=1e30",
        "algorithm.importance_floor=1",
        "train.max_grad_norm=1e9", "model.device=cuda:3", "search.url=http://[::1]:8000/retrieve",
        "eval.temperature=0", "train.seed=-5",
    ],
)  # fmt: skip
def test_values_at_the_edge_of_sense_are_taken(overrides):
    load(None, overrides.split(" "))


# --- a model that is loaded ---


def test_a_loaded_model_has_no_warm_start_unless_asked_for(tmp_path):
    steps = lambda sft: (sft.clean_steps, sft.noisy_steps, sft.hard_steps, sft.lr)  # noqa: E731
    assert steps(load().sft) == (600, 300, 120, 3e-3)
    assert steps(load(None, ["model.path=m"]).sft) == steps(Config(model=Model(path="m")).sft) == (0, 0, 0, 1e-5)
    file = write(tmp_path, "model: {path: m}\nsft: {noisy_steps: 7}")
    assert steps(load(file, ["sft.lr=1e-4"]).sft) == (0, 7, 0, 1e-4)
    assert steps(load(file, ["model.path="]).sft) == (600, 7, 120, 3e-3)


# --- credentials ---


@pytest.mark.parametrize(
    "override",
    ["search.url=http://me:secret@h:99999/x", "search.url=ftp://secret@h/", "search.timeout=http://a:secret@h"],
)
def test_credentials_are_masked_in_refusals(override):
    message = refusal(override)
    assert "secret" not in message and "***@h" in message


def test_credentials_are_masked_in_the_stored_file(tmp_path):
    config = load(
        None,
        [
            "search.url=http://me:secret@h:1/retrieve",
            "rollout.engine=vllm",
            "rollout.server=[http://secret@a:1,http://b:2]",
        ],
    )
    assert "secret" not in config.dump()
    stored = load(write(tmp_path, config.dump()))
    assert (stored.search.url, stored.rollout.server) == ("http://***@h:1/retrieve", ("http://***@a:1", "http://b:2"))


# --- any value at all ---

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**25, -(10**400), 1e308, 1e-320, "1e999", "~", "~x/", "http://[", "\udc80", "a\0", "[", "&a"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner), max_leaves=4
)
KEYS = st.sampled_from([f"{section}.{key}" for section, key, _ in fields()])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(values=st.dictionaries(KEYS, VALUES, max_size=4), overrides=st.lists(st.tuples(KEYS, LEAVES), max_size=2))
def test_any_value_of_any_key_is_taken_or_refused_in_a_line(tmp_path_factory, values, overrides):
    sections = {}
    for name, value in values.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    folder = tmp_path_factory.mktemp("any")
    file = folder / "run.yaml"
    file.write_bytes(yaml.dump(sections, allow_unicode=True).encode(errors="surrogatepass"))
    try:
        config = load(file, [f"{name}={value}" for name, value in overrides])
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000
        return
    file.write_text(config.dump(), encoding="utf-8")
    assert load(file) == config


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.binary(max_size=40) | st.text("train: {steps\n[]!&*|>#'\"-?,}0", max_size=30).map(str.encode))
def test_any_file_is_taken_or_refused_in_a_line(tmp_path_factory, content):
    file = tmp_path_factory.mktemp("any") / "run.yaml"
    file.write_bytes(content)
    try:
        load(file)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


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
        "| `lr` | number ≥ 1e-12 | `1e-06` | Peak learning rate of AdamW. |",
        "| `betas` | list of 2: number ≥ 0, < 1 | `[0.9, 0.999]` | AdamW's. |",
        "| `precision` | `float32`, `bfloat16` | `float32` |",
        "| `path` | string or empty | empty |",
        "| `gamma` | number ≥ 0, ≤ 1 | `1.0` |",
        "| `ig_gate` | `0.02` | `0.0` | `0.0` | `0.0` | `0.0` |",
    ],
)
def test_docs_say_type_bounds_and_default(row):
    assert row in config_docs.render()


def test_docs_are_tables_that_render():
    for line in config_docs.render().splitlines():
        if line.startswith("|"):
            columns = line.replace("\\|", "").count("|") - 1
            assert columns in (4, 1 + len(PRESETS)), line
