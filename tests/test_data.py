import json
import re
from collections import Counter
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast import config
from igpo_fast.data.load import load_data, question_order
from igpo_fast.data.passages import load_corpus, passage_of
from igpo_fast.data.questions import load_questions
from igpo_fast.errors import InputError
from igpo_fast.types import Passage, Question

DATA = Path(__file__).parents[2] / "shared" / "data"


def write_lines(path: Path, *rows) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def write_parquet(path: Path, *rows) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def refusal(load, *args) -> str:
    with pytest.raises(InputError) as caught:
        load(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


STEPS = [{"passage_id": "p1", "question": "x", "answer": "y"}]
OWN = {"id": "a", "question": " Who? ", "answers": ["Ann", " ", "Ann", "A. B."], "hops": 2, "steps": STEPS}


def test_own_schema(tmp_path):
    (question,) = load_questions(write_lines(tmp_path / "q.jsonl", OWN))
    assert question == Question("a", "Who?", ("Ann", "A. B."), 2, tuple(STEPS))
    assert load_questions(write_parquet(tmp_path / "q.parquet", OWN)) == (question,)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ({"answers": "one"}, ("one",)),
        ({"answer": "one"}, ("one",)),
        ({"answer": 35}, ("35",)),
        ({"golden_answers": ["one", "two"]}, ("one", "two")),
        ({"solution": "one"}, ("one",)),
        ({"answers": None, "answer": "one"}, ("one",)),
        ({"reward_model": {"ground_truth": "one<|answer_split|>two", "style": "rule"}}, ("one", "two")),
        ({"reward_model": {"ground_truth": {"target": ["one", "two"]}, "style": "rule"}}, ("one", "two")),
        ({"reward_model": {"ground_truth": {"target": "one"}}}, ("one",)),
    ],
)
def test_answers_in_every_form(tmp_path, row, answers):
    row = {"question": "q?", **row}
    assert load_questions(write_lines(tmp_path / "q.jsonl", row))[0].answers == answers
    assert load_questions(write_parquet(tmp_path / "q.parquet", row))[0].answers == answers


@pytest.mark.parametrize(
    "prompt",
    [
        "q?",
        [{"role": "user", "content": "q?"}],
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "q?"},
        ],
    ],
)
def test_prompts_of_verl_and_trl(tmp_path, prompt):
    row = {
        "data_source": "nq",
        "prompt": prompt,
        "reward_model": {"ground_truth": "x"},
        "extra_info": {"index": 3},
    }
    for path in (write_lines(tmp_path / "q.jsonl", row), write_parquet(tmp_path / "q.parquet", row)):
        (question,) = load_questions(path)
        assert question == Question("nq/3", "q?", ("x",), dataset="nq")


def test_ids_default_to_the_line(tmp_path):
    path = write_lines(tmp_path / "q.jsonl", {"question": "q?", "answer": "x"}, "", {"question": "r?", "answer": "y"})
    assert [q.id for q in load_questions(path)] == ["q-1", "q-3"]


INSTRUCTIONS = (
    "Answer the question. Search by <search> query </search> as often as you want, and answer inside <answer> and "
    "</answer>, as in <answer> Beijing </answer>. Question: "
)
SEARCH_R1 = {
    "data_source": "nq",
    "prompt": [{"role": "user", "content": f"{INSTRUCTIONS}who wrote it?\n"}],
    "ability": "fact-reasoning",
    "reward_model": {"ground_truth": {"target": ["Ann", "A. B."]}, "style": "rule"},
    "extra_info": {"index": 0, "split": "test"},
}


@pytest.mark.parametrize(
    ("columns", "id", "hops"),
    [
        ({}, "nq/test-0", None),
        ({"id": "test_0", "question": "who wrote it?", "golden_answers": ["Ann", "A. B."]}, "nq/test_0", None),
        ({"prompt": "?", "extra_info": {"question": "who wrote it?", "index": 0}}, "nq/0", None),
        ({"id": 7, "metadata": {"supporting_facts": {"title": ["A", "B", "A"], "sent_id": [0, 1, 2]}}}, "nq/7", 2),
    ],
    ids=["prompt only", "FlashRAG's columns kept", "verl's extra_info", "metadata"],
)
def test_search_r1_parquet(tmp_path, columns, id, hops):
    """Its prompts begin with instructions, which are the dialect's; its ids repeat from data set to data set."""
    (question,) = load_questions(write_parquet(tmp_path / "q.parquet", SEARCH_R1 | columns))
    assert question == Question(id, "who wrote it?", ("Ann", "A. B."), hops, dataset="nq")


