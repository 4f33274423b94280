"""The definition of linear_policy_loss: linear_logprob, then policy_loss."""

from __future__ import annotations

from igpo_kernels.linear_logprob.reference import linear_logprob
from igpo_kernels.policy_loss.reference import policy_loss


def linear_policy_loss(hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap):
    logp, entropy = linear_logprob(hidden, weight, labels, rows, bias, temperature, softcap, True)
    loss, metrics = policy_loss(logp, settings=settings, entropy=entropy, segment=None, sequence=None, **pair_inputs)
    return loss, {**metrics, "logp": logp.detach()}
