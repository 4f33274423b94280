"""The definition of linear_policy_loss: linear_logprob, then policy_loss."""

from __future__ import annotations

from igpo_kernels.linear_logprob.reference import linear_logprob
from igpo_kernels.linear_logprob.shards import Shard
from igpo_kernels.policy_loss.reference import policy_loss


def linear_policy_loss(hidden, weight, bias, pairs, pair_inputs, settings, temperature, softcap):
    shard = Shard.of(None, len(weight))
    logp, entropy, _ = linear_logprob(hidden, weight, pairs, bias, temperature, softcap, True, False, shard)
    loss, metrics = policy_loss(logp, settings=settings, entropy=entropy, segment=None, sequence=None, **pair_inputs)
    return loss, {**metrics, "logp": logp.detach()}
