"""dialect.py: what a turn is written as, token for token."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from igpo_fast.errors import InputError
from igpo_fast.rollouts.dialect import BARE, FULL, TagsDialect, Wording, make_dialect
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import Passage, Question, ToolResult, answer_with, search_for
from tests.scripted import ids_of, words_tokenizer

BUDGETS = dict(max_passage_tokens=8, max_answer_tokens=4, max_answers=2)
BORN = Passage("p1", "A B", "A B born C D")


def bytes_tokenizer(**extra) -> PreTrainedTokenizerFast:
    """A small byte-level BPE: every text has tokens and comes back from them."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|bos|>", "<|im_start|>", "<|im_end|>", "<|end|>"],
    )
    core.train_from_iterator([FULL.system, FULL.before, "Paris Berlin the capital of France"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>", **extra)


BYTES, NAMES = bytes_tokenizer(), words_tokenizer()


def question(text="A B born ?", *answers) -> Question:
    return Question("q7", text, answers or ("C D",))


class TestTagsOfKnownWords:
    dialect = make_dialect("tags", NAMES, (SEARCH_TOOL,), **BUDGETS)

    def test_takes_the_bare_wording_and_stops_at_tags(self):
        assert self.dialect.wording is BARE
        assert self.dialect.stop_strings == ()
        assert self.dialect.stop_ids == tuple(ids_of("</search> </answer> <eos>"))

    def test_prompt_is_the_question(self):
        prompt = self.dialect.prompt(question())
        assert prompt.dtype == np.int32
        assert prompt.tolist() == ids_of("A B born ?")

    def test_system_goes_before_it(self):
        dialect = make_dialect("tags", NAMES, (SEARCH_TOOL,), system="D D", **BUDGETS)
        assert dialect.prompt(question()).tolist() == ids_of("D D A B born ?")

    def test_response_shows_passages(self):
        other = Passage("p2", "", "C D")
        ids, text = self.dialect.response((search_for("q"),), (ToolResult((BORN, other)),))
        assert ids.dtype == np.int32
        assert ids.tolist() == ids_of("<information> A B A B born C D C D </information>")
        assert text == "\n<information>\nA B\nA B born C D\n\nC D\n</information>\n"

    def test_long_passages_are_cut_each(self):
        long = Passage("p", "", " ".join(["A"] * 9))
        ids, _ = self.dialect.response((search_for("q"),), (ToolResult((long, long)),))
        assert ids.tolist() == ids_of("<information> " + "A " * 16 + "</information>")

    def test_nothing_found_and_nothing_asked(self):
        for ids, _ in (self.dialect.response((search_for("q"),), (ToolResult(),)), self.dialect.response((), ())):
            assert ids.tolist() == ids_of("<information> </information>")

    def test_branches(self):
        first, second = self.dialect.branches(question("?", "C D", "A", "B"))
        assert (first.ids.tolist(), first.start, first.stop) == (ids_of("<answer> C D"), 1, 3)
        assert (second.ids.tolist(), second.start, second.stop) == (ids_of("<answer> A"), 1, 2)

    def test_long_answers_are_cut(self):
        (branch,) = self.dialect.branches(question("?", "A B C D A B"))
        assert (branch.ids.tolist(), branch.start, branch.stop) == (ids_of("<answer> A B C D"), 1, 5)

    @pytest.mark.parametrize("answer", ["", "  \n"])
    def test_empty_answer_is_refused_by_its_question(self, answer):
        with pytest.raises(InputError, match=r"question q7: .*tokenises to nothing; "):
            self.dialect.branches(question("?", "A", answer))


class TestTagsOfText:
    dialect = make_dialect("tags", BYTES, (SEARCH_TOOL,), **BUDGETS)

    def test_takes_the_full_wording_and_stops_at_strings(self):
        assert self.dialect.wording is FULL
        assert self.dialect.stop_strings == ("</search>", "</answer>")
        assert self.dialect.stop_ids == (BYTES.eos_token_id,)

    @pytest.mark.parametrize("system, start", [(None, FULL.system), ("", ""), ("Be brief.", "Be brief.\n\n")], ids=repr)
    def test_prompt(self, system, start):
        dialect = make_dialect("tags", BYTES, (SEARCH_TOOL,), system=system, **BUDGETS)
        assert dialect.decode(dialect.prompt(question("Who {}?"))) == start + "Question: Who {}?\n"

    def test_prompt_has_the_start_token_that_the_tokenizer_adds(self):
        tokenizer = bytes_tokenizer(bos_token="<|bos|>")
        bos = tokenizer.bos_token_id
        without = make_dialect("tags", tokenizer, (SEARCH_TOOL,), **BUDGETS).prompt(question())
        assert bos not in without
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
        )
        dialect = make_dialect("tags", tokenizer, (SEARCH_TOOL,), **BUDGETS)
        assert dialect.prompt(question()).tolist() == [bos, *without.tolist()]
        assert bos not in dialect.response((), ())[0]
        assert bos not in dialect.branches(question())[0].ids

    def test_hint(self):
        ids, text = self.dialect.response((), ())
        assert text == FULL.hint == self.dialect.decode(ids)

    def test_a_cut_leaves_no_space_behind(self):
        tokenizer = bytes_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        budget = len(BYTES("Paris").input_ids)
        dialect = make_dialect("tags", tokenizer, (SEARCH_TOOL,), **(BUDGETS | dict(max_passage_tokens=budget)))
        _, shown = dialect.response((search_for("q"),), (ToolResult((Passage("p", "", "Paris Berlin"),)),))
        assert shown == "\n<information>\nParis\n</information>\n"

    @given(st.text(max_size=60))
    @settings(max_examples=60, deadline=None)
    def test_cut_passages_are_whole_characters_within_the_budget(self, text):
        ids, shown = self.dialect.response((search_for("q"),), (ToolResult((Passage("p", "", text),)),))
        inner = shown.removeprefix("\n<information>\n").removesuffix("\n</information>\n")
        assert text.startswith(inner)
        assert len(self.dialect.encode(inner)) <= BUDGETS["max_passage_tokens"]
        if len(self.dialect.encode(text)) <= BUDGETS["max_passage_tokens"]:
            assert inner == text
        assert self.dialect.decode(ids) == shown

    @given(st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(str.strip))
    @settings(max_examples=60, deadline=None)
    def test_scored_tokens_cover_the_answer_and_no_more(self, answer):
        dialect = make_dialect("tags", BYTES, (SEARCH_TOOL,), **(BUDGETS | dict(max_answer_tokens=99)))
        (branch,) = dialect.branches(question("?", answer))
        answer = answer.strip()
        whole = dialect.encode(FULL.before + answer + FULL.after)
        assert branch.ids.tolist() == whole[: branch.stop].tolist()
        lengths = [len(BYTES.convert_ids_to_tokens(int(token))) for token in whole]  # a character a byte
        ends = np.cumsum(lengths)
        first, last = len(FULL.before.encode()), len((FULL.before + answer).encode())
        assert ends[branch.start] - lengths[branch.start] <= first < ends[branch.start]
        assert ends[branch.stop - 1] - lengths[branch.stop - 1] < last <= ends[branch.stop - 1]


def test_tokens_that_straddle_the_answers_border_count():
    vocabulary = {token: i for i, token in enumerate(["x", "a", "b", "y", "xa", "by"])}
    core = Tokenizer(models.BPE(vocabulary, [("x", "a"), ("b", "y")]))
    wording = Wording(system="", question="{}", hint="", before="xx", after="yy")
    dialect = TagsDialect(PreTrainedTokenizerFast(tokenizer_object=core), (SEARCH_TOOL,), wording=wording, **BUDGETS)
    (branch,) = dialect.branches(question("x", "ab"))
    assert (branch.ids.tolist(), branch.start, branch.stop) == ([0, 4, 5], 1, 3)  # x [xa by] y


@pytest.mark.parametrize(
    "text, action",
    [
        ("<think> so </think> <search> A B </search>", (search_for("A B"),)),
        ("<answer>\nC D\n</answer> <eos>", (answer_with("C D"),)),
        ("<search> A </search> <answer> B </answer>", (search_for("A"),)),
        ("<answer> open <search> A </search>", (search_for("A"),)),
        ("<answer> two\nlines </answer>", (answer_with("two\nlines"),)),
        ("<search> A </answer>", ()),
        ("<search> </search>", ()),
        ("<answer></answer>", ()),
        ("</search> A <search>", ()),
        ("C D <eos>", ()),
        ("", ()),
    ],
)
def test_tags_parse(text, action):
    assert TestTagsOfText.dialect.parse(text) == action


def test_slow_tokenizers_are_refused():
    with pytest.raises(InputError, match="'slow': gives no character offsets; use"):
        make_dialect("tags", SimpleNamespace(is_fast=False, name_or_path="slow"), (SEARCH_TOOL,), **BUDGETS)


CHAT = """{%- if messages[0].role == 'system' %}<|im_start|>system
{{ messages[0].content }}
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'assistant' %}<|im_start|>assistant
{{ m.content.split('</think>')[-1] }}<|im_end|>
{% elif m.role == 'tool' %}<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chat(template=CHAT, **options):
    return make_dialect("chat", bytes_tokenizer(chat_template=template), (SEARCH_TOOL,), **(BUDGETS | options))


class TestChat:
    dialect = chat()
    end = BYTES.convert_tokens_to_ids("<|im_end|>")

    def test_stops_at_the_templates_end_of_turn(self):
        assert self.dialect.stop_ids == (self.end, BYTES.eos_token_id)
        assert self.dialect.stop_strings == ()

    def test_prompt_is_the_rendered_template(self):
        text = self.dialect.decode(self.dialect.prompt(question("Who?")))
        assert text.startswith("<|im_start|>system\nAnswer the user's question.")
        assert '"name": "search"' in text
        assert text.endswith("<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
        silent = chat(system="")
        assert silent.decode(silent.prompt(question("Who?"))) == (
            "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
        )

    def test_pieces_make_the_conversation_as_the_template_writes_it(self):
        dialect = chat(max_passage_tokens=99)
        turn = '<tool_call>\n{"name": "search", "arguments": {"query": "A"}}\n</tool_call>'
        response, _ = dialect.response((search_for("q"),), (ToolResult((BORN, Passage("p2", "C", "D"))),))
        pieces = [dialect.prompt(question("Who?")), dialect.encode(turn + "<|im_end|>"), response]
        assert dialect.decode(np.concatenate(pieces)) == dialect.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": dialect._system[0]["content"]},
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": turn},
                {"role": "tool", "content": "A B\nA B born C D\n\nC\nD"},
            ],
            tools=[SEARCH_TOOL],
            add_generation_prompt=True,
            tokenize=False,
        )

    def test_a_turn_cut_by_length_is_closed(self):
        _, text = self.dialect.response((), (), ended=True)
        cut, told = self.dialect.response((), (), ended=False)
        assert text.startswith("\n<|im_start|>user\n") and text.endswith("<|im_start|>assistant\n")
        assert told == "<|im_end|>" + text.replace("No action", "Your turn was too long and was cut. No action")
        assert cut[0] == self.end and self.dialect.decode(cut) == told

    def test_without_a_call_of_the_templates_own_calls_are_json_in_tags(self):
        call = '<tool_call>\n{"name": "search", "arguments": {"query": " A "}}\n</tool_call>'
        assert self.dialect.parse(call) == (search_for("A"),)

    @pytest.mark.parametrize(
        "template, before",
        [
            (CHAT, "<think>\nNow there's enough information to answer\n</think>\n"),
            (
                CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
                "Now there's enough information to answer\n</think>\n",
            ),
            (
                CHAT.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"),
                "\nNow there's enough information to answer\n</think>\n",
            ),
            (CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}"), ""),
        ],
        ids=["nothing opens it", "the template opens it", "without a line", "the template closes it"],
    )
    def test_branches_end_the_reasoning(self, template, before):
        dialect = chat(template)
        (branch,) = dialect.branches(question("?", "Paris"))
        assert dialect.decode(branch.ids[: branch.start]) == before + "<answer>\n"
        assert dialect.decode(branch.ids[branch.start :]) == "Paris"

    @pytest.mark.parametrize(
        "template, fault",
        [
            (None, "has no chat template; use rollout.dialect=tags"),
            ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends no assistant message"),
            ("{{ raise_exception('no system role') }}", "refuses the conversation .no system role.; try"),
        ],
    )
    def test_templates_that_cannot_serve_are_refused(self, template, fault):
        with pytest.raises(InputError, match=fault):
            chat(template)


@pytest.mark.parametrize("dialect", [TestTagsOfText.dialect, TestChat.dialect], ids=["tags", "chat"])
@pytest.mark.parametrize(
    "turn", [(search_for('who is "A"?'),), (answer_with("Zoë, of C\nand D"),)], ids=["search", "answer"]
)
def test_written_turns_parse_back_and_end_at_a_stop(dialect, turn):
    text = dialect.write(turn)
    assert dialect.parse(text) == turn
    assert dialect.encode(text)[-1] in dialect.stop_ids or text.endswith(dialect.stop_strings)
