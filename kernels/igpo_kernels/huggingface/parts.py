"""A pack in two forwards: the tokens that a loss has a gradient at, then all others, without one.

Answers are scored for their values alone, and no token of a rollout attends to them: in a backward through the whole
pack, their rows are zeros. Read apart, they cost a forward and no backward, and keep nothing for one.

    trunk = TrunkAttend(plan.with_gradient, rows_read=True)
    hidden = ...                                            # a forward of plan.with_gradient's tokens
    with torch.no_grad():
        others = ...                                        # a forward of plan.rows_without_gradient's tokens under
                                                            # BranchAttend(plan, trunk, rows_read=True)
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from igpo_kernels.huggingface.dispatch import TreeAttend
from igpo_kernels.tree_attention import tree_attention


@dataclass(frozen=True)
class TrunkAttend(TreeAttend):
    """Attention under the mask of ``plan.with_gradient``, whose keys and values are kept for ``BranchAttend``."""

    kept: dict[int, tuple[torch.Tensor, ...]] = field(default_factory=dict, repr=False)
    """Keys and values of each layer, [G, Hkv, D] each, without gradient; nothing once ``BranchAttend`` has read them,
    so that a layer that is recomputed in the backward does not keep them again."""

    def __call__(self, layer, q, k, v, **options):
        self.kept.setdefault(layer, (k.detach(), v.detach()))
        return super().__call__(layer, q, k, v, **options)


@dataclass(frozen=True)
class BranchAttend(TreeAttend):
    """Attention of ``plan.rows_without_gradient`` to themselves and to the trunk's kept keys and values, which it reads
    once: ValueError if there are none."""

    trunk: TrunkAttend | None = None

    def __call__(self, layer, q, k, v, *, scale, softcap, window):
        rows = "rows_without_gradient" if len(q) == len(k) else "rows_read_without_gradient"
        kept = self.trunk.kept.get(layer)
        if not kept:
            raise ValueError(
                f"BranchAttend: the trunk keeps no keys of layer {layer}; run its forward first, under a TrunkAttend "
                "of its own"
            )
        self.trunk.kept[layer] = ()
        k, v = (self._joined(*parts) for parts in zip(kept, (k, v), strict=True))
        return tree_attention(q, k, v, self.plan, scale, softcap, window, self.backend, rows=rows)

    def last_rows(self, device):
        if not self.rows_read:
            return None
        of, plan = "rows_read_without_gradient", self.plan
        places = lambda: torch.from_numpy(np.searchsorted(plan.rows_without_gradient, getattr(plan, of)))  # noqa: E731
        return plan.cached(("last", of, str(device)), lambda: places().to(device))

    def _joined(self, trunk: torch.Tensor, branches: torch.Tensor) -> torch.Tensor:
        """Keys or values of all tokens of the plan: [N, Hkv, D]."""
        every = trunk.new_empty(self.plan.n_tokens, *trunk.shape[1:])
        for name, part in (("rows_with_gradient", trunk), ("rows_without_gradient", branches)):
            every.index_copy_(0, self.plan.tensor(name, trunk.device), part)
        return every
