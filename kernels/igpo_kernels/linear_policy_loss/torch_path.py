"""linear_policy_loss by row chunks: the gradient is made in the forward, while the chunk's logits are there.

For a chunk of distinct rows: logits and their statistics, the loss and its slope in each log-probability and entropy,
the logits' gradient in their place, and two products into dhidden and dweight: 6 * U * H * V FLOPs for loss and
gradients. Both sweeps go through the vocabulary panel by panel, so that a panel is still in the caches when it is used.
Unless something else needs the logits themselves (an entropy, soft-capping), the first sweep leaves exp(z - base) in
their place, base being the row's largest logit up to that panel, and the second sweep only multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from igpo_kernels.autograd import first_order
from igpo_kernels.linear_logprob.torch_path import Statistics, block_logits, slope_of, softmax_gradient_
from igpo_kernels.pairs import Chunk
from igpo_kernels.policy_loss.gradients import hand_out
from igpo_kernels.policy_loss.reference import METRICS, policy_loss
from igpo_kernels.policy_loss.settings import LossSettings
from igpo_kernels.workspace import workspace_bytes

PANEL = 1024
"""Columns per panel: with a chunk's hundred rows they fit a core's own cache."""
TEMPORARIES = 4
"""Temporaries of a panel's size beside a chunk's logits."""
PAIR_BYTES, CHUNK_PAIR_BYTES = 112, 320
"""Bytes per pair: its place in the order of rows and its row's; and, while its chunk is in work, its loss."""


def linear_policy_loss(hidden, weight, bias, pairs, pair_inputs, settings, temperature, softcap):
    loss, logp, *sums = _LinearPolicyLoss.apply(
        hidden, weight, bias, pairs, pair_inputs, settings, temperature, softcap
    )
    return loss, {**dict(zip(METRICS, sums, strict=True)), "logp": logp}


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, pairs, pair_inputs, settings, temperature, softcap):
        compute, differentiate = torch.promote_types(hidden.dtype, torch.float32), any(ctx.needs_input_grad)
        pairs = pairs.on_host()
        count = len(pairs.on(hidden.device).distinct)
        gradients = Gradients(hidden, weight, bias, compute, ctx.needs_input_grad, count)
        height, panel = chunk_shape(hidden, weight, len(pairs), count, compute)
        keep_logits = bool(softcap or settings.entropy)
        head = Head(weight, bias, temperature, softcap, height, panel, compute, keep_logits)
        loss, logp = hidden.new_zeros((), dtype=compute), hidden.new_empty(len(pairs), dtype=compute)
        sums = {name: torch.zeros_like(loss) for name in METRICS}
        for start in range(0, count, height):
            chunk = pairs.chunk(slice(start, min(start + height, count)), head.columns, hidden.device)
            swept = first_sweep(head, hidden, chunk)
            inputs = {name: value if value is None else value[chunk.pairs] for name, value in pair_inputs.items()}
            part, metrics, logp[chunk.pairs], slopes = chunk_loss(swept, chunk.row, inputs, settings, differentiate)
            loss += part
            for name in METRICS:
                combine = torch.maximum if name == "ratio_max" else torch.add
                sums[name] = combine(sums[name], metrics[name])
            if differentiate:
                second_sweep(head, chunk, swept, slopes, settings, gradients)
        ctx.mark_non_differentiable(logp, *sums.values())
        ctx.gradients = gradients.of(hidden, weight, bias)
        return loss, logp, *sums.values()

    @staticmethod
    @first_order("linear_policy_loss")
    def backward(ctx, d_loss, *_):
        gradients = hand_out(ctx, "linear_policy_loss")
        if d_loss.device.type != "cpu" or d_loss != 1:  # 1 is the usual case, and a pass over the weight's gradient
            for gradient in filter(lambda g: g is not None, gradients):
                gradient *= d_loss
        return *gradients, *[None] * 5


class Gradients:
    """Gradients that chunks add to: hidden's [N, H] in its dtype, the weight's [V, H] and the bias's [V] in ``dtype``;
    None where none is needed. Of ``chunks`` chunks the first writes the weight's, which costs no pass of zeros."""

    def __init__(self, hidden, weight, bias, dtype: torch.dtype, needed: Sequence[bool], chunks: int):
        dtypes = (hidden.dtype, dtype, dtype)
        makes = (torch.zeros, torch.empty if chunks else torch.zeros, torch.zeros)
        self.hidden, self.weight, self.bias = (
            make(x.shape, dtype=dtype, device=x.device) if need else None
            for make, x, dtype, need in zip(makes, (hidden, weight, bias), dtypes, needed, strict=False)
        )
        self.begun = False

    def of(self, *inputs: torch.Tensor | None) -> list[torch.Tensor | None]:
        """The gradients of hidden, weight and bias in the inputs' dtypes."""
        pairs = zip((self.hidden, self.weight, self.bias), inputs, strict=True)
        return [None if gradient is None else gradient.to(x.dtype) for gradient, x in pairs]


class Head:
    """The LM head, its panels, and the buffers that all chunks of up to ``height`` rows share."""

    def __init__(self, weight, bias, temperature, softcap, height, panel, dtype: torch.dtype, keep_logits: bool):
        vocab, size = weight.shape
        new = partial(torch.empty, dtype=dtype, device=weight.device)
        self.weight, self.bias, self.temperature, self.softcap = weight, bias, temperature, softcap
        self.keep_logits, self.dtype = keep_logits, dtype
        self.columns = [slice(c, min(c + panel, vocab)) for c in range(0, vocab, panel)]
        self._logits, self._scratch, self._states = new(height * vocab), new(height * panel), new(2, height, size)
        self._upcast = None if weight.dtype == dtype else new(panel, size)

    def logits(self, rows: int) -> torch.Tensor:
        return self._logits[: rows * len(self.weight)].view(rows, -1)

    def scratch(self, block: torch.Tensor) -> torch.Tensor:
        return self._scratch[: block.numel()].view(block.shape)

    def states(self, rows: int) -> torch.Tensor:
        return self._states[0, :rows]

    def states_gradient(self, rows: int) -> torch.Tensor:
        return self._states[1, :rows].zero_()

    def panel_weight(self, c: slice) -> torch.Tensor:
        return self.weight[c] if self._upcast is None else self._upcast[: c.stop - c.start].copy_(self.weight[c])


