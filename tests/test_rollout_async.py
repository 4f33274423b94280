"""Many rollouts at once, on a clock that jumps: simulated times are exact, and nothing waits."""

import asyncio
import gc
import random
from collections import Counter
from contextlib import closing, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from igpo_fast.engines.base import Sampling
from igpo_fast.rollouts.batch import Stragglers, finished_groups, in_ranges, rollout_groups
from igpo_fast.rollouts.rollout import Agent, question_key
from igpo_fast.types import Passage, Question, ToolResult
from tests.clock import JumpingLoop, arrival
from tests.scripted import ScriptedEngine, ScriptedTool, tools_of
from tests.test_rollout import DIALECT, LIMITS

ANSWER = "<answer> C </answer>"


def query(index):
    """A query that says which rollout of its group asks: 0 .. 15."""
    return f"{'ABCD'[index // 4]} {'ABCD'[index % 4]}"


class SlowEngine(ScriptedEngine):
    """A rollout makes ``searches(place, index)`` searches, then answers; each turn takes ``seconds``, on other
    machines if it is ``remote``."""

    def __init__(self, questions, searches, seconds=0.0, remote=False, keeps_rollouts=True):
        self.place = {question_key(question): place for place, question in enumerate(questions)}

        def script(key, turn):
            searching = turn < searches(self.place[key[2]], key[3])
            return f"<search> {query(key[3])} </search>" if searching else ANSWER

        super().__init__(script)
        self.seconds, self.busy, self.most, self.broken = seconds, 0, 0, None
        self.remote, self.keeps_rollouts = remote, keeps_rollouts

    async def generate(self, request):
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            await (arrival if self.remote else asyncio.sleep)(self.seconds)
            if self.broken == (self.place[request.key[2]], request.key[3], len(request.ids) > 3):
                raise FloatingPointError("sampling: the model's logits are not finite")
            return await super().generate(request)
        finally:
            self.busy -= 1


class SlowTool(ScriptedTool):
    """Waits as long as the next of ``latencies[place][index]`` says; the corpus is the place."""

    def __init__(self, latencies):
        super().__init__()
        self.latencies, self.waiting, self.cancelled = latencies, 0, 0

    async def __call__(self, query, corpus=""):
        index = 4 * "ABCD".index(query[0]) + "ABCD".index(query[2])
        call = self.calls.count((query, corpus))
        self.calls.append((query, corpus))
        self.waiting += 1
        try:
            await arrival(self.latencies[int(corpus)][index][call])
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return ToolResult((Passage("p1", "", "A B born C D"),))


class Scene:
    """A batch with ``latencies[place][index]``, a list each: a rollout makes as many searches."""

    def __init__(self, latencies, turn_seconds=0.0, **engine):
        self.latencies = latencies
        self.questions = [Question(f"q{i}", "A B ?", ("C D",), corpus=str(i)) for i in range(len(latencies))]
        searches = lambda place, index: len(latencies[place][index])  # noqa: E731
        self.engine = SlowEngine(self.questions, searches, turn_seconds, **engine)
        self.tool, self.loop, self.counts, self.progress = SlowTool(latencies), JumpingLoop(), Counter(), []

    def groups(self, run=finished_groups, concurrency=64, **options):
        agent = Agent(self.engine, tools_of(self.tool), DIALECT, LIMITS, Sampling(), seed=9, concurrency=concurrency)
        told = dict(counts=self.counts, progress=lambda *at: self.progress.append((round(self.loop.now, 6), *at)))
        size = len(self.latencies[0])
        return run(agent, self.questions, size, 2, loop_factory=lambda: self.loop, **(told | options))


def chains(latencies, turn_seconds=0.0):
    return [sum(own) + turn_seconds * (len(own) + 1) for group in latencies for own in group]


def uniform(questions, size, searches=3, seed=0):
    rng = random.Random(seed)
    return [[[rng.uniform(0, 2) for _ in range(searches)] for _ in range(size)] for _ in range(questions)]


