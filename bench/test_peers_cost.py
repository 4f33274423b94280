"""What information gain costs against the number of turns, of rollouts in a group and of accepted answers.

ours                            IGPO in one pass
outcome_only                    the same update without answers
full_logits, kv_reuse           the values alone (bench/scoring.py)
igpo_full_logits, igpo_kv_reuse     outcome_only, and before it the values
"""

from __future__ import annotations

from functools import partial

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("trl", exc_type=ImportError)

from bench.recorded import Lengths, recorded
from bench.scoring import full_logits, kv_reuse
from bench.steps import Size, counts, ours

SIZE = Size(128, 3, 8192)
"""The model of configs/musique.yaml."""
PROMPT, TURN, RESPONSE, ANSWER = 150, 16, 48, (20, 4)
USUAL = dict(turns=4, rollouts=2, answers=1)
SWEEPS = {"turns": (1, 4, 16, 64), "rollouts": (1, 4, 8, 16), "answers": (1, 4, 16)}
ROUNDS = 5
LONG = 16
"""Turns above which a step takes many seconds, and two rounds must do."""
AT_ONCE = 2


def group_of(turns: int, rollouts: int, answers: int) -> Lengths:
    own = ((TURN, RESPONSE),) * (turns - 1) + ((TURN, 0),)
    return Lengths(PROMPT, (ANSWER,) * answers, (own,) * rollouts)


@pytest.mark.parametrize("sweep, value", [(sweep, value) for sweep, values in SWEEPS.items() for value in values])
def test_cost(sweep, value, compare, request):
    if not request.config.getoption("--full"):
        pytest.skip("with --full")
    shape = USUAL | {sweep: value}
    data = recorded([group_of(**shape)], SIZE.vocab)
    lm = SIZE.lm().eval()
    branches_of = lambda rollout: data.branches[rollout.question.id]  # noqa: E731
    sides = {
        "ours": ours(SIZE, data),
        "outcome_only": ours(SIZE, data, algorithm="grpo"),
        "full_logits": partial(full_logits, lm, data.rollouts, branches_of, at_once=AT_ONCE),
        "kv_reuse": lambda: [kv_reuse(lm, rollout, branches_of(rollout)) for rollout in data.rollouts],
    }
    sums = {f"igpo_{way}": (way, "outcome_only") for way in ("full_logits", "kv_reuse")}
    about = {"sweep": sweep, **shape, "hidden": SIZE.hidden, "layers": SIZE.layers, "vocab": SIZE.vocab}
    long = shape["turns"] > LONG
    compare(
        "cost", about | counts(data), sides, 2 if long else ROUNDS, long=long, sums=sums, tokens=data.decision_tokens
    )  # fmt: skip
