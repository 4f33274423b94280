"""Rows of made-up runs."""

from __future__ import annotations

SCORE = "eval/f1"


def row(variant: str, seed: int, scores, steps=None, seconds=None, tokens=None, **more) -> dict:
    """A finished run's row; without ``steps`` an evaluation every 10, 2 seconds and 100 tokens a step."""
    steps = list(range(0, 10 * len(scores), 10)) if steps is None else steps
    return {
        "variant": variant,
        "seed": seed,
        "finished": True,
        "trained_steps": steps[-1] if steps else 0,
        "settings": {"algorithm.name": variant, "train.seed": seed},
        "steps": steps,
        SCORE: list(scores),
        f"{SCORE}_se": [0.02] * len(scores),
        "seconds": [2 * step for step in steps] if seconds is None else seconds,
        "tokens": [100 * step for step in steps] if tokens is None else tokens,
        "collapsed": [None, *[0.25] * (len(scores) - 1)],
        "turns": 4.5,
        "group/collapsed": 0.25,
        **more,
    }
