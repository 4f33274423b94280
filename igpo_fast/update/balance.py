"""Who reads which groups: the cost of a group's tree, and shares of equal cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from transformers import PreTrainedModel

from igpo_kernels import Tree, tree_size


def tree_cost(tree: Tree, tokens_per_pair: float) -> float:
    """Cost of reading a packed tree, in tokens: those it holds, and attention's part of the work.

    Args:
        tokens_per_pair: what one query that sees one key costs, in tokens.
    """
    tokens, pairs = tree_size(tree)
    return tokens + tokens_per_pair * pairs


def attention_share(lm: PreTrainedModel, parameters: int) -> float:
    """What a query that sees a key costs, as a share of what a token costs in the model's matrices: 4 H L against 2 P
    FLOPs, for the H numbers of each of L layers and P parameters."""
    config = lm.config.get_text_config()
    return 2 * config.hidden_size * config.num_hidden_layers / parameters


def shares(costs: Sequence[float], ranks: int) -> list[list[int]]:
    """The numbers of the items that each rank takes, ascending: longest first, each to the rank with the least so far.

    At most 4/3 of the best possible largest share (Graham, Bounds on Multiprocessing Timing Anomalies, 1969).
    """
    taken: list[list[int]] = [[] for _ in range(ranks)]
    least = [(0.0, rank) for rank in range(ranks)]
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, rank = heapq.heappop(least)
        taken[rank].append(number)
        heapq.heappush(least, (total + costs[number], rank))
    return [sorted(numbers) for numbers in taken]
