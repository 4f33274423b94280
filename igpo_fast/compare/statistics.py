"""Paired statistics over seeds: differences with intervals and tests, and how soon a score is reached.

A row is a finished run (results.py): ``variant``, ``seed``, and one number per evaluation under the score's name,
``steps``, ``seconds`` and ``tokens``, the last three as a run had spent them by then; None where a number is not known.
Runs of one seed start from the same weights and meet the same questions, so differences are taken seed by seed, and a
seed is the unit of every statistic here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

BUDGETS = ("steps", "seconds", "tokens")
LEAST = 5
"""Fewest values of which an interval is given: of fewer a bootstrap knows too little, and it comes out too narrow."""
EXACT = 16
"""Most pairs of which all 2^n sign flips are tried; of more, 2^16 random ones are."""
RESAMPLES = 9999
LEVEL = 0.05
"""A difference is called one if p is below this and the 95 % interval leaves 0 out."""
TESTABLE = 6
"""Fewest pairs whose p can be below ``LEVEL``: if all are ahead, 2 of 2^n sign flips are as far from 0, and of five
pairs p is 0.0625."""


def summarise(rows: Sequence[Mapping], baseline: str, score: str, at: float, stalled: float) -> dict:
    """The statistics of finished runs, as compare.json has them.

    Args:
        baseline: the variant that each other one is compared with.
        score: key of the score, ``eval/f1``.
        at: the score of which is told what it took to reach it (``reached``).
        stalled: a run whose last score is below this has stalled.
    """
    variants: dict[str, dict[int, Mapping]] = {}
    for row in rows:
        variants.setdefault(row["variant"], {})[row["seed"]] = row
    return {
        "score": score,
        "baseline": baseline,
        "at": at,
        "stalled": stalled,
        "variants": {name: _variant(list(runs.values()), score, at, stalled) for name, runs in variants.items()},
        "pairs": {
            name: {budget: _pairs(runs, variants[baseline], score, budget) for budget in BUDGETS}
            for name, runs in variants.items()
            if name != baseline and baseline in variants
        },
        "by_step": {
            name: _by_step(runs, variants[baseline], score)
            for name, runs in variants.items()
            if name != baseline and baseline in variants
        },
        "unpaired": _unpaired(variants, baseline),
    }


def _unpaired(variants: Mapping[str, Mapping[int, Mapping]], baseline: str) -> dict[str, str]:
    """Name of each run that is in no pair -> the partners that it lacks."""
    found = {}
    for name, runs in variants.items() if baseline in variants else ():
        partners = [other for other in variants if other != name] if name == baseline else [baseline]
        for seed in runs:
            if partners and not any(seed in variants[partner] for partner in partners):
                found[f"{name}-{seed}"] = ", ".join(f"no {partner}-{seed}" for partner in partners)
    return found


def _variant(rows: Sequence[Mapping], score: str, at: float, stalled: float) -> dict:
    last = np.array([ys[-1] for row in rows for _, ys in [points(row, score)] if len(ys)])
    collapsed = [row["group/collapsed"] for row in rows if row.get("group/collapsed") is not None]
    return {
        "runs": len(rows),
        "mean": float(last.mean()) if len(last) else None,
        "standard_error": float(last.std(ddof=1) / len(last) ** 0.5) if len(last) > 1 else None,
        "stalls": int((last < stalled).sum()),
        "collapsed": float(np.mean(collapsed)) if collapsed else None,
        "reached": _reached(rows, score, at),
    }


def _reached(rows: Sequence[Mapping], score: str, at: float) -> dict:
    """Of how many runs the score reached ``at``, and the median of what it took over all of them. A run that never did
    is censored: it took more than it had, and if it falls on the median, the median is None."""
    found = [reached(row, score, at) for row in rows]
    costs = {budget: [np.inf if cost is None else cost[budget] for cost in found] for budget in BUDGETS}
    known = {budget: [np.nan if value is None else value for value in values] for budget, values in costs.items()}
    medians = {budget: float(np.median(values)) if values else np.nan for budget, values in known.items()}
    never = sum(cost is None for cost in found)
    return {"runs": len(rows) - never, "never": never} | {
        budget: median if np.isfinite(median) else None for budget, median in medians.items()
    }


def _pairs(runs: Mapping[int, Mapping], others: Mapping[int, Mapping], score: str, budget: str) -> dict:
    """Statistics of the differences of the score after an equal budget, and of those of its mean over the budget."""
    found = {seed: differences(runs[seed], others[seed], score, budget) for seed in sorted(runs.keys() & others.keys())}
    known = {seed: pair for seed, pair in found.items() if pair is not None}
    return {
        "seeds": list(known),
        "at": [pair["at"] for pair in known.values()],
        **{key: paired([pair[key] for pair in known.values()]) for key in ("score", "area")},
    }


def _by_step(runs: Mapping[int, Mapping], others: Mapping[int, Mapping], score: str) -> dict[str, list]:
    """The mean difference at each evaluation, over pairs, as ``mean_curve`` has it."""
    pairs = []
    for seed in sorted(runs.keys() & others.keys()):
        (xs, ys), (other_xs, other_ys) = (points(run[seed], score) for run in (runs, others))
        steps, ours, theirs = np.intersect1d(xs, other_xs, return_indices=True)
        pairs.append({"steps": steps.tolist(), "difference": (ys[ours] - other_ys[theirs]).tolist()})
    return mean_curve(pairs, "difference", "steps", RESAMPLES)


def points(row: Mapping, score: str, budget: str = "steps") -> tuple[np.ndarray, np.ndarray]:
    """What a run had spent at each evaluation and its scores, (E,) each, without evaluations that lack either."""
    xs, ys = (np.array([np.nan if v is None else v for v in row[key]], float) for key in (budget, score))
    known = np.isfinite(xs) & np.isfinite(ys)
    return xs[known], ys[known]


def differences(row: Mapping, other: Mapping, score: str, budget: str) -> dict[str, float] | None:
    """How much higher the score of ``row`` is than that of ``other`` after the largest budget that both have spent.

    Returns:
        ``at``, that budget; ``score``, the difference there; ``area``, the difference of the scores' means from the
        first budget known of both to ``at``. Between evaluations scores are interpolated. None if there is no such
        budget above 0, or if what a run has spent in all is not known: the score there would not be its last.
    """
    (xs, ys), (other_xs, other_ys) = (points(r, score, budget) for r in (row, other))
    if not (len(xs) and len(other_xs)) or None in (row[budget][-1], other[budget][-1]):
        return None
    first, last = max(xs[0], other_xs[0]), min(xs[-1], other_xs[-1])
    if first > last or last <= 0:
        return None
    return {
        "at": float(last),
        "score": float(np.interp(last, xs, ys) - np.interp(last, other_xs, other_ys)),
        "area": area(xs, ys, first, last) - area(other_xs, other_ys, first, last),
    }


def area(xs: np.ndarray, ys: np.ndarray, first: float, last: float) -> float:
    """The mean of the line through the points from ``first`` to ``last``, by trapezoids.

    >>> area(np.array([0.0, 2.0]), np.array([0.0, 1.0]), 0.0, 1.0)
    0.25
    """
    x = np.concatenate([[first], xs[(xs > first) & (xs < last)], [last]])
    y = np.interp(x, xs, ys)
    return float(((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() / (last - first) if last > first else y[0])


def paired(values: Sequence[float]) -> dict:
    """Statistics of paired differences.

    Returns:
        The ``differences``; their ``mean``, its 95 % ``interval`` and the ``p`` of the permutation test; the numbers of
        pairs ``ahead`` (above 0), ``behind`` and ``ties``.
    """
    d = np.array(values, float)
    return {
        "differences": d.tolist(),
        "mean": float(d.mean()) if len(d) else None,
        "interval": interval(d),
        "p": sign_flip_p(d) if len(d) else None,
        "ahead": int((d > 0).sum()),
        "behind": int((d < 0).sum()),
        "ties": int((d == 0).sum()),
    }


def interval(values: Sequence[float], resamples: int = RESAMPLES) -> list[float] | None:
    """The 95 % bootstrap interval [low, high] of the mean: bias-corrected and accelerated (Efron 1987), or of
    percentiles where that is not defined. None of fewer than ``LEAST`` values."""
    from scipy import stats

    values = np.asarray(values, float)
    if len(values) < LEAST:
        return None
    if values.min() == values.max():
        return [float(values[0])] * 2
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, where BCa is not defined
            found = stats.bootstrap(
                (values,), np.mean, n_resamples=resamples, method=method, rng=np.random.default_rng(0)
            )
        low, high = map(float, found.confidence_interval)
        if low <= high:  # not if they are NaN
            break
    return [low, high]


def sign_flip_p(d: np.ndarray) -> float:
    """Two-sided p of the paired permutation test: the share of sign flips of the (N,) differences whose mean is as far
    from 0 as theirs. If both variants of a pair learn equally well, either sign is equally likely.

    All 2^N flips up to ``EXACT`` pairs; else of 2^16 random ones and the pairs as they are.
    """
    if len(d) <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(d))[:, None] >> np.arange(len(d)) & 1)
    else:
        signs = np.random.default_rng(0).choice((-1, 1), (2**EXACT, len(d)))
        signs[0] = 1
    # Equal sums may differ by rounding, which depends on the size of what is added, not on that of the sum.
    rounding = 1e-12 * np.abs(d).sum()
    return float((np.abs(signs @ d) >= np.abs(d.sum()) - rounding).mean())


def reached(row: Mapping, score: str, at: float) -> dict[str, float | None] | None:
    """Steps, seconds and tokens that the run had spent at its first evaluation with at least the score ``at``; None if
    there is none."""
    for place, value in enumerate(row[score]):
        if value is not None and value >= at:
            return {budget: row[budget][place] for budget in BUDGETS}
    return None


def mean_curve(rows: Sequence[Mapping], key: str, budget: str, resamples: int = 999) -> dict[str, list]:
    """The mean of ``key`` over runs, with a 95 % band, as far as all of them have spent.

    Returns:
        ``x``, (E,) budgets; ``mean``; ``low`` and ``high``, None without a band.
    """
    curves = [found for row in rows if len((found := points(row, key, budget))[0])]
    if not curves:
        return {"x": [], "mean": [], "low": None, "high": None}
    first, last = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    every = np.unique(np.concatenate([xs for xs, _ in curves]))
    # Runs spend different seconds and tokens per step: as many points as a run has evaluations are enough.
    x = every if budget == "steps" else np.linspace(first, last, max(len(xs) for xs, _ in curves))
    x = x[(x >= first) & (x <= last)]
    values = np.array([np.interp(x, xs, ys) for xs, ys in curves])
    bands = [interval(at, resamples) for at in values.T]
    low, high = zip(*bands, strict=True) if bands and bands[0] else (None, None)
    return {
        "x": x.tolist(),
        "mean": values.mean(0).tolist(),
        "low": low and list(low),
        "high": high and list(high),
    }


def sentences(found: Mapping) -> list[str]:
    """What the statistics say of each variant: at equal steps, at equal seconds and tokens; which runs are left out,
    and who stalled."""
    said = []
    if found["baseline"] not in found["variants"]:
        said.append(f"No run of {found['baseline']} counts: nothing is compared.")
    elif not found["pairs"]:
        said.append(f"Runs of {found['baseline']} alone count: nothing is compared.")
    for name, budgets in found["pairs"].items():
        said.append(_verdict(name, found["baseline"], found["score"], budgets["steps"]["score"]))
        others = [
            f"{pairs['mean']:+.3f} at equal {budget}{_uncertainty(pairs)}"
            for budget in BUDGETS[1:]
            if (pairs := budgets[budget]["score"])["differences"]
        ]
        if others:
            said.append(f"{name} - {found['baseline']}: {', '.join(others)}.")
    for begin, key in (("Not counted", "not_counted"), ("In no pair", "unpaired")):
        if names := [f"{name} ({why})" for name, why in found.get(key, {}).items()]:
            said.append(f"{begin}: {', '.join(names)}.")
    stalls = [f"{v['stalls']} of {v['runs']} runs of {name}" for name, v in found["variants"].items()]
    return said + [f"Ended below {found['stalled']:g}: {', '.join(stalls)}."] * bool(stalls)


def _verdict(name: str, baseline: str, score: str, pairs: Mapping) -> str:
    count = len(pairs["differences"])
    if not count:
        return f"{name} and {baseline} have no seed that both have finished: nothing is compared."
    mean, ends = pairs["mean"], pairs["interval"]
    level = f"{abs(mean):.3f} {'higher' if mean > 0 else 'lower'} than" if round(mean, 3) else "level with"
    ties = f" and level in {pairs['ties']}" if pairs["ties"] else ""
    begin = f"{name} ended {level} {baseline} in {score} at equal steps{_uncertainty(pairs)}, "
    begin += f"ahead in {pairs['ahead']} of {count} {'pair' if count == 1 else 'pairs'}{ties}"
    higher = "higher" if mean >= 0 else "lower"
    if count < TESTABLE:
        return f"{begin}; with fewer than {TESTABLE} pairs p cannot be below {LEVEL}: not shown to be {higher}."
    if ends[0] <= 0 <= ends[1]:
        return f"{begin}; the interval includes 0: not shown to be {higher}."
    if pairs["p"] >= LEVEL:
        return f"{begin}; the interval leaves 0 out, but p is not below {LEVEL}: not shown to be {higher}."
    return f"{begin}; {higher} here, by interval and test."


def _uncertainty(pairs: Mapping) -> str:
    ends = pairs["interval"]
    between = f"95 % interval {ends[0]:+.3f} to {ends[1]:+.3f}, " if ends else ""
    return f" ({between}p = {pairs['p']:.2g})"
