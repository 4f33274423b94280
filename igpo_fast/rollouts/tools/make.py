"""Makes the tools of a run."""

from __future__ import annotations

from igpo_fast.config import Config
from igpo_fast.data.load import Data
from igpo_fast.errors import InputError
from igpo_fast.rollouts.tools.base import Tool, Tools
from igpo_fast.rollouts.tools.calculate import Calculate
from igpo_fast.rollouts.tools.lookup import Lookup
from igpo_fast.rollouts.tools.search import Search, make_search
from igpo_fast.types import CALCULATE, LOOKUP, SEARCH


def make_tools(config: Config, data: Data, search: Search | None = None) -> Tools:
    """The tools of a run.

    Args:
        search: the tool ``search`` in place of the configured one.
    Raises:
        InputError: a tool that does not exist or does not describe itself.
    """
    made: list[Tool] = []
    for name in config.rollout.tools:
        if name == SEARCH:
            made.append(search or make_search(config, data))
        elif name == LOOKUP:
            made.append(Lookup(data.tables))
        elif name == CALCULATE:
            made.append(Calculate())
        else:
            raise InputError(
                f"rollout.tools: there is no tool {name!r}; give search, lookup, calculate, or package.module:function"
            )
    tools = Tools(made)
    return tools
