"""What every Dialect owes (igpo_fast/rollouts/dialect/base.py)."""

import numpy as np
import pytest

from igpo_fast.types import ANSWER, SEARCH, Passage, Question, ToolResult, answer_with, search_for

ODD = ("", " ", "<", "</", "<search>", "</search>", "<answer></answer>", "{", "[]", "\ud800", "\x00", "a" * 9999)


class DialectContract:
    """Fixture: ``dialect``. Its tokenizer knows the words of ``question``, ``passage`` and ``argument``."""

    question = Question("q7", "A B born ?", ("C D", "A B", "D"))
    passage = Passage("p1", "A B", "A B born C D")
    argument = "A B"
    quotes = True
    """Whether its tokenizer can write what ends a turn as plain text."""

    def result(self, *texts):
        return ToolResult(tuple(Passage(f"p{i}", "", text) for i, text in enumerate(texts)) or (self.passage,))

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
                assert action.tool in (SEARCH, ANSWER) and action.text

    def test_what_ends_turns_is_not_read_in_a_passage(self, dialect):
        spelled = [dialect.decode(np.array([stop])) for stop in dialect.stop_ids]
        ends = lambda ids: int(np.isin(ids, dialect.stop_ids).sum())  # noqa: E731
        plain, _ = dialect.response((search_for("q"),), (self.result("A"),))
        for text in (*spelled, *dialect.stop_strings, *dialect.tags) if self.quotes else ():
            ids, _ = dialect.response((search_for("q"),), (self.result(f"A {text} B"),))
            assert ends(ids) == ends(plain), text

    def test_branches_force_the_accepted_answers(self, dialect):
        branches = dialect.branches(self.question)
        assert len(branches) == min(dialect.max_answers, len(self.question.answers))
        for branch, answer in zip(branches, self.question.answers, strict=False):
            assert 0 <= branch.start < branch.stop == len(branch.ids)
            assert branch.stop - branch.start <= dialect.max_answer_tokens
            assert dialect.decode(branch.ids[branch.start :]).strip() == answer
