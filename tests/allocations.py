"""How much memory a call takes, for tests and benches."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")
CPU = 0
"""c10's DeviceType."""


def peak_bytes(run: Callable[[], Result], device: str = "cpu") -> tuple[int, Result]:
    """Most bytes that were live at once of those ``run()`` allocated on ``device``, its result's included; the result.

    torch's allocator is asked, so compiled code and the temporaries of C++ operators count; what BLAS and oneDNN take
    for themselves does not. The profiler slows ``run`` on a CPU: time another call.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        trace = json.loads(Path(folder, "trace.json").read_text())
    events = [e for e in trace["traceEvents"] if e["name"] == "[memory]" and e["args"]["Device Type"] == CPU]
    events.sort(key=lambda event: event["ts"])
    return max(accumulate((event["args"]["Bytes"] for event in events), initial=0)), result
