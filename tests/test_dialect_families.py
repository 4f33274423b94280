"""The chat dialect with the formats of model families: templates of our own (tests/families.py), and real tokenizer
directories where the environment variable IGPO_TOKENIZERS lists some (separated by colons)."""

import asyncio
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igpo_fast import config, model
from igpo_fast.data.load import Data
from igpo_fast.data.tokenizer import load_tokenizer
from igpo_fast.engines.base import Generation, Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.errors import InputError
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.dialect.parsing import ECHO
from igpo_fast.rollouts.rollout import Agent, Limits, run_rollout
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import ANSWER, INVALID, SEARCH, Action, Passage, Question, ToolResult, answer_with, search_for
from tests.contracts.dialect import NOW
from tests.families import DEEPSEEK_V3, FAMILIES, LLAMA31, QWEN3, QWEN25, tokenizer_of
from tests.scripted import tools_of

BUDGETS = dict(max_passage_tokens=99, max_answer_tokens=16, max_answers=2)
FOUND = ToolResult((Passage("p1", "Faust", 'A "play" by Goethe.'), Passage("p2", "", "It is long.")))
SHOWN = 'Faust\nA "play" by Goethe.\n\nIt is long.'
QUESTION = Question("q1", "Who wrote Faust?", ("Goethe",))
REAL = [Path(entry) for entry in os.environ.get("IGPO_TOKENIZERS", "").split(":") if entry]
HERMES = ["qwen2.5", "qwen3", "qwen3-thinking"]
LLAMAS = ["llama3.1", "llama3.2"]
TAGGED = '<tool_call>\n{"name": "search", "arguments": {"query": "A"}}\n</tool_call>'
BARE = '{"name": "search", "parameters": {"query": "A"}}'
CODERS = ["qwen3-coder"]
CODED = "<tool_call>\n<function=search>\n<parameter=query>\nA\n</parameter>\n</function>\n</tool_call>"
KEYED = "<tool_call>search\n<arg_key>query</arg_key>\n<arg_value>A</arg_value>\n</tool_call>"
ANALYSIS = "<|channel|>analysis<|message|>so<|end|><|start|>assistant"
CHANNEL = '<|channel|>commentary to=functions.search <|constrain|>json<|message|>{"query": "A"}'
RECIPIENT = ' to=functions.search<|channel|>commentary json<|message|>{"query": "A"}'
DEEPSEEKS = ["deepseek-v3", "deepseek-v3.1"]
_CALL = '<｜tool▁call▁begin｜>search<｜tool▁sep｜>{"query": "A"}<｜tool▁call▁end｜>'
SEPARATED = f"<｜tool▁calls▁begin｜>{_CALL}<｜tool▁calls▁end｜>"
TWICE = f"<｜tool▁calls▁begin｜>{_CALL}{_CALL}<｜tool▁calls▁end｜>"
FENCED = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n"
    '{"query": "A"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)


def chat(family, **options):
    return make_dialect("chat", tokenizer_of(family), (SEARCH_TOOL,), **(BUDGETS | options))


def broken(template, family="qwen2.5", tokenizer=None):
    """The dialect with another template."""
    tokenizer = tokenizer or tokenizer_of(family)
    copy = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=template, eos_token=tokenizer.eos_token,
        bos_token=tokenizer.bos_token,
    )  # fmt: skip
    return make_dialect("chat", copy, (SEARCH_TOOL,), **BUDGETS)


def refusal(check) -> str:
    with pytest.raises(InputError) as caught:
        check()
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Says:
    """Says the given turns, tokenised by themselves, and remembers what it was sent."""

    def __init__(self, dialect, *turns, cut=()):
        self.turns = [dialect.encode(turn) for turn in turns]
        self.cut, self.sent = cut, []

    async def generate(self, request):
        turn = len(self.sent)
        self.sent.append(request.ids)
        ids = self.turns[turn]
        return Generation(ids, np.zeros(len(ids), np.float32), finished=turn not in self.cut)

    def release(self, key):
        pass


