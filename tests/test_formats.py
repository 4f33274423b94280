"""Files as users have them: every form is read right, or refused in a line that names file, line and field."""

import gzip
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from igpo_fast import config
from igpo_fast.data.load import load_data, without_long
from igpo_fast.data.passages import load_corpus
from igpo_fast.data.questions import load_questions
from igpo_fast.errors import InputError
from igpo_fast.types import Passage, Question
from tests.test_data import refusal, write_lines, write_parquet

ROW = {"question": "who?", "answer": "Ann"}


def one(tmp_path, row: dict) -> Question:
    (question,) = load_questions(write_lines(tmp_path / "q.jsonl", {**ROW, **row}))
    return question


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answer_aliases": "bc"}, ("Ann", "bc")),  # not b, c
        ({"answer_aliases": 3}, ("Ann", "3")),
        ({"answer": {"value": "Rome", "aliases": "bc"}}, ("Rome", "bc")),
        ({"answer": {"value": "Rome", "aliases": None}}, ("Rome",)),
        ({"answer": {"text": ["Ann", "A. B."], "answer_start": [3, 9]}}, ("Ann", "A. B.")),
        ({"answer": 1999.0}, ("1999",)),  # whole numbers beside nulls are floats in tables
        ({"answer": [3.5, 1e-7, 10**20, 1e20]}, ("3.5", "0.0000001", "100000000000000000000")),
        ({"answer": ["[1, 2]"]}, ("[1, 2]",)),
        ({"answer": "e\u0301"}, ("é",)),
    ],
)
def test_answers_are_texts_and_numbers_as_people_write_them(tmp_path, row, answers):
    assert one(tmp_path, row).answers == answers


def test_years_in_a_column_with_nulls(tmp_path):
    rows = [{"question": f"{i}?", "answer": year, "aliases": None} for i, year in enumerate([1999.0, 2001.5])]
    path = write_parquet(tmp_path / "q.parquet", *rows)
    assert [q.answers for q in load_questions(path)] == [("1999",), ("2001.5",)]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": True}, "answer: true, not a text or a number"),
        ({"answer": [["Ann"]]}, "answer: a list, not a text or a number"),
        ({"answer": [{"text": "Ann"}]}, "answer: an object, not a text or a number"),
        ({"answer": {"name": "Ann"}}, "answer: an object without target, text or value"),
        ({"answer": math.nan}, "answer: nan, not a text or a number"),
        ({"answer": [math.inf]}, "answer: inf, not a text or a number"),
        ({"answer": '["Ann", "Bo"]'}, "answer: a list or an object written as a text"),
        ({"answer": "[1, 2]"}, "answer: a list or an object written as a text"),
        ({"answer": "['Ann' 'Bo']"}, "answer: a list or an object written as a text"),
        ({"answer": ["{'text': ['Ann']}"]}, "answer: a list or an object written as a text"),
        ({"answer_aliases": {"a": 1}}, "answer_aliases: an object, not a text or a number"),
        ({"answer_aliases": [False]}, "answer_aliases: false, not a text or a number"),
        ({"answer": {"value": ["a", ["b"]]}}, "answer.value: a list, not"),
        ({"question": '[{"role": "user", "content": "who?"}]'}, "question: a list or an object written as a text"),
        ({"question": None, "prompt": '[{"role": "user", "content": "who?"}]'}, "prompt: a list or an object written"),
        ({"question": ["who?"]}, "no question"),
        ({"id": {"n": 1}}, "id: an object, not a text or a number"),
        ({"id": [1]}, "id: a list, not a text or a number"),
        ({"id": True}, "id: true, not a text or a number"),
        ({"data_source": ["nq"]}, "data_source: a list, not"),
        ({"extra_info": {"index": [1]}}, "extra_info.index: a list, not"),
        ({"hops": True}, "hops True is not a whole number"),
        ({"hops": 1.5}, "hops 1.5 is not a whole number"),
        ({"hops": -1}, "hops -1 is not a whole number"),
        ({"hops": [2]}, "hops a list is not a whole number"),
        ({"steps": [{"answer": ["a"]}]}, "steps.answer: a list, not"),
        ({"question_decomposition": 1}, "steps is not a list of objects"),
        ({"supporting_facts": [[["A"], 0]]}, "supporting_facts: a list, not"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path, row, message):
    path = write_lines(tmp_path / "q.jsonl", ROW | {"id": 1, "question": "before?"}, ROW | row)
    assert refusal(load_questions, path).startswith(f"{path} line 2: {message}")


