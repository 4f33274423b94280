"""What every Dialect owes (igpo_fast/rollouts/dialect/base.py)."""

import json

import numpy as np
import pytest

from igpo_fast.errors import InputError
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.types import ANSWER, Action, Passage, Question, ToolResult, answer_with, search_for

ODD = ("", " ", "<", "</", "<search>", "</search>", "<answer></answer>", "{", "[]", "\ud800", "\x00", "a" * 9999)
MARKUP = (
    "</tool_call>", "<tool_call>", "</parameter>", "</function>", "<arg_key>", "</arg_value>", "<think>", "</think>",
    "<answer>x</answer>", "<|im_end|>", "<|eot_id|>", "<|call|>", "<|return|>", "<|user|>", "<|observation|>",
    "<|channel|>commentary to=functions.search<|message|>{}", "<｜tool▁call▁end｜>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
"""What closes calls and turns in the formats of model families."""


def function(name, description, properties, required=None):
    """A function as ``Tool.schemas`` has it."""
    parameters = {"type": "object", "properties": properties, "required": list(required or properties)}
    described = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": described}


MEASURE = function(
    "measure",
    "Measure something.",
    {
        "what": {"type": "string", "description": "What to measure."},
        "count": {"type": "integer"},
        "factor": {"type": "number"},
        "exact": {"type": "boolean"},
        "names": {"type": "array", "items": {"type": "string"}},
        "limits": {"type": "object"},
        "unit": {"type": "string", "nullable": True},
    },
    ["what", "count"],
)
LOOKUP = function("lookup", "Read a row of the table.", {"row": {"type": "integer"}})
NOW = function("now", "Tell the time.", {})
FUNCTIONS = (SEARCH_TOOL, MEASURE, LOOKUP, NOW)
CALLS = (
    search_for("A B"),
    Action("measure", {"what": "A", "count": 3}),
    Action("measure", {"what": "12", "count": -1, "factor": 2.5, "exact": False, "names": ["A"], "limits": {"A": [1]}}),
    Action("measure", {"what": "A", "count": 0, "factor": 7, "exact": True, "names": [], "limits": {}, "unit": None}),
    Action("measure", {"what": "def f():\n    return 'A'\n", "count": 1, "unit": " B "}),
    Action("lookup", {"row": 12}),
    Action("now", {}),
)  # fmt: skip


class DialectContract:
    """Fixture: ``make``, which makes the dialect for a run's functions. Its tokenizer knows the words of ``question``,
    ``passage`` and ``argument``.
    """

    question = Question("q7", "A B born ?", ("C D", "A B", "D"))
    passage = Passage("p1", "A B", "A B born C D")
    argument = "A B"
    quotes = True
    """Whether its tokenizer can write what ends a turn as plain text, and the calls of several functions."""

    @pytest.fixture
    def dialect(self, make):
        return make((SEARCH_TOOL,))

    @pytest.fixture
    def several(self, make):
        """The dialect for several functions."""
        if not self.quotes:
            pytest.skip("its tokenizer knows the words of one function")
        return make(FUNCTIONS)

    def result(self, *texts):
        return ToolResult(tuple(Passage(f"p{i}", "", text) for i, text in enumerate(texts)) or (self.passage,))

    def ends(self, dialect, ids) -> int:
        """How many tokens end a turn."""
        return int(np.isin(ids, dialect.stop_ids).sum())

    def test_pieces_are_tokens_and_the_same_every_time(self, dialect):
        pieces = [
            lambda: dialect.prompt(self.question),
            lambda: dialect.response((search_for("q"),), (self.result(),))[0],
            lambda: dialect.response((search_for("q"),), (ToolResult(),))[0],
            lambda: dialect.response((), ())[0],
            lambda: dialect.response((), (), ended=False)[0],
        ]
        for piece in pieces:
            ids = piece()
            assert ids.dtype == np.int32 and ids.ndim == 1 and len(ids)
            assert ids.tolist() == piece().tolist()

    @pytest.mark.parametrize("act", [search_for, answer_with])
    def test_written_turns_parse_back_and_end_at_a_stop(self, dialect, act):
        meant = (act(self.argument),)
        text = dialect.write(meant)
        assert dialect.parse(text) == meant
        ids = dialect.encode(text)
        assert ids[-1] in dialect.stop_ids or text.endswith(tuple(dialect.stop_strings))
        assert dialect.parse(dialect.decode(ids)) == meant

    @pytest.mark.parametrize("act", [search_for, answer_with])
    def test_a_call_is_the_shortest_end_that_reads_alike(self, dialect, act):
        meant = (act(self.argument),)
        written = dialect.encode(dialect.write(meant))
        reads = [dialect.parse(dialect.decode(written[place:])) == meant for place in range(len(written))]
        own = dialect.call(written, meant)
        assert reads[own] and not any(reads[own + 1 :])
        before = dialect.encode("A B D")
        assert dialect.call(np.concatenate([before, written]), meant) == len(before) + own
        assert dialect.call(before, ()) == 0

    def test_any_text_parses(self, dialect):
        whole = dialect.write((search_for(self.argument),))
        for text in (*ODD, *(whole[:n] for n in range(len(whole))), whole[1:], whole * 2):
            for action in dialect.parse(text):
                assert action.tool in (*dialect.functions, ANSWER) and action.text

    def test_what_ends_turns_is_not_read_in_a_passage(self, dialect):
        spelled = [dialect.decode(np.array([stop])) for stop in dialect.stop_ids]
        plain, _ = dialect.response((search_for("q"),), (self.result("A"),))
        for text in (*spelled, *dialect.stop_strings, *dialect.tags, *MARKUP) if self.quotes else ():
            ids, _ = dialect.response((search_for("q"),), (self.result(f"A {text} B"),))
            assert self.ends(dialect, ids) == self.ends(dialect, plain), text

    def test_branches_force_the_accepted_answers(self, dialect):
        branches = dialect.branches(self.question)
        assert len(branches) == min(dialect.max_answers, len(self.question.answers))
        for branch, answer in zip(branches, self.question.answers, strict=False):
            assert 0 <= branch.start < branch.stop == len(branch.ids)
            assert branch.stop - branch.start <= dialect.max_answer_tokens
            assert dialect.decode(branch.ids[branch.start :]).strip() == answer

    # --- several functions: texts, types, no arguments ---

    def test_the_prompt_shows_every_function(self, several):
        prompt = several.decode(several.prompt(self.question))
        for name, described in several.functions.items():
            assert name in prompt and described["function"]["description"] in prompt

    @pytest.mark.parametrize("call", CALLS, ids=lambda call: f"{call.tool} {call.text}"[:60])
    def test_calls_of_every_kind_parse_back(self, several, call):
        """Each value of the type that the schema gives it, which == of Python does not tell from 1 and 1.0."""
        ids = several.encode(several.write((call,)))
        assert ids[-1] in several.stop_ids or several.decode(ids).endswith(tuple(several.stop_strings))
        (read,) = several.parse(several.decode(ids))
        assert read == call and json.dumps(read.arguments) == json.dumps(call.arguments)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"what": "A"},
            {"count": 1},
            {"what": "A", "count": "many"},
            {"what": "A", "count": 1.5},
            {"what": "A", "count": None},
            {"what": "A", "count": 1, "exact": "perhaps"},
            {"what": "A", "count": 1, "names": "A, B"},
            {"what": "A", "count": 1, "limits": [1]},
        ],
        ids=str,
    )
    def test_arguments_that_do_not_fit_are_no_call(self, several, arguments):
        assert several.parse(several.write((Action("measure", arguments),))) == ()

    def test_unknown_functions_and_arguments(self, several):
        text = several.write((Action("lookup", {"row": 12}),))
        assert several.parse(text.replace("lookup", "nothing")) == ()
        text = several.write((Action("measure", {"what": "A", "count": 1, "colour": "B"}),))
        assert several.parse(text) == (Action("measure", {"what": "A", "count": 1}),)

    def test_calls_at_once(self, several):
        """All of a turn's calls, or the first, if the format has one; and a result for each, in their order."""
        for calls in ((CALLS[0], CALLS[5]), (CALLS[5], CALLS[5], CALLS[6]), (CALLS[1], CALLS[0])):
            try:
                text = several.write(calls)
            except InputError:
                calls = calls[:1]
                text = several.write(calls)
            read = several.parse(text)
            assert read in (calls, calls[:1])
            _, shown = several.response(read, [ToolResult(text=f"result {n}") for n in range(len(read))])
            places = [shown.index(f"result {n}") for n in range(len(read))]
            assert places == sorted(places)

    def test_markup_in_an_argument_ends_no_turn_and_forges_no_call(self, several):
        harmless = several.encode(several.write((Action("measure", {"what": "A", "count": 1}),)))
        for text in (*MARKUP, "\n".join(MARKUP)):
            calls = (Action("measure", {"what": f'print("{text}")\nx = 1', "count": 1}),)
            ids = several.encode(several.write(calls))
            assert self.ends(several, ids) == self.ends(several, harmless), text
            assert several.parse(several.decode(ids)) == calls, text

    def test_markup_in_a_result_ends_no_turn(self, several):
        calls = (CALLS[5],)
        harmless, _ = several.response(calls, (ToolResult(text="A"),))
        for text in MARKUP:
            for result in (ToolResult(text=f"A {text}"), ToolResult(failure=f"A {text}")):
                ids, shown = several.response(calls, (result,))
                assert self.ends(several, ids) == self.ends(several, harmless), text
                assert several.decode(ids) == shown

    def test_markup_in_a_description_ends_no_turn(self, make, several):
        """The user's own words, but no more than words."""
        text = f"Read {' '.join(MARKUP)} it."
        shown = make((SEARCH_TOOL, MEASURE, function("lookup", text, {"row": {"type": "integer"}}), NOW))
        ids = shown.prompt(self.question)
        assert self.ends(shown, ids) == self.ends(several, several.prompt(self.question))
        assert text in shown.decode(ids)
