"""heartbeat.py: who is silent is named, who is done is not, and whoever was stopped itself blames nobody."""

from __future__ import annotations

import threading
import time

import pytest
import torch.distributed as dist

from igpo_fast import heartbeat
from igpo_fast.heartbeat import Heartbeat


class Ranks:
    """Three ranks of one process at a store; ``named`` are those that rank 0 found silent."""

    def __init__(self):
        self.store, self.named, self.found = dist.HashStore(), [], threading.Event()
        self.beats = [Heartbeat(self.store, rank, 3, self.silent) for rank in range(3)]

    def silent(self, stuck):
        self.named += stuck
        self.found.set()

    def wait_for_beats(self, rank, count):
        """Until ``rank`` has beaten ``count`` times."""
        until = time.monotonic() + 60
        while int(self.store.get(f"beat/{rank}")) < count:
            assert time.monotonic() < until
            time.sleep(heartbeat.BEAT)


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT", 0.02)
    made = Ranks()
    yield made
    for beats in made.beats:
        beats._over.set()


def test_the_silent_one_is_named(ranks):
    for rank in (0, 2):
        ranks.beats[rank].start()
    assert ranks.found.wait(60)
    assert set(ranks.named) == {1}


def test_one_that_falls_silent_later_is_named(ranks):
    for rank in range(3):
        ranks.beats[rank].start()
    ranks.wait_for_beats(0, 3 * heartbeat.LIMIT)
    assert not ranks.named
    ranks.beats[2]._keys = [*ranks.beats[2]._keys[:2], "elsewhere"]
    assert ranks.found.wait(60)
    assert set(ranks.named) == {2}


def test_one_that_is_done_is_not(ranks):
    for rank in range(3):
        ranks.beats[rank].start()
    for rank in (1, 2):
        ranks.beats[rank]._end()
    ranks.wait_for_beats(0, 5 * heartbeat.LIMIT)
    assert not ranks.named


def test_a_store_that_is_gone_ends_the_watch(ranks):
    """The first rank has it: the others' next exchange says that it is gone."""

    class Gone:
        def set(self, key, value):
            raise dist.DistNetworkError("connection closed")

    ranks.beats[1]._store = Gone()
    ranks.beats[1].start()
    assert ranks.beats[1]._over.wait(60)
    for thread in ranks.beats[1]._threads:
        thread.join(60)
    assert not ranks.named


def test_a_store_that_does_not_answer_is_its_hosts_silence(ranks):
    asked = threading.Event()

    class Stopped:
        def set(self, key, value):
            asked.wait()
            raise dist.DistNetworkError("connection closed")

    ranks.beats[1]._store = Stopped()
    ranks.beats[1].start()
    assert ranks.found.wait(60)
    asked.set()
    assert set(ranks.named) == {0}
