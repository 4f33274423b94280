"""What rounding errors are relative to: the terms of a sum, whose result may cancel to nothing."""

import torch

from igpo_kernels import linear_logprob, policy_loss


def of_head_gradients(leaves, labels, rows, pairs, settings, **options):
    """Sum of the magnitudes of a fused loss's slopes, times the largest number that one multiplies in a product.

    Args:
        leaves: hidden, weight, and bias if there is one. pairs: old_logp and so on, as ``policy_loss`` takes them.
    """
    wide = {name: x.detach().double() for name, x in leaves.items()}
    logp, entropy = linear_logprob(**wide, labels=labels, rows=rows, entropy=True, backend="reference", **options)
    logp.requires_grad_(), entropy.requires_grad_()
    pairs = {name: None if x is None else x.double() for name, x in pairs.items()}
    loss, _ = policy_loss(logp, **pairs, settings=settings, entropy=entropy, backend="reference")
    slopes = torch.autograd.grad(loss, (logp, entropy), allow_unused=True)
    steepness = sum(float(x.abs().sum()) for x in slopes if x is not None)
    largest = max(float(x.abs().max()) for x in (wide["hidden"], wide["weight"]))
    return steepness * max(1.0, largest) / options.get("temperature", 1.0)