class TestTime:
    @pytest.mark.parametrize("turn_seconds", [0.0, 0.125])
    def test_a_batch_takes_the_longest_chain_of_latencies_and_turns(self, turn_seconds):
        latencies = uniform(8, 8)
        scene = Scene(latencies, turn_seconds)
        assert len(scene.groups(rollout_groups)) == 8
        assert scene.loop.now == pytest.approx(max(chains(latencies, turn_seconds)), abs=1e-9)
        # Turn by turn, everyone would wait for the slowest call of each.
        lockstep = sum(max(own[t] for group in latencies for own in group) for t in range(3))
        assert scene.loop.now < lockstep + 4 * turn_seconds - 0.3

    @given(
        st.lists(st.lists(st.floats(0, 2), max_size=3), min_size=6, max_size=6),
        st.integers(1, 6),
    )
    def test_with_fewer_in_flight_each_starts_when_another_ends(self, chains_of_six, concurrency):
        latencies = [chains_of_six[i : i + 2] for i in (0, 2, 4)]
        scene = Scene(latencies)
        scene.groups(rollout_groups, concurrency=concurrency)
        free = [0.0] * concurrency
        for seconds in chains(latencies):
            free.sort()
            free[0] += seconds
        assert scene.loop.now == pytest.approx(max(free), abs=1e-6)

    @pytest.mark.parametrize("keeps_rollouts, seconds", [(True, 14), (False, 8)])
    def test_who_waits_for_a_tool_makes_room_unless_the_engine_keeps_it(self, keeps_rollouts, seconds):
        # One at a time: turns of 1 s, a search of 5 s between them.
        scene = Scene([[[5.0]], [[5.0]]], turn_seconds=1.0, keeps_rollouts=keeps_rollouts)
        scene.groups(rollout_groups, concurrency=1)
        assert (scene.loop.now, scene.engine.most) == (seconds, 1)


class TestHandedOut:
    def test_work_on_a_finished_group_costs_no_time_while_a_tool_is_waited_for(self):
        # Group 0 is done after 1 s, group 1 after 10 s; work of 3 s on each.
        scene = Scene([[[1.0], [0.5]], [[1.0], [10.0]]])
        begun = []
        for place, _ in scene.groups():
            begun.append((place, scene.loop.now))
            scene.loop.spend(3)
        assert begun == [(0, 1.0), (1, 10.0)]
        assert scene.loop.now == 13

    def test_an_answer_that_came_meanwhile_is_read_when_the_work_is_done(self):
        scene = Scene([[[1.0], [0.5]], [[1.0], [2.0, 2.0]]])
        for place, _ in scene.groups():
            scene.loop.spend(3 if place == 0 else 0)
        assert scene.loop.now == 6  # at 4 instead of 2, and 2 more

    def test_only_when_the_engine_has_nothing_to_do(self):
        scene = Scene(uniform(6, 3), turn_seconds=0.5)
        handed = []
        for place, group in scene.groups():
            assert scene.engine.busy == 0
            handed.append((place, len(group.rollouts)))
            if scene.tool.waiting:
                assert scene.progress[-1][0] <= scene.loop.now
        assert sorted(handed) == [(place, 3) for place in range(6)]

    def test_never_before_the_end_if_the_engine_always_has_something_to_do(self):
        # Rollout 1 samples in 0-2, 4-6, 8-10 s, rollout 2 in 0-2, 2-4, 6-8 s.
        scene = Scene([[[]], [[2.0, 2.0]], [[0.0, 2.0]]], turn_seconds=2.0)
        times = [scene.loop.now for _ in scene.groups()]
        assert times == [10.0] * 3

    def test_at_once_if_the_engine_is_elsewhere(self):
        scene = Scene([[[]], [[2.0, 2.0]], [[0.0, 2.0]]], turn_seconds=2.0, remote=True)
        assert [scene.loop.now for _ in scene.groups()] == [2.0, 8.0, 10.0]

    def test_an_engine_elsewhere_goes_on_meanwhile(self):
        # Rollout 1 samples in 0-2 s, and from 5 s, when its result of 4 s is read; then in 9-11 s.
        scene = Scene([[[]], [[2.0, 2.0]], [[0.0, 2.0]]], turn_seconds=2.0, remote=True)
        for place, _ in scene.groups():
            scene.loop.spend(3 if place == 0 else 0)
        assert scene.loop.now == 11

    def test_no_deadline_counts_the_work(self):
        # The second answer to rollout 1 comes in the work of 3 s, and is read after it.
        scene = Scene([[[1.0]], [[1.0, 0.25]]])
        tool = scene.tool

        async def in_pieces(query, corpus):
            async with asyncio.timeout(1.5):
                result = await tool(query, corpus)
                await arrival(0.125)
                return result

        scene.tool = in_pieces
        times = []
        for _, group in scene.groups():
            times.append(scene.loop.now)
            scene.loop.spend(3)
            assert all(turn.passages for turn in group.rollouts[0].turns[:-1])
        assert times == [1.125, 4.25]

    def test_what_is_sampled_does_not_depend_on_it(self):
        latencies = uniform(4, 2)
        one, other = Scene(latencies), Scene(latencies)
        worked = {}
        for place, group in one.groups():
            one.loop.spend(0.7)
            worked[place] = group
        for group, same in zip(other.groups(rollout_groups), (worked[i] for i in range(4)), strict=True):
            for a, b in zip(group.rollouts, same.rollouts, strict=True):
                assert a.ids.tolist() == b.ids.tolist()
        assert one.engine.sequences == other.engine.sequences


