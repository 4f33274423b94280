"""The engines, tools and dialects of this repository keep their contracts, doubles included."""

import numpy as np
import pytest

from igpo_fast.engines.torch import TorchEngine
from igpo_fast.rollouts.tools.search import Bm25Search, HttpSearch, NoSearch
from tests import test_dialect
from tests.contracts.dialect import DialectContract
from tests.contracts.engine import EngineContract, SamplingContract
from tests.contracts.tool import SearchContract
from tests.replica import Replica
from tests.scripted import ScriptedEngine, ScriptedTool
from tests.search_server import Server
from tests.test_engine_torch import make, plain_logp, prompts
from tests.test_engine_vllm import PAIRS, servers
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


class TestTagsDialectOfWords(DialectContract):
    quotes = False  # a tag is a word like others to this tokenizer, the made-up world's, whose passages hold none

    @pytest.fixture
    def dialect(self):
        return test_dialect.TestTagsOfKnownWords.dialect


class TestTagsDialectOfText(DialectContract):
    @pytest.fixture
    def dialect(self):
        return test_dialect.TestTagsOfText.dialect


class TestChatDialect(DialectContract):
    @pytest.fixture
    def dialect(self):
        return test_dialect.TestChat.dialect