def rollout_of(dialect, *turns, cut=()):
    """The rollout that says ``turns``, after checking that each prompt extends the one before token for token."""

    async def tool(query, corpus=""):
        return FOUND

    engine, limits = Says(dialect, *turns, cut=cut), Limits(len(turns), 400, 6000)
    rollout = asyncio.run(run_rollout(Agent(engine, tools_of(tool), dialect, limits, Sampling(), 0, 1), QUESTION, 0, 0))
    for sent, said, following in zip(engine.sent, engine.turns, engine.sent[1:], strict=False):
        assert following[: len(sent) + len(said)].tolist() == [*sent.tolist(), *said.tolist()]
    return rollout


def conversation(dialect, *turns):
    """The template's own rendering, a JSON call made a structured one: how a trainer that renders would write it."""
    messages = [*dialect._system, {"role": "user", "content": QUESTION.question}]
    for turn in turns:
        (action, *_) = dialect.parse(turn + dialect._end) or [None]
        if action and action.tool == SEARCH:
            call = {"name": "search", "arguments": dict(action.arguments)}
            said = turn.split("</think>")[0] + "</think>" if "</think>" in turn else ""
            messages.append({"role": "assistant", "content": said, "tool_calls": [{"function": call}]})
            messages.append({"role": "tool", "name": "search", "content": SHOWN})
        else:
            messages += [{"role": "assistant", "content": turn}, dialect._hint(ended=True)]
    return dialect.tokenizer.apply_chat_template(
        messages, tools=[SEARCH_TOOL], add_generation_prompt=True, tokenize=False, strftime_now=lambda f: "26 Jul 2024"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_accepted(family):
    """The check at the start: the increments are what the template itself writes."""
    chat(family).check()
    if family == "qwen3":
        chat(family, thinking=False).check()
        chat(family, thinking=True).check()


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", *LLAMAS])
def test_a_rollout_without_thinking_is_the_templates_own_conversation(family):
    """A call (Qwen's in <tool_call>, Llama's bare JSON), its result (Qwen's <tool_response>, Llama's JSON string in
    ipython), an invalid turn and its hint."""
    dialect = chat(family)
    call = dialect.write((search_for("Faust"),)).removesuffix(dialect._end)
    turns = [call, "I forgot."]
    rollout = rollout_of(dialect, *(turn + dialect._end for turn in turns), "<answer>Goethe</answer>" + dialect._end)
    assert [turn.action for turn in rollout.turns] == [SEARCH, INVALID, ANSWER]
    before_the_answer = dialect.decode(rollout.ids[: rollout.boundaries[-1]])
    assert before_the_answer == conversation(dialect, *turns)


def test_thoughts_stay_where_the_template_would_drop_them():
    """Qwen3 drops the thoughts of turns before the user's last message; a hint is one. Rendering again would change
    what was sampled; the rollout keeps it, token for token."""
    dialect = chat("qwen3")
    turns = [f"<think>\nfirst thought\n</think>\n\n{TAGGED}", "<think>\nsecond thought\n</think>\n\nno action"]
    rollout = rollout_of(dialect, *(turn + "<|im_end|>" for turn in turns), "<answer>Goethe</answer><|im_end|>")
    rendered, text = conversation(dialect, *turns), dialect.decode(rollout.ids)
    assert "thought\n" not in rendered  # the quirk
    assert "first thought" in text and "second thought" in text
    parts = [rollout.prompt_ids]
    for turn, said in zip(rollout.turns, turns, strict=False):
        assert turn.ids.tolist() == dialect.encode(said + "<|im_end|>").tolist()
        parts += [turn.ids, turn.response_ids]
    assert rollout.ids.tolist() == [*np.concatenate([*parts, rollout.turns[-1].ids])]


@pytest.mark.parametrize("thought", ["<think>\n\n</think>\n\n", "<think></think>", ""], ids=["empty", "bare", "none"])
def test_empty_thoughts_stay_too(thought):
    """Qwen3 writes an empty thought only before the last turn, and none before earlier ones."""
    dialect = chat("qwen3")
    turn = f"{thought}{TAGGED}<|im_end|>"
    rollout = rollout_of(dialect, turn, "<answer>Goethe</answer><|im_end|>")
    assert rollout.turns[0].action == SEARCH
    assert f"<|im_start|>assistant\n{turn}\n<|im_start|>user\n<tool_response>" in dialect.decode(rollout.ids)


def test_no_thinking_opens_every_turn_with_an_empty_thought():
    """Qwen3 with enable_thinking=false."""
    dialect = chat("qwen3", thinking=False)
    rollout = rollout_of(dialect, TAGGED + "<|im_end|>", "Hm.<|im_end|>", "<answer>Goethe</answer><|im_end|>")
    assert dialect.decode(rollout.ids).count("<|im_start|>assistant\n<think>\n\n</think>\n\n") == 3
    assert [turn.action for turn in rollout.turns] == [SEARCH, INVALID, ANSWER]
    assert "no enable_thinking; leave rollout.thinking empty" in refusal(lambda: chat("qwen2.5", thinking=False))


@pytest.mark.parametrize(
    ("family", "thinking", "before"),
    [
        ("qwen2.5", None, "<think>\nNow there's enough information to answer\n</think>\n"),
        ("qwen3", None, "<think>\nNow there's enough information to answer\n</think>\n"),
        ("qwen3", False, ""),
        ("qwen3-thinking", None, "Now there's enough information to answer\n</think>\n"),
        ("llama3.1", None, "<think>\nNow there's enough information to answer\n</think>\n"),
    ],
)
def test_forced_answers_end_the_reasoning_that_the_format_has(family, thinking, before):
    """The released code's wrapper stands inside the template: it ends a thought that is open, opens and ends one where
    the template opens none, and ends the turn with the family's token."""
    dialect = chat(family, thinking=thinking)
    (branch,) = dialect.branches(QUESTION)
    assert dialect.decode(branch.ids[: branch.start]) == before + "<answer>\n"
    assert dialect.decode(branch.ids[branch.start :]) == "Goethe"
    opened = dialect.decode(dialect.prompt(QUESTION)) + dialect.decode(branch.ids)
    assert opened.count("<think>") == opened.count("</think>")
    assert dialect._wrapper()[1] == "\n</answer>" + dialect._end


@pytest.mark.parametrize(
    ("family", "stops"),
    [
        ("qwen2.5", ["<|im_end|>", "<|endoftext|>"]),
        ("qwen3", ["<|im_end|>", "<|endoftext|>"]),
        ("llama3.1", ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"]),
        ("glm4.5", ["<|user|>", "<|observation|>", "<|endoftext|>"]),
        ("gpt-oss", ["<|return|>", "<|call|>", "<|endoftext|>"]),
        ("deepseek-v3.1", ["<｜end▁of▁sentence｜>"]),
    ],
)
def test_stops(family, stops):
    """Qwen ends turns with <|im_end|>, its base models with <|endoftext|>; Llama calls may end with <|eom_id|>. <|end|>
    of gpt-oss ends a thought, no turn."""
    dialect = chat(family)
    assert dialect.tokenizer.convert_ids_to_tokens(dialect.stop_ids) == stops
    assert dialect.stop_strings == ()


def test_a_llama_call_that_ends_with_eom_is_followed_by_its_result():
    """The template would write <|eot_id|> there; what was sampled stays, and no second end is added."""
    dialect = chat("llama3.1")
    rollout = rollout_of(dialect, f"<|python_tag|>{BARE}<|eom_id|>", "<answer>Goethe</answer><|eot_id|>")
    text = dialect.decode(rollout.ids)
    assert f"{BARE}<|eom_id|><|start_header_id|>ipython<|end_header_id|>\n\n{json.dumps(SHOWN)}<|eot_id|>" in text


@pytest.mark.parametrize(
    ("family", "call", "result", "hint"),
    [
        ("glm4.5", "<|observation|>", "\n<tool_response>\n{}\n</tool_response><|assistant|>", "<|user|>\nNo action"),
        (
            "gpt-oss",
            "<|call|>",
            "<|start|>functions.search to=assistant<|channel|>commentary<|message|>{}<|end|><|start|>assistant",
            "<|return|><|start|>user<|message|>No action",
        ),
        (
            "deepseek-v3.1",
            "<｜end▁of▁sentence｜>",
            "<｜tool▁output▁begin｜>{}<｜tool▁output▁end｜>",
            "<｜end▁of▁sentence｜><｜User｜>No action",
        ),
    ],
)
def test_what_follows_a_call_and_an_invalid_turn(family, call, result, hint):
    """Each behind its own end: a result in the family's form, a hint from the user."""
    dialect = chat(family)
    said = dialect.write((search_for("Faust"),))
    rollout = rollout_of(dialect, said, "Hm." + dialect._end, "<answer>Goethe</answer>" + dialect._end)
    text = dialect.decode(rollout.ids)
    shown = json.dumps(SHOWN) if family == "gpt-oss" else SHOWN
    assert said.endswith(call) and f"{said}{result.format(shown)}Hm." in text
    assert f"Hm.{hint}" in text
    cut = rollout_of(dialect, "Hm.", "<answer>Goethe</answer>" + dialect._end, cut=[0]).turns[0].response
    assert cut.startswith(("<|end|>" if family == "gpt-oss" else hint)[:6]) and "was cut. No action" in cut


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_hint_shows_is_text(family):
    """The call in it has no special token, which would begin a message or a call of the user's."""
    dialect = chat(family)
    special = set(dialect.tokenizer.all_special_ids) | set(dialect.stop_ids)
    ids, shown = dialect.response((), ())
    around = dialect._after_turn((), [{"role": "user", "content": "Hm."}], ended=True)
    assert sum(id in special for id in ids.tolist()) == sum(id in special for id in dialect.encode(around).tolist())
    assert ECHO + "query" in shown


def test_one_call_a_turn_where_the_template_writes_one():
    """Llama's refuses two, gpt-oss' leaves one out."""
    two = (search_for("A"), search_for("B"))
    for dialect in (chat("llama3.1"), chat("gpt-oss")):
        with pytest.raises(InputError, match="writes one call per turn"):
            dialect.write(two)
    assert chat("glm4.5").parse(chat("glm4.5").write(two)) == two


def test_a_thought_that_the_template_opens_only_after_the_user_is_refused():
    """DeepSeek-V3.1 opens none after a result, so nobody could tell whether a turn begins inside one."""
    fault = refusal(chat("deepseek-v3.1", thinking=True).check)
    assert "opens a thought before the first turn, but not after 'tool'" in fault


def test_llama_prompts_have_one_start_token_and_a_fixed_date():
    """Llama's template writes the start token that tokenising would add again; 3.2 asks for today's date, with which
    prompts would differ from day to day and a resumed run from itself."""
    for family in LLAMAS:
        dialect = chat(family)
        prompt = dialect.prompt(QUESTION)
        assert prompt.tolist().count(dialect.tokenizer.bos_token_id) == 1
        assert "Today Date: 26 Jul 2024\n" in dialect.decode(prompt)
    assert dialect.tokenizer("x").input_ids[0] == dialect.tokenizer.bos_token_id


PARSED = [
    (HERMES, TAGGED, (search_for("A"),)),
    (HERMES, f"Let me see.\n{TAGGED}\n{TAGGED.replace('A', 'B')}", (search_for("A"), search_for("B"))),
    (
        HERMES,
        '<tool_call>{"arguments": {"query": " Zoë \\"Z\\" "}, "name": "search"}</tool_call>',
        (search_for('Zoë "Z"'),),
    ),
    (HERMES, "So it is.\n<answer>\nC D\n</answer>", (answer_with("C D"),)),
    (HERMES, f"<answer>a</answer>{TAGGED}", (answer_with("a"),)),
    (HERMES, BARE, ()),  # another family's
    (HERMES, TAGGED.removesuffix("</tool_call>"), ()),
    (HERMES, TAGGED.replace("}}", "}}}"), ()),
    (HERMES, TAGGED.replace('"A"', "A"), ()),
    (HERMES, TAGGED.replace('"A"', '" "'), ()),
    (HERMES, TAGGED.replace('"A"', "3"), ()),
    (HERMES, TAGGED.replace('{"query": "A"}', '["A"]'), ()),
    (HERMES, TAGGED.replace("search", "buy"), ()),
    (HERMES, "<tool_call>search(A)</tool_call>", ()),
    (HERMES, "<tool_call>[1]</tool_call>", ()),
    (HERMES, "It is C D.", ()),
    (LLAMAS, BARE, (search_for("A"),)),
    (LLAMAS, f"<|python_tag|>{BARE}", (search_for("A"),)),
    (LLAMAS, f" \n{BARE}; {BARE.replace('A', 'B')}", (search_for("A"),)),
    (LLAMAS, '{"type": "function", "name": "search", "arguments": {"query": "A"}}', (search_for("A"),)),
    (LLAMAS, '<|python_tag|>search.call(query="who is A?")', (search_for("who is A?"),)),
    (LLAMAS, "So it is.\n<answer>C D</answer>", (answer_with("C D"),)),
    (LLAMAS, '<|python_tag|>brave_search.call(query="A")', ()),
    (LLAMAS, '<|python_tag|>search.call(query="")', ()),
    (LLAMAS, 'search.call(query="A")', ()),
    (LLAMAS, f"I call {BARE}", ()),
    (LLAMAS, BARE.removesuffix("}}"), ()),
    (LLAMAS, TAGGED, ()),  # another family's
    (CODERS, CODED, (search_for("A"),)),
    (CODERS, f"I see.\n\n{CODED}\n{CODED.replace('A', 'B')}", (search_for("A"), search_for("B"))),
    (
        CODERS,
        "<tool_call><function=search><parameter=query> A \n\n B</parameter></function></tool_call>",
        (search_for("A \n\n B"),),
    ),
    (
        CODERS,
        CODED.replace("A", "A</parameter>\nB</function> </tool_call>"),
        (search_for("A</parameter>\nB</function> </tool_call>"),),
    ),
    (CODERS, CODED.replace("A", "A\n</parameter>\n<parameter=query>\nB"), (search_for("B"),)),
    (CODERS, TAGGED, ()),  # another family's
    (CODERS, CODED.replace("search", "buy"), ()),
    (CODERS, CODED.replace("=query", "=question"), ()),
    (CODERS, CODED.replace("\nA\n", "\n \n"), ()),
    (CODERS, CODED.replace("</parameter>", ""), ()),
    (CODERS, CODED.replace("</function>", ""), ()),
    (CODERS, CODED.removesuffix("</tool_call>"), ()),
    (CODERS, CODED.replace("</function>", "</function> so"), ()),
    (["glm4.5"], KEYED, (search_for("A"),)),
    (
        ["glm4.5"],
        f"\n<think>so</think>\nI see.\n{KEYED}\n{KEYED.replace('A', 'B')}",
        (search_for("A"), search_for("B")),
    ),
    (["glm4.5"], KEYED.replace("\n", ""), (search_for("A"),)),
    (["glm4.5"], KEYED.replace("A", "A</arg_value> </tool>"), (search_for("A</arg_value> </tool>"),)),
    (["glm4.5"], TAGGED, ()),
    (["glm4.5"], CODED, ()),
    (["glm4.5"], KEYED.replace("search", "buy"), ()),
    (["glm4.5"], KEYED.replace("</arg_value>", ""), ()),
    (["glm4.5"], KEYED.replace("<arg_key>query</arg_key>\n", ""), ()),
    (["glm4.5"], KEYED.removesuffix("</tool_call>"), ()),
    (["gpt-oss"], CHANNEL, (search_for("A"),)),
    (["gpt-oss"], RECIPIENT, (search_for("A"),)),
    (["gpt-oss"], CHANNEL.replace("<|constrain|>", ""), (search_for("A"),)),
    (["gpt-oss"], CHANNEL.replace(" <|constrain|>json", ""), (search_for("A"),)),
    (["gpt-oss"], f"{ANALYSIS}{CHANNEL}", (search_for("A"),)),
    (["gpt-oss"], f"{ANALYSIS}<|start|>assistant{RECIPIENT}", (search_for("A"),)),
    (["gpt-oss"], f"<|channel|>analysis<|message|>I write {CHANNEL}", ()),
    (["gpt-oss"], f"{CHANNEL}{CHANNEL.replace('A', 'B')}", (search_for("A"),)),
    (["gpt-oss"], CHANNEL.replace("commentary", "final"), ()),
    (["gpt-oss"], RECIPIENT.replace("<|channel|>commentary", ""), ()),
    (["gpt-oss"], CHANNEL.replace("functions.search", "search"), ()),
    (["gpt-oss"], CHANNEL.replace("search", "buy"), ()),
    (["gpt-oss"], CHANNEL + " so", ()),
    (["gpt-oss"], CHANNEL.removesuffix("}"), ()),
    (["gpt-oss"], BARE, ()),
    (["gpt-oss"], f"{ANALYSIS}<|channel|>final<|message|><answer>C D</answer>", (answer_with("C D"),)),
    (["gpt-oss"], "<|channel|>analysis<|message|><answer>C D</answer><|end|>", ()),
    (DEEPSEEKS, SEPARATED, (search_for("A"),)),
    (DEEPSEEKS, FENCED, (search_for("A"),)),
    (DEEPSEEKS, f"I see.{SEPARATED}", (search_for("A"),)),
    (DEEPSEEKS, TWICE, (search_for("A"), search_for("A"))),
    (DEEPSEEKS, TWICE.replace("A", "A<｜tool▁call▁end｜>", 1), (search_for("A<｜tool▁call▁end｜>"), search_for("A"))),
    (DEEPSEEKS, TWICE.replace('"A"', "A", 1), ()),
    (DEEPSEEKS, TWICE.replace("search", "buy", 1), (search_for("A"),)),
    (DEEPSEEKS, SEPARATED.removeprefix("<｜tool▁calls▁begin｜>"), ()),
    (DEEPSEEKS, SEPARATED.replace("<｜tool▁call▁end｜>", ""), ()),
    (DEEPSEEKS, SEPARATED.replace("<｜tool▁sep｜>", " "), ()),
    (DEEPSEEKS, TAGGED, ()),
]


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [(family, text, expected) for families, text, expected in PARSED for family in families],
)
def test_calls_are_read_in_the_familys_format(family, text, expected):
    """A call counts if its model was trained to write it so; anything else is a format error."""
    dialect = chat(family)
    thought = "</think>\n\n" if family == "qwen3-thinking" else ""
    for end in dialect.stop_ids:
        assert dialect.parse(thought + text + dialect.decode(np.asarray([end]))) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_without_arguments_needs_its_end(family):
    dialect = make_dialect("chat", tokenizer_of(family), (NOW,), **BUDGETS)
    call = (Action("now", {}),)
    text = dialect.write(call).removesuffix(dialect._call_end).rstrip()
    assert dialect.parse(text) == call
    text = text.removesuffix("<｜tool▁calls▁end｜>")  # what matters there is the end of the single call
    assert dialect.parse(text[:-1]) == () == dialect.parse(text[:-1] + dialect._end)


def test_half_a_surrogate_pair_in_a_call_becomes_text():
    (action,) = chat("qwen3").parse(TAGGED.replace('"A"', '"A \\ud800 B"'))
    assert action == search_for("A ? B")


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        ("qwen3", f"<think>\n{TAGGED}\n</think>\n\n<answer>x</answer>", (answer_with("x"),)),
        ("qwen3", f"<think>\nI could\n{TAGGED}", ()),
        ("qwen3", f"<think>a</think>\n{TAGGED}<think>b", (search_for("A"),)),
        ("qwen3", f"<think>a</think><think>\n{TAGGED}", ()),
        ("qwen3-thinking", f"so\n</think>\n\n{TAGGED}", (search_for("A"),)),
        ("qwen3-thinking", TAGGED, ()),
    ],
)
def test_actions_inside_a_thought_do_not_count(family, text, expected):
    """Also where the thought was cut, and where the template opened it."""
    assert chat(family).parse(text) == expected


