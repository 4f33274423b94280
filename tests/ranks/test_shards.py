"""A vocabulary split over two processes gives what the whole one does: tests/ranks/shards.py."""

import pytest

from tests.ranks.launch import run
from tests.ranks.shards import RANKS

pytest.importorskip("triton")


def test_a_vocabulary_split_over_two_processes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert all(text.endswith("done\n") for text in run(["-m", "tests.ranks.shards"], RANKS))
