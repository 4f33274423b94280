"""Run by ``make bare`` where only the wheel and its base dependencies are installed: igpo_kernels works there."""

import importlib.util

import numpy as np
import torch

from igpo_kernels import ANSWER, Branch, RolloutTokens, Tree, linear_logprob, pack, tree_attention

assert all(importlib.util.find_spec(name) is None for name in ("transformers", "pydantic", "bm25s", "rich"))

ids, turn = np.array([5, 6, 7, 8, 9]), np.array([-1, -1, 0, 0, 1])
plan = pack([Tree([RolloutTokens(0, ids, turn, np.array([2, 4]))], [Branch(np.array([1, 2, 3]), 1, 3)])])
q = torch.randn(plan.n_tokens, 4, 16, requires_grad=True)
hidden = tree_attention(q, q[:, :2], q[:, 2:], plan).flatten(1)
logp = linear_logprob(hidden, torch.randn(11, 64), plan.tensor("label"), plan.tensor("row"))
logp.sum().backward()
assert logp.shape == (plan.n_pairs,) and bool(q.grad.isfinite().all()) and (plan.kind == ANSWER).sum() == 4
print(f"igpo_kernels from the wheel: {plan.n_tokens} tokens, {plan.n_pairs} pairs, torch {torch.__version__}")
