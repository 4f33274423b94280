"""One of two processes whose LM head's vocabulary is split between them, against the whole head in float64 on each."""

from __future__ import annotations

import sys
from itertools import product

import torch
import torch.distributed as dist

import tests.conftest  # noqa: F401 (Triton's interpreter, as tests have it)
from igpo_kernels import Pairs, linear_logprob
from igpo_kernels.compat import linear_cross_entropy

RANKS, VOCAB, SIZE, ROWS = 2, 70, 16, 9
OPTIONS = ({}, {"temperature": 0.7, "softcap": 3.0}, {"shift": -200.0}, {"barred": slice(0, 35)})
"""The last one bars all of the first rank's tokens."""


def case(shift: float = 0.0, barred: slice = slice(0)):
    g = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, SIZE, generator=g) for n in (ROWS, VOCAB))
    bias = torch.randn(VOCAB, generator=g) + shift
    bias[barred] = -torch.inf
    rows = torch.tensor([0, 4, 4, 4, 8, 8, 2])
    labels = torch.tensor([36, 40, 69, 40, 35, 36, 68] if barred.stop else [0, 34, 35, 34, 69, 1, 68])
    upstream = torch.randn(3, len(rows), generator=g)
    return hidden, weight, bias, rows, labels, upstream


def whole(hidden, weight, bias, rows, labels, upstream, temperature=1.0, softcap=0.0):
    """Values and gradients of the whole head, from its definition in float64."""
    leaves = [x.double().requires_grad_() for x in (hidden, weight, bias)]
    z = (leaves[0] @ leaves[1].T)[rows] + leaves[2]
    z = (softcap * (z / softcap).tanh() if softcap else z) / temperature
    log_p = z.log_softmax(1)
    entropy = -torch.where(log_p > -torch.inf, log_p.exp() * log_p.clamp(min=-1e30), 0.0).sum(1)
    out = log_p.gather(1, labels[:, None])[:, 0], entropy, z.logsumexp(1)
    loss = sum((a * b).sum() for a, b in zip(out, upstream.double(), strict=True))
    return [x.detach() for x in out], torch.autograd.grad(loss, leaves)


def check(rank: int, backend: str, known: bool, options: dict) -> None:
    made = {name: options[name] for name in ("shift", "barred") if name in options}
    asked = {name: value for name, value in options.items() if name not in made}
    hidden, weight, bias, rows, labels, upstream = case(**made)
    out, gradients = whole(hidden, weight, bias, rows, labels, upstream, **asked)
    mine = slice(rank * VOCAB // RANKS, (rank + 1) * VOCAB // RANKS)
    leaves = [x.requires_grad_() for x in (hidden, weight[mine].clone(), bias[mine].clone())]
    pairs = (Pairs(labels.numpy(), rows.numpy()),) if known else (labels, rows)
    asked |= dict(bias=leaves[2], entropy=True, logsumexp=True, group=dist.group.WORLD, backend=backend)
    ours = linear_logprob(*leaves[:2], *pairs, **asked)
    loss = sum((a * b).sum() for a, b in zip(ours, upstream, strict=True))
    d_hidden, *own = torch.autograd.grad(loss, leaves)
    dist.all_reduce(d_hidden)
    found = [*ours, d_hidden, *own]
    for got, want in zip(found, [*out, gradients[0], *(x[mine] for x in gradients[1:])], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-4, atol=2e-4)
    every = [torch.empty_like(ours[0].detach()) for _ in range(RANKS)]
    dist.all_gather(every, ours[0].detach())
    assert torch.equal(*every), "the ranks' log-probabilities differ"


def check_verls(rank: int) -> None:
    hidden, weight, _, _, labels, _ = case()
    log_p = (hidden[: len(labels)].double() @ weight.double().T / 0.7).log_softmax(1)
    shard = weight.view(RANKS, -1, SIZE)[rank]
    logp, entropy = linear_cross_entropy(hidden[: len(labels)], shard, labels, 0.7, "none", dist.group.WORLD)
    torch.testing.assert_close(logp, log_p.gather(1, labels[:, None])[:, 0].float())
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(1).float())


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for backend, known, options in product(("torch", "triton"), (False, True), OPTIONS):
        try:
            check(rank, backend, known, options)
        except Exception as error:
            raise AssertionError(f"rank {rank}: {backend}, known={known}, {options}") from error
    check_verls(rank)
    try:
        linear_logprob(torch.zeros(3, 8), torch.zeros(5, 8), torch.tensor([10, 0, 1]), group=dist.group.WORLD)
    except ValueError as error:
        assert "label 10 of pair 0 is not in 0 .. 9" in str(error)
    else:
        raise AssertionError("a label beyond the whole vocabulary was taken")
    try:
        linear_logprob(*(torch.zeros(3, 8),) * 2, torch.tensor([0, 1, 1]), group=dist.group.WORLD, backend="reference")
    except ValueError as error:
        assert "takes no group" in str(error)
    else:
        raise AssertionError("the reference took a group")
    try:
        linear_logprob(torch.zeros(2, 8), torch.zeros(5 + rank, 8), torch.tensor([0, 1]), group=dist.group.WORLD)
    except ValueError as error:
        assert "differ in size: 5, 6;" in str(error)
    else:
        raise AssertionError("shards of different sizes were taken")
    dist.destroy_process_group()
    print("done")


if __name__ == "__main__":
    sys.exit(main())
