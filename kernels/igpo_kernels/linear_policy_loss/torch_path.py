"""linear_policy_loss by row chunks: the gradient is made in the forward, while the chunk's logits are there.

For a chunk of distinct rows: logits and their statistics, the loss and its slope in each log-probability and entropy,
the logits' gradient in their place, and two products into dhidden and dweight: 6 * U * H * V FLOPs for loss and
gradients. Both sweeps go panel by panel of the vocabulary, so that what is done to a panel finds it in the caches.
Unless something else needs the logits themselves (an entropy, soft-capping), the first sweep leaves exp(z - base) in
their place, base being the row's largest logit up to that panel: the second then only multiplies.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from igpo_kernels.autograd import first_order
from igpo_kernels.linear_logprob.torch_path import Statistics, block_logits, slope_of, softmax_gradient_
from igpo_kernels.policy_loss.gradients import hand_out
from igpo_kernels.policy_loss.reference import policy_loss
from igpo_kernels.workspace import workspace_bytes

METRICS = ("policy", "tokens", "clipped", "ratio", "ratio_max", "kl", "mismatch", "entropy")
PANEL = 1024
"""Columns that are worked on at a time: with a chunk's hundred rows they fit a core's own cache."""
TEMPORARIES = 4
"""Panels that live beside a chunk's logits."""
PAIR_BYTES, CHUNK_PAIR_BYTES = 32, 320
"""What a pair takes: its place in the order of rows and its row's; and, while its chunk is at work, its loss."""


