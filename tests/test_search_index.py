"""Indices: built once, found again, never half built."""

import json
import multiprocessing
import os
import shutil
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase

import numpy as np
import pytest

from igpo_fast.data.passages import load_corpus
from igpo_fast.errors import InputError
from igpo_fast.rollouts.tools.search import Bm25Search
from igpo_fast.search_server.dense import Dense, SentenceEncoder
from igpo_fast.search_server.index import Bm25, open_index

DATA = Path(__file__).parents[2] / "shared" / "data"
ROWS = [
    {"id": "a", "title": "Mars", "text": "is red"},
    {"id": 2, "title": "", "text": "no title\nof Mars"},
    {"id": "c", "contents": '"Venus"\nis hot'},
    {"id": "d", "title": "Straße", "text": "heißt 道"},
]
DOCUMENTS = [
    {"id": "a", "contents": "Mars\nis red"},
    {"id": "2", "contents": "\nno title\nof Mars"},
    {"id": "c", "contents": '"Venus"\nis hot'},
    {"id": "d", "contents": "Straße\nheißt 道"},
]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    write(path, ROWS)
    return path


def write(path, rows):
    path.write_text("\n" + "\n".join(json.dumps(row) for row in rows))  # a blank line, no newline at the end


class Counting(Bm25):
    """BM25 that counts how often it is built."""

    def __init__(self, **settings):
        super().__init__()
        self.settings |= settings
        self.built = 0

    def build(self, *arguments):
        self.built += 1
        super().build(*arguments)


def test_documents_are_served_as_the_protocol_has_them(corpus, tmp_path):
    index = open_index(corpus, Bm25(), tmp_path / "index")
    assert [json.loads(index.documents[i]) for i in range(len(index.documents))] == DOCUMENTS
    # Read back by the client's rule they are the passages that training in process searches.
    assert tuple(index.documents.passage(i) for i in range(len(index.documents))) == load_corpus(corpus)


@pytest.mark.skipif(not DATA.exists(), reason="needs the real data")
def test_ranks_as_search_in_process_does(tmp_path):
    corpus = DATA / "musique" / "corpus.jsonl"
    index, passages = open_index(corpus, Bm25(), tmp_path), load_corpus(corpus)
    search, questions = Bm25Search({"": passages}, 5), DATA / "musique" / "questions.jsonl"
    queries = [json.loads(line)["question"] for line in questions.read_text().splitlines()]
    for query, hits in zip(queries, index.search(queries, 5), strict=True):
        assert tuple(passages[i] for i, _ in hits) == search._search(query, "").passages
    assert index.search(["", "?!", "qqqqqq"], 5) == [[], [], []]
    assert len(index.search(["the"], 10**9)[0]) <= len(passages)


def test_built_once_and_found_by_content_and_settings(corpus, tmp_path):
    first, again, moved, other = Counting(), Counting(), Counting(), Counting(words="stemmed")
    folder = open_index(corpus, first, tmp_path / "index").folder
    manifest = (folder / "manifest.json").read_bytes()
    assert open_index(corpus, again, tmp_path / "index").folder == folder
    assert (folder / "manifest.json").read_bytes() == manifest
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    assert open_index(copy, moved, tmp_path / "index").folder == folder
    assert open_index(corpus, other, tmp_path / "index").folder != folder
    assert [r.built for r in (first, again, moved, other)] == [1, 0, 0, 1]


def test_who_comes_while_it_is_built_waits_for_it(corpus, tmp_path):
    building, go_on = threading.Event(), threading.Event()

    class Slow(Counting):
        def build(self, *arguments):
            building.set()
            assert go_on.wait(10)
            super().build(*arguments)

    second = Counting()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(open_index, corpus, Slow(), tmp_path / "index")
        assert building.wait(10)
        later = pool.submit(open_index, corpus, second, tmp_path / "index")
        with pytest.raises(TimeoutError):
            later.result(timeout=0.2)
        go_on.set()
        assert later.result().folder == first.result().folder
    assert second.built == 0


def test_another_content_is_another_index(corpus, tmp_path):
    before = open_index(corpus, Bm25(), tmp_path / "index")
    times = corpus.stat()
    write(corpus, [ROWS[0] | {"text": "is odd"}, *ROWS[1:]])  # of the same size
    os.utime(corpus, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    after = open_index(corpus, Bm25(), tmp_path / "index")
    assert after.folder != before.folder
    assert json.loads(after.documents[0])["contents"] == "Mars\nis odd"
    assert json.loads(before.documents[0])["contents"] == "Mars\nis red", "one that is being served stays"


class Dies(Bm25):
    def build(self, documents, folder, bar):
        (folder / "bm25").mkdir()
        (folder / "bm25" / "data.csc.index.npy").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_build_that_was_killed_is_not_used(corpus, tmp_path):
    child = multiprocessing.get_context("forkserver").Process(target=open_index, args=(corpus, Dies(), tmp_path / "i"))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "i").iterdir() if path.is_dir()] == [".bm25.tmp"]
    index = open_index(corpus, Bm25(), tmp_path / "i")
    assert index.search(["venus"], 3) == [[(2, pytest.approx(0.8, abs=0.3))]]
    assert [path.name for path in (tmp_path / "i").iterdir() if path.is_dir()] == [index.folder.name]


