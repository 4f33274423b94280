import json
import random
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from igpo_fast import config
from igpo_fast.data.load import Data, load_data
from igpo_fast.data.tokenizer import check_known, load_tokenizer
from igpo_fast.data.world import TAGS, make_worlds, vocabulary
from igpo_fast.errors import InputError
from igpo_fast.types import Passage, Question
from tests.families import tokenizer_of

MUSIQUE = Path(__file__).parents[2] / "shared" / "data" / "musique"

CORPUS = Data(
    train=(Question("q", "Who lives in Łódź?", ("the baker",)),),
    eval=(),
    collections={"": [Passage("p", "Łódź", "The baker lives in Łódź, near the other baker.")]},
)
BPE = config.load(None, ["model.tokenizer=bpe", "model.vocab_size=300"])
EMPTY = Data((), (), {})

world = load_tokenizer(config.load(), EMPTY)
bpe = load_tokenizer(BPE, CORPUS)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)


@given(st.lists(st.sampled_from(vocabulary()), max_size=30).map(" ".join))
def test_world_round_trip(text):
    encoded = encode(world, text)
    assert world.decode(encoded.input_ids) == text
    assert world.decode(encoded.input_ids, skip_special_tokens=True) == text
    assert [text[a:b] for a, b in encoded.offset_mapping] == text.split()
    assert world.unk_token_id not in encoded.input_ids


def test_world_knows_its_words_and_ends():
    assert len(world) == len(vocabulary()) + 3
    assert len({world.pad_token_id, world.eos_token_id, world.unk_token_id}) == 3
    assert encode(world, "Hello").input_ids == [world.unk_token_id]


def test_world_line_breaks_are_spaces():
    assert encode(world, "<search>\n?\n</search>").input_ids == encode(world, "<search> ? </search>").input_ids


def test_world_texts_have_no_unknown_word():
    w = make_worlds(config.World(eval_worlds=1), "eval")[0]
    text = " ".join([*(f"{p.title}\n{p.text}" for p in w.passages), *(q.question for q in w.questions)])
    assert world.unk_token_id not in encode(world, text).input_ids


@given(st.text(st.characters(codec="utf-8"), max_size=40))
@example("The baker  lives in Łódź \n")
def test_bpe_round_trip(text):
    encoded = encode(bpe, text)
    assert bpe.decode(encoded.input_ids) == text or any(s in text for s in ("<pad>", "<eos>"))
    covered = [i for a, b in encoded.offset_mapping for i in range(a, b)]
    assert set(covered) == set(range(len(text))), "offsets must leave no character out, spaces included"


@pytest.mark.parametrize("tag", TAGS)
def test_bpe_tags_are_ordinary_text(tag):
    ids = encode(bpe, tag).input_ids
    assert len(ids) > 1
    assert bpe.decode(ids, skip_special_tokens=True) == tag


def test_bpe_has_learnt_the_corpus_and_the_questions():
    assert 258 < len(bpe) <= 300
    assert len(encode(bpe, " baker").input_ids) == 1
    assert len(encode(bpe, " in Łódź").input_ids) < len(" in Łódź".encode())
    assert bpe.pad_token_id != bpe.eos_token_id


def test_bpe_is_the_same_every_time():
    assert load_tokenizer(BPE, CORPUS).get_vocab() == bpe.get_vocab()
    assert load_tokenizer(BPE, CORPUS).backend_tokenizer.to_str() == bpe.backend_tokenizer.to_str()


def test_bpe_too_small_for_all_bytes():
    small = config.load(None, ["model.tokenizer=bpe", "model.vocab_size=100"])
    with pytest.raises(InputError, match=r"model\.vocab_size=100: a bpe tokenizer needs 258"):
        load_tokenizer(small, CORPUS)


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer"])
def test_a_saved_tokenizer_is_loaded(tmp_path, key):
    bpe.save_pretrained(tmp_path)
    loaded = load_tokenizer(config.load(None, [f"{key}={tmp_path}"]), EMPTY)
    text = "The  baker\n<search>Łódź</search>"
    assert encode(loaded, text).input_ids == encode(bpe, text).input_ids
    assert encode(loaded, text).offset_mapping == encode(bpe, text).offset_mapping
    assert (loaded.eos_token_id, loaded.pad_token_id) == (bpe.eos_token_id, bpe.pad_token_id)


@pytest.mark.parametrize("key", ["model.path", "model.tokenizer"])
@pytest.mark.parametrize("content", [None, "not json"], ids=["missing", "corrupt"])
def test_no_tokenizer_is_one_line(tmp_path, monkeypatch, key, content):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "model"
    if content:
        folder.mkdir()
        (folder / "tokenizer.json").write_text(content)
        (folder / "tokenizer_config.json").write_text(content)
    expected = "no tokenizer can be loaded" if content else "no such folder; give a Hugging Face directory or name"
    with pytest.raises(InputError, match=f"{key}={folder}: {expected}") as caught:
        load_tokenizer(config.load(None, [f"{key}={folder}"]), EMPTY)
    assert "\n" not in str(caught.value)