class Swept(NamedTuple):
    """Results of the first sweep over a chunk of U rows, m pairs and P panels."""

    target: torch.Tensor
    """Each pair's logit [m]."""
    top: torch.Tensor
    log_mass: torch.Tensor
    entropy: torch.Tensor
    """Statistics of each row's distribution [U]."""
    bases: torch.Tensor
    """Base of each panel's exponentials [P, U]."""


def first_sweep(head: Head, hidden: torch.Tensor, chunk: Chunk) -> Swept:
    """Fill the chunk's logits panel by panel, and leave ``exp(z - base)`` in their place unless they are kept."""
    x = head.states(len(chunk.rows)).copy_(hidden[chunk.rows])
    z = head.logits(len(chunk.rows))
    statistics = Statistics(len(chunk.rows), hidden.device, head.dtype)
    target, bases = z.new_empty(len(chunk.pairs)), z.new_empty(len(chunk.panels), len(chunk.rows))
    for (c, part, cell), base in zip(chunk.panels, bases, strict=True):
        bias = None if head.bias is None else head.bias[c]
        block = block_logits(x, head.panel_weight(c), bias, head.temperature, head.softcap, z[:, c])
        target[part] = block[cell]
        scratch = head.scratch(block)
        base.copy_(statistics.add(block, barred=bias is not None, keep=head.keep_logits, scratch=scratch))
    return Swept(target, *statistics.finish(), bases)


def chunk_loss(swept: Swept, row: torch.Tensor, inputs: dict, settings: LossSettings, differentiate: bool):
    """Loss, metrics and log-probabilities of a chunk's pairs, without a graph; and the loss's slopes in these
    log-probabilities and in the pairs' entropies, None unless asked for."""
    logp = (swept.target - swept.top[row] - swept.log_mass[row]).requires_grad_(differentiate)
    entropy = swept.entropy[row].requires_grad_(differentiate)
    with torch.set_grad_enabled(differentiate):
        loss, metrics = policy_loss(logp, settings=settings, entropy=entropy, segment=None, sequence=None, **inputs)
    slopes = torch.autograd.grad(loss, (logp, entropy)) if differentiate else None
    return loss.detach(), metrics, logp.detach(), slopes


def second_sweep(
    head: Head, chunk: Chunk, swept: Swept, slopes: tuple, settings: LossSettings, gradients: Gradients
) -> None:
    """Turn the chunk's logits into their gradient, panel by panel, and add its products to ``gradients``."""
    (d_logp, d_entropy), (target, top, log_mass, entropy, bases) = slopes, swept
    x, z, dx = (f(len(chunk.rows)) for f in (head.states, head.logits, head.states_gradient))
    row_d_logp = torch.zeros_like(top).index_add_(0, chunk.row, d_logp)
    row_d_entropy = torch.zeros_like(top).index_add_(0, chunk.row, d_entropy)
    pull = d_logp * slope_of(target, head.temperature, head.softcap)
    row_entropy = (entropy, row_d_entropy) if settings.entropy else None
    factor = bases.sub_(top).sub_(log_mass).exp_().mul_(row_d_logp / -head.temperature)
    for (c, part, cell), row_factor in zip(chunk.panels, factor, strict=True):
        dz = z[:, c]
        if head.keep_logits:
            slope = slope_of(dz, head.temperature, head.softcap)
            dz = softmax_gradient_(dz, top, log_mass, row_d_logp, row_entropy)
            dz = dz.mul_(slope) if head.softcap or slope != 1 else dz
        else:
            dz *= row_factor[:, None]
        dz.index_put_(cell, pull[part], accumulate=True)
        if gradients.hidden is not None:
            dx.addmm_(dz, head.panel_weight(c))
        if gradients.weight is not None:
            gradients.weight[c].addmm_(dz.T, x, beta=int(gradients.begun))
        if gradients.bias is not None:
            gradients.bias[c] += dz.sum(0)
    gradients.begun = True
    if gradients.hidden is not None:
        gradients.hidden.index_copy_(0, chunk.rows, dx.to(gradients.hidden.dtype))


def chunk_shape(
    hidden: torch.Tensor, weight: torch.Tensor, pairs: int, rows: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Rows per chunk, whose logits, temporaries and states fit the workspace, and columns per panel.

    Chunks are as few as fit, and of equal height: products of a few rows left over would be slow. Assumes pairs spread
    evenly over rows. Half of the workspace is left for logits, however many pairs there are.
    """
    (vocab, size), workspace = weight.shape, workspace_bytes(hidden.device)
    panel, fixed = min(vocab, PANEL), PAIR_BYTES * pairs
    if weight.dtype != dtype:
        panel = max(1, min(panel, workspace // (4 * dtype.itemsize * size)))
        fixed += dtype.itemsize * panel * size
    row_bytes = dtype.itemsize * (vocab + TEMPORARIES * panel + 2 * size) + hidden.dtype.itemsize * size
    row_bytes += CHUNK_PAIR_BYTES * -(-pairs // max(1, rows))
    height = max(1, min(rows, max(workspace // 2, workspace - fixed) // row_bytes))
    return -(-rows // -(-rows // height)) if rows else 1, panel