@pytest.mark.parametrize(
    ("family", "turn", "example"),
    [
        ("qwen2.5", "<tool_call>search(A)</tool_call><|im_end|>", TAGGED.replace('"A"', '"your query"')),
        ("llama3.1", "I call search.<|eot_id|>", BARE.replace('"A"', '"your query"')),
    ],
)
def test_a_malformed_call_is_answered_with_the_right_form(family, turn, example):
    """The turn counts as a format error, and the next one begins after a hint with a call as this family writes it."""
    dialect = chat(family)
    rollout = rollout_of(dialect, turn, "<answer>Goethe</answer>" + dialect._end)
    assert rollout.turns[0].actions == ()
    assert f"No action was found. To search, write exactly\n{example}\n" in rollout.turns[0].response


def test_a_turn_cut_inside_its_thought_is_closed_and_told_so():
    dialect = chat("qwen3")
    rollout = rollout_of(dialect, "<think>\nand then", "<answer>Goethe</answer><|im_end|>", cut=[0])
    assert rollout.turns[0].action == INVALID
    assert rollout.turns[0].response.startswith("<|im_end|>\n<|im_start|>user\nYour turn was too long and was cut. No ")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "turn", [(search_for('who is "Zoë"?'),), (answer_with("Zoë, of C\nand D"),)], ids=["search", "answer"]
)
def test_written_turns_parse_back_and_end_at_a_stop(family, turn):
    dialect = chat(family)
    text = dialect.write(turn)
    assert dialect.parse(text) == turn and dialect.encode(text)[-1] in dialect.stop_ids