class TestRanges:
    def test_a_range_comes_when_it_is_whole_and_the_rest_at_the_end(self):
        came = []

        def finished():
            for place in (4, 1, 6, 0, 2, 5):
                came.append(place)
                yield place, f"group {place}"

        ranges = [(list(some), len(came)) for some in in_ranges(finished(), 2, 7)]
        assert ranges == [([6], 3), ([0, 1], 4), ([4, 5], 6), ([2], 6)]

    @given(st.permutations(range(7)), st.integers(1, 8))
    def test_what_is_in_a_range_does_not_depend_on_the_order(self, order, size):
        ranges = [list(some) for some in in_ranges(((place, place) for place in order), size, 7)]
        assert sorted(ranges) == [list(range(i, min(i + size, 7))) for i in range(0, 7, size)]


class TestStragglers:
    # 4 of 6 are done at 2.5 s, after 1, 1, 2 and 2.5 s: the median is 1.5, and twice that is 3 s.
    LATENCIES = (((1.0,), (5.0,), (2.0,)), ((1.0,), (2.5,), (2.9,)))

    def test_are_left_out_of_their_group(self):
        scene = Scene(self.LATENCIES)
        groups = scene.groups(rollout_groups, stragglers=Stragglers(share=0.6, factor=2))
        assert [[r.index for r in group.rollouts] for group in groups] == [[0, 2], [0, 1, 2]]
        assert scene.loop.now == 3
        assert scene.counts == {"rollout/stragglers": 1}
        assert scene.tool.cancelled == 1
        assert scene.progress[-1] == (3, 6, 6)
        assert len(scene.engine.released) == 6

    def test_there_are_none_unless_asked(self):
        scene = Scene(self.LATENCIES)
        assert [len(group.rollouts) for group in scene.groups(rollout_groups)] == [3, 3]
        assert (scene.loop.now, scene.counts) == (5, {"rollout/stragglers": 0})

    def test_a_group_without_two_rollouts_is_dropped(self):
        scene = Scene([[[1.0], [9.0], [9.0]], [[1.0], [1.0], [9.0]]])
        groups = scene.groups(rollout_groups, stragglers=Stragglers(share=0.5, factor=4))
        assert [(g.question.id, len(g.rollouts)) for g in groups] == [("q1", 2)]
        assert (scene.loop.now, scene.counts) == (4, {"rollout/stragglers": 3})

    def test_one_that_starts_late_has_as_much_time_as_the_others(self):
        # Two at a time; median 1 is known at 1 s. Rollout 3 starts at 2 s and may take 2 s.
        scene = Scene([[[1.0], [1.0]], [[1.0], [1.5]], [[1.9], [2.1]]])
        groups = scene.groups(rollout_groups, concurrency=2, stragglers=Stragglers(share=0.3, factor=2))
        assert [len(group.rollouts) for group in groups] == [2, 2]
        assert scene.loop.now == 4.5  # 2.5 + 2 s allowed

    def test_work_on_a_group_makes_none(self):
        # The median is 1 s; the last rollout has 1.5 s, of which 1 has passed when the work of 3 s begins.
        scene = Scene([[[1.0], [1.0]], [[1.0], [1.25, 0.25]]])
        sizes = []
        for _, group in scene.groups(stragglers=Stragglers(share=0.5, factor=1.5)):
            sizes.append((len(group.rollouts), scene.loop.now))
            scene.loop.spend(3)
        assert sizes == [(2, 1.0), (2, 4.25)]
        assert scene.counts == {"rollout/stragglers": 0}

    def test_a_tools_own_timeout_is_a_fault_not_a_straggler(self):
        scene = Scene(self.LATENCIES)

        async def tool(query, corpus=""):
            raise TimeoutError("of its own")

        scene.tool = tool
        with pytest.raises(TimeoutError, match="of its own"):
            scene.groups(rollout_groups, stragglers=Stragglers(share=0.5, factor=2))


