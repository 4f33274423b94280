"""linear_policy_loss by row chunks: the gradient is made in the forward, while the chunk's logits are there.

For a chunk of distinct rows: logits and their statistics, the loss and its slope in each log-probability and entropy,
the logits' gradient in their place, and two products into dhidden and dweight: 6 * U * H * V FLOPs for loss and
gradients. Both sweeps go panel by panel of the vocabulary, so that what is done to a panel finds it in the caches.
"""

from __future__ import annotations

import torch

from igpo_kernels.linear_logprob.torch_path import Statistics, block_logits, slope_of, softmax_gradient_
from igpo_kernels.policy_loss.reference import policy_loss
from igpo_kernels.workspace import workspace_bytes

METRICS = ("policy", "tokens", "clipped", "ratio", "ratio_max", "kl", "mismatch", "entropy")
PANEL = 1024
"""Columns that are worked on at a time: with a chunk's hundred rows they fit a core's own cache."""
TEMPORARIES = 4
"""Panels that live beside a chunk's logits."""


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
        vocab = len(weight)
        columns = [slice(c, min(c + PANEL, vocab)) for c in range(0, vocab, PANEL)]
        height = chunk_rows(vocab, hidden.shape[1], compute, hidden.device)
        buffer = d_hidden.new_empty(min(height, len(distinct)) * vocab)
        scratch = d_hidden.new_empty(min(height, len(distinct)) * min(vocab, PANEL))
        for start in range(0, len(distinct), height):
            at = distinct[start : start + height]
            edges = torch.tensor([start, start + len(at)], device=at.device)
            lo, hi = torch.searchsorted(pair_row[order], edges).tolist()
            pairs = order[lo:hi]
            cell = (pair_row[pairs] - start, labels[pairs])
            x = hidden[at].to(compute)
            z = buffer[: len(at) * vocab].view(len(at), vocab)
            statistics = Statistics(len(at), hidden.device, compute)
            for c in columns:
                part_bias = None if bias is None else bias[c]
                block = block_logits(x, weight[c], part_bias, temperature, softcap, z[:, c])
                statistics.add(block, scratch=scratch[: block.numel()].view(block.shape))
            top, log_mass, row_entropy = statistics.finish()
            logp = (z[cell] - top[cell[0]] - log_mass[cell[0]]).requires_grad_()
            entropy = row_entropy[cell[0]].requires_grad_()
            chunk = {name: value if value is None else value[pairs] for name, value in pair_inputs.items()}
            with torch.enable_grad():
                part, metrics = policy_loss(logp, settings=settings, entropy=entropy, sequence=None, **chunk)
            d_logp, d_entropy = torch.autograd.grad(part, (logp, entropy))
            loss = loss + part.detach()
            logp_all[pairs] = logp.detach()
            for name in METRICS:
                combine = torch.maximum if name == "ratio_max" else torch.add
                sums[name] = combine(sums[name], metrics[name])
            row_d_logp = torch.zeros_like(top).index_add_(0, cell[0], d_logp)
            row_d_entropy = torch.zeros_like(top).index_add_(0, cell[0], d_entropy)
            pull = d_logp * slope_of(z[cell], temperature, softcap)
            of_entropy = (row_entropy, row_d_entropy) if settings.entropy else None
            in_block, dx = cell[1] // PANEL, torch.zeros_like(x)
            for number, c in enumerate(columns):
                slope = slope_of(z[:, c], temperature, softcap)
                dz = softmax_gradient_(z[:, c], top, log_mass, row_d_logp, of_entropy)
                if softcap or slope != 1:
                    dz *= slope
                mine = (in_block == number).nonzero()[:, 0]
                dz.index_put_((cell[0][mine], cell[1][mine] - c.start), pull[mine], accumulate=True)
                dx.addmm_(dz, weight[c].to(compute))
                d_weight[c].addmm_(dz.T, x)
                if d_bias is not None:
                    d_bias[c] += dz.sum(0)
            d_hidden.index_add_(0, at, dx)
        ctx.mark_non_differentiable(logp_all, *sums.values())
        ctx.gradients = [
            None if x is None else g.to(x.dtype) for g, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        ]
        return loss, logp_all, *sums.values()

    @staticmethod
    def backward(ctx, d_loss, *_):
        if d_loss.device.type == "cpu" and d_loss == 1:  # the usual case; saves a copy of the weight's gradient
            return *ctx.gradients, *[None] * 6
        return *(None if g is None else g * d_loss for g in ctx.gradients), *[None] * 6


def chunk_rows(vocab: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows whose logits fill the workspace, with a block's temporaries and the rows themselves twice."""
    row_bytes = dtype.itemsize * (vocab + TEMPORARIES * min(vocab, PANEL) + 2 * hidden_size)
    return max(1, workspace_bytes(device) // row_bytes)
