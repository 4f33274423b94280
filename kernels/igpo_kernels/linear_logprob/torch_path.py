"""linear_logprob block by block: never more logits than the workspace holds, distinct rows only.

Rows repeat (a shared token has several owners), so the LM head runs on the U <= M distinct rows; pairs gather from
them and scatter their gradients back. The backward recomputes each block's logits: three products, of which the
forward keeps only the log-sum-exp (and entropy) of each distinct row.

A block's logits live in one buffer that every block reuses: fresh memory costs page faults, and a block that fits the
caches costs little compared with the product that made it.
"""

from __future__ import annotations

import torch

from igpo_kernels.autograd import first_order
from igpo_kernels.workspace import workspace_bytes

VOCAB_BLOCK = 2048
BLOCK_LOGITS = 2048 * VOCAB_BLOCK
"""Most logits of a block: 16 MiB in float32; larger blocks would only fit the caches worse."""
PAIR_BYTES = 160
"""Bytes per pair of indices and statistics, its row's included."""
MOST_FALL = -1e30
"""Stands for -inf (the maximum before the first block, a barred token), whose product with 0 would be NaN."""


def linear_logprob(hidden, weight, pairs, bias, temperature, softcap, entropy, logsumexp, shard):
    return _LinearLogprob.apply(hidden, weight, bias, pairs, temperature, softcap, entropy, logsumexp, shard)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, pairs, temperature, softcap, entropy, logsumexp, shard):
        pairs = pairs.on_host()
        of = pairs.on(hidden.device)
        distinct, pair_row = of.distinct, of.row_of_pair
        compute = torch.promote_types(hidden.dtype, torch.float32)
        blocks = Blocks(hidden, weight, len(pairs), len(distinct), compute, logits=1 + entropy, states=1)
        statistics = Statistics(len(distinct), hidden.device, compute)
        target = statistics.top.new_zeros(len(pairs))
        for r in blocks.rows:
            x = blocks.states(hidden, distinct[r])
            chunk = pairs.chunk(r, blocks.columns, hidden.device, shard.first)
            for c, part, cell in chunk.panels:
                w = blocks.upcast(weight[c])
                z = block_logits(x, w, _part(bias, c), temperature, softcap, blocks.logits(r, c))
                target[chunk.pairs[part]] = z[cell]
                statistics.add(z, r, entropy, barred=bias is not None)
        top, log_mass, row_entropy = statistics.finish()
        target, top, log_mass, row_entropy = shard.whole(target, top, log_mass, row_entropy if entropy else None)
        ctx.save_for_backward(hidden, weight, bias, top, log_mass, row_entropy)
        ctx.pairs, ctx.of, ctx.first_label = pairs, of, shard.first
        ctx.temperature, ctx.softcap = temperature, softcap
        ctx.set_materialize_grads(False)
        logp = target - top[pair_row] - log_mass[pair_row]
        h = row_entropy[pair_row] if entropy else None
        return logp, h, (top + log_mass)[pair_row] if logsumexp else None

    @staticmethod
    @first_order("linear_logprob")
    def backward(ctx, d_logp, d_entropy, d_logsumexp):
        hidden, weight, bias, top, log_mass, row_entropy = ctx.saved_tensors
        if d_logp is None and d_entropy is None and d_logsumexp is None:
            return (None,) * 9
        pairs, distinct, pair_row = ctx.pairs, ctx.of.distinct, ctx.of.row_of_pair
        of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
        compute = top.dtype
        blocks = Blocks(
            hidden, weight, len(pairs), len(distinct), compute,
            logits=1 + (d_entropy is not None) + (ctx.softcap > 0), states=1 + of_hidden,
        )  # fmt: skip
        # d logp_m / dz = onehot - p, d entropy_m / dz = -p * (log p + entropy), d logsumexp_m / dz = p, each summed
        # over the pairs of a row.
        by_row = lambda d: torch.zeros_like(top).index_add_(0, pair_row, d.to(compute))  # noqa: E731
        d_logp = None if d_logp is None else d_logp.to(compute)
        row_d_logp = torch.zeros_like(top) if d_logp is None else by_row(d_logp)
        if d_logsumexp is not None:
            row_d_logp -= by_row(d_logsumexp)
        row_d_entropy = None if d_entropy is None else by_row(d_entropy)
        d_hidden = torch.zeros_like(hidden) if of_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=compute, device=weight.device) if of_weight else None
        d_bias = torch.zeros(len(weight), dtype=compute, device=weight.device) if of_bias else None
        for r in blocks.rows:
            x = blocks.states(hidden, distinct[r])
            dx = blocks.states_gradient(r) if of_hidden else None
            chunk = pairs.chunk(r, blocks.columns, hidden.device, ctx.first_label)
            for c, part, cell in chunk.panels:
                w = blocks.upcast(weight[c])
                z = block_logits(x, w, _part(bias, c), ctx.temperature, ctx.softcap, blocks.logits(r, c))
                slope = slope_of(z, ctx.temperature, ctx.softcap)
                entropy = None if d_entropy is None else (row_entropy[r], row_d_entropy[r])
                dz = softmax_gradient_(z, top[r], log_mass[r], row_d_logp[r], entropy)
                if d_logp is not None:
                    dz.index_put_(cell, d_logp[chunk.pairs[part]], accumulate=True)
                if ctx.softcap or slope != 1:
                    dz *= slope
                del slope
                if of_hidden:
                    dx.addmm_(dz, w)
                if of_weight:
                    d_weight[c].addmm_(dz.T, x)
                if of_bias:
                    d_bias[c] += dz.sum(0)
            if of_hidden:
                d_hidden.index_copy_(0, distinct[r], dx.to(hidden.dtype))
        d_weight = d_weight.to(weight.dtype) if of_weight else None
        d_bias = d_bias.to(bias.dtype) if of_bias else None
        return d_hidden, d_weight, d_bias, *[None] * 6


