"""score.py: values equal to one plain forward a prefix, and every bad line named."""

import json
import math
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from igpo_fast import config, model
from igpo_fast.data.load import Data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.errors import InputError, RunError
from igpo_fast.score import Scored, Scorer, load_scorer, read_records, score_file
from igpo_fast.types import Passage, Question
from tests.parity import naive

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = Data(
    train=(Question("q", "Who lives in Łódź?", ("the baker",)),),
    eval=(),
    collections={"": [Passage("p", "Łódź", "The baker lives in Łódź, near the other baker.")]},
)


@cache
def tokenizer(kind):
    if kind == "world":
        return load_tokenizer(config.load(), Data((), (), {}))
    made = load_tokenizer(config.load(None, ["model.tokenizer=bpe", "model.vocab_size=330"]), TEXTS)
    made.chat_template = CHATML
    return made


def sharp_model(words):
    """A random Qwen2 for a tokenizer, with weights large enough to make attention sharp."""
    lm = model.build(
        len(words), hidden_size=32, layers=2, heads=4, kv_heads=2, ffn_size=48, max_tokens=512,
        tie_embeddings=True, seed=0,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 2:
                parameter *= 6
    return lm


@pytest.fixture(scope="module", params=["world", "bpe"])
def saved(request, tmp_path_factory):
    """A sharp model and its tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp(request.param)
    words = tokenizer(request.param)
    lm = sharp_model(words)
    lm.save_pretrained(folder)
    words.save_pretrained(folder)
    return request.param, folder


def message(role, content):
    return {"role": role, "content": content}


def world_rows():
    asked, found = message("user", "buga tiza birthplace ?"), message("tool", "mavi fiti country buga .")
    search, answer = (message("assistant", f"<{tag}> buga tiza </{tag}>") for tag in ("search", "answer"))
    row = {"question": "buga tiza birthplace ?", "answers": ["mavi fiti", "tiza"], "id": 7}
    return [
        row | {"messages": [asked, search, found, search, found, message("user", "."), answer]},
        row | {"messages": [asked, search, found, answer]},  # the same answers: a shared tree
        row | {"messages": [asked, answer], "answers": ["tiza"]},  # one turn: one value, no gain
        row | {"messages": [search, message("environment", "tiza"), search]},  # the dialect's own prompt
    ]


def bpe_rows():
    rows = json.loads(json.dumps(world_rows()).replace("buga tiza", "Łódź baker"))
    rows[0]["messages"].insert(0, message("system", "Be brief."))
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def expected_values(folder, words, parts, wrapped, before, answer):
    """By plain transformers: prefixes tokenised piece by piece, the answer found by its text's length in tokens."""
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    encode = lambda text: words(text, add_special_tokens=False).input_ids  # noqa: E731
    offsets = words(wrapped, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    scored = [i for i, (a, b) in enumerate(offsets) if a < len(before + answer) and b > len(before)]
    prefix, values = [], []
    for part in parts:
        for piece in part:
            prefix += encode(piece)
        values.append(naive.answer_value(plain, prefix, encode(wrapped), scored[0], scored[-1] + 1, 1.3))
    return values


def tags_parts(row, dialect):
    """Texts of the prompt, then of each turn but the last with its responses."""
    parts, messages = [[]], row["messages"]
    if messages[0]["role"] == "assistant":
        parts = [[dialect.wording.system + dialect.wording.question.format(row["question"])]]
    for m in messages:
        if m["role"] == "assistant":
            parts.append([])
        parts[-1].append(m["content"])
    return parts[:-1]


def test_equals_plain_forwards(saved, tmp_path):
    kind, folder = saved
    rows = world_rows() if kind == "world" else bpe_rows()
    source, target = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    scorers, done = [], []

    def make_scorer():
        scorers.append(load_scorer(str(folder), temperature=1.3))
        return scorers[0]

    assert score_file(source, target, make_scorer, progress=lambda *at: done.append(at)) == len(rows)
    assert done == [(i, len(rows)) for i in range(1, len(rows) + 1)]
    dialect = scorers[0].writer.dialect
    out = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    before, after = dialect.wording.before, dialect.wording.after
    for row, scored in zip(rows, out, strict=True):
        assert {key: scored[key] for key in row} == row
        answer = row["answers"][0]
        expected = expected_values(
            folder, tokenizer(kind), tags_parts(row, dialect), before + answer + after, before, answer
        )
        np.testing.assert_allclose(scored["values"], expected, atol=1e-4)
        np.testing.assert_allclose(scored["info_gain"], np.diff(expected), atol=2e-4)
    assert [len(scored["values"]) for scored in out] == [3, 2, 1, 2]
    assert not [path for path in tmp_path.iterdir() if path not in (source, target)]


def scorer(kind, **options):
    words = tokenizer(kind)
    lm = model.build(
        len(words), hidden_size=16, layers=1, heads=2, kv_heads=2, ffn_size=16, max_tokens=512,
        tie_embeddings=True, seed=1,
    )  # fmt: skip
    return Scorer(model.use_attend(lm), words, **options)


def scored(tmp_path, rows, scorer):
    return [(v, g) for _, v, g, _ in scorer.score(read_records(write(tmp_path / "rows.jsonl", rows)))]


def test_packs_and_shared_trees_change_nothing(tmp_path):
    together = scored(tmp_path, world_rows(), scorer("world"))
    reader = scorer("world", token_budget=60)
    passes = []
    reader.policy.lm.model.embed_tokens.register_forward_hook(lambda m, args, out: passes.append(args[0].numel()))
    apart = scored(tmp_path, world_rows(), reader)
    assert len(passes) > 1 and max(passes) <= 60
    for (one, _), (other, _) in zip(together, apart, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_basis_and_answers(tmp_path):
    rows = world_rows()[:1]
    first, best, mean = (scored(tmp_path, rows, scorer("world", answers=a))[0][0] for a in ("first", "max", "mean"))
    second = scored(tmp_path, [rows[0] | {"answers": ["tiza"]}], scorer("world"))[0][0]
    np.testing.assert_allclose(best, np.maximum(first, second), atol=1e-5)
    np.testing.assert_allclose(mean, (first + second) / 2, atol=1e-5)
    record = next(read_records(write(tmp_path / "rows.jsonl", rows)))
    assert [len(scorer("world", answers=a).tokenise(record).branches) for a in ("first", "max")] == [1, 2]
    probability = scored(tmp_path, rows, scorer("world", basis="prob"))[0][0]
    np.testing.assert_allclose(probability, np.exp(first), atol=1e-5)


class TestChat:
    rows = bpe_rows()

    def test_prefixes_are_the_templates_own_renderings(self, tmp_path):
        record = next(read_records(write(tmp_path / "rows.jsonl", self.rows)))
        reader = scorer("bpe", dialect="chat")
        trajectory = reader.tokenise(record)
        words, messages = tokenizer("bpe"), self.rows[0]["messages"]
        for boundary, count in zip(trajectory.boundaries, (2, 4, 7), strict=True):
            rendered = words.apply_chat_template(messages[:count], add_generation_prompt=True, tokenize=False)
            assert words.decode(trajectory.ids[:boundary]) == rendered
        assert len(trajectory.ids) == trajectory.boundaries[-1]

    def test_an_environment_is_a_user_and_a_missing_prompt_the_dialects(self, tmp_path):
        record = list(read_records(write(tmp_path / "rows.jsonl", self.rows)))[3]
        reader = scorer("bpe", dialect="chat")
        trajectory = reader.tokenise(record)
        prompt = reader.writer.dialect.prompt(record.question)
        np.testing.assert_array_equal(trajectory.ids[: len(prompt)], prompt)
        assert "<|im_start|>user\ntiza<|im_end|>" in tokenizer("bpe").decode(trajectory.ids)

    @pytest.mark.parametrize(
        ("template", "fault"),
        [
            (CHATML.replace("messages %}", "messages if m.role != 'tool' %}"), "writes nothing .* 'tool'"),
            (CHATML + "{{ messages | length }}", "rewrites the text before turn 1"),
            (CHATML + "{% if messages | length > 5 %}{{ raise_exception('too long') }}{% endif %}", "refuses"),
        ],
    )
    def test_a_template_that_makes_it_impossible(self, tmp_path, monkeypatch, template, fault):
        reader = scorer("bpe", dialect="chat")
        monkeypatch.setattr(tokenizer("bpe"), "chat_template", template)
        with pytest.raises(InputError, match=f"line 1: the chat template {fault}"):
            scored(tmp_path, self.rows, reader)


GOOD = world_rows()[1]
BAD = {
    "not json": ("{", "not JSON"),
    "a list": ("[]", "a list, not a JSON object"),
    "half a character": (json.dumps(GOOD | {"id": "\ud800"}), "half a character"),
    "no question": (json.dumps(GOOD | {"question": " "}), "no question"),
    "no answers": (json.dumps(GOOD | {"answers": []}), "no answers"),
    "a blank answer": (json.dumps(GOOD | {"answers": ["tiza", " "]}), "no answers"),
    "answers no list": (json.dumps(GOOD | {"answers": "tiza"}), "no answers"),
    "no messages": (json.dumps(GOOD | {"messages": ["hello"]}), "is no list of messages"),
    "no text": (json.dumps(GOOD | {"messages": [message("assistant", None)]}), "message 1 has no text"),
    "no turn": (json.dumps(GOOD | {"messages": [message("user", "?")]}), "no message of the assistant"),
    "a tool first": (
        json.dumps(GOOD | {"messages": [message("tool", "?"), message("assistant", "?")]}),
        "message 1 has role 'tool'; before the first assistant message it can be system or user",
    ),
    "a late system": (
        json.dumps(GOOD | {"messages": [message("assistant", "?"), message("system", "?")]}),
        "message 2 has role 'system'; after",
    ),
    "an empty prompt": (
        json.dumps(GOOD | {"messages": [message("user", ""), message("assistant", "?")]}),
        "the prompt has no tokens",
    ),
    "an empty turn": (
        json.dumps(GOOD | {"messages": [message("assistant", ""), message("assistant", "?")]}),
        "turn 1 has no tokens",
    ),
    "too long": (
        json.dumps(GOOD | {"messages": [message("user", "tiza " * 200), message("assistant", "?")]}),
        "over --token-budget 150",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_lines_are_named_and_nothing_is_written(tmp_path, name):
    line, fault = BAD[name]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(f"{json.dumps(GOOD)}\n\n{line}\n", encoding="utf-8")
    target.write_text("before")
    with pytest.raises(InputError) as error:
        score_file(source, target, lambda: scorer("world", token_budget=150), overwrite=True)
    assert str(error.value).startswith(f"{source} line 3: ") and fault in str(error.value)
    assert "\n" not in str(error.value)
    assert target.read_text() == "before" and len(list(tmp_path.iterdir())) == 2


def test_files_that_cannot_be(tmp_path):
    never = lambda: pytest.fail("a model was loaded for nothing")  # noqa: E731
    source = write(tmp_path / "in.jsonl", [GOOD])
    cases = [
        (tmp_path / "none.jsonl", tmp_path / "out", "cannot read it"),
        (source, source, "is the input; give another --output"),
        (write(tmp_path / "empty.jsonl", []), tmp_path / "out", "no trajectories"),
        (source, tmp_path / "nowhere" / "out", r"out: cannot write there \(no such folder\); give another --output"),
    ]
    for given, target, fault in cases:
        with pytest.raises(RunError, match=fault):
            score_file(given, target, never)
    assert not (tmp_path / "out").exists()


def test_an_undefined_value_is_null_and_its_gains_zero(tmp_path):
    class Broken:
        baseline = "previous"

        def score(self, records):
            for record in records:
                yield Scored(record, np.array([math.nan, -1.0]), np.array([0.0]), None)

    source = write(tmp_path / "in.jsonl", [GOOD])
    score_file(source, tmp_path / "out.jsonl", Broken)
    assert '"values": [null, -1.0], "info_gain": [0.0]' in (tmp_path / "out.jsonl").read_text()
