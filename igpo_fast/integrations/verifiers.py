"""Environments of the verifiers library (0.4) inside a run: its tasks are the questions, its toolsets the tools, its
metrics and rewards the outcome.

The policy samples in this package's own rollouts, token by token as ever. So what verifiers does in its agents' loop
(``Env.run``, interceptors, harnesses, containers) has no place here, and such environments are refused. Toolsets, which
verifiers serves in processes of their own, run in this one: they are the environment's own code.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import functools
import inspect
import json
import random
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import verifiers.v1 as vf
from mcp.server.mcpserver import MCPServer
from verifiers.v1.harnesses.utils.mcp import mcp_content_to_chat_content
from verifiers.v1.mcp.server import _call_state
from verifiers.v1.runtimes import provision_runtime
from verifiers.v1.state import state_cls
from verifiers.v1.utils.decorators import discover_decorated, invoke
from verifiers.v1.utils.generic import concrete_type

from igpo_fast.config import Config
from igpo_fast.data.fields import BadField, texts
from igpo_fast.data.load import Data, hold_out, trained_on
from igpo_fast.errors import InputError, RunError, ToolError, reason_of
from igpo_fast.extend import is_spec, named
from igpo_fast.rollouts.outcome import OWN
from igpo_fast.rollouts.tools.processes import CallError
from igpo_fast.rollouts.tools.user import UserTool
from igpo_fast.types import ANSWER, ENVIRONMENT, REWARD, Action, Question, Rollout, ToolResult

STOPS = {"": "agent_completed", "turns": "max_turns", "tokens": "max_total_tokens"}
"""``Rollout.truncated`` -> verifiers' name for what stopped a trace."""
Functions = Mapping[str, tuple[MCPServer, Any]]
"""The name that the policy calls -> the server that has the function, and the function as mcp describes it."""