def test_other_prompts_keep_their_words(tmp_path):
    text = "Answer in <answer>.\nQuestion: who?"
    (question,) = load_questions(write_lines(tmp_path / "q.jsonl", SEARCH_R1 | {"prompt": text}))
    assert question.question == text


HUB = {
    "google-research-datasets/nq_open:validation": (
        {"question": "who?", "answer": ["Ann", "A. B."]},
        Question("nq_open:validation-1", "who?", ("Ann", "A. B.")),
    ),
    "mandarjoshi/trivia_qa:unfiltered.nocontext:validation": (
        {
            "question": "who?", "question_id": "tc_2", "question_source": "x", "entity_pages": {"title": []},
            "answer": {"aliases": ["A. B.", "Ann"], "normalized_aliases": ["ann"], "value": "Ann", "type": "Entity"},
        },
        Question("tc_2", "who?", ("Ann", "A. B.")),
    ),
    "hotpotqa/hotpot_qa:distractor:validation": (
        {
            "id": "5a8b", "question": "who?", "answer": "Ann", "type": "bridge", "level": "hard",
            "supporting_facts": {"title": ["A", "B", "B"], "sent_id": [0, 1, 2]},
            "context": {"title": ["A"], "sentences": [["x"]]},
        },
        Question("5a8b", "who?", ("Ann",), 2),
    ),
    "framolfese/2WikiMultihopQA:validation": (
        {"id": "61a4", "question": "who?", "answer": "Ann", "evidences": [["A", "b", "C"]],
         "supporting_facts": {"title": ["A", "B", "C", "D"], "sent_id": [0, 0, 0, 0]}},
        Question("61a4", "who?", ("Ann",), 4),
    ),
    "xanhho/2WikiMultihopQA:dev": (
        {"_id": "61a4", "question": "who?", "answer": "Ann", "supporting_facts": "[['A', 0], ['B', 1]]"},
        Question("61a4", "who?", ("Ann",)),
    ),
    "dgslibisey/MuSiQue:validation": (
        {
            "id": "2hop__1_2", "question": "who?", "answer": "Ann", "answer_aliases": ["A. B."], "answerable": True,
            "paragraphs": [{"idx": 0, "title": "A", "paragraph_text": "x", "is_supporting": True}],
            "question_decomposition": [
                {"id": 1, "question": "film >> director", "answer": "Bo", "paragraph_support_idx": 0},
                {"id": 2, "question": "#1 >> child", "answer": "Ann", "paragraph_support_idx": 3},
            ],
        },
        Question(
            "2hop__1_2", "who?", ("Ann", "A. B."), 2,
            (
                {"id": 1, "question": "film >> director", "answer": "Bo", "paragraph_support_idx": 0},
                {"id": 2, "question": "#1 >> child", "answer": "Ann", "paragraph_support_idx": 3},
            ),
        ),
    ),
    "chiayewken/bamboogle:test": (
        {"Question": "who?", "Answer": "Ann"},
        Question("bamboogle:test-1", "who?", ("Ann",)),
    ),
    "akariasai/PopQA:test": (
        {
            "id": 4222, "subj": "It", "prop": "author", "obj": "Ann", "question": "who?",
            "possible_answers": '["Ann", "A. B.", "Ann"]', "s_aliases": "[]", "o_aliases": '["A. B."]', "o_pop": 3,
        },
        Question("4222", "who?", ("Ann", "A. B.")),
    ),
    "RUC-NLPIR/FlashRAG_datasets:musique:dev": (
        {"id": "dev_0", "question": "who?", "golden_answers": ["Ann"], "metadata": {"type": "x"}},
        Question("dev_0", "who?", ("Ann",)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", HUB)
def test_columns_of_the_hubs_data_sets(source, monkeypatch):
    """Rows made up in each set's columns; loading itself is replaced, here is no network."""
    import datasets

    row, expected = HUB[source]
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, split: asked.append((*name, split)) or [row])
    assert load_questions(source) == (expected,)
    assert asked == [tuple(source.split(":"))]


def test_the_original_files_of_hotpotqa_and_2wiki(tmp_path):
    row = {"_id": "x", "question": "who?", "answer": "Ann", "supporting_facts": [["A", 0], ["B", 2], ["B", 3]]}
    assert load_questions(write_lines(tmp_path / "q.jsonl", row)) == (Question("x", "who?", ("Ann",), 2),)


def test_a_folder_as_datasets_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", {"question": "q?", "answer": ["x", "y"]}, {"question": "r?", "answer": ["z"]})
    questions = load_questions(f"{folder}:train")
    assert [(q.id, q.answers) for q in questions] == [("set:train-1", ("x", "y")), ("set:train-2", ("z",))]
    assert refusal(load_questions, f"{folder}:nope").startswith(f"{folder}:nope: cannot load it (")
    assert "cannot load it" in refusal(load_questions, f"{tmp_path / 'absent'}:train")


GOOD = {"id": "b", "question": "q?", "answers": ["x"]}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"id": ', "line 2: not JSON"),
        ("[1]", "line 2: a list, not a JSON object"),
        ({"id": "a", "answers": ["x"]}, 'line 2: no question; fill "question" or "prompt"'),
        ({"id": "a", "question": "  ", "answers": ["x"]}, "line 2: no question"),
        ({"id": "a", "question": 5, "answers": ["x"]}, "line 2: no question"),
        ({"id": "a", "prompt": ["hi"], "answers": ["x"]}, "line 2: no question"),
        ({"id": "a", "question": "q?"}, "line 2: question without answers"),
        ({"id": "a", "question": "q?", "answers": []}, "line 2: question without answers"),
        ({"id": "a", "question": "q?", "answers": [" ", "\n", None]}, "line 2: question without answers"),
        ({"id": "a", "question": "q?", "reward_model": "x"}, "line 2: question without answers"),
        ({"id": "b", "question": "r?", "answers": ["x"]}, "line 2: id 'b' occurs twice"),
        ({"question": "q?", "possible_answers": "[Ann]"}, "line 2: possible_answers is not a JSON list; correct it"),
        (
            {"id": "a", "question": "q?", "answers": ["x"], "question_decomposition": ["a"]},
            "line 2: steps is not a list",
        ),
        (
            {"id": "a", "question": "q?", "answers": ["x"], "hops": "2"},
            "line 2: hops '2' is not a whole number",
        ),
        (
            {"id": "a", "question": "q?", "answers": ["x"], "steps": "p1"},
            "line 2: steps is not a list of objects",
        ),
    ],
)
def test_bad_questions_name_file_and_line(tmp_path, bad, message):
    path = write_lines(tmp_path / "q.jsonl", GOOD, bad)
    assert refusal(load_questions, path).startswith(f"{path} {message}")