def test_a_failed_build_leaves_nothing(corpus, tmp_path):
    class Full(Bm25):
        def build(self, documents, folder, bar):
            raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"index: cannot write the index \(No space left on device\); give another"):
        open_index(corpus, Full(), tmp_path / "index")
    assert [path.name for path in (tmp_path / "index").iterdir()] == [".lock"]


def test_a_corpus_that_changes_meanwhile_is_refused(corpus, tmp_path):
    @contextmanager
    def bar(name):
        yield lambda done, total: corpus.open("a").write("\n") if name == "corpus" and done < total else None

    with pytest.raises(InputError, match=r"corpus\.jsonl: changed while it was read"):
        open_index(corpus, Bm25(), tmp_path / "index", bar)
    assert [path.name for path in (tmp_path / "index").iterdir()] == [".lock"]


def test_progress_reaches_its_end(corpus, tmp_path):
    seen = {}

    @contextmanager
    def bar(name):
        yield lambda done, total: seen.setdefault(name, []).append(done / total)

    open_index(corpus, Bm25(), tmp_path / "index", bar)
    assert list(seen) == ["corpus", "words"]
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in seen.values())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"id": "x"', "corpus.jsonl line 4: not JSON"),
        ("[1]", "corpus.jsonl line 4: a list, not a JSON object"),
        ('{"text": "t"}', 'corpus.jsonl line 4: passage without "id"'),
        ('{"id": "x"}', "corpus.jsonl line 4: passage without text"),
        ('{"id": "a", "text": "t"}', "corpus.jsonl line 4: id 'a' occurs twice; make ids unique"),
        ("\udcff", "corpus.jsonl line 4: not UTF-8 text; give JSON lines"),
        ('{"id": "x", "text": ["t"]}', "corpus.jsonl line 4: text: a list, not a text or a number; correct it"),
        (r'{"id": "x", "text": "\ud83d"}', "corpus.jsonl line 4: a text with half a character (a lone surrogate)"),
        ("[" * 100_000, "corpus.jsonl line 4: not JSON (brackets nested too deeply)"),
        ('{"id": ' + "9" * 5_000, "corpus.jsonl line 4: not JSON (a number of too many digits)"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, expected):
    lines = ["", *map(json.dumps, ROWS[:2]), line, json.dumps(ROWS[2])]
    (tmp_path / "corpus.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    with pytest.raises(InputError) as caught:
        open_index(tmp_path / "corpus.jsonl", Bm25(), tmp_path / "index")
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(expected) and "\n" not in str(caught.value)
    assert [path.name for path in (tmp_path / "index").iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "corpus.jsonl: cannot read it (No such file or directory); give an existing file"),
        (Path.mkdir, "corpus.jsonl: cannot read it (Is a directory); give an existing file"),
        (Path.touch, "corpus.jsonl: no passages; give at least one line"),
    ],
    ids=["missing", "folder", "empty"],
)
def test_no_corpus(tmp_path, make, expected):
    make(tmp_path / "corpus.jsonl")
    with pytest.raises(InputError) as caught:
        open_index(tmp_path / "corpus.jsonl", Bm25(), tmp_path / "index")
    assert str(caught.value).removeprefix(f"{tmp_path}/") == expected


def test_an_index_of_other_words_is_not_taken(corpus, tmp_path, monkeypatch):
    """How texts become words belongs to what an index is known by."""
    folder = open_index(corpus, Bm25(), tmp_path / "index").folder
    assert json.loads((folder / "manifest.json").read_text())["settings"]["format"] == 2
    monkeypatch.setattr("igpo_fast.search_server.index.FORMAT", 3)
    assert open_index(corpus, Bm25(), tmp_path / "index").folder != folder