def test_without_a_system_message_qwen25_invents_one():
    silent = chat("qwen2.5", system="")
    silent.check()
    assert silent.decode(silent.prompt(QUESTION)).startswith("<|im_start|>system\nYou are a friendly model.")


# --- templates and tokenizers that cannot serve ---

SHOWS = """{%- for tool in tools %}{{ tool | tojson }}{% endfor %}"""
PLAIN = "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (PLAIN, "does not show the tools it is given"),  # Llama 3.0, Phi-3: no tools at all
        (SHOWS + PLAIN, "writes no tool calls"),
        (
            QWEN25.replace("<tool_call>\\n", "<call>").replace("\\n</tool_call>", "</call>"),
            r"writes tool calls as '<call>\{.*, which is not read here",
        ),
        (
            QWEN25.replace("m.content + '\\n</tool", "('(dropped)' if after else m.content) + '\\n</tool"),
            "after '.*<tool_response>.n' its chat template writes '.dropped.*', a rollout would have 'A title.*'",
        ),
        (
            QWEN25.replace("'<|im_start|>' + m", "(loop.index if m.role == 'user') ~ '<|im_start|>' + m"),
            "after '.*' its chat template writes '8.*', a rollout would have '3.*'",
        ),
        (LLAMA31, "ends an assistant message with '<|eot_id|>.*', which is not one token"),
        (QWEN3.replace("'<|im_end|>\\n'", "'\\n'"), "ends no assistant message"),
        ("{{ raise_exception('no system role') }}", r"refuses the conversation \(no system role\); try"),
        ("{{ messages[0] + 1 }}", "refuses the conversation"),
        (None, "has no chat template; use rollout.dialect=tags"),
    ],
    ids=["no tools", "no calls", "other calls", "drops results", "numbers turns", "many tokens", "no end", "raises",
         "breaks", "none"],
)  # fmt: skip
def test_templates_that_cannot_serve_are_refused_naming_what_differs(template, fault):
    message = refusal(lambda: broken(template).check())
    assert re.search(fault.replace("|", r"\|"), message), message
    assert "rollout.dialect=tags" in message