def test_support_may_be_missing_in_part(tmp_path):
    assert one(tmp_path, {"supporting_facts": [None, ["A", 0], ["A", 1], ["B", 0]]}).hops == 2
    assert one(tmp_path, {"supporting_facts": {"title": None}}).hops is None
    assert one(tmp_path, {"hops": 2.0}).hops == 2
    steps = [{"question": "who?", "answer": 5.0, "passage_id": None, "other": [1]}]
    assert one(tmp_path, {"steps": steps}).steps == (steps[0] | {"answer": "5"},)


HALF = "\ud83d"


@pytest.mark.parametrize("key", ["id", "question", "answer", "data_source", "note"])
def test_half_a_character_is_refused_in_questions(tmp_path, key):
    path = write_lines(tmp_path / "q.jsonl", json.dumps(ROW | {key: f"a{HALF}"}))
    message = "line 1: a text with half a character (a lone surrogate); correct it"
    assert refusal(load_questions, path) == f"{path} {message}"


@pytest.mark.parametrize("key", ["id", "title", "text", "contents"])
def test_half_a_character_is_refused_in_passages(tmp_path, key):
    row = {"id": "1", "contents": "t\nx"} if key == "contents" else {"id": "1", "title": "t", "text": "x"}
    path = write_lines(tmp_path / "c.jsonl", json.dumps(row | {key: f"a{HALF}"}))
    assert "half a character" in refusal(load_corpus, path)
    whole = write_lines(tmp_path / "c.jsonl", json.dumps({"id": "1", "text": "\U0001f600"}))
    assert load_corpus(whole)[0].text == "\U0001f600"


@pytest.mark.parametrize("name", ["q.jsonl", "q.json"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[" * 100_000 + "]" * 100_000, "not JSON (brackets nested too deeply)"),
        ("9" * 5_000, "not JSON (a number of too many digits)"),
        ("[" * 900 + "]" * 900, "answer: a list, not a text or a number"),
        ('"\0"', "not JSON (Invalid control character at)"),
        ("nul", "not JSON (Expecting value)"),
    ],
    ids=["deep", "digits", "nested", "NUL", "word"],
)
def test_json_that_breaks_parsers(tmp_path, name, value, message):
    row = f'{{"question": "q?", "answer": {value}}}'
    (tmp_path / name).write_text(row if name == "q.jsonl" else f"[{row}]")
    where = "line" if name == "q.jsonl" else "entry"
    assert refusal(load_questions, tmp_path / name).startswith(f"{tmp_path / name} {where} 1: {message}")


