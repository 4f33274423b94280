"""A pack in two forwards: the tokens that a loss has a gradient at, then all others, without one.

Answers are scored for their values alone, and no token of a rollout attends to them: in a backward through the whole
pack, their rows are zeros. Read apart, they cost a forward and no backward, and keep nothing for one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from igpo_kernels.huggingface.dispatch import TreeAttend
from igpo_kernels.plan import TreePlan
from igpo_kernels.tree_attention import tree_attention


@dataclass(frozen=True)
class TrunkAttend(TreeAttend):
    """Attention under a mask that is another plan's ``with_gradient``; keeps keys and values for ``BranchAttend``."""

    kept: deque[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=deque, repr=False)
    """Number, keys and values of each layer in the order in which they ran, [G, Hkv, D] each, without gradient."""
    taken: list[int] = field(default_factory=list, repr=False)
    """The layers whose keys were taken. Nothing is kept any more once there is one: layers that run then are
    recomputed for the backward."""

    def __call__(self, layer, q, k, v, **options):
        if not self.taken:
            self.kept.append((layer, k.detach(), v.detach()))
        return super().__call__(layer, q, k, v, **options)

    def take(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layer that is next, which are then kept no longer."""
        if not self.kept or self.kept[0][0] != layer:
            raise ValueError(
                f"BranchAttend: the trunk keeps no keys for layer {layer}; give each pair of forwards a TrunkAttend of "
                "its own, and run the trunk's first"
            )
        self.taken.append(layer)
        return self.kept.popleft()[1:]


@dataclass(frozen=True)
class BranchAttend(TreeAttend):
    """Attention of ``plan.rows_without_gradient`` to themselves and to the trunk's keys and values, in one forward.

    Raises:
        ValueError: the trunk's forward did not run the same layers, or another forward has read its keys.
    """

    trunk: TrunkAttend = field(kw_only=True)

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        rows = "rows_without_gradient" if len(q) == len(k) else "rows_read_without_gradient"
        k, v = (self._joined(*parts) for parts in zip(self.trunk.take(layer), (k, v), strict=True))
        return tree_attention(q, k, v, self.plan, scale, softcap, window, self.backend, rows=rows)

    def last_rows(self, device):
        return self.plan.tensor("last_rows_without_gradient", device) if self.rows_read else None

    def _joined(self, trunk: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
        """Keys or values of all tokens of the plan: [N, Hkv, D]."""
        every = trunk.new_empty(self.plan.n_tokens, *trunk.shape[1:])
        for name, part in (("rows_with_gradient", trunk), ("rows_without_gradient", branches)):
            every.index_copy_(0, self.plan.tensor(name, trunk.device), part)
        return every


Forward = Callable[[torch.Tensor, torch.Tensor, TreeAttend], torch.Tensor]
"""(tokens [S], positions [S], attend) -> a decoder's last hidden states: [S, H], or those of ``attend.last_rows``."""


def read_in_parts(
    forward: Forward, plan: TreePlan, device: torch.device | str = "cpu", backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states of a plan with decision tokens and answers, in two forwards.

        def forward(ids, positions, attend):
            out = model.base_model(ids[None], position_ids=positions[None], plan=attend, use_cache=False)
            return out.last_hidden_state[0]

    Returns:
        Those that ``plan.with_gradient`` reads, [len(plan.with_gradient.rows_read), H]; and without gradient those
        that ``plan`` reads, [len(plan.rows_read), H]. ``logprobs(..., rows_read=True)`` takes either with its plan.
    """
    trunk = TrunkAttend(plan.with_gradient, backend, rows_read=True)
    hidden = trunk.last_of(forward(*trunk.plan.tokens(device), trunk))
    with torch.no_grad():
        branches = BranchAttend(plan, backend, rows_read=True, trunk=trunk)
        others = branches.last_of(forward(*plan.tokens(device, "rows_without_gradient"), branches))
        every = torch.cat([hidden.detach(), others])[plan.tensor("place_in_parts", device)]
    return hidden, every