def folder_of(tokenizer, folder, model_type, tokenizer_class, **more):
    """A model folder whose configuration names a tokenizer class other than the tokenizer's."""
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    saved = json.loads((folder / "tokenizer_config.json").read_text()) | more | {"tokenizer_class": tokenizer_class}
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in saved.items() if v is not None}))
    return config.load(None, [f"model.path={folder}"])


@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [("llama", "LlamaTokenizer"), ("llama", "LlamaTokenizerFast"), ("llama", None), ("qwen2", "Qwen2Tokenizer"),
     ("qwen2", None), ("gemma2", "GemmaTokenizer"), ("bert", "BertTokenizer"), ("gpt2", "GPT2Tokenizer")],
)  # fmt: skip
@pytest.mark.parametrize("saved", [bpe, tokenizer_of("llama3.1")], ids=["bpe", "llama3.1"])
def test_ids_are_those_of_tokenizer_json(tmp_path, model_type, tokenizer_class, saved):
    text = "Who wrote Faust? Łódź, cafe\u0301 東京\n\n  two  spaces"
    loaded = load_tokenizer(folder_of(saved, tmp_path, model_type, tokenizer_class), EMPTY)
    ids = encode(loaded, text).input_ids
    assert ids == saved.backend_tokenizer.encode(text, add_special_tokens=False).ids
    assert loaded.decode(ids) == text
    assert loaded.eos_token == saved.eos_token


def test_damaged_tokenizers_are_one_line(tmp_path):
    """Any value of any key in place of the right one: tokenizers and transformers raise nearly everything."""
    rng = random.Random(0)
    for number in range(60):
        folder = tmp_path / str(number)
        settings = folder_of(tokenizer_of("qwen2.5"), folder, "qwen2", "Qwen2Tokenizer")
        file = folder / rng.choice(["tokenizer.json", "tokenizer_config.json"])
        content = json.loads(file.read_text())
        part = content.get("model", content) if rng.random() < 0.5 else content
        part[rng.choice(list(part))] = rng.choice([None, 1, -1, "x", [], {}, [1], {"type": "BPE"}, True, [["a"]]])
        file.write_text(json.dumps(content))
        try:
            encode(load_tokenizer(settings, EMPTY), "Who wrote Faust?")
        except InputError as error:
            assert "\n" not in str(error)


def test_code_of_a_tokenizer_folder_is_never_run(tmp_path):
    auto_map = {"AutoTokenizer": ["evil.Tokenizer", None]}
    settings = folder_of(bpe, tmp_path, "evil", "EvilTokenizer", auto_map=auto_map)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="auto_map, which is never run"):
        load_tokenizer(settings, EMPTY)
    assert not (tmp_path / "ran").exists()


def test_unknown_words_are_refused():
    check_known(bpe, ["Goethe wrote it"], "data.train")  # bytes know every word
    check_known(world, [], "data.train")
    check_known(world, vocabulary(), "data.train")
    check_known(world, ["<unk>"], "data.train")  # as written
    with pytest.raises(InputError, match=r"^data.train: the tokenizer does not know 'Goethe' and would .* <unk>;"):
        check_known(world, ["<search> </search>", "<answer> Goethe </answer>"], "data.train")


@pytest.mark.skipif(not MUSIQUE.exists(), reason="needs the real data")
def test_bpe_of_a_real_corpus_compresses_it():
    settings = config.load(
        None,
        [
            "model.tokenizer=bpe",
            "data.source=files",
            f"data.train={MUSIQUE / 'questions.jsonl'}",
            f"data.corpus={MUSIQUE / 'corpus.jsonl'}",
        ],
    )
    data = load_data(settings)
    tokenizer = load_tokenizer(settings, data)
    texts = [p.text for p in data.collections[""][:200]]
    tokens = sum(len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids)
    assert len(tokenizer) == 8192
    assert sum(map(len, texts)) / tokens > 3.5
    assert all(tokenizer.decode(encode(tokenizer, text).input_ids) == text for text in texts)


def test_a_checkpoint_brings_its_own_tokenizer(tmp_path):
    """Whatever the files hold by now that a bpe tokenizer was trained on."""
    settings = config.load(None, ["data.source=files", "data.train=a", "data.corpus=b", "model.tokenizer=bpe"])
    data = lambda text: Data((), (), {"": [Passage("1", text, text)]})  # noqa: E731
    before = load_tokenizer(settings, data("abracadabra " * 20))
    before.save_pretrained(tmp_path)
    later = data("simsalabim " * 20)
    text = "abracadabra simsalabim"
    assert load_tokenizer(settings, later)(text).input_ids != before(text).input_ids
    assert load_tokenizer(settings, later, str(tmp_path))(text).input_ids == before(text).input_ids
