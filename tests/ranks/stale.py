"""``python -m tests.ranks.stale RANK SYNC train ...``: the command line; on one rank vLLM misses one sync.

SYNC 0 is the one before the first step.
"""

from __future__ import annotations

import os
import sys

from igpo_fast.cli import main
from igpo_fast.engines.vllm.colocated import VllmEngine

rank, number = sys.argv[1:3]
del sys.argv[1:3]
sound = VllmEngine._send


def stale(engine, buckets):
    missed = os.environ["RANK"] == rank and engine.version == int(number)
    sound(engine, ([] for _ in buckets) if missed else buckets)


VllmEngine._send = stale
main()