BOM = b"\xef\xbb\xbf"
TWO = [{"id": "a", **ROW}, {"id": "b", **ROW, "question": "where?"}]
LINES = "".join(json.dumps(row) + "\n" for row in TWO).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("q.jsonl", BOM + LINES),
        ("q.jsonl", LINES.replace(b"\n", b"\r\n")),
        ("q.json", LINES),
        ("q.json", json.dumps(TWO).encode()),
        ("q.json", BOM + b"\r\n " + json.dumps(TWO, indent=2).encode() + b"\n"),
        ("q.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("q.json.gz", gzip.compress(json.dumps(TWO).encode(), mtime=0)),
    ],
    ids=["BOM", "CRLF", "lines in .json", "array", "indented array", "gz", "array in gz"],
)
def test_files_of_other_programs(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert [q.id for q in load_questions(tmp_path / name)] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.json", b"[1]", "entry 1: a number, not a JSON object"),
        ("q.json", b"[", "entry 1: not JSON"),
        ("q.json", json.dumps(TWO).encode()[:-1], "entry 2: not followed by a comma or the end"),
        ("q.json", json.dumps(TWO).encode() + b"x", "entry 2: not followed by a comma or the end"),
        ("q.json", b'["\xff"]', ": not UTF-8 text"),
        ("q.jsonl", LINES.decode().encode("utf-16"), "line 1: not UTF-8 text"),
        ("q.jsonl.gz", b"no", ": not gzip"),
        ("q.jsonl.gz", gzip.compress(LINES, mtime=0)[:-9], ": damaged gzip"),
    ],
)  # fmt: skip
def test_files_that_are_not_what_they_are_called(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    path = tmp_path / name
    assert refusal(load_questions, path).removeprefix(str(path)).lstrip().startswith(message)


def test_an_empty_array_has_no_questions(tmp_path):
    (tmp_path / "q.json").write_text("[ ]")
    assert "no questions" in refusal(load_questions, tmp_path / "q.json")


def test_shards_patterns_and_lists(tmp_path):
    for number in range(3):
        write_lines(tmp_path / f"train-{number}.jsonl", ROW | {"question": f"{number}?"})
    write_parquet(tmp_path / "more.parquet", ROW | {"question": "3?"})
    pattern = f"{tmp_path}/train-*.jsonl"
    asked = load_questions(pattern)
    assert [(q.id, q.question) for q in asked] == [(f"train-{n}-1", f"{n}?") for n in range(3)]
    assert [q.question for q in load_questions(f"{pattern}, {tmp_path}/more.parquet")] == ["0?", "1?", "2?", "3?"]
    corpus = write_lines(tmp_path / "c.jsonl", {"id": 1, "text": "x"})
    settings = config.load(
        None,
        ["data.source=files", f"data.train=[{tmp_path}/train-0.jsonl, {tmp_path}/more.parquet]",
         f"data.corpus={corpus}", "model.tokenizer=bpe"],
    )  # fmt: skip
    assert len(load_data(settings).train) + len(load_data(settings).eval) == 2
    assert refusal(load_questions, f"{tmp_path}/no-*.jsonl") == (
        f"{tmp_path}/no-*.jsonl: no file matches; give an existing file or another pattern"
    )
    (tmp_path / "table.parquet").mkdir()
    for number in range(2):
        write_parquet(tmp_path / "table.parquet" / f"part-{number}.parquet", ROW | {"question": f"{number}?"})
    assert [q.question for q in load_questions(tmp_path / "table.parquet")] == ["0?", "1?"]
    for nothing in ("", " , ", "a\0.jsonl"):
        refusal(load_questions, nothing)
    (tmp_path / "a,b[1].jsonl").write_bytes(LINES)  # a file of that very name comes first
    assert len(load_questions(tmp_path / "a,b[1].jsonl")) == 2


def test_ids_follow_verls_split_and_index(tmp_path):
    rows = [
        {**ROW, "data_source": source, "extra_info": {"split": "test", "index": index}}
        for source, index in (("nq", 7), ("popqa", 7), ("nq", 8), ("nq", 7))
    ]
    asked = load_questions(write_lines(tmp_path / "q.jsonl", *rows))
    assert [q.id for q in asked] == ["nq/test-7", "popqa/test-7", "nq/test-8", "nq/q-4"], "the last repeats an index"
    (alone,) = load_questions(write_lines(tmp_path / "other.jsonl", rows[2]))
    assert alone.id == "nq/test-8"


def test_kilt(tmp_path):
    outputs = [{"answer": "Ann", "provenance": [{"title": "A"}]}, {"provenance": []}, {"answer": "A. B."}]
    path = write_lines(tmp_path / "q.jsonl", {"id": "k", "input": "who?", "output": outputs})
    assert load_questions(path) == (Question("k", "who?", ("Ann", "A. B.")),)
    alpaca = write_lines(tmp_path / "q.jsonl", {"instruction": "Translate", "input": "who?", "output": "wer?"})
    assert "no question" in refusal(load_questions, alpaca)


def test_corpora_of_beir_and_kilt(tmp_path):
    path = write_lines(
        tmp_path / "c.jsonl",
        {"_id": "b", "title": "T", "text": "x", "metadata": {}},
        {"_id": "k", "wikipedia_id": "9", "wikipedia_title": "T", "text": ["T\n", "Section::::S.\n", "One. Two.\n"]},
        {"wikipedia_id": "8", "wikipedia_title": "T", "text": {"paragraph": ["T", "One."], "paragraph_id": [0, 1]}},
        {"id": 5, "title": 1984.0, "text": "u\u0308ber"},
    )
    assert load_corpus(path) == (
        Passage("b", "T", "x"),
        Passage("k", "T", "Section::::S.\nOne. Two."),
        Passage("8", "T", "One."),
        Passage("5", "1984", "über"),
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ["a", "b"]}, "text: a list, not a text or a number"),
        ({"contents": {"text": "a"}}, "contents: an object, not"),
        ({"text": "a", "title": ["b"]}, "title: a list, not"),
        ({"text": True}, "text: true, not"),
        ({"text": math.nan}, "text: nan, not"),
        ({"id": ["x"], "text": "a"}, "id: a list, not"),
        ({"wikipedia_title": "T", "text": [["a"]]}, "text: a list, not"),
    ],
)
def test_what_is_no_text_is_refused_in_passages(tmp_path, row, message):
    path = write_lines(tmp_path / "c.jsonl", {"id": "1", **row})
    assert refusal(load_corpus, path).startswith(f"{path} line 1: {message}")