def test_a_template_that_writes_only_the_first_results_as_it_should_is_refused():
    """As DeepSeek-V3's released one does."""
    template = DEEPSEEK_V3.replace("outputs_begin if last.role != 'tool'", "outputs_begin if loop.index < 4")
    message = refusal(broken(template, "deepseek-v3").check)
    assert "its chat template writes '▁begin｜>A title" in message
    assert "a rollout would have 's▁begin｜><｜tool▁output▁begin｜>'" in message


def test_a_tokenizer_that_reads_pieces_differently_is_refused():
    """SentencePiece-like: a space before every piece, so that an increment would have one that the template has not."""
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁", -3.0), *((chr(c), -4.0) for c in range(10, 127))], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    message = refusal(broken(QWEN25, tokenizer=tokenizer).check)
    assert re.search(r"it tokenises '.n<\|im_start\|>user.*' differently alone and after '<\|im_end\|>'", message)


# --- from files, and through an engine ---


@pytest.mark.parametrize("kept", ["jinja", "json"])
def test_a_model_directory_brings_its_template(tmp_path, kept):
    """Newer directories have chat_template.jinja, older ones a key of tokenizer_config.json."""
    tokenizer_of("qwen3").save_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    assert file.exists()
    if kept == "json":
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings["chat_template"] = file.read_text()
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        file.unlink()
    tokenizer = load_tokenizer(config.load(None, [f"model.path={tmp_path}"]), Data((), (), {}))
    dialect = make_dialect("chat", tokenizer, (SEARCH_TOOL,), **BUDGETS)
    dialect.check()
    assert dialect.prompt(QUESTION).tolist() == chat("qwen3").prompt(QUESTION).tolist()


