"""Log-probabilities (and entropies) of labels under an LM head, without [M, V] logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from igpo_kernels.autograd import no_autocast
from igpo_kernels.backend import choose, lazy
from igpo_kernels.checks import check_devices, check_tensors, integers, number
from igpo_kernels.linear_logprob import reference, torch_path
from igpo_kernels.linear_logprob.shards import Shard
from igpo_kernels.pairs import GivenPairs, Pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

IMPLEMENTATIONS = {
    "reference": reference.linear_logprob,
    "torch": torch_path.linear_logprob,
    "triton": lazy("igpo_kernels.linear_logprob.triton_path", "linear_logprob"),
}


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | Pairs,
    rows: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = 0.0,
    entropy: bool = False,
    logsumexp: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """``logp_m = z_m[labels_m] - logsumexp(z_m)``, ``z_m = softcap(hidden[rows_m] @ weight.T + bias) / temperature``.

    Avoids the [M, V] logits and their gradient: at M 65,536, V 151,936 those are 80 GB in float32.

    Args:
        hidden: [N, H]. weight: [V, H]. bias: [V]; -inf excludes a token (with a softcap it
            does not: the cap of -inf is -c).
        labels: integers [M], in 0 .. V-1; leave ignored tokens out of labels and rows. ``Pairs`` are labels and rows
            that the host knows: with them nothing is sorted and nothing waits for the device.
        rows: integers [M], in 0 .. N-1, repeats allowed; None is row m for pair m.
        temperature: above 0.
        softcap: ``c * tanh(z / c)`` where above 0 (Gemma-2's final logits); 0 or None is none.
        entropy: also return ``-sum p log p`` of each pair's row, in nats.
        logsumexp: also return ``logsumexp(z_m)`` of each pair, as z-loss needs it.
        group: the vocabulary is split over these R processes: weight and bias are this rank's shard, V / R entries in
            the order of ranks; everything else is the same on all ranks, the upstream gradients included. One
            all-gather of a few numbers per row. The gradient of ``hidden`` is this rank's part: their sum over the
            group is the whole (as in verl; Megatron's mappings into tensor-parallel regions sum it).
        backend: ``auto``, ``triton``, ``torch`` or ``reference`` (without a group).
    Returns:
        logp [M], in nats, float32 or wider; or a tuple: logp, then entropy [M], then the log-sum-exp [M], of these what
        was asked for. Differentiable once in hidden, weight, bias; a second time raises RuntimeError.
        ``torch.autocast`` changes nothing.
    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. On GPUs a tensor's label or row out of range
            fails a device-side assertion instead, without synchronising.
    """
    check_tensors("linear_logprob", weight=weight)
    shard = Shard.of(group, weight.shape[:1].numel())
    pairs, temperature, softcap = head_arguments(
        "linear_logprob", hidden, weight, labels, rows, temperature, softcap, bias, shard.vocab
    )
    run = choose("linear_logprob", backend, hidden.device, IMPLEMENTATIONS, (hidden.dtype, weight.dtype))
    with no_autocast(hidden.device):
        logp, *more = run(hidden, weight, pairs, bias, temperature, softcap, entropy, logsumexp, shard)
    more = [x for x, asked in zip(more, (entropy, logsumexp), strict=True) if asked]
    return (logp, *more) if more else logp


def head_arguments(
    op, hidden, weight, labels, rows, temperature, softcap, bias, vocab: int | None = None
) -> tuple[GivenPairs, float, float]:
    """Arguments of every LM-head op, checked: the pairs, then ``temperature`` and ``softcap`` as floats. ``vocab``:
    labels are below it; by default the weight's entries."""
    known = isinstance(labels, Pairs)
    given = dict(hidden=hidden, weight=weight, bias=bias, rows=rows) | ({} if known else {"labels": labels})
    check_tensors(op, optional=("bias", "rows"), **given)
    temperature = number(op, "temperature", temperature)
    softcap = 0.0 if softcap is None else number(op, "softcap", softcap)
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{op}: hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit")
    if not len(weight):
        raise ValueError(f"{op}: weight {tuple(weight.shape)} has no vocabulary; give [V, H], V of 1 or more")
    for name in ("hidden", "weight", "bias"):
        if given[name] is not None and not given[name].is_floating_point():
            raise ValueError(f"{op}: {name} is {given[name].dtype}; give floating point")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: bias {tuple(bias.shape)} for a weight {tuple(weight.shape)}; give [{len(weight)}]")
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap must be at least 0 (0 is none) and finite, got {softcap}")
    check_devices(op, **given)
    vocab = len(weight) if vocab is None else vocab
    if known:
        if rows is not None:
            raise ValueError(f"{op}: rows beside Pairs, which hold rows; leave one out")
        labels.check(op, vocab, len(hidden))
        return GivenPairs.of(labels, hidden.device), temperature, softcap
    shape = hidden.shape[:1] if rows is None else rows.shape
    if labels.shape != shape or labels.ndim != 1:
        raise ValueError(f"{op}: {tuple(labels.shape)} labels for {tuple(shape)} rows")
    labels = in_range(op, "label", labels, vocab)
    if rows is None:
        return GivenPairs(labels, None), temperature, softcap
    return GivenPairs(labels, in_range(op, "row", rows, len(hidden))), temperature, softcap


def in_range(op: str, name: str, indices: torch.Tensor, stop: int) -> torch.Tensor:
    """``indices`` as int64; refused unless all are in 0 .. stop - 1."""
    indices = integers(op, f"{name}s", indices)
    outside = (indices < 0) | (indices >= stop)
    if indices.device.type != "cpu":
        torch._assert_async(~outside.any(), f"{op}: a {name} is not in 0 .. {stop - 1}")
    elif outside.any():
        pair = int(outside.nonzero()[0])
        raise ValueError(
            f"{op}: {name} {int(indices[pair])} of pair {pair} is not in 0 .. {stop - 1}; "
            "leave ignored pairs out of labels and rows"
        )
    return indices
