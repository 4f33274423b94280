"""A vocabulary split over processes: each has the statistics of its shard, all get those of the whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from igpo_kernels.checks import check_kind

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

LEAST = -1e12
"""No logit is lower: a shard whose largest is has no mass, every token of it being barred by the bias."""


@dataclass(frozen=True)
class Shard:
    """This process's part of the vocabulary: entries ``first .. first + size - 1`` of ``vocab``."""

    size: int
    first: int
    vocab: int
    group: ProcessGroup | None = None
    """None: the shard is the whole vocabulary."""

    @classmethod
    def of(cls, group: ProcessGroup | None, size: int) -> Shard:
        """The shard of a process whose weight has ``size`` entries, as many as every rank's."""
        if group is None:
            return cls(size, 0, size)
        if group == dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("linear_logprob: this process is not in the group; call it on the group's ranks alone")
        check_kind("linear_logprob", "group", group, dist.ProcessGroup)
        if group.size() == 1:
            return cls(size, 0, size)
        return cls(size, dist.get_rank(group) * size, group.size() * size, group)

    def whole(
        self, logit: torch.Tensor, top: torch.Tensor, log_mass: torch.Tensor, entropy: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Statistics over the whole vocabulary from those over each shard, in one all-gather.

        With ``w_r`` the probability that falls into shard r and ``H_r`` the entropy within it, entropies of disjoint
        shards mix as ``H = sum_r w_r (H_r - log w_r)``. The ranks are added in order: all have the same bits.

        Args:
            logit: [C], 0 for labels of other shards. top, log_mass, entropy: [U].
        Raises:
            ValueError: shards of different sizes, on all ranks; on GPUs a device-side assertion fails instead.
        """
        if self.group is None:
            return logit, top, log_mass, entropy
        mine = [top.new_full((1,), self.size), *(x for x in (logit, top, log_mass, entropy) if x is not None)]
        packed = torch.cat(mine)
        every = packed.new_empty(self.vocab // self.size, len(packed))
        dist.all_gather_into_tensor(every.view(-1), packed, group=self.group)
        sizes, logits, tops, log_masses, *entropies = every.split([len(x) for x in mine], dim=1)
        self._check(sizes)
        top = tops.amax(0)
        barred = tops < LEAST
        log_share = torch.where(barred, -torch.inf, tops - top + log_masses)
        log_mass = log_share.logsumexp(0).masked_fill(barred.all(0), torch.nan)
        if entropy is not None:
            log_w = log_share - log_mass
            entropy = torch.where(barred, 0.0, log_w.exp() * (entropies[0] - log_w)).sum(0)
        return logits.sum(0), top, log_mass, entropy

    def _check(self, sizes: torch.Tensor) -> None:
        """Every rank's ``size`` [R, 1] must be this one's."""
        equal, fault = (sizes == self.size).all(), "linear_logprob: the ranks' shards of the vocabulary differ in size"
        if sizes.device.type != "cpu":
            torch._assert_async(equal, fault)
        elif not equal:
            found = ", ".join(f"{size:.0f}" for size in sizes.flatten())
            raise ValueError(f"{fault}: {found}; pad the last with entries that a bias of -inf bars")
