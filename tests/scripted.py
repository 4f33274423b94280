"""A policy that says what a test wrote down, and a search that finds what it was given."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igpo_fast.engines.base import Generation, Request
from igpo_fast.rollouts.tools.base import Tool, Tools
from igpo_fast.rollouts.tools.search import Search
from igpo_fast.types import Passage, ToolResult

TAGS = ["<search>", "</search>", "<information>", "</information>", "<answer>", "</answer>"]
WORDS = ["<unk>", "<eos>", *TAGS, "?", "A", "B", "C", "D", "born"]


def words_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that knows tags and names only, as the made-up world's."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<eos>")


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


class ScriptedEngine:
    """Says ``script(key, turn)``, a turn's text; token i of a turn has log-probability -i / 4.

    It holds callers to the contract: a request extends what its key sent and got before, token for token.
    """

    name, version, remote, keeps_rollouts = "scripted", 0, False, True

    def __init__(self, script: Callable[[tuple[int, ...], int], str]):
        self.script = script
        self.sequences: dict[tuple[int, ...], list[int]] = {}
        self.requests: list[Request] = []
        self.released: list[tuple[int, ...]] = []

    async def generate(self, request: Request) -> Generation:
        before, ids = self.sequences.get(request.key, []), request.ids.tolist()
        assert ids[: len(before)] == before, "the request re-tokenised what was sampled"
        turn = sum(earlier.key == request.key for earlier in self.requests)
        self.requests.append(request)
        await asyncio.sleep(0)
        said = np.asarray(ids_of(self.script(request.key, turn))[: request.max_tokens], dtype=np.int32)
        self.sequences[request.key] = ids + said.tolist()
        return Generation(said, -np.arange(len(said), dtype=np.float32) / 4, finished=said[-1] in request.stop_ids)

    def release(self, key: tuple[int, ...]) -> None:
        self.released.append(key)

    def sleep(self) -> None:
        pass

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.version += 1

    def counts(self) -> dict[str, float]:
        return {}


class ScriptedTool(Search):
    """Finds one passage, ``A B born C D``, whatever is asked."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, str]] = []

    async def search(self, query: str, corpus: str) -> ToolResult:
        self.calls.append((query, corpus))
        return ToolResult((Passage("p1", "", "A B born C D"),))


class Answers(Search):
    """A search that a function does: (query, corpus) to a result."""

    def __init__(self, search: Callable):
        super().__init__()
        self._search = search

    async def search(self, query: str, corpus: str) -> ToolResult:
        return await self._search(query, corpus)


def tools_of(tool) -> Tools:
    """One tool, or one function that searches, as the tools of a run."""
    return Tools([tool if isinstance(tool, Tool) else Answers(tool)])