class TestEnough:
    def test_ends_with_the_first_groups_to_finish_and_cancels_the_rest(self):
        scene = Scene([[[9.0], [1.0]], [[2.0], [1.0]], [[1.0], [3.0]], [[9.0], [9.0]]])
        assert [place for place, _ in scene.groups(enough=2)] == [1, 2]
        assert scene.loop.now == 3
        assert scene.tool.cancelled == 3
        assert len(scene.engine.released) == 8


class TestNothingLeaks:
    @pytest.fixture(autouse=True)
    def no_complaints(self, caplog):
        yield
        gc.collect()
        assert not caplog.records  # asyncio complains of what was destroyed or not retrieved

    def everything_ended(self, scene):
        assert scene.loop.is_closed()
        assert not asyncio.all_tasks(scene.loop)
        assert (scene.engine.busy, scene.tool.waiting) == (0, 0)
        assert sorted(scene.engine.released) == sorted(scene.engine.sequences)

    @pytest.mark.parametrize("ending", ["all", "stopped", "fault"])
    def test_tool_and_engine_are_closed_when_no_rollout_uses_them_any_more(self, ending):
        scene, closed = Scene([[[1.0]], [[2.0]]]), []

        async def aclose():
            assert (scene.engine.busy, scene.tool.waiting) == (0, 0)
            closed.append(asyncio.get_running_loop() is scene.loop)

        scene.engine.aclose = scene.tool.aclose = aclose
        scene.engine.broken = (0, 0, True) if ending == "fault" else None
        with suppress(FloatingPointError), closing(scene.groups()) as groups:
            for _ in groups:
                if ending == "stopped":
                    break
        assert closed == [True, True]

    def test_when_the_consumer_stops(self):
        scene = Scene([[[1.0], [1.0]], [[2.0], [3.0]], [[4.0, 4.0], [5.0]]])
        with closing(scene.groups()) as finished:
            assert next(finished)[0] == 0
        assert scene.loop.now == 1
        assert scene.tool.cancelled == 4
        self.everything_ended(scene)

    @pytest.mark.parametrize("later_turn", [False, True])
    def test_when_the_engine_raises_in_the_middle(self, later_turn):
        scene = Scene([[[1.0], [1.0]], [[2.0], [3.0]], [[4.0, 4.0], [5.0]]], turn_seconds=0.25)
        scene.engine.broken = (1, 0, later_turn)
        handed = []
        with pytest.raises(FloatingPointError, match=r"^sampling: the model's logits are not finite$"):
            for place, _ in scene.groups():
                handed.append(place)
        assert handed == ([0] if later_turn else [])
        assert scene.loop.now == (2.5 if later_turn else 0.25)
        assert scene.tool.cancelled == (3 if later_turn else 5)
        scene.engine.released = [key for key in scene.engine.released if key in scene.engine.sequences]
        self.everything_ended(scene)
