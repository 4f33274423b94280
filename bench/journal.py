"""A pytest plugin that writes a JSON line whenever a test begins or ends, so that a run killed at any moment tells how
far it came, and the next run of the same step goes on behind the test that it had begun.

    pytest -p bench.journal --journal FILE --step NAME ...

A test whose error leaves the device unusable ends its process, for every later test would fail; so does one that
outlasts pytest's ``faulthandler_timeout`` (with ``faulthandler_exit_on_timeout``). Under pytest-xdist another worker
takes its place.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

WHY = 1500
"""Characters kept of a failure's end."""


def pytest_addoption(parser):
    parser.addoption("--journal", type=Path, help="append a JSON line per test that begins or ends")
    parser.addoption("--step", default="", help="name of this run in the journal")


def pytest_configure(config):
    if not (path := config.getoption("--journal")):
        return
    config.pluginmanager.register(Leaver())
    if hasattr(config, "workerinput"):
        config.begun = set(config.workerinput["begun"])
        return
    config.begun = begun(path, config.getoption("--step"))
    config.pluginmanager.register(Journal(path, config.getoption("--step")))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    # All workers collect the same tests, later ones, too.
    node.workerinput["begun"] = sorted(getattr(node.config, "begun", ()))


def pytest_collection_modifyitems(config, items):
    if left := getattr(config, "begun", None):
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in left])
        items[:] = [item for item in items if item.nodeid not in left]


def lines(path: Path, step: str) -> list[dict]:
    """The step's lines; one that a kill cut short is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [row for row in found if row.get("step") == step]


def begun(path: Path, step: str) -> set[str]:
    return {row["test"] for row in lines(path, step) if row.get("outcome") == "begun"}


class Journal:
    """Lines ``{"step", "test", "outcome"}``, with seconds and the reason where a test has ended; the last of a run that
    came to its end has ``"end"``."""

    def __init__(self, path: Path, step: str):
        self.path, self.step = path, step

    def write(self, **row: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": self.step, **row}) + "\n")

    def pytest_runtest_logstart(self, nodeid):
        self.write(test=nodeid, outcome="begun")

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        why = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else report.longreprtext
        self.write(
            test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2),
            **({"why": why[-WHY:]} if why and not report.passed else {}),
        )  # fmt: skip

    def pytest_sessionfinish(self, exitstatus):
        self.write(end=int(exitstatus))


class Leaver:
    """Ends the process once the device is lost."""

    @pytest.hookimpl(trylast=True)  # after the report has been written, or sent
    def pytest_runtest_logreport(self, report):
        if report.failed and lost():
            os._exit(3)


def lost() -> bool:
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
