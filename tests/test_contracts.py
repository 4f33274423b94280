"""The engines, tools, dialects and rewards of this repository keep their contracts, doubles included."""

import asyncio
from functools import partial

import numpy as np
import pytest

from igpo_fast.data.table import Table
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.extend import named
from igpo_fast.judge import Judge, score_of
from igpo_fast.rollouts.dialect import make_dialect
from igpo_fast.rollouts.tools.base import Tool
from igpo_fast.rollouts.tools.calculate import Calculate
from igpo_fast.rollouts.tools.lookup import Lookup
from igpo_fast.rollouts.tools.processes import Processes
from igpo_fast.rollouts.tools.search import Bm25Search, HttpSearch, NoSearch
from igpo_fast.rollouts.tools.user import UserTool
from igpo_fast.rollouts.tools.visit import Visit
from igpo_fast.types import Action, Passage, Question, Rollout, ToolResult
from tests import test_dialect
from tests.contracts.dialect import DialectContract, function
from tests.contracts.engine import EngineContract, SamplingContract
from tests.contracts.reward import RewardContract
from tests.contracts.tool import SearchContract, ToolContract
from tests.families import FAMILIES, tokenizer_of
from tests.replica import Replica
from tests.scripted import ScriptedEngine, ScriptedTool
from tests.search_server import Server
from tests.test_engine_torch import make, plain_logp, prompts
from tests.test_engine_vllm import PAIRS, servers
from tests.test_examples import EXAMPLES
from tests.test_search import GOOD, PASSAGES


class TestTorchEngine(SamplingContract):
    lm = make()

    @pytest.fixture
    def make_engine(self):
        return lambda: TorchEngine(self.lm, max_slots=2048)

    @pytest.fixture
    def weights(self):
        return self.lm.state_dict().items()

    @pytest.fixture
    def prompts(self):
        return prompts(8)

    @pytest.fixture
    def plain_logp(self):
        return lambda ids, temperature: plain_logp(self.lm, ids, temperature)[-1]


class TestScriptedEngine(EngineContract):
    @pytest.fixture
    def make_engine(self):
        return lambda: ScriptedEngine(lambda key, turn: ("A B C", "D A B", "B B B")[(key[2] + turn) % 3])

    @pytest.fixture
    def weights(self):
        return ()

    @pytest.fixture
    def prompts(self):
        return prompts(8)


class TestVllmServers(EngineContract):
    """Against stubs of replicas: what the client owes."""

    @pytest.fixture
    def make_engine(self):
        replicas = [Replica(), Replica()]

        def make():
            engine = servers(*replicas)
            engine.load_weights(PAIRS)
            return engine

        yield make
        for replica in replicas:
            replica.kill()

    @pytest.fixture
    def weights(self):
        return PAIRS

    @pytest.fixture
    def prompts(self):
        return [np.array([5, 6 + k], np.int32) for k in range(8)]


class TestBm25Search(SearchContract):
    @pytest.fixture
    def tool(self):
        return Bm25Search({"": PASSAGES}, top_k=3)


class TestHttpSearch(SearchContract):
    @pytest.fixture
    def tool(self):
        with Server((200, GOOD)) as server:
            yield HttpSearch(server.url, 2)


class TestNoSearch(SearchContract):
    finds = False

    @pytest.fixture
    def tool(self):
        return NoSearch()


class TestScriptedTool(SearchContract):
    @pytest.fixture
    def tool(self):
        return ScriptedTool()


class Notes(Tool):
    """Keeps what a rollout notes: several functions, typed arguments, and a state per rollout."""

    schemas = (
        function("note", "Note a text, several times.", {"text": {"type": "string"}, "times": {"type": "integer"}}),
        function("notes", "Read what was noted.", {}),
    )

    async def open(self, question: Question) -> list[str]:
        return []

    async def call(self, opened: list[str], action: Action) -> ToolResult:
        self.counts["calls"] += 1
        if action.tool == "note":
            if not 0 < action.arguments["times"] < 100:
                self.counts["failures"] += 1
                return ToolResult(failure="times must be 1 to 99")
            opened += [action.arguments["text"]] * action.arguments["times"]
        await asyncio.sleep(0)
        return ToolResult(text=f"{len(opened)} notes")

    async def outcome(self, opened: list[str], rollout: Rollout) -> dict[str, float]:
        return {"noted": float(len(opened))}


class TestNotes(ToolContract):
    action = Action("note", {"text": "A", "times": 2})

    @pytest.fixture
    def tool(self):
        return Notes()

    def test_calls_of_one_rollout_share_its_state(self, tool):
        """Calls of one turn run at once, so each sees both."""
        ((first, second),) = self.calls(tool, [self.action, Action("notes", {})])
        assert (first.text, second.text) == ("2 notes", "2 notes")


class TestLookup(ToolContract):
    action = Action("lookup", {"cell": "Norway population"})

    @pytest.fixture
    def tool(self):
        return Lookup({"": Table({("Norway", "population"): "5.6 million", ("Norway", "capital"): "Oslo"})})


class TestCalculate(ToolContract):
    action = Action("calculate", {"expression": "2 * (3 + 4)"})

    @pytest.fixture
    def tool(self):
        return Calculate()


class TestVisit(ToolContract):
    action = Action("visit", {"id": "3"})

    @pytest.fixture
    def tool(self):
        return Visit({"": [Passage("3", "Faust", "A play.")]})


class TestFunctionOfOnesOwn(ToolContract):
    action = Action("count_letters", {"word": "Faust"})

    @pytest.fixture
    def tool(self):
        made = Processes(str(EXAMPLES / "tool.py:count_letters"), seconds=60.0, max_characters=1000, concurrency=4)
        yield UserTool("count_letters", made)
        made.end()


class TestFrugal(RewardContract):
    @pytest.fixture
    def reward(self):
        return named(str(EXAMPLES / "reward.py:frugal"), "algorithm.outcome")


class TestJudge(RewardContract):
    @pytest.fixture
    def reward(self):
        with Server((200, {"choices": [{"message": {"role": "assistant", "content": "7"}}]})) as server:
            judge = Judge(server.url, "m")

            async def reward(rollout):
                return score_of(await judge(f"Is {rollout.answer} right?"), most=10)

            yield reward


class TestTagsDialectOfWords(DialectContract):
    quotes = False  # a tag is a word like others to this tokenizer, the made-up world's, whose passages hold none

    @pytest.fixture
    def make(self):
        return partial(make_dialect, "tags", test_dialect.NAMES, **test_dialect.BUDGETS)


WIDE = dict(max_passage_tokens=400, max_answer_tokens=400, max_answers=2)


class TestTagsDialectOfText(DialectContract):
    @pytest.fixture
    def make(self):
        return partial(make_dialect, "tags", test_dialect.BYTES, **WIDE)


@pytest.mark.parametrize("family", FAMILIES)
class TestChatDialect(DialectContract):
    @pytest.fixture
    def make(self, family):
        return partial(make_dialect, "chat", tokenizer_of(family), **WIDE)

    def test_a_run_accepts_it(self, several, dialect):
        several.check()
        dialect.check()


class TestChatDialectWithoutCalls(DialectContract):
    """A template that writes no calls, which only ``score`` accepts: calls are as Hermes'."""

    @pytest.fixture
    def make(self):
        tokenizer = test_dialect.bytes_tokenizer(chat_template=test_dialect.CHAT)
        return partial(make_dialect, "chat", tokenizer, **WIDE)
