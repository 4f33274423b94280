"""linear_policy_loss by row chunks: the gradient is made in the forward, while the chunk's logits are there.

For a chunk of distinct rows: logits, log-probabilities, the loss and its slope in each log-probability and entropy,
the logits' gradient in place, and two products into dhidden and dweight: 6 * U * H * V FLOPs for loss and gradients.
"""

from __future__ import annotations

import torch

from igpo_kernels.linear_logprob.torch_path import LIVE_BLOCKS, block_logits
from igpo_kernels.policy_loss.reference import policy_loss
from igpo_kernels.workspace import workspace_bytes

METRICS = ("policy", "tokens", "clipped", "ratio", "ratio_max", "kl", "mismatch", "entropy")


def linear_policy_loss(hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap):
    loss, logp, *sums = _LinearPolicyLoss.apply(
        hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap
    )
    return loss, {**dict(zip(METRICS, sums, strict=True)), "logp": logp}


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap):
        compute = torch.promote_types(hidden.dtype, torch.float32)
        distinct, pair_row = torch.unique(rows, return_inverse=True)
        order = torch.argsort(pair_row, stable=True)
        d_hidden, d_weight, d_bias = (
            None if x is None else torch.zeros(x.shape, dtype=compute, device=x.device) for x in (hidden, weight, bias)
        )
        loss = d_hidden.new_zeros(())
        logp_all = d_hidden.new_empty(len(labels))
        sums = {name: torch.zeros_like(loss) for name in METRICS}
        height = max(1, workspace_bytes(hidden.device) // (4 * LIVE_BLOCKS * len(weight)))
        for start in range(0, len(distinct), height):
            at = distinct[start : start + height]
            edges = torch.tensor([start, start + len(at)], device=at.device)
            lo, hi = torch.searchsorted(pair_row[order], edges).tolist()
            pairs = order[lo:hi]
            cell = (pair_row[pairs] - start, labels[pairs])
            x = hidden[at].to(compute)
            z, slope = block_logits(x, weight, bias, temperature, softcap)
            log_p = z.log_softmax(1)
            p = log_p.exp()
            row_entropy = -(p * log_p).sum(1)
            logp, entropy = log_p[cell].requires_grad_(), row_entropy[cell[0]].requires_grad_()
            chunk = {name: value if value is None else value[pairs] for name, value in pair_inputs.items()}
            with torch.enable_grad():
                part, metrics = policy_loss(logp, settings=settings, entropy=entropy, sequence=None, **chunk)
            d_logp, d_entropy = torch.autograd.grad(part, (logp, entropy))
            loss = loss + part.detach()
            logp_all[pairs] = logp.detach()
            for name in METRICS:
                combine = torch.maximum if name == "ratio_max" else torch.add
                sums[name] = combine(sums[name], metrics[name])
            # dz = d_logp (onehot - p) - d_entropy p (log p + entropy), summed over the pairs of a row.
            row_d_logp = torch.zeros_like(row_entropy).index_add_(0, cell[0], d_logp)
            dz = p.neg_()
            if settings.entropy:
                row_d_entropy = torch.zeros_like(row_entropy).index_add_(0, cell[0], d_entropy)
                dz *= log_p.add_(row_entropy[:, None]).mul_(row_d_entropy[:, None]).add_(row_d_logp[:, None])
            else:
                dz *= row_d_logp[:, None]
            dz.index_put_(cell, d_logp, accumulate=True)
            dz *= slope
            d_hidden.index_add_(0, at, dz @ weight.to(compute))
            d_weight.addmm_(dz.T, x)
            if d_bias is not None:
                d_bias += dz.sum(0)
        ctx.gradients = [
            None if x is None else g.to(x.dtype) for g, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        ]
        ctx.mark_non_differentiable(logp_all, *sums.values())
        return loss, logp_all, *sums.values()

    @staticmethod
    def backward(ctx, d_loss, *_):
        return *(None if g is None else g * d_loss for g in ctx.gradients), *[None] * 6