@pytest.mark.parametrize("name", ["tags", "chat"])
@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "llama3.2"])
def test_both_dialects_on_the_embedded_engine(family, name):
    """What an untrained policy writes is nonsense: most turns are cut, and each of them is closed and answered."""
    dialect = make_dialect(name, tokenizer_of(family), (SEARCH_TOOL,), **BUDGETS)
    lm = model.build(
        len(dialect.tokenizer), hidden_size=16, layers=1, heads=2, kv_heads=1, ffn_size=16, max_tokens=4000,
        tie_embeddings=True, seed=0,
    )  # fmt: skip
    engine = TorchEngine(lm, decode=dialect.tokenizer.decode, max_slots=4, max_tokens=4000)
    sent = []

    async def generate(request, real=engine.generate):
        sent.append(request)
        return await real(request)

    engine.generate = generate
    agent = Agent(engine, Tools([]), dialect, Limits(3, 6, 4000), Sampling(), seed=0, concurrency=2)
    (group,) = rollout_groups(agent, [QUESTION], 2, 0)
    for rollout in group.rollouts:
        mine = [request.ids for request in sent if request.key[-1] == rollout.index]
        assert [len(ids) for ids in mine] == rollout.boundaries.tolist()
        assert all(rollout.ids[: len(ids)].tolist() == ids.tolist() for ids in mine)
        for turn in rollout.turns[:-1]:
            assert turn.action == INVALID and dialect.decode(turn.response_ids) == turn.response


