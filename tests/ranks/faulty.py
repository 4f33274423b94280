"""``python -m tests.ranks.faulty RANK STEP train ...``: the command line; sampling fails on one rank at one step."""

from __future__ import annotations

import os
import sys

from igpo_fast import train
from igpo_fast.cli import main
from igpo_fast.errors import EngineError

rank, step = sys.argv[1:3]
del sys.argv[1:3]
sound = train.finished_groups


def faulty(agent, questions, group_size, number, **options):
    if os.environ["RANK"] == rank and number == int(step):
        raise EngineError(f"step {step}: planted")
    yield from sound(agent, questions, group_size, number, **options)


train.finished_groups = faulty
main()