def test_bad_parquet_rows_are_named(tmp_path):
    path = write_parquet(tmp_path / "q.parquet", GOOD, {**GOOD, "id": "c", "answers": []})
    assert refusal(load_questions, path).startswith(f"{path} row 2: question without answers")


def test_bad_question_files(tmp_path):
    for name in ("absent.jsonl", "absent.parquet"):
        assert refusal(load_questions, tmp_path / name).startswith(f"{tmp_path / name}: cannot read it (")
    for name, content in {"empty.jsonl": b"", "blank.jsonl": b"\n \n"}.items():
        (tmp_path / name).write_bytes(content)
        assert "no questions" in refusal(load_questions, tmp_path / name)
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é"}'.encode("latin-1"))
    assert "latin.jsonl line 1: not UTF-8" in refusal(load_questions, tmp_path / "latin.jsonl")
    (tmp_path / "text.parquet").write_text("no")
    assert "not parquet" in refusal(load_questions, tmp_path / "text.parquet")
    write_parquet(tmp_path / "empty.parquet")
    assert "no questions" in refusal(load_questions, tmp_path / "empty.parquet")
    assert "not a .jsonl, .json or .parquet file" in refusal(load_questions, "questions.csv")


def test_corpus_in_both_forms(tmp_path):
    path = write_lines(
        tmp_path / "c.jsonl",
        {"id": "1", "title": "T", "text": "One.\u2028Two."},
        {"id": 2, "text": "No title"},
        {"id": "3", "contents": '"Quoted"\nLine one\nline two'},
        {"id": "4", "contents": "only one line"},
    )
    assert load_corpus(path) == (
        Passage("1", "T", "One.\u2028Two."),
        Passage("2", "", "No title"),
        Passage("3", "Quoted", "Line one\nline two"),
        Passage("4", "", "only one line"),
    )


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "line 2: not JSON"),
        ({"id": "2", "title": "T"}, "line 2: passage without text"),
        ({"id": "2", "text": " "}, "line 2: passage without text"),
        ({"id": "2", "contents": "\n"}, "line 2: passage without text"),
        ({"text": "x"}, 'line 2: passage without "id"'),
        ({"id": "1", "text": "x"}, "line 2: id '1' occurs twice"),
    ],
)
def test_bad_passages_name_file_and_line(tmp_path, bad, message):
    path = write_lines(tmp_path / "c.jsonl", {"id": "1", "text": "x"}, bad)
    assert refusal(load_corpus, path).startswith(f"{path} {message}")