def linear_policy_loss(hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap):
    loss, logp, *sums = _LinearPolicyLoss.apply(
        hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap
    )
    return loss, {**dict(zip(METRICS, sums, strict=True)), "logp": logp}


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, rows, pair_inputs, settings, temperature, softcap):
        compute = torch.promote_types(hidden.dtype, torch.float32)
        new = lambda *shape: torch.empty(shape, dtype=compute, device=hidden.device)  # noqa: E731
        d_hidden, d_weight, d_bias = (
            torch.zeros(x.shape, dtype=dtype, device=x.device) if needed else None
            for x, dtype, needed in zip(
                (hidden, weight, bias), (hidden.dtype, compute, compute), ctx.needs_input_grad, strict=False
            )
        )
        differentiate = any(ctx.needs_input_grad)
        distinct, pair_row = torch.unique(rows, return_inverse=True)
        pair_row, order = pair_row.sort(stable=True)
        loss, logp_all = new().zero_(), new(len(labels))
        sums = {name: torch.zeros_like(loss) for name in METRICS}
        vocab, size = weight.shape
        height, panel = chunk_shape(hidden, weight, len(labels), len(distinct), compute)
        columns = [slice(c, min(c + panel, vocab)) for c in range(0, vocab, panel)]
        needs_logits = bool(softcap or settings.entropy)
        buffer, scratch, states = new(height * vocab), new(height * panel), new(2, height, size)
        upcast = None if weight.dtype == compute else new(panel, size)
        weight_of = lambda c: weight[c] if upcast is None else upcast[: c.stop - c.start].copy_(weight[c])  # noqa: E731
        for start in range(0, len(distinct), height):
            at = distinct[start : start + height]
            edges = torch.tensor([start, start + len(at)], device=at.device)
            lo, hi = torch.searchsorted(pair_row, edges).tolist()
            by_label = labels[order[lo:hi]].argsort(stable=True)
            pairs, row = order[lo:hi][by_label], pair_row[lo:hi][by_label] - start
            label = labels[pairs]
            edges = torch.searchsorted(label, torch.arange(0, vocab + panel, panel, device=at.device)).tolist()
            of_panel = [slice(a, b) for a, b in pairwise(edges)]
            cells = [(row[part], label[part] - c.start) for part, c in zip(of_panel, columns, strict=True)]
            x = states[0, : len(at)].copy_(hidden[at])
            z = buffer[: len(at) * vocab].view(len(at), vocab)
            statistics = Statistics(len(at), hidden.device, compute)
            target, bases = new(len(pairs)), new(len(columns), len(at))
            for c, part, cell, base in zip(columns, of_panel, cells, bases, strict=True):
                part_bias = None if bias is None else bias[c]
                block = block_logits(x, weight_of(c), part_bias, temperature, softcap, z[:, c])
                target[part] = block[cell]
                below = scratch[: block.numel()].view(block.shape)
                base.copy_(statistics.add(block, barred=bias is not None, keep=needs_logits, scratch=below))
            top, log_mass, row_entropy = statistics.finish()
            logp = (target - top[row] - log_mass[row]).requires_grad_(differentiate)
            entropy = row_entropy[row].requires_grad_(differentiate)
            chunk = {name: value if value is None else value[pairs] for name, value in pair_inputs.items()}
            with torch.set_grad_enabled(differentiate):
                part, metrics = policy_loss(logp, settings=settings, entropy=entropy, sequence=None, **chunk)
            loss = loss + part.detach()
            logp_all[pairs] = logp.detach()
            for name in METRICS:
                combine = torch.maximum if name == "ratio_max" else torch.add
                sums[name] = combine(sums[name], metrics[name])
            if not differentiate:
                continue
            d_logp, d_entropy = torch.autograd.grad(part, (logp, entropy))
            del part
            row_d_logp = torch.zeros_like(top).index_add_(0, row, d_logp)
            row_d_entropy = torch.zeros_like(top).index_add_(0, row, d_entropy)
            pull = d_logp * slope_of(target, temperature, softcap)
            of_entropy = (row_entropy, row_d_entropy) if settings.entropy else None
            factor = bases.sub_(top).sub_(log_mass).exp_().mul_(row_d_logp / -temperature)
            dx = states[1, : len(at)].zero_()
            for c, part, cell, of_row in zip(columns, of_panel, cells, factor, strict=True):
                dz = z[:, c]
                if needs_logits:
                    slope = slope_of(dz, temperature, softcap)
                    dz = softmax_gradient_(dz, top, log_mass, row_d_logp, of_entropy)
                    dz = dz.mul_(slope) if softcap or slope != 1 else dz
                else:
                    dz *= of_row[:, None]
                dz.index_put_(cell, pull[part], accumulate=True)
                if d_hidden is not None:
                    dx.addmm_(dz, weight_of(c))
                if d_weight is not None:
                    d_weight[c].addmm_(dz.T, x)
                if d_bias is not None:
                    d_bias[c] += dz.sum(0)
            if d_hidden is not None:
                d_hidden.index_copy_(0, at, dx.to(hidden.dtype))
        ctx.mark_non_differentiable(logp_all, *sums.values())
        ctx.gradients = [
            None if g is None else g.to(x.dtype) for g, x in ((d_hidden, hidden), (d_weight, weight), (d_bias, bias))
        ]
        return loss, logp_all, *sums.values()

    @staticmethod
    @first_order("linear_policy_loss")
    def backward(ctx, d_loss, *_):
        gradients = hand_out(ctx, "linear_policy_loss")
        if d_loss.device.type != "cpu" or d_loss != 1:  # 1 is the usual case, and a pass over the weight's gradient
            for gradient in filter(lambda g: g is not None, gradients):
                gradient *= d_loss
        return *gradients, *[None] * 6


def chunk_shape(
    hidden: torch.Tensor, weight: torch.Tensor, pairs: int, rows: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Rows whose logits fill the workspace, with a panel's temporaries and the rows themselves; columns of a panel.

    Pairs are taken to be spread evenly over rows. However many they are, half of the workspace is left for logits.
    """
    (vocab, size), workspace = weight.shape, workspace_bytes(hidden.device)
    panel, fixed = min(vocab, PANEL), PAIR_BYTES * pairs
    if weight.dtype != dtype:
        panel = max(1, min(panel, workspace // (4 * dtype.itemsize * size)))
        fixed += dtype.itemsize * panel * size
    row_bytes = dtype.itemsize * (vocab + TEMPORARIES * panel + 2 * size) + hidden.dtype.itemsize * size
    row_bytes += CHUNK_PAIR_BYTES * -(-pairs // max(1, rows))
    return max(1, min(rows, max(workspace // 2, workspace - fixed) // row_bytes)), panel
