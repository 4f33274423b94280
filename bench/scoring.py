"""The common ways to get the answer values of every prefix, in plain transformers, beside packed scoring.

    full_logits   a padded pass per prefix over several rollouts, with logits of every token (the released IGPO code)
    kv_reuse      prefixes extend one key-value cache; each answer is fed on it and dropped again (a long-horizon port)

Both return mean log-probabilities of the answers, a tensor [answers, turns] per rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from igpo_fast.types import Rollout
from igpo_kernels import Branch, RolloutTokens

BranchesOf = Callable[[Rollout | RolloutTokens], Sequence[Branch]]


def mean_logp(logits_AV: torch.Tensor, branch: Branch) -> torch.Tensor:
    """The mean log-probability of an answer from the logits that predict its tokens."""
    label = torch.as_tensor(branch.ids[branch.start : branch.stop], device=logits_AV.device).long()
    return logits_AV.float().log_softmax(-1).gather(1, label[:, None]).mean()


@torch.no_grad()
def full_logits(
    lm: PreTrainedModel, rollouts: Sequence[Rollout | RolloutTokens], branches_of: BranchesOf, at_once: int
) -> list[torch.Tensor]:
    """Passes over ``at_once`` sequences each, padded on the right, so that causal attention needs no mask, which is
    faster than the usual padding on the left."""
    found = [torch.zeros(len(branches_of(r)), len(r.boundaries), device=lm.device) for r in rollouts]
    for t in range(max(len(rollout.boundaries) for rollout in rollouts)):
        texts = [
            (np.concatenate([rollout.ids[: rollout.boundaries[t]], branch.ids[: branch.stop - 1]]), branch, i, a)
            for i, rollout in enumerate(rollouts)
            if t < len(rollout.boundaries)
            for a, branch in enumerate(branches_of(rollout))
        ]
        for start in range(0, len(texts), at_once):
            batch = texts[start : start + at_once]
            ids = torch.zeros(len(batch), max(len(text[0]) for text in batch), dtype=torch.long)
            for row, (text, *_) in zip(ids, batch, strict=True):
                row[: len(text)] = torch.as_tensor(text)
            logits = lm(input_ids=ids.to(lm.device), use_cache=False).logits
            for row, (text, branch, i, a) in zip(logits, batch, strict=True):
                found[i][a, t] = mean_logp(row[len(text) - (branch.stop - branch.start) : len(text)], branch)
    return found


@torch.no_grad()
def kv_reuse(lm: PreTrainedModel, rollout: Rollout | RolloutTokens, branches: Sequence[Branch]) -> torch.Tensor:
    """One rollout at a time."""
    ids = torch.as_tensor(rollout.ids, device=lm.device).long()[None]
    cache, done = DynamicCache(), 0
    found = torch.zeros(len(branches), len(rollout.boundaries), device=lm.device)
    for t, boundary in enumerate(rollout.boundaries.tolist()):
        last = lm(ids[:, done:boundary], past_key_values=cache, logits_to_keep=1).logits[0]
        for a, branch in enumerate(branches):
            fed = torch.as_tensor(branch.ids[: branch.stop - 1], device=lm.device).long()[None]
            if fed.shape[1]:
                after = lm(fed, past_key_values=cache, logits_to_keep=branch.stop - max(branch.start, 1)).logits[0]
                cache.crop(-fed.shape[1])
                logits = torch.cat([last, after])[-(branch.stop - branch.start) :]
            else:
                logits = last
            found[a, t] = mean_logp(logits, branch)
        done = boundary
    return found
