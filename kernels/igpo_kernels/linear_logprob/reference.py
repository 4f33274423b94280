"""The definition of linear_logprob: full logits, multiplied in the inputs' dtype; the rest in float32 or wider."""

from __future__ import annotations

import torch


def logits(hidden, weight, rows, bias, temperature, softcap):
    common = torch.promote_types(hidden.dtype, weight.dtype)
    z = (hidden[rows].to(common) @ weight.to(common).T).to(torch.promote_types(common, torch.float32))
    if bias is not None:
        z = z + bias
    if softcap:
        z = softcap * (z / softcap).tanh()
    return z / temperature


def linear_logprob(hidden, weight, pairs, bias, temperature, softcap, entropy, logsumexp, shard):
    if shard.group is not None:
        raise ValueError("linear_logprob: backend='reference' takes no group; gather the weight, or leave backend out")
    z = logits(hidden, weight, pairs.rows, bias, temperature, softcap)
    log_p = z.log_softmax(-1)
    logp = log_p.gather(1, pairs.labels[:, None])[:, 0]
    # p log p is 0 where p is 0: -inf times 0 would be NaN.
    h = -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1) if entropy else None
    return logp, h, z.logsumexp(-1) if logsumexp else None
