"""A reward: F1, less what many turns cost.

igpo-fast train --config configs/quickstart.yaml algorithm.outcome=examples/reward.py:frugal
"""

from igpo_fast.update.rewards import f1_score


def frugal(rollout):
    f1 = f1_score(rollout.answer, rollout.question.answers)
    return {"reward": f1 - 0.02 * len(rollout.turns), "f1_alone": f1}