A, B = ("A", "Ann was born. She wrote."), ("B", "Bo lives.")
CONTEXTS = {
    "MuSiQue": {
        "id": "2hop__1_2", "answerable": True, "question_decomposition": [], "answer_aliases": [],
        "paragraphs": [
            {"idx": 0, "title": "A", "paragraph_text": "Ann was born. She wrote.", "is_supporting": True},
            {"idx": 1, "title": "B", "paragraph_text": "Bo lives.", "is_supporting": False},
        ],
    },
    "MuSiQue as columns": {
        "paragraphs": {"idx": [0, 1], "title": ["A", "B"], "paragraph_text": ["Ann was born. She wrote.", "Bo lives."]},
    },
    "HotpotQA": {
        "_id": "5a", "type": "bridge", "level": "hard", "supporting_facts": [["A", 0]],
        "context": [["A", ["Ann was born.", " She wrote."]], ["B", ["Bo lives."]]],
    },
    "2WikiMultiHopQA": {
        "_id": "61", "evidences": [["A", "b", "C"]], "supporting_facts": [["A", 0], ["B", 0]],
        "context": [["A", ["Ann was born.", "She wrote."]], ["B", ["Bo lives."]]],
    },
    "the hub's": {
        "id": "5a", "supporting_facts": {"title": ["A"], "sent_id": [0]},
        "context": {"title": ["A", "B"], "sentences": [["Ann was born.", " She wrote."], ["Bo lives."]]},
    },
    "FlashRAG's": {
        "metadata": {"context": {"title": ["A", "B"], "content": [["Ann was born.", " She wrote."], ["Bo lives."]]}},
    },
}  # fmt: skip


