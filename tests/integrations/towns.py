"""An environment of verifiers in one file: which river flows through a town? The tool looks it up, once per town."""

import verifiers.v1 as vf
from pydantic import Field

RIVERS = {"Bonn": "Rhine", "Prague": "Vltava", "Rome": "Tiber", "Vienna": "Danube", "Paris": "Seine", "Turin": "Po"}


class TownsState(vf.State):
    asked: list[str] = Field(default_factory=list)


class TownsToolset(vf.Toolset[vf.ToolsetConfig, TownsState]):
    TOOL_PREFIX = "towns"

    async def setup_task(self, task: vf.TaskData) -> None:
        self.town = task.town

    @vf.tool
    def lookup(self, name: str) -> str:
        """Look up the river of a town."""
        if name in self.state.asked:
            raise ValueError(f"{name} was asked before")
        self.state.asked.append(name)
        return RIVERS.get(name, "no such town")

    @vf.tool(name="hint")
    async def first_letter(self) -> dict[str, str]:
        """Tell the first letter of the river."""
        return {"letter": RIVERS[self.town][0]}


class TownsTaskConfig(vf.TaskConfig):
    tools: vf.ToolsetConfig = vf.ToolsetConfig()


class TownsData(vf.TaskData):
    town: str
    answer: str


class TownsTask(vf.Task[TownsData, TownsState, TownsTaskConfig]):
    @classmethod
    def toolsets(cls, config: TownsTaskConfig) -> list[vf.Toolset]:
        return [TownsToolset(config.tools)]

    async def setup(self, trace: vf.Trace) -> None:
        trace.info["setup"] = True

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply == self.data.answer)

    @vf.reward(weight=0.5)
    async def looked_up(self, trace: vf.Trace) -> float:
        return float(self.data.town in trace.state.asked and trace.info["setup"])

    @vf.metric
    async def turns(self, trace: vf.Trace) -> float:
        return trace.num_turns

    @vf.metric
    async def found(self, trace: vf.Trace) -> float:
        return sum(message.content == self.data.answer for message in trace.tool_messages)

    @vf.stop
    async def long(self, trace: vf.Trace) -> bool:
        return trace.num_turns >= 10


class TownsConfig(vf.TasksetConfig):
    task: TownsTaskConfig = TownsTaskConfig()
    last: bool = False


class TownsTaskset(vf.Taskset[TownsTask, TownsConfig]):
    def load(self) -> list[TownsTask]:
        towns = list(RIVERS)[4:] if self.config.last else list(RIVERS)[:4]
        return [
            TownsTask(
                TownsData(
                    id=town, town=town, answer=RIVERS[town], system_prompt="Be brief.",
                    prompt=f"Which river flows through {town}?",
                ),
                self.config.task,
            )
            for town in towns
        ]  # fmt: skip


__all__ = ["TownsTaskset"]
