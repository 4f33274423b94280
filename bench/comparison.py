"""Timing of ours and its peers in turns, as figures and rows."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch

from bench.timing import DEVICE, circumstances, timed
from tests.allocations import peak_bytes

WARMUP = 1
"""Warm-up rounds, which are not counted."""


class Comparison:
    """Several implementations of one result: ``sides["ours"]`` and its peers, functions without arguments.

    First every side runs unmeasured (this compiles it), its result is compared with ours, and it runs once more for its
    memory. Then come ``rounds`` rounds: each peer once, then ours. Times are per call, the device's work included. A
    peer that raises or differs gets a row that says so, without figures; ours raises.

    Args:
        long: whether calls take many seconds: the first one's memory is measured, and no round is for warming up.
        sums: peers that are others one after another, by name: the sum of their times in a round, and the most memory.
        tokens: what a call gets through; figures then have it per second.
        clock: gives seconds; None is the wall's.
        calls: number of calls timed together, if a call takes microseconds; figures are their mean.
        graph: whether to time the device alone on a GPU (``timing.timed``).
        flops: FLOPs per call, by formula.
        agree: tolerance between results that are not None: ``torch.testing.assert_close``'s ``atol`` and
            ``rtol``, or a share of each tensor's norm and of its largest entry; None does not check.
    """

    def __init__(
        self, bench, shape, sides, *, calls=1, graph=False, flops=None, agree=None, long=False, sums=None, tokens=None,
        clock=None,
    ):  # fmt: skip
        self.bench, self.shape, self.calls, self.flops, self.tokens = bench, shape, calls, flops, tokens
        self.sums, self.warmup, self.clock = sums or {}, 0 if long else WARMUP, clock or perf_counter
        self.runs, self.peaks, self.errors = {}, {}, {}
        self.found: dict[str, dict] = {}
        expected = None
        for name in ["ours", *(peer for peer in sides if peer != "ours")]:
            try:
                self.peaks[name], result = peak_bytes(sides[name], DEVICE) if long else (0, sides[name]())
                if agree and expected is not None and result is not None:
                    hold(result, expected, agree)
                expected = result if name == "ours" else expected
                del result
                if not long:
                    self.peaks[name] = peak_bytes(sides[name], DEVICE)[0]
                self.runs[name] = timed(sides[name], calls, graph)
            except Exception as error:  # an error of a peer becomes its row
                if name == "ours":
                    raise
                self.errors[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]

    def rows(self, benchmark, rounds: int) -> list[dict]:
        """Time all sides that run, ours with pytest-benchmark's fixture; returns one row per peer."""
        peers = [name for name in self.runs if name != "ours"]
        times: dict[str, list[float]] = {name: [] for name in peers}

        def time_peers():
            for name in peers:
                start = self.clock()
                self.runs[name]()
                times[name].append((self.clock() - start) / self.calls)

        benchmark.group = self.bench
        benchmark.pedantic(self.runs["ours"], setup=time_peers, rounds=rounds, warmup_rounds=self.warmup)
        seconds = {name: np.array(times[name][self.warmup :]) for name in peers}
        seconds["ours"] = np.array(benchmark.stats.stats.data) / self.calls
        for name, parts in self.sums.items():
            if all(part in seconds for part in parts):
                seconds[name] = sum(seconds[part] for part in parts)
                self.peaks[name] = max(self.peaks[part] for part in parts)
                peers.append(name)
        self.found = {name: figures(s, self.peaks[name], self.flops, self.tokens) for name, s in seconds.items()}
        about = {**circumstances(), "shape": self.shape} | ({"flops": self.flops} if self.flops else {})
        about |= {"clock": self.clock.__name__} if self.clock is not perf_counter else {}
        rows = []
        for name in [*peers, *self.errors]:
            row = {"bench": f"{self.bench}/{name}", **about, "ours": self.found["ours"], "peer": name}
            if name in self.errors:
                rows.append({**row, "error": self.errors[name]})
                continue
            ratios = seconds[name] / seconds["ours"]
            spread = [round(float(ratio), 3) for ratio in (ratios.min(), ratios.max())]
            ratio = round(float(np.median(ratios)), 3)
            rows.append({**row, "peers": {name: self.found[name]}, "ratio": ratio, "ratio_spread": spread})
        benchmark.extra_info |= {"calls": self.calls, "rows": rows}
        return rows


def hold(result, expected, agree: dict[str, float] | float) -> None:
    """AssertionError if ``result`` differs from ``expected`` by more than ``agree``."""
    if not isinstance(agree, float):
        torch.testing.assert_close(result, expected, check_dtype=False, **agree)
        return
    result, expected = ([result], [expected]) if isinstance(expected, torch.Tensor) else (result, expected)
    for number, (got, want) in enumerate(zip(result, expected, strict=True)):
        assert got.shape == want.shape, f"result {number} has shape {tuple(got.shape)}, ours {tuple(want.shape)}"
        difference = got.float() - want.float()
        for size in (torch.linalg.vector_norm, lambda x: x.abs().max()):
            share = float(size(difference) / size(want.float()))
            assert share <= agree, f"result {number} is not close: it differs by {share:.1e} of ours, over {agree}"


def figures(seconds: Sequence[float], peak_bytes: int, flops: float | None, tokens: int | None = None) -> dict:
    """Median, 20th and 80th percentile per call in ms, peak bytes, and TFLOP/s and tokens per second at the median."""
    p20, median, p80 = (float(f"{1e3 * value:.6g}") for value in np.quantile(seconds, (0.2, 0.5, 0.8)))
    found = {"median": median, "p20": p20, "p80": p80, "unit": "ms", "peak_bytes": peak_bytes}
    if flops is not None:
        found["tflops"] = float(f"{flops / median / 1e9:.4g}")
    if tokens is not None:
        found["tokens_per_s"] = float(f"{1e3 * tokens / median:.4g}")
    return found


def line(row: dict) -> str:
    """A row in words."""
    if "error" in row:
        return f"{row['bench']}: {row['error']}"
    ours, peer = row["ours"], row["peers"][row["peer"]]
    low, high = row["ratio_spread"]
    text = f"{row['bench']}: ours {ours['median']:.4g} ms, {row['peer']} {peer['median']:.4g} ms, "
    text += f"ratio {row['ratio']:.2f} ({low:.2f} - {high:.2f})"
    text += f", peak {ours['peak_bytes'] / 2**20:.1f} and {peer['peak_bytes'] / 2**20:.1f} MiB"
    for key, unit in (("tflops", "TFLOP/s"), ("tokens_per_s", "tokens/s")):
        text += f", {ours[key]:.3g} and {peer[key]:.3g} {unit}" if key in ours else ""
    return text