def test_a_corpus_with_byte_order_mark_and_carriage_returns(tmp_path):
    rows = [{"_id": "b", "title": "T", "text": "x"}, {"id": "a", "text": "y"}]
    (tmp_path / "c.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode())
    index = open_index(tmp_path / "c.jsonl", Bm25(), tmp_path / "index")
    assert [index.documents.passage(n).id for n in range(2)] == ["b", "a"]


def test_a_damaged_index_is_named(corpus, tmp_path):
    folder = open_index(corpus, Bm25(), tmp_path / "index").folder
    with open(folder / "documents.jsonl", "ab") as file:
        file.truncate(10)
    with pytest.raises(
        InputError, match=rf"^{folder}: this .* \(documents\.jsonl is .* another size\); delete the folder"
    ):
        open_index(corpus, Bm25(), tmp_path / "index")


def flipped(content, at=0):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def halved_middle(content):
    """Another number in the middle of offsets.npy."""
    return flipped(content, len(content) - 12)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *[("manifest.json", lambda _, content=content: content) for content in (
            b"", b"{", b"[]", b"{}", b"null", b"\xff", b"[" * 100_000, b'{"settings": {}, "corpus": {}, "files": {}}',
            b'{"settings": {}, "corpus": [], "files": 3}',
        )],
        ("offsets.npy", flipped),
        ("offsets.npy", lambda content: flipped(content, 30)),
        ("offsets.npy", halved_middle),
        ("bm25/data.csc.index.npy", flipped),
        ("bm25/indptr.csc.index.npy", lambda content: bytes(len(content))),
        ("bm25/params.index.json", lambda content: b"x" * len(content)),
        ("bm25/vocab.index.json", lambda content: b" " * len(content)),
    ],
)  # fmt: skip
def test_damage_of_any_file_is_told_in_a_line(corpus, tmp_path, name, change):
    folder = open_index(corpus, Bm25(), tmp_path / "index").folder
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    with pytest.raises(InputError) as caught:
        open_index(corpus, Bm25(), tmp_path / "index")
    said = str(caught.value)
    assert said.startswith(f"{folder}: this search index is damaged (") and "\n" not in said and len(said) < 500
    assert said.endswith("; delete the folder, and it is built again")
    shutil.rmtree(folder)
    assert open_index(corpus, Bm25(), tmp_path / "index").search(["venus"], 1)[0][0][0] == 2


def test_an_index_cannot_be_kept_in_a_file(corpus):
    with pytest.raises(InputError, match=r"cannot keep an index there \(.*\); give another --index"):
        open_index(corpus, Bm25(), corpus / "index")


class Letters:
    """Encodes a text by how often it has each letter; passages and queries alike."""

    settings: dict = {"letters": 26}  # noqa: RUF012

    def queries(self, texts):
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts], dtype=np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)

    passages = queries


def test_dense_search_is_exact(tmp_path):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 12)) for _ in range(600)]  # more than two batches
    write(tmp_path / "corpus.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    index = open_index(tmp_path / "corpus.jsonl", Dense(Letters()), tmp_path / "index")
    cosine = Letters().queries(["abba", "feed"]) @ Letters().passages(texts).T
    for row, hits in zip(cosine, index.search(["abba", "feed"], 4), strict=True):
        assert [score for _, score in hits] == pytest.approx(sorted(row, reverse=True)[:4], abs=1e-6)
        assert [row[i] for i, _ in hits] == pytest.approx([score for _, score in hits], abs=1e-6)
    assert index.search([], 4) == []
    assert len(index.search(["abba"], 10_000)[0]) == 600
    assert open_index(tmp_path / "corpus.jsonl", Bm25(), tmp_path / "index").folder != index.folder


@pytest.fixture(scope="module")
def sentence_transformer(tmp_path_factory):
    """A directory with a tiny random one."""
    pytest.importorskip("faiss")
    st = pytest.importorskip("sentence_transformers")
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("st")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ascii_lowercase, *(f"##{letter}" for letter in ascii_lowercase)]
    core = Tokenizer(models.WordPiece({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    BertModel(BertConfig(vocab_size=len(names), max_position_embeddings=64, **shape)).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    st.SentenceTransformer(str(folder / "bert"), prompts={"query": "q ", "document": "d "}).save(str(folder / "model"))
    return folder / "model"


def test_dense_search_with_a_sentence_transformer(sentence_transformer, corpus, tmp_path):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(sentence_transformer))
    texts = ["Mars\nis red", "no title\nof Mars", "Venus\nis hot", "Straße\nheißt 道"]
    for prompts, expected in [((None, None), ("q ", "d ")), (("query: ", "passage: "), ("query: ", "passage: "))]:
        index = open_index(corpus, Dense(SentenceEncoder(sentence_transformer, prompts)), tmp_path / "index")
        query, *passages = model.encode([expected[0] + "mars", *(expected[1] + text for text in texts)], batch_size=1)
        norm = np.linalg.norm
        cosine = [query @ passage / norm(query) / norm(passage) for passage in passages]
        (hits,) = index.search(["mars"], 4)
        assert [score for _, score in hits] == pytest.approx(sorted(cosine, reverse=True), abs=1e-5)
        assert [cosine[i] for i, _ in hits] == pytest.approx([score for _, score in hits], abs=1e-5)
    assert len(list((tmp_path / "index").glob("*/manifest.json"))) == 2, "other prompts are another index"


def test_no_sentence_transformer(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match=r"absent: no such directory; give a sentence-transformer's"):
        SentenceEncoder(tmp_path / "absent")
    with pytest.raises(InputError, match="no sentence-transformer loads from there") as caught:
        SentenceEncoder(tmp_path)
    assert "\n" not in str(caught.value)
