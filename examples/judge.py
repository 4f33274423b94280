"""A language model judges the answers: ``igpo-fast train ... algorithm.outcome=examples/judge.py:reward``.

JUDGE_URL (up to /v1), JUDGE_MODEL and, if it needs one, JUDGE_KEY name the model. Any OpenAI-compatible server does:
``vllm serve Qwen/Qwen2.5-7B-Instruct --port 8001``. Questions need no answers with an outcome-only algorithm.
"""

import os

from igpo_fast.judge import Judge, score_of
from igpo_fast.types import Rollout

judge = Judge(
    os.environ.get("JUDGE_URL", "http://127.0.0.1:8001/v1"),
    os.environ.get("JUDGE_MODEL", "Qwen/Qwen2.5-7B-Instruct"),
    key=os.environ.get("JUDGE_KEY", ""),
    max_tokens=64,
)
PROMPT = """Question: {question}
Right answers: {right}
Given answer: {answer}
How right is the given answer? Reply with one whole number from 0 (wrong) to 10 (right)."""


async def reward(rollout: Rollout) -> dict[str, float] | None:
    if rollout.answer is None:
        return {"reward": 0.0, "judged": 0.0}
    question, right = rollout.question.question, "; ".join(rollout.question.answers) or "not known"
    score = score_of(await judge(PROMPT.format(question=question, right=right, answer=rollout.answer)), most=10)
    return None if score is None else {"reward": score, "judged": 1.0}  # None: no verdict, the rollout is left out
