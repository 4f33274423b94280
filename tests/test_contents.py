"""contents.py: what a source names, and digests that change with what is there."""

import hashlib
from types import SimpleNamespace

import pytest

from igpo_fast import config
from igpo_fast.contents import contents, parts_of, sources
from igpo_fast.errors import InputError
from igpo_fast.run.checkpoint import open_run


@pytest.fixture
def folder(tmp_path):
    """Two shards and a corpus."""
    for name in ("part-0.jsonl", "part-1.jsonl", "corpus.jsonl"):
        (tmp_path / name).write_text(f"{name}\n")
    return tmp_path


def reading(folder, *overrides):
    return config.load(
        None,
        ["data.source=files", "model.tokenizer=bpe", f"data.train={folder}/part-0.jsonl",
         f"data.corpus={folder}/corpus.jsonl", *overrides],
    )  # fmt: skip


def digest(content):
    return hashlib.sha256(content.encode()).hexdigest()


SEVERAL = {
    "a pattern": "data.train={}/part-*.jsonl",
    "a comma list": "data.train={0}/part-0.jsonl, {0}/part-1.jsonl",
    "a list": "data.train=[{0}/part-0.jsonl, {0}/part-1.jsonl]",
    "a list of patterns": "data.train=[{0}/part-0*, {0}/part-1*]",
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("shard", [0, 1])
def test_one_of_two_files_changes_the_digest(folder, name, shard):
    settings = reading(folder, SEVERAL[name].format(folder))
    before = contents(settings)
    assert before["data.train"] == digest(digest("part-0.jsonl\n") + digest("part-1.jsonl\n"))
    (folder / f"part-{shard}.jsonl").write_text("other\n")
    changed = contents(settings)
    assert changed["data.train"] != before["data.train"] and changed["data.corpus"] == before["data.corpus"]


@pytest.mark.parametrize("shard", [0, 1])
def test_a_run_whose_pattern_holds_something_else_is_refused(folder, shard):
    settings = reading(folder, f"data.train={folder}/part-*.jsonl")
    with open_run(folder / "run", settings) as run:
        run.begin()
    open_run(folder / "run", settings).close()
    (folder / f"part-{shard}.jsonl").write_text("other\n")
    with pytest.raises(InputError) as error:
        open_run(folder / "run", settings)
    assert str(error.value).startswith(f"{folder}/part-*.jsonl (data.train): holds something else than when ")


def test_a_file_that_comes_to_match_changes_the_digest_and_an_order_too(folder):
    settings = reading(folder, f"data.train={folder}/part-*.jsonl")
    before = contents(settings)["data.train"]
    there = reading(folder, f"data.train={folder}/part-1.jsonl,{folder}/part-0.jsonl")
    assert contents(there)["data.train"] != before, "rows come in another order"
    (folder / "part-2.jsonl").write_text("more\n")
    assert contents(settings)["data.train"] != before


def test_a_file_is_known_by_its_content_not_by_how_it_is_named(folder):
    for source in ("part-0.jsonl", "part-0*", "[p]art-0.jsonl", "part-0.jsonl,"):
        found = contents(reading(folder, f"data.train={folder}/{source}"))
        assert found["data.train"] == digest("part-0.jsonl\n")


def test_sets_of_an_evaluation_may_be_patterns(folder):
    settings = reading(folder, f"data.eval=[both={folder}/part-*.jsonl, {folder}/part-1.jsonl]")
    found = contents(settings)
    assert sources(settings)["data.eval[0]"] == f"{folder}/part-*.jsonl"
    assert found["data.eval[0]"] == digest(digest("part-0.jsonl\n") + digest("part-1.jsonl\n"))
    assert found["data.eval[1]"] == digest("part-1.jsonl\n")


def test_contexts_is_no_source(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "contexts").write_text("a file of that name is not read")
    settings = reading(folder, "data.corpus=contexts")
    assert "data.corpus" not in sources(settings) and list(contents(settings)) == ["data.train"]


def test_a_model_in_a_folder_named_contexts_is_a_source(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "contexts").mkdir()
    assert set(contents(reading(folder, "model.path=contexts"))) == {"model.path", "data.train", "data.corpus"}


def test_a_list_may_name_the_hub(folder, monkeypatch):
    prints = {"train": "aa", "more": "bb"}
    loaded = lambda *name, split: SimpleNamespace(_fingerprint=prints[split])  # noqa: E731
    monkeypatch.setattr("datasets.load_dataset", loaded)
    settings = reading(folder, f"data.train=[some/set:train, some/set:main:more, {folder}/part-0.jsonl]")
    assert contents(settings)["data.train"] == digest("aa" + "bb" + digest("part-0.jsonl\n"))
    prints["more"] = "cc"
    assert contents(settings)["data.train"] == digest("aa" + "cc" + digest("part-0.jsonl\n"))


def test_a_source_of_which_a_part_is_not_there_has_no_digest(folder):
    for missing in (f"{folder}/part-0.jsonl,{folder}/gone.jsonl", f"{folder}/gone-*.jsonl", f"{folder}/gone.jsonl"):
        assert list(contents(reading(folder, f"data.train={missing}"))) == ["data.corpus"]


def test_a_table_of_parquet_files_is_its_files_by_name(folder):
    table = folder / "table.parquet"
    (table / "day=1").mkdir(parents=True)
    for name in ("b.parquet", "a.parquet", "day=1/c.parquet", "_SUCCESS"):
        (table / name).write_text(name)
    settings = reading(folder, f"data.train={table}")
    assert parts_of(table) == [f"{table}/{name}" for name in ("a.parquet", "b.parquet", "day=1/c.parquet")]
    before = contents(settings)["data.train"]
    (table / "_SUCCESS").write_text("again")
    assert contents(settings)["data.train"] == before
    (table / "day=1" / "c.parquet").write_text("other")
    assert contents(settings)["data.train"] != before


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("rollout.tools=[search, {}:f]", "rollout.tools: {}:f"), ("rollout.dialect={}:f", "rollout.dialect"),
        ("rollout.engine={}:f", "rollout.engine"), ("algorithm.gain={}:f", "algorithm.gain"),
        ("algorithm.outcome={}:f", "algorithm.outcome"),
    ],
)  # fmt: skip
def test_code_of_ones_own_is_known_by_its_content(tmp_path, setting, key):
    own = tmp_path / "own.py"
    own.write_text("def f(): pass\n")
    settings, key = config.load(None, [setting.format(own)]), key.format(own)
    assert contents(settings) == {key: digest("def f(): pass\n")}
    own.write_text("def f(): return 1\n")
    assert contents(settings) == {key: digest("def f(): return 1\n")}