class Environment:
    """The taskset that ``data.environment`` names, loaded once per run.

    Raises:
        InputError: there is no such taskset, it does not load, or a run cannot do what it needs.
    """

    def __init__(self, config: Config):
        settings = config.data
        self._where = f"data.environment={settings.environment}"
        taskset, module = self._taskset(settings.environment_args)
        tasks = self._tasks(taskset)
        self._refuse_own_loops(taskset, module, tasks[0])
        self._task_of = self._by_id(tasks, "")
        answered = config.algorithm.needs_answers
        train = tuple(self._question(id, task.data, answered) for id, task in self._task_of.items())
        warnings = []
        if settings.environment_eval:
            others = self._tasks(self._taskset(settings.environment_args | settings.environment_eval)[0])
            if len(others) > config.eval.questions:  # a fixed random part, because many are sorted
                others = random.Random(0).sample(others, config.eval.questions)
            held_out = self._by_id(others, "eval-")
            self._task_of |= held_out
            evaluation = tuple(self._question(id, task.data, answered) for id, task in held_out.items())
            warnings += trained_on(train, evaluation, "data.environment_eval", "data.environment")
        else:
            train, evaluation = hold_out(train, config.eval.questions, self._where, "data.environment_eval={...}")
        stops = [hook.__name__ for hook in tasks[0].hooks("stop")]
        if stops:
            warnings.append(
                f"{self._where}: its stop conditions ({', '.join(stops)}) are not asked; limits of section rollout and "
                "the answer end rollouts"
            )
        self.data = Data(train, evaluation, {}, tuple(warnings))
        """Its questions, without passages."""
        try:
            self._shared, schemas = asyncio.run(self._serve(taskset, tasks[0]))
        except RunError:
            raise
        except Exception as error:
            raise self._refusal(f"its toolsets do not start ({reason_of(error)})", "correct them") from error
        self._schemas = tuple(schemas)

    def tool(self, seconds: float, max_characters: int) -> EnvironmentTool:
        """The tool ``environment``: all functions of the toolsets, and the judge of rollouts."""
        return EnvironmentTool(self._where, self._task_of, self._shared, self._schemas, seconds, max_characters)

    def _refusal(self, fault: str, remedy: str) -> InputError:
        return InputError(f"{self._where}: {fault}; {remedy}")

    def _taskset(self, given: Mapping[str, Any]) -> tuple[vf.Taskset, ModuleType]:
        """The taskset with its settings, and the module that exports it."""
        spec = self._where.partition("=")[2]
        try:
            if not is_spec(spec):
                made, module = vf.load_taskset(vf.taskset_config_type(spec)(id=spec, **given)), vf.import_taskset(spec)
                return made, module
            made = named(spec, "data.environment")
            if isinstance(made, type) and issubclass(made, vf.Taskset):
                settings = concrete_type(made, vf.TasksetConfig, origin=vf.Taskset) or vf.TasksetConfig
                made = made(settings(**given))
            else:
                made = made(**given)
        except RunError:
            raise
        except Exception as error:
            raise self._refusal(
                f"it does not load ({reason_of(error)})", "correct it, or data.environment_args"
            ) from error
        if not isinstance(made, vf.Taskset):
            raise self._refusal(f"gives {type(made).__name__}, not a verifiers.v1.Taskset", "return one")
        return made, sys.modules[type(made).__module__]

    def _tasks(self, taskset: vf.Taskset) -> list[vf.Task]:
        if not taskset.bounded:
            raise self._refusal(
                "it has no end", "name a function that returns a part of it, such as `taskset.take(1000)`"
            )
        try:
            tasks = list(taskset)
        except Exception as error:
            raise self._refusal(f"its tasks do not load ({reason_of(error)})", "correct it") from error
        if not tasks:
            raise self._refusal("it has no tasks", "give one with tasks")
        return tasks

    def _by_id(self, tasks: Sequence[vf.Task], prefix: str) -> dict[str, vf.Task]:
        found = {f"{prefix}{task.data.idx if task.data.id is None else task.data.id}": task for task in tasks}
        if len(found) < len(tasks):
            raise self._refusal("two tasks have one id", "make TaskData.id unique")
        return found

    def _refuse_own_loops(self, taskset: vf.Taskset, module: ModuleType, task: vf.Task) -> None:
        """Refuse what happens between verifiers' agents and their models, and has no place in a rollout here."""
        for own in vars(module).values():
            if not (isinstance(own, type) and issubclass(own, vf.Env)) or own.__module__.startswith("verifiers."):
                continue
            for name in ("run", "finalize"):
                if getattr(own, name) is not getattr(vf.SingleAgentEnv, name):
                    raise self._refusal(
                        f"{own.__name__}.{name} drives the agents itself, and rollouts here are this package's",
                        "take an environment of one agent with tools",
                    )
        if hooks := discover_decorated(task, "intercept"):
            raise self._refusal(
                f"its interceptor {hooks[0].__name__} rewrites messages, and rollouts here keep the sampled tokens",
                "take an environment without",
            )
        if task.NEEDS_CONTAINER:
            raise self._refusal(f"{type(task).__name__} needs a container", "take one that runs on the host")
        for toolset in (*type(taskset).toolsets(taskset.config), *type(task).toolsets(task.config)):
            placed = toolset.config
            elsewhere = (
                placed.url and f"at {placed.url}",
                getattr(placed, "colocated", False) and "in the agent's runtime",
                placed.runtime.type != "subprocess" and f"in {placed.runtime.type}",
            )
            if where := next(filter(None, elsewhere), ""):
                raise self._refusal(
                    f"its toolset {type(toolset).__name__} runs {where}, and tools here run in the trainer's process",
                    "set its config's url, colocated and runtime to their defaults",
                )

    def _question(self, id: str, data: vf.TaskData, answered: bool) -> Question:
        """A task as a question: the system prompt, if any, before the prompt, so that the dialect's own instructions
        stay; ``TaskData.answer``, if there is one, as the accepted answer."""
        system, asked = [data.system_prompt or ""], data.prompt
        if not isinstance(asked, str):
            *before, last = asked or [None]
            if not isinstance(last, vf.UserMessage) or any(not isinstance(m, vf.SystemMessage) for m in before):
                raise self._refusal(
                    f"the prompt of task {id} is not one message of the user", "take tasks whose prompt is a text"
                )
            if any(not isinstance(message.content, str) for message in (*before, last)):
                raise self._refusal(f"the prompt of task {id} is no plain text", "take tasks of text")
            system, asked = [*system, *(message.content for message in before)], last.content
        try:
            given = texts(getattr(data, "answer", None), "answer")
        except BadField as error:
            raise InputError(f"{self._where}: task {id}: {error}") from None
        answers = tuple(dict.fromkeys(filter(None, map(str.strip, given))))
        if answered and not answers:
            raise self._refusal(
                f"task {id} has no `answer` in its TaskData, which gains compare with",
                "add the field, or take an outcome-only algorithm such as algorithm.name=grpo",
            )
        return Question(id, "\n\n".join(filter(None, (*system, asked))), answers)

    async def _serve(self, taskset: vf.Taskset, task: vf.Task) -> tuple[Functions, list[dict[str, Any]]]:
        """The functions that all rollouts share, and the schemas of all, those per rollout as the first task has
        them."""
        shared: dict[str, tuple[MCPServer, Any]] = {}
        for toolset in type(taskset).toolsets(taskset.config):
            shared |= self._new(await _serve(toolset), shared)
        functions = dict(shared)
        async with AsyncExitStack() as ends:
            for toolset in type(task).toolsets(task.config):
                ends.push_async_callback(toolset._exit_stack.aclose)
                functions |= self._new(await _serve(toolset, task.data), functions)
        schemas = [
            {"name": name, "description": function.description or name, "parameters": function.input_schema}
            for name, (_, function) in functions.items()
        ]
        return shared, [{"type": "function", "function": schema} for schema in schemas]

    def _new(self, functions: Functions, known: Functions) -> Functions:
        if twice := sorted(functions.keys() & known.keys()):
            raise self._refusal(f"two of its functions are named {twice[0]}", "rename one")
        return functions