@pytest.mark.skipif(not REAL, reason="IGPO_TOKENIZERS lists no tokenizer directories")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_real_tokenizers(path):
    tokenizer = load_tokenizer(config.load(None, [f"model.path={path}"]), Data((), (), {}))
    dialect = make_dialect("chat", tokenizer, (SEARCH_TOOL,), **BUDGETS)
    dialect.check()
    turns = [dialect.write((search_for("Faust"),)), "Hm." + dialect._end, dialect.write((answer_with("Goethe"),))]
    rollout = rollout_of(dialect, *turns)
    assert rollout.turns[0].action == SEARCH and rollout.answer == "Goethe"
    for turn, said in zip(rollout.turns, turns, strict=True):
        assert turn.ids[-1] in dialect.stop_ids and dialect.parse(said) == (turn.action, turn.argument)
    (branch,) = dialect.branches(QUESTION)
    assert "Goethe" in dialect.decode(branch.ids[branch.start : branch.stop])


# The other templates here, unlike those that they stand for, are written for conversations with tools.
@pytest.mark.parametrize(("name", "family"), [("tags", "qwen2.5"), ("tags", "llama3.1"), ("chat", "qwen2.5")])
def test_without_tools_only_answers_count_and_none_are_spoken_of(name, family):
    dialect = make_dialect(name, tokenizer_of(family), (), **BUDGETS)
    dialect.check()
    prompt = dialect.decode(dialect.prompt(QUESTION))
    hint = dialect.response((), ())[1]
    assert "<answer>" in prompt and "Who wrote Faust?" in prompt and "<answer>" in hint
    assert not re.search(r"tool|search|<information>", prompt + hint)
    assert dialect.parse(TAGGED) == dialect.parse(BARE) == dialect.parse("<search>A</search>") == ()
    assert dialect.parse(dialect.write((answer_with("Goethe"),))) == (answer_with("Goethe"),)
