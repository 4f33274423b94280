"""The made-up world as an environment of verifiers, for whatever runs these: the taskset ``igpo_search_world``, with
this folder on PYTHONPATH. All rollouts share one BM25 server; each searches the world that its own state names.

igpo-fast train --config configs/quickstart.yaml data.source=verifiers model.tokenizer=bpe \
    data.environment=examples/verifiers/igpo_search_world.py:SearchWorldTaskset 'data.environment_eval={kind: eval}'
"""

import verifiers.v1 as vf

from igpo_fast.config import World
from igpo_fast.data.world import make_worlds
from igpo_fast.rollouts.tools.search import Bm25Search
from igpo_fast.update.rewards import exact_match, f1_score

__all__ = ["SearchWorldTaskset"]


class SearchState(vf.State):
    world: str = ""


class SearchConfig(vf.SharedToolsetConfig):
    worlds: World = World()
    top_k: int = 2


class SearchToolset(vf.Toolset[SearchConfig, SearchState]):
    TOOL_PREFIX = None

    async def setup(self) -> None:
        worlds = make_worlds(self.config.worlds, "train") + make_worlds(self.config.worlds, "eval")
        self.bm25 = Bm25Search({world.name: world.passages for world in worlds}, self.config.top_k)

    @vf.tool
    async def search(self, query: str) -> str:
        """Search a collection of passages; returns the best ones."""
        found = await self.bm25.search(query, self.state.world)
        return "\n\n".join(f"{passage.title}\n{passage.text}" for passage in found.passages)


class SearchWorldData(vf.TaskData):
    world: str
    answer: str


class SearchWorldTask(vf.Task[SearchWorldData, SearchState]):
    async def setup(self, trace: vf.Trace) -> None:
        trace.state.world = self.data.world

    @vf.reward
    async def f1(self, trace: vf.Trace) -> float:
        return f1_score(trace.last_reply, [self.data.answer])

    @vf.metric
    async def em(self, trace: vf.Trace) -> float:
        return exact_match(trace.last_reply, [self.data.answer])


class SearchWorldConfig(vf.TasksetConfig):
    kind: str = "train"
    instructions: str | None = "Search for the facts, one at a time. Answer with the name alone."
    tools: SearchConfig = SearchConfig()


class SearchWorldTaskset(vf.Taskset[SearchWorldTask, SearchWorldConfig]):
    @classmethod
    def toolsets(cls, config: SearchWorldConfig) -> list[vf.Toolset]:
        return [SearchToolset(config.tools)]

    def load(self) -> list[SearchWorldTask]:
        kind, words = self.config.kind, self.config.instructions
        questions = [question for world in make_worlds(self.config.tools.worlds, kind) for question in world.questions]
        made = (
            SearchWorldData(id=q.id, prompt=q.question, system_prompt=words, answer=q.answers[0], world=q.corpus)
            for q in questions
        )
        return [SearchWorldTask(data, self.config.task) for data in made]


if __name__ == "__main__":
    SearchToolset.run()
