"""The definition of linear_logprob: full logits, full log-softmax."""

from __future__ import annotations


def logits(hidden, weight, rows, bias, temperature, softcap):
    z = hidden[rows] @ weight.T
    if bias is not None:
        z = z + bias
    if softcap:
        z = softcap * (z / softcap).tanh()
    return z / temperature


def linear_logprob(hidden, weight, labels, rows, bias, temperature, softcap, entropy):
    log_p = logits(hidden, weight, rows, bias, temperature, softcap).log_softmax(-1)
    logp = log_p.gather(1, labels[:, None])[:, 0]
    return (logp, -(log_p.exp() * log_p).sum(-1)) if entropy else logp