@pytest.mark.parametrize("columns", CONTEXTS.values(), ids=CONTEXTS)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_a_corpus_of_the_rows_own_paragraphs(tmp_path, columns, suffix):
    rows = [{**ROW, "question": f"{n}?", **columns, "id": f"q{n}", "_id": None} for n in range(3)]
    path = tmp_path / f"set.{suffix}"
    if suffix == "parquet":
        if any(isinstance(pair, list) for pair in columns.get("context", [])):
            pytest.skip("pairs of a text and a list have no column")
        if columns.get("question_decomposition") == []:
            rows = [{k: v for k, v in row.items() if k != "question_decomposition"} for row in rows]
        write_parquet(path, *rows)
    else:
        path.write_text(json.dumps(rows)) if suffix == "json" else write_lines(path, *rows)
    settings = config.load(
        None, ["data.source=files", f"data.train={path}", "data.corpus=contexts", "model.tokenizer=bpe"]
    )
    data = load_data(settings)
    assert (len(data.train), len(data.eval)) == (2, 1)
    passages = data.collections[""]
    assert [(passage.title, passage.text) for passage in passages] == [A, B], "each once"
    assert len({passage.id for passage in passages}) == 2


def test_squads_context(tmp_path):
    found = {}
    load_questions(write_lines(tmp_path / "q.jsonl", ROW | {"title": "A", "context": "Ann."}), passages=found)
    assert [(passage.title, passage.text) for passage in found.values()] == [("A", "Ann.")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({}, 'no paragraphs of its own ("paragraphs" or "context"); give data.corpus=FILE'),
        ({"paragraphs": []}, "no paragraphs of its own"),
        ({"paragraphs": "x"}, "paragraphs is not a list of objects"),
        ({"paragraphs": [{"title": "A", "paragraph_text": ["x"]}]}, "paragraphs.paragraph_text: a list, not"),
        ({"context": [["A"]]}, "context: not a list of [title, sentences]"),
        ({"context": [["A", [["x"]]]]}, "context.sentences: a list, not"),
        ({"context": "[['A', ['x']]]"}, "context: a list written as a text"),
        ({"context": {"title": ["A", "B"], "sentences": [["x"]]}}, "context: not a list of titles"),
        ({"context": {"title": "A"}}, "context: not a list of titles"),
        ({"context": 5}, "context: not a list"),
    ],
)
def test_rows_without_paragraphs_say_so(tmp_path, columns, message):
    path = write_lines(tmp_path / "q.jsonl", ROW | columns)
    with pytest.raises(InputError) as caught:
        load_questions(path, passages={})
    assert str(caught.value).startswith(f"{path} line 1: {message}")


def of_files(train, *overrides):
    return config.load(
        None,
        ["data.source=files", f"data.train={train}", "search.url=http://localhost:1", "model.tokenizer=bpe",
         *overrides],
    )  # fmt: skip


def asked(name, n, **columns):
    return [{"id": f"{name}{i}", "question": f"{name}{i}?", "answers": ["x"], **columns} for i in range(n)]