@dataclass
class Opened:
    """A task in one rollout."""

    task: vf.Task
    trace: vf.Trace
    runtime: vf.Runtime | None = None
    functions: dict[str, tuple[MCPServer, Any]] = field(default_factory=dict)
    replies: dict[int, str] = field(default_factory=dict)
    """What each call got, by the ``id`` of its action."""
    ends: AsyncExitStack = field(default_factory=AsyncExitStack)


class EnvironmentTool(UserTool):
    """The functions of an environment's toolsets, and what its rewards and metrics say of a rollout.

    Each rollout has a trace of its own, with its own state, which is what ``Toolset.state`` is during its calls.

    Args:
        where: names the environment, for messages.
        tasks: by the ids of questions.
        shared: functions of the toolsets that all rollouts share.
    """

    def __init__(
        self,
        where: str,
        tasks: Mapping[str, vf.Task],
        shared: Functions,
        schemas: Sequence[Mapping[str, Any]],
        seconds: float,
        max_characters: int,
    ):
        super().__init__(ENVIRONMENT, Calls(schemas, seconds, max_characters))
        self._where, self._tasks, self._shared = where, tasks, shared

    async def open(self, question: Question) -> Opened:
        """Raises:
        ToolError: the task or one of its toolsets cannot be set up.
        """
        task = self._tasks[question.id]
        made = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
        agent = vf.AgentInfo(config=vf.AgentConfig(runtime=vf.SubprocessConfig()))
        opened = Opened(task, vf.Trace(task=made, agent=agent, state=state_cls(type(task))()))
        opened.functions.update(self._shared)
        try:
            if _wants_runtime(task):
                box = provision_runtime(vf.SubprocessConfig(), env=task.runtime_env())
                opened.runtime = await opened.ends.enter_async_context(box)
            await invoke(task.setup, {"trace": opened.trace, "runtime": opened.runtime})
            for toolset in type(task).toolsets(task.config):
                opened.ends.push_async_callback(toolset._exit_stack.aclose)
                opened.functions.update(await _serve(toolset, task.data))
        except Exception as error:
            await opened.ends.aclose()
            raise ToolError(
                f"{self._where}: task {question.id} cannot be set up ({type(error).__name__}: {reason_of(error)}); "
                "correct the environment"
            ) from error
        return opened

    async def call(self, opened: Opened, action: Action) -> ToolResult:
        result = await super().call(opened, action)
        opened.replies[id(action)] = result.failure or result.text
        return result

    async def outcome(self, opened: Opened, rollout: Rollout) -> Mapping[str, float]:
        """``reward``, the weighted sum of the task's rewards and judges, and each of them and of its metrics by name;
        a name that means something else here gets ``environment_`` before it."""
        trace, task = opened.trace, opened.task
        write_trace(trace, rollout, opened.replies)
        await invoke(task.finalize, {"trace": trace, "runtime": opened.runtime})
        await task.score(trace, opened.runtime)
        scores = {name: reward.score for name, reward in trace.rewards.items() if reward is not None}
        scores |= {name: number for name, number in trace.metrics.items() if number is not None}
        taken = {name for name in scores if name == REWARD or OWN.fullmatch(name)}
        return {REWARD: trace.reward} | {
            f"{ENVIRONMENT}_{name}" if name in taken else name: score for name, score in scores.items()
        }

    async def close(self, opened: Opened) -> None:
        await opened.ends.aclose()


