"""Random groups of rollouts for tests: ragged turns, shared prompts, shared first turns, several answers."""

import numpy as np

from igpo_fast.types import Group, Question, Rollout, Turn
from igpo_kernels import Branch
from tests.doing import doing

VOCAB = 61


def random_turn(rng, last, vocab=VOCAB):
    n, m = int(rng.integers(1, 6)), 0 if last else int(rng.integers(1, 7))
    draw = lambda k: rng.integers(0, vocab, k).astype(np.int32)  # noqa: E731
    action = "answer" if last else "search"
    logp = rng.normal(-1, 0.3, n).astype(np.float32)
    return Turn(draw(n), logp, "", doing(action), draw(m), found=not last)


def random_group(rng, rollouts=4, max_turns=4, vocab=VOCAB):
    """Some rollouts repeat the first turns of the one before; some are a prefix of it."""
    question = Question(f"q{rng.integers(1 << 30)}", "?", ("x",))
    prompt = rng.integers(0, vocab, int(rng.integers(1, 8))).astype(np.int32)
    made = []
    for index in range(rollouts):
        shared = []
        if made and rng.random() < 0.6:
            before = made[-1].turns
            shared = [t for t in before[: int(rng.integers(0, len(before)))] if len(t.response_ids)]
        fresh = int(rng.integers(1, max_turns - len(shared) + 1)) if len(shared) < max_turns else 1
        turns = [*shared, *(random_turn(rng, t == fresh - 1, vocab) for t in range(fresh))]
        made.append(Rollout(question, index, prompt, tuple(turns)))
    if rng.random() < 0.3:  # the same rollout twice: every token has two owners
        made[-1] = Rollout(question, rollouts - 1, prompt, made[0].turns)
    return Group(question, tuple(made))


def random_branches(rng, answers=2, vocab=VOCAB):
    """Answers behind a common wrapper."""
    wrapper = rng.integers(0, vocab, int(rng.integers(0, 4)))
    branches = []
    for _ in range(answers):
        answer = rng.integers(0, vocab, int(rng.integers(1, 5)))
        closing = rng.integers(0, vocab, 2)
        ids = np.concatenate([wrapper, answer, closing]).astype(np.int32)
        branches.append(Branch(ids, len(wrapper), len(wrapper) + len(answer)))
    return branches