class Statistics:
    """Statistics of each row over the blocks of its logits so far: the largest (``top``), the mass ``sum exp(z - top)``
    and the moment ``sum (z - top) exp(z - top)``."""

    def __init__(self, n_rows, device, dtype):
        self.top = torch.full((n_rows,), float("-inf"), dtype=dtype, device=device)
        self.mass, self.moment = torch.zeros_like(self.top), torch.zeros_like(self.top)

    def add(self, z, r: slice = slice(None), entropy=True, barred=True, keep=False, scratch=None) -> torch.Tensor:
        """Add a block of the rows ``r``; it becomes ``exp(z - base)`` unless ``keep``. Returns ``base``, the largest
        logit of each row so far. ``barred``: some may be -inf, as with a bias. ``scratch`` has the block's shape.
        """
        top, mass, moment = self.top[r], self.mass[r], self.moment[r]
        new_top = torch.maximum(top, z.amax(1))
        base = new_top.clamp(min=MOST_FALL)
        fall = (top - base).clamp_(min=MOST_FALL)
        if entropy:
            below = torch.sub(z, base[:, None], out=scratch)
            e = torch.exp(below, out=None if keep else z)
            below = below.clamp_(min=MOST_FALL) if barred else below
            moment.add_(fall * mass).mul_(fall.exp()).add_(below.mul_(e).sum(1))
        else:
            e = z.sub_(base[:, None]).exp_()
        mass.mul_(fall.exp_()).add_(e.sum(1))
        top.copy_(new_top)
        return base

    def finish(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Largest logit, log mass, and entropy (valid if every block was added with ``entropy``).

        The log-sum-exp stays in two parts: their sum would lose the digits that large logits have no room for.
        """
        log_mass = self.mass.log()
        return self.top, log_mass, log_mass - self.moment / self.mass


class Blocks:
    """Row blocks outside, vocabulary blocks inside, and the buffers that they share, within the workspace.

    ``logits`` blocks of logits live at once, and ``states`` copies of a row block's hidden states.
    """

    def __init__(self, hidden, weight, pairs, n_rows, dtype, logits: int, states: int):
        vocab, size = weight.shape
        workspace = workspace_bytes(hidden.device)
        budget = max(workspace // 2, workspace - PAIR_BYTES * pairs)
        width = min(vocab, VOCAB_BLOCK)
        upcast, copied = weight.dtype != dtype, hidden.dtype != dtype
        if upcast:
            width = max(1, min(width, budget // (4 * dtype.itemsize * size)))
            budget -= dtype.itemsize * width * size
        row_bytes = dtype.itemsize * (logits * width + states * size) + (hidden.dtype.itemsize * size if copied else 0)
        height = max(1, min(n_rows, BLOCK_LOGITS // width, budget // row_bytes))
        self.rows = [slice(r, min(r + height, n_rows)) for r in range(0, n_rows, height)]
        self.columns = [slice(c, min(c + width, vocab)) for c in range(0, vocab, width)]
        new = lambda *shape: torch.empty(shape, dtype=dtype, device=hidden.device)  # noqa: E731
        self._logits, self._states = new(height * width), new(states, height, size)
        self._weight = new(width, size) if upcast else None

    def logits(self, r: slice, c: slice) -> torch.Tensor:
        shape = r.stop - r.start, c.stop - c.start
        return self._logits[: shape[0] * shape[1]].view(shape)

    def states(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """The hidden states of ``rows``, in the dtype of the logits."""
        out = self._states[0, : len(rows)]
        if hidden.dtype == out.dtype:
            return torch.index_select(hidden, 0, rows, out=out)
        return out.copy_(hidden[rows])

    def states_gradient(self, r: slice) -> torch.Tensor:
        """Zeros [rows, H]."""
        return self._states[1, : r.stop - r.start].zero_()

    def upcast(self, weight: torch.Tensor) -> torch.Tensor:
        """A block of the weight, in the dtype of the logits."""
        return weight if self._weight is None else self._weight[: len(weight)].copy_(weight)


def block_logits(x, weight, bias, temperature, softcap, out):
    """Scaled logits [rows, columns], in ``out``."""
    z = torch.mm(x, weight.to(x.dtype).T, out=out)
    if bias is not None:
        z += bias
    if softcap:
        z.div_(softcap).tanh_().mul_(softcap)
    return z.div_(temperature) if temperature != 1 else z


def slope_of(z, temperature, softcap):
    """Derivative of the scaled logits in the raw ones, computed from the scaled ones; a number without soft-capping."""
    if not softcap:
        return 1 / temperature
    t = z * (temperature / softcap)
    return t.square_().sub_(1).div_(-temperature)


def softmax_gradient_(z, top, log_mass, d_logp, entropy):
    """Turn logits [rows, columns] in place into their gradient, as if no label lay among them:
    ``-p (d_logp + d_entropy (log p + H))``; ``entropy`` is (H, d_entropy) of each row, or None."""
    below = z.sub_(top[:, None])
    if entropy is None:
        return below.exp_().mul_((log_mass.neg().exp_() * -d_logp)[:, None])
    h, d_entropy = entropy
    log_p = below.sub_(log_mass[:, None]).clamp_(min=MOST_FALL)
    pull = (log_p + h[:, None]).mul_(d_entropy[:, None]).add_(d_logp[:, None])
    return log_p.exp_().mul_(pull.neg_())


def _part(bias, c: slice):
    return None if bias is None else bias[c]