def test_a_file_of_seven_sets_beside_another_is_eight(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", *asked("t", 2))
    sources = [f"s{i}" for i in range(7)]
    seven = write_parquet(tmp_path / "seven.parquet", *(r for s in sources for r in asked(s, 3, data_source=s)))
    other = write_lines(tmp_path / "other.jsonl", *asked("o", 3))
    data = load_data(of_files(train, f"data.eval=[{seven}, {other}]", "eval.questions=2"))
    assert [q.dataset for q in data.eval] == [name for name in (*sources, "other") for _ in range(2)]
    assert data.eval[-1].id.startswith("other/o")
    named = load_data(of_files(train, f"data.eval=[All={seven}, {other}]", "eval.questions=2"))
    assert [q.dataset for q in named.eval] == ["All", "All", "other", "other"]
    again = write_lines(tmp_path / "again.jsonl", *asked("z", 1, data_source="s3"))
    assert "an earlier source has a set 's3'" in refusal(load_data, of_files(train, f"data.eval=[{seven}, {again}]"))


def test_questions_that_are_trained_on(tmp_path):
    train = write_lines(tmp_path / "train.jsonl", *asked("t", 4))
    copy = write_lines(
        tmp_path / "copy.jsonl", *({**row, "id": f"c{row['id']}", "answers": ["y"]} for row in asked("t", 2))
    )
    mixed = write_lines(tmp_path / "mixed.jsonl", *asked("t", 1), *asked("m", 3))
    for source in (train, copy):
        message = refusal(load_data, of_files(train, f"data.eval={source}"))
        assert message.startswith(
            "data.eval: all questions are in data.train, too; give others, or leave data.eval out"
        )
    assert "all questions of copy are" in refusal(load_data, of_files(train, f"data.eval=[{mixed}, {copy}]"))
    warned = load_data(of_files(train, f"data.eval={mixed}"))
    assert warned.warnings == ("data.eval: 1 of 4 questions are in data.train, too",)
    assert load_data(of_files(train)).warnings == ()


@pytest.mark.parametrize("key", ["train", "eval", "corpus"])
def test_files_are_not_given_to_a_made_up_world(key):
    with pytest.raises(InputError, match=rf"data\.{key} is not read with data\.source=world; set data\.source=files"):
        config.load(None, [f"data.{key}=x.jsonl"])


def test_long_questions_are_left_out_with_a_count(tmp_path):
    data = load_data(of_files(write_lines(tmp_path / "train.jsonl", *asked("t", 12)), "eval.questions=3"))
    short = without_long(data, lambda question: len(question.question) < 4)  # t0? .. t9?
    assert ([q.id for q in short.train], [q.id for q in short.eval]) == ([f"t{i}" for i in range(9)], ["t9"])
    assert short.warnings == ("data.skip_long: left out 0 train, 2 eval questions too long for rollout.max_tokens",)
    assert without_long(data, lambda question: True) is data
    assert "no question is short enough" in refusal(without_long, data, lambda question: False)


scalar = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(codec=None), max_size=6),
    st.sampled_from(['["a"]', "[]", "{'a': 1}", "a<|answer_split|>b", "\ud83d", "Ann"]),
)  # fmt: skip
anything = st.recursive(
    scalar, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(
        ["title", "text", "value", "aliases", "target", "answer", "question", "role", "content", "index", "split",
         "ground_truth", "sentences", "paragraph_text", "paragraph", "context", "supporting_facts"]
    ), inner, max_size=3), max_leaves=8,
)  # fmt: skip
COLUMNS = (
    "question", "prompt", "input", "output", "answers", "answer", "possible_answers", "answer_aliases", "reward_model",
    "extra_info", "id", "_id", "hops", "steps", "question_decomposition", "supporting_facts", "data_source", "metadata",
    "paragraphs", "context", "title", "text", "contents", "wikipedia_title", "wikipedia_id",
)  # fmt: skip
rows = st.fixed_dictionaries(
    {}, optional={column: anything for column in COLUMNS} | {"question": st.just("q?") | anything}
)


@settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows, st.booleans())
def test_no_row_brings_anything_but_a_refusal(tmp_path_factory, row, complete):
    """And what is read can be encoded and holds texts only."""
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / "x.jsonl"
    path.write_text(json.dumps(({"question": "q?", "answer": "a"} if complete else {}) | row) + "\n")
    for load in (
        load_questions, lambda path: load_questions(path, passages={}), load_corpus
    ):  # fmt: skip
        try:
            (found,) = load(path)
        except InputError as error:
            assert str(error).startswith(f"{path} line 1: ") and "\n" not in str(error)
            str(error).encode()
        else:
            texts = (found.id, found.question, *found.answers, found.dataset) if isinstance(found, Question) else (
                found.id, found.title, found.text
            )  # fmt: skip
            assert all(type(text) is str and text.encode() is not None for text in texts)


@settings(max_examples=100, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=60) | st.text("[]{}\",:0123456789eE.nulltruefalsN\\u d83", max_size=60).map(str.encode),
       st.sampled_from(["x.jsonl", "x.json", "x.jsonl.gz", "x.parquet"]))  # fmt: skip
def test_no_bytes_bring_anything_but_a_refusal(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("fuzz", numbered=True) / name
    path.write_bytes(content)
    assert refusal(load_questions, path).startswith(str(path))