def test_bad_corpus_files(tmp_path):
    assert "cannot read it" in refusal(load_corpus, tmp_path / "absent.jsonl")
    assert "no passages" in refusal(load_corpus, write_lines(tmp_path / "empty.jsonl"))


def test_an_id_of_zero_is_an_id():
    assert passage_of({"id": 0, "text": "x"}).id == "0"


def files(tmp_path, n, *overrides):
    path = write_lines(tmp_path / "q.jsonl", *({"id": str(i), "question": f"{i}?", "answers": ["x"]} for i in range(n)))
    corpus = write_lines(tmp_path / "c.jsonl", {"id": "1", "text": "x"})
    names = [f"data.train={path}", f"data.corpus={corpus}", "data.source=files", "model.tokenizer=bpe"]
    return config.load(None, [*names, *overrides])


def test_without_eval_the_last_questions_are_held_out(tmp_path):
    data = load_data(files(tmp_path, 10, "eval.questions=3"))
    assert [q.id for q in data.train] == list("0123456") and [q.id for q in data.eval] == list("789")
    data = load_data(files(tmp_path, 5, "eval.questions=128"))
    assert (len(data.train), len(data.eval)) == (3, 2), "at most half"
    assert data.collections == {"": (Passage("1", "", "x"),)}
    assert "one question cannot be split" in refusal(load_data, files(tmp_path, 1))


def test_eval_file_and_search_server(tmp_path):
    extra = write_lines(tmp_path / "e.jsonl", {"id": "e", "question": "q?", "answers": ["x"]})
    data = load_data(files(tmp_path, 4, f"data.eval={extra}"))
    assert (len(data.train), [q.id for q in data.eval]) == (4, ["e"])
    served = files(tmp_path, 4, "data.corpus=null", "search.url=http://localhost/retrieve")
    assert load_data(served).collections == {}


def rows_of(name, n):
    return [{"id": f"{name}{i}", "question": f"{name}{i}?", "answers": ["x"]} for i in range(n)]


def test_several_sets_are_named_and_each_is_cut(tmp_path):
    first = write_lines(tmp_path / "first.jsonl", *rows_of("a", 9))
    second = write_lines(tmp_path / "second.jsonl", *rows_of("a", 2))
    data = load_data(files(tmp_path, 4, f"data.eval=[NQ={first}, {second}]", "eval.questions=4"))
    assert [q.dataset for q in data.eval] == ["NQ"] * 4 + ["second"] * 2
    assert [q.id for q in data.eval[4:]] == ["second/a0", "second/a1"]
    part = [q.id for q in data.eval[:4]]
    assert len(set(part)) == 4 and set(part) <= {f"NQ/a{i}" for i in range(9)}
    assert part != [f"NQ/a{i}" for i in range(4)]  # many files are sorted by kind
    more = load_data(files(tmp_path, 4, f"data.eval=NQ={first}", "eval.questions=6")).eval
    assert [q.id for q in more[:4]] == part and len(more) == 6
    (alone,) = load_data(files(tmp_path, 4, f"data.eval={second}", "eval.questions=1")).eval
    assert (alone.dataset, alone.id[0]) == ("", "a")


