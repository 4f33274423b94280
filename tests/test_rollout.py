"""rollout.py: what ends a rollout, what it keeps, and that one neither holds up nor survives a fault."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest

from igpo_fast.engines.base import Sampling
from igpo_fast.errors import InputError
from igpo_fast.rollouts.batch import rollout_groups
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.rollout import Agent, Limits, question_key, run_rollout
from igpo_fast.rollouts.tools.base import Tools
from igpo_fast.rollouts.tools.search import SEARCH_TOOL
from igpo_fast.run.records import record_of
from igpo_fast.types import ANSWER, INVALID, SEARCH, Credit, Question
from tests.scripted import ScriptedEngine, ScriptedTool, ids_of, words_tokenizer

DIALECT = make_dialect(
    "tags", words_tokenizer(), (SEARCH_TOOL,), max_passage_tokens=8, max_answer_tokens=4, max_answers=2
)
LIMITS = Limits(max_turns=4, max_turn_tokens=6, max_tokens=64)
FOUND = "<information> A B born C D </information>"
ASKED = Question("q", "A B born ?", ("C D",), corpus="people")
KEY = (1, 2, question_key(ASKED), 5)


def say(*turns):
    return ScriptedEngine(lambda key, turn: turns[turn])


def agent(engine, tool=None, limits=LIMITS, seed=1, concurrency=64):
    return Agent(engine, Tools([tool or ScriptedTool()]), DIALECT, limits, Sampling(), seed, concurrency)


def run(engine, tool=None, limits=LIMITS, question=ASKED):
    return asyncio.run(run_rollout(agent(engine, tool, limits), question, 2, 5))


def groups(questions, size, engine, tool=None, concurrency=64, **options):
    return rollout_groups(agent(engine, tool, seed=9, concurrency=concurrency), questions, size, 2, **options)


class TestOneRollout:
    def test_is_prompt_turns_and_responses_token_for_token(self):
        engine, tool = say("<search> A B </search>", "<answer> C D </answer>"), ScriptedTool()
        rollout = run(engine, tool)
        assert rollout.ids.tolist() == ids_of(f"A B born ? <search> A B </search> {FOUND} <answer> C D </answer>")
        assert rollout.ids.tolist() == engine.sequences[KEY]
        assert rollout.turn_of_token.tolist() == [-1] * 4 + [0] * 4 + [-1] * 7 + [1] * 4
        assert rollout.boundaries.tolist() == [4, 15]
        assert rollout.logp.tolist() == [0, -0.25, -0.5, -0.75] * 2
        assert (rollout.index, rollout.answer) == (5, "C D")
        assert tool.calls == [("A B", "people")]
        search, answer = rollout.turns
        assert (search.action, search.argument, search.passages) == (SEARCH, "A B", ("p1",))
        assert search.response.split() == FOUND.split()
        assert (answer.action, answer.response_ids.tolist(), answer.response) == (ANSWER, [], "")

    def test_asks_the_engine_for_one_turn_at_the_dialects_stops(self):
        engine = say("<answer> C </answer>")
        run(engine)
        (request,) = engine.requests
        assert (request.key, request.max_tokens) == (KEY, 6)
        assert (request.stop_ids, request.stop_strings) == (DIALECT.stop_ids, DIALECT.stop_strings)
        assert request.ids.dtype == np.int32

    def test_ends_after_max_turns_without_a_last_search(self):
        tool = ScriptedTool()
        rollout = run(say(*["<search> A </search>"] * 4), tool)
        assert [turn.action for turn in rollout.turns] == [SEARCH] * 4
        assert [len(turn.response_ids) for turn in rollout.turns] == [7, 7, 7, 0]
        assert len(tool.calls) == 3
        assert rollout.answer is None

    def test_an_invalid_turn_gets_a_hint_and_another_chance(self):
        tool = ScriptedTool()
        rollout = run(say("C D <eos>", "<answer> C </answer>"), tool)
        assert [turn.action for turn in rollout.turns] == [INVALID, ANSWER]
        assert rollout.turns[0].response_ids.tolist() == ids_of("<information> </information>")
        assert rollout.turns[0].passages == ()
        assert tool.calls == []

    def test_a_turn_cut_by_length_is_invalid(self):
        rollout = run(say("<search> A B C D A B </search>", "<answer> C </answer>"))
        assert [turn.action for turn in rollout.turns] == [INVALID, ANSWER]
        assert len(rollout.turns[0].ids) == 6

    def test_the_dialect_hears_whether_a_turn_ended_by_itself(self, monkeypatch):
        heard, respond = [], DIALECT.response

        def response(actions, results, *, ended):
            heard.append((actions, ended))
            return respond(actions, results, ended=ended)

        monkeypatch.setattr(DIALECT, "response", response)
        run(say("A A A A A A A", "A <eos>", "<answer> C </answer>"))
        assert heard == [((), False), ((), True)]

    def test_sampled_tokens_are_never_tokenised_again(self, monkeypatch):
        # Sampled tokens whose text would tokenise to others: here, to none at all.
        decode = DIALECT.decode
        monkeypatch.setattr(DIALECT, "decode", lambda ids: decode(ids).replace("A", ""))
        engine = say("<search> A B A </search>", "<answer> A C </answer>")
        rollout = run(engine)
        assert rollout.turns[0].argument == "B"
        assert rollout.turns[0].ids.tolist() == ids_of("<search> A B A </search>")
        assert rollout.ids.tolist() == engine.sequences[KEY]

    def test_unless_it_parses(self):
        rollout = run(say("<answer> C </answer> D D D D D"))
        assert (rollout.answer, len(rollout.turns[0].ids)) == ("C", 6)

    @pytest.mark.parametrize("max_tokens, turns", [(10, 1), (19, 1), (20, 2), (29, 2), (30, 3), (40, 4)])
    def test_ends_when_the_next_turn_would_not_fit(self, max_tokens, turns):
        # 4 of prompt, 3 + 7 = 10 a turn with its response, and 6 must be free for a turn to begin.
        rollout = run(say(*["<search> A </search>"] * 4), limits=replace(LIMITS, max_tokens=max_tokens))
        assert len(rollout.turns) == turns
        last = rollout.turns[-1]
        assert (last.action, last.response_ids.tolist(), last.response, last.passages) == (SEARCH, [], "", ())
        assert len(rollout.ids) <= max_tokens

    def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(self):
        engine = say()
        with pytest.raises(InputError, match=r"question q: its prompt of 4 tokens .*rollout.max_tokens=9; "):
            run(engine, limits=replace(LIMITS, max_tokens=9))
        assert engine.requests == []

    def test_goes_on_behind_given_turns_token_for_token(self, monkeypatch):
        turns = run(say("<search> A B </search>", "<search> D </search>", "C <eos>", "<answer> B </answer>")).turns
        # Nothing that was sampled or shown before is written again.
        monkeypatch.setattr(DIALECT, "response", lambda *args, **options: (np.array(ids_of("? ?"), np.int32), "? ?"))
        for begun in range(4):
            engine, tool = ScriptedEngine(lambda key, turn: "<answer> C D </answer>"), ScriptedTool()
            found = asyncio.run(run_rollout(agent(engine, tool), ASKED, 2, 5, begun=turns[:begun]))
            assert list(map(id, found.turns[:-1])) == list(map(id, turns[:begun])) and found.answer == "C D"
            (request,) = engine.requests
            before = [id for turn in turns[:begun] for id in (*turn.ids, *turn.response_ids)]
            assert request.ids.tolist() == ids_of("A B born ?") + before
            assert found.ids.tolist() == request.ids.tolist() + ids_of("<answer> C D </answer>")
            # The calls are made again, for tools that keep a state.
            assert tool.calls == [("A B", "people"), ("D", "people")][:begun]
            assert engine.released == [KEY]

    def test_given_turns_count_towards_the_limit(self):
        turns = run(say(*["<search> A </search>"] * 4)).turns
        engine = say("<search> D </search>")
        found = asyncio.run(run_rollout(agent(engine), ASKED, 2, 5, begun=turns[:3]))
        assert (len(found.turns), found.truncated, len(engine.requests)) == (4, "turns", 1)


QUESTIONS = [Question(f"q{i}", "A B born ?", ("C D",)) for i in range(3)]


class TestGroups:
    def test_come_in_order_whatever_finishes_first(self):
        def script(key, turn):  # rollout 0 of each question takes longest
            return "<answer> C </answer>" if turn + key[3] >= 2 else "<search> A </search>"

        done = []
        result = groups(QUESTIONS, 3, ScriptedEngine(script), progress=lambda *at: done.append(at))
        assert [group.question for group in result] == QUESTIONS
        assert [[r.index for r in group.rollouts] for group in result] == [[0, 1, 2]] * 3
        assert [[len(r.turns) for r in group.rollouts] for group in result] == [[3, 2, 1]] * 3
        assert done == [(i, 9) for i in range(1, 10)]

    def test_keys_follow_the_question_not_its_place(self):
        forward, backward = say("<answer> C </answer>"), say("<answer> C </answer>")
        groups(QUESTIONS, 2, forward)
        groups(QUESTIONS[::-1], 2, backward)
        keys = {request.key for request in forward.requests}
        assert keys == {request.key for request in backward.requests}
        assert keys == {(9, 2, question_key(q), i) for q in QUESTIONS for i in range(2)}
        assert len(keys) == 6

    def test_question_keys_are_stable_numbers(self):
        assert question_key(QUESTIONS[0]) == question_key(replace(QUESTIONS[0], question="other"))
        assert question_key(Question("q0", "", ())) == 1097637041652947206  # half of what `b2sum -l 64` says
        assert all(0 <= question_key(Question(str(i), "", ())) < 2**63 for i in range(100))

    def test_every_rollout_is_released_once(self):
        engine = say("<search> A </search>", "<answer> C </answer>")
        groups(QUESTIONS, 2, engine)
        assert sorted(engine.released) == sorted(engine.sequences)

    @pytest.mark.parametrize("concurrency", [1, 2, 5])
    def test_no_more_in_flight_than_allowed(self, concurrency):
        engine = say("<search> A </search>", "<answer> C </answer>")
        in_flight = []

        class Tool(ScriptedTool):
            async def __call__(self, query, corpus=""):
                in_flight.append(len(engine.sequences) - len(engine.released))
                return await super().__call__(query, corpus)

        groups(QUESTIONS, 2, engine, Tool(), concurrency=concurrency)
        assert max(in_flight) == concurrency

    def test_a_question_twice_in_a_batch_is_refused(self):
        with pytest.raises(InputError, match="question q1: occurs twice"):
            groups([*QUESTIONS, QUESTIONS[1]], 2, say())


class TestFaults:
    def test_a_slow_tool_holds_up_no_other_rollout(self):
        events = []
        released = asyncio.Event()

        class Tool(ScriptedTool):
            async def __call__(self, query, corpus=""):
                if query == "D":
                    events.append("slow starts")
                    await asyncio.wait_for(released.wait(), 10)
                    events.append("slow ends")
                return await super().__call__(query, corpus)

        def script(key, turn):
            query = "D" if key[2:] == (question_key(QUESTIONS[0]), 0) else "A"
            return f"<search> {query} </search>" if turn < 2 else "<answer> C </answer>"

        def progress(done, total):
            events.append(done)
            if done == total - 1:
                released.set()

        groups(QUESTIONS, 2, ScriptedEngine(script), Tool(), progress=progress)
        assert events == ["slow starts", 1, 2, 3, 4, 5, "slow ends", "slow starts", "slow ends", 6]

    @pytest.mark.parametrize("part", ["tool", "engine"])
    def test_the_first_fault_surfaces_and_ends_the_rest(self, part):
        cancelled = []

        async def work(broken):
            if broken:
                raise ConnectionError(f"{part} is down")
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        class Tool(ScriptedTool):
            async def __call__(self, query, corpus=""):
                if part == "tool":
                    await work(query == "D")
                return await super().__call__(query, corpus)

        class Engine(ScriptedEngine):
            async def generate(self, request):
                if part == "engine":
                    await work(request.key[3] == 1)
                return await super().generate(request)

        engine = Engine(lambda key, turn: f"<search> {'D' if key[3] == 1 else 'A'} </search>")
        done = []
        with pytest.raises(ConnectionError, match=f"{part} is down"):
            groups(QUESTIONS[:1], 3, engine, Tool(), progress=lambda *at: done.append(at))
        assert done == []
        assert len(cancelled) == 2
        assert sorted(key[3] for key in engine.released) == [0, 1, 2]


class TestRecord:
    rollout = run(say("<search> A B </search>", "<search> D </search>", "<answer> C D </answer>"))
    scores = Credit(
        values=np.array([0.25, np.nan, 0.5]),
        gains=np.array([0.0, 0.125]),
        outcome=1.0,
        f1=1.0,
        em=0.0,
        advantages=np.array([1.5, -0.5, 0.75]),
    )

    def test_says_what_each_turn_earned(self):
        record = json.loads(json.dumps(record_of(self.rollout, self.scores), allow_nan=False))
        assert record["values"] == [0.25, None, 0.5]
        turns = record["turns"]
        assert [turn["value"] for turn in turns] == [None, 0.5, None]
        assert [turn["info_gain"] for turn in turns] == [0.0, 0.125, None]
        assert [turn["advantage"] for turn in turns] == [1.5, -0.5, 0.75]
        assert (record["outcome"], record["f1"], record["em"], record["answer"]) == (1.0, 1.0, 0.0, "C D")

    def test_loses_nothing_of_the_rollout(self):
        record = json.loads(json.dumps(record_of(self.rollout, self.scores), allow_nan=False))
        assert [record[key] for key in ("id", "question", "answers", "index")] == [
            "q",
            "A B born ?",
            ["C D"],
            5,
        ]
        ids = record["prompt_ids"]
        for turn in record["turns"]:
            ids = ids + turn["ids"] + turn["response_ids"]
            assert turn["tokens"] == len(turn["ids"])
        assert ids == self.rollout.ids.tolist()
        assert [x for turn in record["turns"] for x in turn["logp"]] == self.rollout.logp.tolist()
        search = record["turns"][0]
        assert (search["action"], search["argument"], search["passages"]) == ("search", "A B", ["p1"])
        assert search["text"] == "<search> A B </search>"
        assert search["response"].split() == FOUND.split()

    def test_unscored(self):
        record = json.loads(json.dumps(record_of(self.rollout), allow_nan=False))
        assert record["values"] == [None] * 3
        assert record["outcome"] is None
        assert [turn["advantage"] for turn in record["turns"]] == [None] * 3
