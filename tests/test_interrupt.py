"""interrupt.py: the first signal is answered at once, the second ends the run without a word of asyncio's."""

import asyncio
import gc
import os
import signal

import numpy as np
import pytest

from igpo_fast.engines.base import Request, Sampling
from igpo_fast.engines.torch import TorchEngine
from igpo_fast.heartbeat import STOP
from igpo_fast.model import build
from igpo_fast.run.interrupt import stop_requested


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, "press Ctrl-C again"), (signal.SIGTERM, "send SIGTERM again")]
)
def test_the_first_signal_is_answered_at_once(capfd, number, again):
    ended = []
    before = signal.signal(number, lambda *_: ended.append(True))
    try:
        with stop_requested() as stop:
            os.kill(os.getpid(), number)
            assert stop.is_set() and not ended
            assert capfd.readouterr().err == f"finishing this step, which is then saved; {again} to stop now\n"
            os.kill(os.getpid(), number)
            assert ended and not capfd.readouterr().err
    finally:
        signal.signal(number, before)


def test_the_second_may_be_the_other_signal(capfd):
    ended = []
    before = signal.signal(signal.SIGTERM, lambda *_: ended.append(True))
    try:
        with stop_requested() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.is_set() and not ended
            os.kill(os.getpid(), signal.SIGTERM)
            assert ended
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_one_that_meets_the_engine_is_not_logged_by_asyncio(monkeypatch, caplog):
    lm = build(17, hidden_size=8, layers=1, heads=2, kv_heads=2, ffn_size=8, max_tokens=16, tie_embeddings=True, seed=0)
    engine = TorchEngine(lm, max_slots=1, max_tokens=16)

    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "_step", interrupted)
    request = Request(
        key=(0,), ids=np.array([1, 2], np.int32), max_tokens=2, stop_ids=(), stop_strings=(), sampling=Sampling()
    )
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(engine.generate(request))
    engine._pump = None
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_the_launcher_may_ask_however_often(capfd):
    """Ctrl-C reaches launcher and ranks alike: what the launcher passes on is no second Ctrl-C."""
    ended = []
    before = signal.signal(signal.SIGINT, lambda *_: ended.append(True))
    try:
        with stop_requested() as stop:
            for number in (STOP, STOP, signal.SIGINT, STOP):
                os.kill(os.getpid(), number)
                assert stop.is_set() and not ended
            assert capfd.readouterr().err.count("finishing this step, which is then saved\n") == 1
            os.kill(os.getpid(), signal.SIGINT)
            assert ended
    finally:
        signal.signal(signal.SIGINT, before)
    assert signal.getsignal(STOP) is signal.SIG_DFL
