"""What everything packed must equal. Imports nothing of ours: plain transformers, eager attention, one unpadded
sequence a forward, full log-softmax."""

import torch


def logprobs(lm, ids, temperature=1.0):
    """log pi(ids[i] | ids[:i]) for i = 1 .. L-1: [L-1], with gradient."""
    ids = torch.as_tensor(ids, dtype=torch.long)
    logits = lm(input_ids=ids[None], use_cache=False).logits[0, :-1]
    return (logits / temperature).log_softmax(-1).gather(1, ids[1:, None])[:, 0]


def entropies(lm, ids, temperature=1.0):
    """Entropy of the distribution over ids[i], i = 1 .. L-1: [L-1], with gradient."""
    logits = lm(input_ids=torch.as_tensor(ids, dtype=torch.long)[None], use_cache=False).logits[0, :-1]
    log_p = (logits / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def answer_value(lm, prefix, wrapped, start, stop, temperature=1.0):
    """Mean log-probability of wrapped[start:stop] after the prefix: one pass over prefix + wrapped."""
    ids = [*prefix, *wrapped[:stop]]
    with torch.no_grad():
        return float(logprobs(lm, ids, temperature)[len(prefix) + start - 1 :].mean())


def clipped_loss(logp, old_logp, advantage, low=0.2, high=0.2):
    """The PPO surrogate of every token."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def values(lm, head, ids):
    """A critic's value of ids[i], i = 1 .. L-1: the head on the last hidden state of ids[:i]: [L-1], with gradient."""
    ids = torch.as_tensor(ids, dtype=torch.long)
    hidden = lm.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    return hidden / hidden.abs().sum(-1, keepdim=True) @ head.weight + head.bias