class Calls:
    """Calls of an environment's functions, in this process.

    Args:
        seconds: limit of a call. A function that is not asynchronous runs in a thread, which cannot be ended: it is
            left alone when the time is up.
        max_characters: most characters of a result.
    """

    def __init__(self, schemas: Sequence[Mapping[str, Any]], seconds: float, max_characters: int):
        self.schemas = schemas
        self._seconds, self._max_characters = seconds, max_characters

    async def call(self, opened: Opened, name: str, arguments: Mapping[str, Any]) -> str:
        """The result as a text.

        Raises:
            CallError: the function raised, took too long, or returned too much or no text.
        """
        server, function = opened.functions[name]
        token = _call_state.set(opened.trace.state)
        try:
            async with asyncio.timeout(self._seconds):
                result = await server.call_tool(function.name, dict(arguments))
        except TimeoutError:
            raise CallError("timeouts", f"{name} took longer than {self._seconds:g} s") from None
        except Exception as error:
            cause = error.__cause__ or error  # mcp wraps what a function raises
            raise CallError("raised", f"{type(cause).__name__}: {reason_of(cause)}") from error
        finally:
            _call_state.reset(token)
        content = mcp_content_to_chat_content(result.content) if result.content else ""
        if not isinstance(content, str):
            raise CallError("malformed", f"{name} returned an image")
        if result.is_error:
            raise CallError("raised", content)
        if len(content) > self._max_characters:
            raise CallError("too_large", f"{name} returned {len(content):,} characters")
        return content

    async def aclose(self) -> None:
        """Nothing is kept between calls."""


