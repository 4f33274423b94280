"""Who reads which groups: the cost of a group's tree, and shares of equal cost."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedModel

from igpo_fast.types import Group


def tree_cost(group: Group, answer_lengths: Sequence[int], tokens_per_pair: float) -> float:
    """Cost of reading a group's tree, in tokens: its packed tokens, and attention's part of the work.

    What rollouts share beyond their prompt is counted for each. A path's last token is a label only and is not read.

    Args:
        answer_lengths: tokens of each answer's branch; none if no answers are scored.
        tokens_per_pair: what one query that sees one key costs, in tokens.
    """
    prompt = len(group.rollouts[0].prompt_ids)
    ends = np.array([len(rollout.ids) - 1 for rollout in group.rollouts])
    tokens = prompt + (ends - prompt).sum()
    pairs = _triangle(prompt) + (_triangle(ends) - _triangle(prompt)).sum()
    boundaries = np.concatenate([[prompt], *(rollout.boundaries[1:] for rollout in group.rollouts)])
    for length in (length - 1 for length in answer_lengths):
        tokens += length * len(boundaries)
        pairs += (length * boundaries + _triangle(length)).sum()
    return float(tokens + tokens_per_pair * pairs)


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


def _triangle(n):
    return n * (n + 1) / 2
