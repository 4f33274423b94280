"""Makes the tools of a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from igpo_fast.config import Config, ToolLimits
from igpo_fast.data.load import Data
from igpo_fast.errors import InputError
from igpo_fast.rollouts.tools.base import Tool, Tools
from igpo_fast.rollouts.tools.calculate import Calculate
from igpo_fast.rollouts.tools.lookup import Lookup
from igpo_fast.rollouts.tools.processes import Processes
from igpo_fast.rollouts.tools.python import ISOLATION, Limits, isolation, python_processes
from igpo_fast.rollouts.tools.search import Search, make_search
from igpo_fast.rollouts.tools.user import UserTool
from igpo_fast.rollouts.tools.visit import VISIT, Visit
from igpo_fast.types import CALCULATE, ENVIRONMENT, LOOKUP, SEARCH

PYTHON = "python"
SHIPPED = (SEARCH, VISIT, PYTHON, LOOKUP, CALCULATE)
"""Names of the tools that come with this package."""


def make_tools(
    config: Config,
    data: Data,
    search: Search | None = None,
    environment: Callable[[float, int], Tool] | None = None,
) -> Tools:
    """The tools of a run.

    Args:
        search: the tool ``search`` in place of the configured one.
        environment: makes the tool ``environment`` from the seconds that a call may take and the characters of its
            result; None if the data come from no environment.
    Raises:
        InputError: a tool that does not exist or does not describe itself.
    """
    limits = config.tools
    made: dict[str, Tool] = {}
    for entry in config.rollout.tools:
        name = entry.rpartition(":")[2]
        own = limits.limits.get(name, ToolLimits())
        if name in made:
            raise InputError(f"rollout.tools: two tools are named {name!r}; rename one")
        seconds = limits.seconds if own.seconds is None else own.seconds
        characters = limits.max_characters if own.max_characters is None else own.max_characters
        if entry == SEARCH:
            made[name] = search or make_search(config, data)
        elif entry == VISIT:
            if config.search.url:
                raise InputError(
                    "rollout.tools: visit reads passages in this process, and search.url's are on a server; give "
                    "data.corpus in its place, or leave visit out"
                )
            made[name] = Visit(data.collections)
        elif entry == LOOKUP:
            made[name] = Lookup(data.tables)
        elif entry == CALCULATE:
            made[name] = Calculate()
        elif entry == ENVIRONMENT and environment:
            made[name] = environment(seconds, characters)
        elif entry == PYTHON:
            made[name] = make_python(Limits(seconds=seconds, max_characters=characters))
        elif ":" in entry:
            try:
                processes = Processes(entry, seconds=seconds, max_characters=characters)
            except InputError as error:
                raise InputError(f"rollout.tools: {error}") from None
            made[name] = UserTool(name, processes)
        else:
            raise InputError(
                f"rollout.tools: there is no tool {entry!r}; give {', '.join(SHIPPED)}, or package.module:function or "
                "path/to/file.py:function for one of your own"
            )
    if unknown := sorted(limits.limits.keys() - made.keys()):
        raise InputError(f"tools.limits: no tool is named {unknown[0]!r}; the run's are {', '.join(made)}")
    calls = {name: own.calls for name, own in limits.limits.items() if own.calls is not None}
    return Tools(list(made.values()), {name: calls.get(name, limits.calls) for name in made})


def make_python(limits: Limits) -> UserTool:
    """The tool ``python``, kept from whatever this machine lets it be kept from (python.py)."""
    allowed = isolation()
    made = UserTool(PYTHON, python_processes(replace(limits, isolated=allowed)))
    if missing := [name for name in ISOLATION if name not in allowed]:
        made.caution = (
            f"rollout.tools=python: this kernel does not keep programs from {' and '.join(missing)} "
            "(docs/extending.md); run in a container if they may be hostile"
        )
    return made