def write_trace(trace: vf.Trace, rollout: Rollout, replies: Mapping[int, str]) -> None:
    """Write a rollout into a trace as verifiers' own agents would have: its messages, calls of tools and what ended
    it.

    ``Trace.last_reply`` is the answer: between <answer> and </answer> if the question itself asks for these, else
    alone; or the text of a last turn that gave none. What else a turn holds is its ``reasoning_content``.

    Args:
        replies: what each call got, by the ``id`` of its action.
    """
    data = trace.task.data
    prompt = [vf.UserMessage(content=data.prompt)] if isinstance(data.prompt, str) else list(data.prompt)
    if data.system_prompt:
        prompt.insert(0, vf.SystemMessage(content=data.system_prompt))
    reply = "<answer>{}</answer>" if "<answer>" in rollout.question.question else "{}"
    messages = [(message, False) for message in prompt]
    for number, turn in enumerate(rollout.turns):
        said, calls = turn.text, []
        if turn.action == ANSWER:
            said = reply.replace("{}", turn.argument)
        elif turn.calls:
            said, calls = None, [
                vf.ToolCall(id=f"call_{number}_{i}", name=a.tool, arguments=json.dumps(dict(a.arguments)))
                for i, a in enumerate(turn.actions)
            ]  # fmt: skip
        thought = turn.text if turn.actions else None
        messages.append((vf.AssistantMessage(content=said, reasoning_content=thought, tool_calls=calls or None), True))
        if len(turn.response_ids):
            found = (replies.get(id(action), turn.response) for action in turn.actions)
            results = [
                vf.ToolMessage(tool_call_id=call.id, content=text, name=call.name)
                for call, text in zip(calls, found, strict=False)
            ]
            messages += [(message, False) for message in results or [vf.UserMessage(content=turn.response)]]
    trace.nodes = [
        vf.MessageNode(parent=place - 1 if place else None, message=message, sampled=sampled)
        for place, (message, sampled) in enumerate(messages)
    ]
    places = [place for place, (_, sampled) in enumerate(messages) if sampled]
    trace.calls = [
        vf.ModelCall(node=place, finish_reason="tool_calls" if turn.calls else "stop")
        for place, turn in zip(places, rollout.turns, strict=True)
    ]
    if rollout.truncated == "tokens":
        trace.calls[-1].finish_reason = "length"
    trace.stop(STOPS[rollout.truncated])
    trace.ok = True


async def _serve(toolset: vf.Toolset, data: vf.TaskData | None = None) -> Functions:
    """The functions of a toolset that is set up as in a server of its own, but in this process. Its state is set around
    each call (``Calls.call``), in place of ``Toolset._with_state``, which fetches it from elsewhere."""
    toolset._with_state = lambda function: function if inspect.iscoroutinefunction(function) else _in_thread(function)
    await toolset.setup()
    if data is not None:
        await toolset.setup_task(data)
    name = toolset.server_name
    server = MCPServer(name or type(toolset).__name__)
    toolset.register(server)
    prefix = f"{name}_" if name else ""  # as verifiers' agents call them
    return {prefix + function.name: (server, function) for function in await server.list_tools()}


def _in_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """An asynchronous form of a function, in a daemon thread: one that hangs holds up neither others nor the end of the
    run, as threads of a pool would."""

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        future: concurrent.futures.Future = concurrent.futures.Future()
        future.set_running_or_notify_cancel()
        context = contextvars.copy_context()

        def run() -> None:
            try:
                future.set_result(context.run(function, *args, **kwargs))
            except BaseException as error:  # a SystemExit would end the run
                alike = error if isinstance(error, Exception) else RuntimeError(repr(error))
                future.set_exception(alike)

        threading.Thread(target=run, daemon=True).start()
        return await asyncio.wrap_future(future)

    return call


def _wants_runtime(task: vf.Task) -> bool:
    """Whether what the task does before, after or to judge a rollout takes a runtime: a folder and subprocesses."""
    hooks = [*task.hooks("metric"), *task.hooks("reward"), *(judge.score for judge in task.plugged_judges())]
    base = (name for name in ("setup", "finalize") if getattr(type(task), name) is not getattr(vf.Task, name))
    hooks += [getattr(task, name) for name in base]
    return any("runtime" in inspect.signature(hook).parameters for hook in hooks)