def test_a_file_of_several_data_sources_is_several_sets(tmp_path):
    rows = [SEARCH_R1 | {"data_source": source, "id": f"test_{i}"} for source in ("nq", "popqa") for i in range(3)]
    path = write_parquet(tmp_path / "test.parquet", *rows)
    data = load_data(files(tmp_path, 4, f"data.eval={path}", "eval.questions=2"))
    assert [q.dataset for q in data.eval] == ["nq", "nq", "popqa", "popqa"]


def test_sets_that_cannot_be_told_apart(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "dev.jsonl", *rows_of("x", 1))
    same = files(tmp_path, 4, f"data.eval=[{tmp_path}/a/dev.jsonl, {tmp_path}/b/dev.jsonl]")
    assert re.fullmatch(
        r"data\.eval: an earlier set has the question 'dev/x0' of '.*/b/dev\.jsonl' too; .* NAME=SOURCE",
        refusal(load_data, same),
    )
    named = files(tmp_path, 4, f"data.eval=[A={tmp_path}/a/dev.jsonl, B={tmp_path}/b/dev.jsonl]")
    assert [q.id for q in load_data(named).eval] == ["A/x0", "B/x0"]


def test_world_data():
    data = load_data(config.load(None, ["eval.questions=50", "world.eval_worlds=4"]))
    assert len(data.eval) == 50
    assert data == load_data(config.load(None, ["eval.questions=50", "world.eval_worlds=4"]))
    assert {q.hops for q in data.eval} == {q.hops for q in data.train} == {3, 4}
    assert set(data.collections) == {q.corpus for q in (*data.train, *data.eval)}
    passages = {p.id for passages in data.collections.values() for p in passages}
    assert passages.issuperset(step["passage_id"] for q in (*data.train, *data.eval) for step in q.steps)
    # Any first part covers the worlds: 13 questions each, 24 of them drawn.
    assert min(Counter(q.corpus for q in data.eval[:24]).values()) >= 2
    assert len({q.corpus for q in data.eval[:24]}) == 4


def test_worlds_too_small_for_evaluation():
    small = config.load(None, ["world.persons=1", "world.companies=1", "world.cities=1", "world.countries=1"])
    assert refusal(load_data, small).startswith("eval.questions: 128 wanted, the worlds have ")


@given(st.integers(1, 20), st.integers(1, 30), st.integers(0, 12), st.integers(-3, 3))
def test_question_order_walks_whole_epochs(n, per_step, step, seed):
    if n < per_step:
        with pytest.raises(InputError, match=r"train\.questions"):
            question_order(n, per_step, step, seed)
        return
    per_epoch = n // per_step
    first = step // per_epoch * per_epoch
    epoch = [i for s in range(first, first + per_epoch) for i in question_order(n, per_step, s, seed)]
    assert len(set(epoch)) == len(epoch) == per_epoch * per_step
    assert set(epoch) <= set(range(n))


def test_question_order_differs_by_epoch_and_seed():
    first, second = question_order(50, 50, 0, 1), question_order(50, 50, 1, 1)
    assert first != second and first != question_order(50, 50, 0, 2)
    assert first == question_order(50, 50, 0, 1)
    assert question_order(50, 25, 1, 1) == first[25:]


@pytest.mark.skipif(not DATA.exists(), reason="needs the real data")
@pytest.mark.parametrize(
    ("name", "questions", "passages"),
    [("musique", 100, 1890), ("hotpotqa", 100, 994), ("nq_open", 2655, 2600)],
    ids=lambda v: str(v),
)
def test_real_data(name, questions, passages):
    corpus = {p.id for p in load_corpus(DATA / name / "corpus.jsonl")}
    asked = load_questions(DATA / name / "questions.jsonl")
    assert (len(asked), len(corpus)) == (questions, passages)
    assert all(q.answers and q.hops and q.steps for q in asked)
    assert corpus.issuperset(step["passage_id"] for q in asked for step in q.steps)
