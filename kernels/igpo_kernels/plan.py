"""TreePlan: several rollouts, their shared prefixes and their answer branches as one row of tokens.

A pack is one token row: trees laid out depth-first, a trunk's continuation before the branches that leave it. With
``subtree_end[k]`` the index just past the last token that descends from token k,

    query q sees key k  <=>  k <= q < subtree_end[k]

is the whole attention mask: causal, shared prompts, answer branches, sequence packing, any depth.

The last token of a prefix predicts several next tokens, so log-probabilities are of (row, label) pairs, one per owner:
a token that two rollouts share is two pairs, and rows repeat.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from igpo_kernels.cache import Cached, on_device
from igpo_kernels.checks import check_kind, whole_numbers
from igpo_kernels.pairs import Pairs

DECISION, ANSWER, FORK = 0, 1, 2
"""Values of ``TreePlan.kind``."""


@dataclass(frozen=True)
class Branch:
    """An answer in its wrapper, forced after every prefix: ``ids[start:stop]`` are the answer's own tokens, which
    are scored; ``ids[:start]`` are the wrapper's opening; tokens from ``stop`` on are never read."""

    ids: np.ndarray
    """int32 [b]."""
    start: int
    stop: int


@dataclass(frozen=True)
class Fork:
    """Another continuation of one prefix of a rollout: other passages in place of a response, say. ``ids[start:stop]``
    are scored; tokens from ``stop`` on are never read. What it shares with the rollout, or with other forks, is read
    once."""

    at: int
    """Tokens of the rollout that come before it: at least 1."""
    ids: np.ndarray
    """int32 [b]."""
    start: int
    stop: int
    turn: int
    """The caller's number; comes back as ``TreePlan.turn``."""
    answer: int = 0
    """The caller's number; comes back as ``TreePlan.answer``."""


@dataclass(frozen=True)
class RolloutTokens:
    """One rollout as tokens."""

    index: int
    """The caller's number for it; comes back as ``TreePlan.rollout``."""
    ids: np.ndarray
    """int32 [L]."""
    turn: np.ndarray
    """The turn of each decision token, -1 for tokens that are not trained: int32 [L]. Token 0 is never trained."""
    boundaries: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """Lengths of the prefixes after which the answers are scored, increasing, >= 1: int64 [T]."""
    forks: Sequence[Fork] = ()


@dataclass(frozen=True)
class Tree:
    """The rollouts of one question, and the answers to force after each of their prefixes (none: no scoring)."""

    rollouts: Sequence[RolloutTokens]
    branches: Sequence[Branch] = ()


@dataclass(frozen=True, eq=False)
class TreePlan(Cached):
    """One pack. All arrays are int64; N packed tokens, M pairs: decision pairs first (by tree, rollout, token), then
    answer pairs (by rollout, turn, answer, token), then those of forks (by tree, rollout, fork, token).

    >>> prompt_and_turn = RolloutTokens(0, np.array([5, 6, 7]), np.array([-1, -1, 0]), np.array([2]))
    >>> plan = pack([Tree([prompt_and_turn], [Branch(np.array([8, 9]), 1, 2)])])
    >>> plan.input_ids.tolist()     # the prompt, then the branch's wrapper; 7 and 9 are labels only
    [5, 6, 8]
    >>> plan.subtree_end.tolist(), plan.row.tolist(), plan.label.tolist()
    ([3, 3, 3], [1, 2], [7, 9])
    """

    input_ids: np.ndarray
    """[N]"""
    position_ids: np.ndarray
    """Length of the path from the root: [N]."""
    subtree_end: np.ndarray
    """[N]"""
    tree_start: np.ndarray
    """Index of the first token of the tree: [N]."""
    row: np.ndarray
    """The packed token whose hidden state predicts the label: [M]."""
    label: np.ndarray
    """[M]"""
    kind: np.ndarray
    """DECISION, ANSWER or FORK: [M]."""
    rollout: np.ndarray
    """``RolloutTokens.index`` of the owner: [M]."""
    turn: np.ndarray
    """A decision token's turn; the boundary (prefix) that an answer token follows; ``Fork.turn``: [M]."""
    answer: np.ndarray
    """Index of the accepted answer, -1 for decision tokens; ``Fork.answer``: [M]."""
    token: np.ndarray
    """A decision token's index in its rollout; another token's index in what is scored: [M]."""
    cache: dict = field(default_factory=dict, init=False, repr=False)
    """Device copies, grouped pairs and attention schedules, shared by layers and passes."""

    @property
    def n_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def n_pairs(self) -> int:
        return len(self.row)

    @property
    def n_decisions(self) -> int:
        """Pairs ``[:n_decisions]`` are decision tokens, the rest those of answers and forks."""
        return int(np.count_nonzero(self.kind == DECISION))

    @property
    def rows_read(self) -> np.ndarray:
        """The packed tokens whose hidden states some pair reads, ascending: int64 [U]."""
        return self.cached("rows read", lambda: np.unique(self.row))

    @property
    def rows_with_gradient(self) -> np.ndarray:
        """The packed tokens that some decision pair's row sees, ascending: int64 [G]. A loss on decision pairs has no
        gradient at any other token."""

        def found() -> np.ndarray:
            read = np.unique(self.row[: self.n_decisions])
            following = np.append(read, self.n_tokens)[np.searchsorted(read, np.arange(self.n_tokens))]
            return np.flatnonzero(following < self.subtree_end)

        return self.cached("rows with gradient", found)

    @property
    def rows_without_gradient(self) -> np.ndarray:
        """The other packed tokens, ascending: int64 [N - G]. Answers, forks, and what follows a last decision token."""
        rows = range(self.n_tokens)
        return self.cached("rows without gradient", lambda: np.setdiff1d(rows, self.rows_with_gradient, True))

    @property
    def rows_read_without_gradient(self) -> np.ndarray:
        """The tokens that are in both ``rows_read`` and ``rows_without_gradient``, ascending."""
        both = lambda: np.intersect1d(self.rows_read, self.rows_without_gradient, True)  # noqa: E731
        return self.cached("rows read without gradient", both)

    @property
    def last_rows_without_gradient(self) -> np.ndarray:
        """The places of ``rows_read_without_gradient`` in ``rows_without_gradient``."""
        return np.searchsorted(self.rows_without_gradient, self.rows_read_without_gradient)

    @property
    def place_in_parts(self) -> np.ndarray:
        """Where each of ``rows_read`` comes when those with a gradient come first: int64 [U]."""

        def found() -> np.ndarray:
            later = np.isin(self.rows_read, self.rows_without_gradient)
            return np.argsort(np.argsort(later, kind="stable"))

        return self.cached("place in parts", found)

    @property
    def with_gradient(self) -> TreePlan:
        """The plan of ``rows_with_gradient`` alone, and of the pairs that read them: all decision pairs first."""

        def cut() -> TreePlan:
            kept = self.rows_with_gradient
            place = partial(np.searchsorted, kept)
            pairs = np.isin(self.row, kept)
            columns = {name: getattr(self, name)[pairs] for name in _PAIR_COLUMNS}
            return TreePlan(
                self.input_ids[kept], self.position_ids[kept], place(self.subtree_end[kept]),
                place(self.tree_start[kept]), **columns | {"row": place(columns["row"])},
            )  # fmt: skip

        return self.cached("with gradient", cut)

    @property
    def is_sequences(self) -> bool:
        """Whether every tree is a single sequence: nothing shared, no branches."""
        depth = self.position_ids - self.position_ids[self.tree_start]
        return bool((depth == np.arange(self.n_tokens) - self.tree_start).all())

    def pairs(self, part: slice = slice(None), *, rows_read: bool = False) -> Pairs:
        """Labels and rows of the pairs ``part``, grouped once for the LM head's ops, which take them in place of
        ``labels``. With ``rows_read`` the rows are places in ``rows_read``, of whose hidden states alone the head then
        reads. ValueError unless ``part`` is a slice."""
        check_kind("TreePlan.pairs", "part", part, slice)

        def grouped() -> Pairs:
            row = self.row[part]
            return Pairs(self.label[part], np.searchsorted(self.rows_read, row) if rows_read else row)

        return self.cached(("pairs", *part.indices(self.n_pairs), rows_read), grouped)

    def tokens(self, device: torch.device | str = "cpu", rows: str = "") -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and their positions on ``device``, all or those of the field ``rows``: int64 [S] each."""
        every = (self.tensor(name, device) for name in ("input_ids", "position_ids"))
        return tuple(x[self.tensor(rows, device)] if rows else x for x in every)

    def tensor(self, name: str, device: torch.device | str = "cpu") -> torch.Tensor:
        """A field as a tensor on ``device``, copied once."""
        return self.cached((name, str(device)), lambda: on_device(getattr(self, name), device))


def pack(trees: Sequence[Tree]) -> TreePlan:
    """Lay out trees one after another in a single pack.

    Args:
        trees: at least one, each with at least one rollout.
    Raises:
        ValueError: an empty rollout, a trained first token, a boundary outside its rollout, an empty answer, ids that
            are no whole numbers. (Lists of whole numbers are accepted like arrays.)
    """
    return _join([_layout(tree) for tree in trees])


def pack_within(trees: Sequence[Tree], token_budget: int, *, split: bool = False) -> list[TreePlan]:
    """Lay out trees in packs of at most ``token_budget`` tokens, as few as first-fit-decreasing finds.

    Args:
        split: whether a tree over the budget is split into trees of fewer rollouts, which then share less, or is
            refused. Per-group statistics that are computed inside one pass need whole groups.
    Raises:
        ValueError: a tree (with ``split``: a single rollout) over the budget; and what ``pack`` raises.
    """
    layouts: list[_Layout] = []
    todo = list(reversed(trees))
    while todo:
        tree = todo.pop()
        layout = _layout(tree)
        if len(layout.input_ids) <= token_budget:
            layouts.append(layout)
        elif split and len(tree.rollouts) > 1:
            half = len(tree.rollouts) // 2
            todo += [Tree(tree.rollouts[half:], tree.branches), Tree(tree.rollouts[:half], tree.branches)]
        else:
            what = "rollout" if len(tree.rollouts) == 1 else f"group of {len(tree.rollouts)} rollouts"
            raise ValueError(
                f"a {what} packs to {len(layout.input_ids)} tokens, over the budget of {token_budget}; "
                "raise the token budget or shorten rollouts"
            )
    packs: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(layouts)), key=lambda i: -len(layouts[i].input_ids)):
        size = len(layouts[i].input_ids)
        for p, free in enumerate(room):
            if size <= free:
                packs[p].append(i)
                room[p] -= size
                break
        else:
            packs.append([i])
            room.append(token_budget - size)
    return [_join([layouts[i] for i in sorted(members)]) for members in packs]


def tree_size(tree: Tree) -> tuple[int, int]:
    """What a packed tree will hold, without laying it out.

    Returns:
        Its tokens, and the (query, key) pairs that its attention sees.
    Raises:
        ValueError: what ``pack`` raises.
    """
    if not tree.rollouts:
        raise ValueError("a tree needs at least one rollout")
    tree = _checked(tree)
    depth = _branch_block(tree.branches).depth if tree.branches else np.zeros(0, np.int64)
    tokens = pairs = 0
    met: set[int] = set()  # boundaries of the prefix that is shared with the rollout before
    fed = _fed(tree)
    for i, before, _ in _paths(fed):
        length = len(fed[i])
        tokens += length - before
        pairs += (length * (length + 1) - before * (before + 1)) // 2
        met = {boundary for boundary in met if boundary <= before}
        own = i < len(tree.rollouts) and tree.branches
        new = set(tree.rollouts[i].boundaries.tolist()) - met if own else set()
        met |= new
        tokens += len(new) * len(depth)
        pairs += sum(new) * len(depth) + len(new) * int((depth + 1).sum())
    return tokens, pairs


class _Layout(NamedTuple):
    """One tree, indices relative to its start."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    subtree_end: np.ndarray
    pairs: np.ndarray
    """int64 [M, 7]: row, label, kind, rollout, turn, answer, token."""


class _BranchBlock(NamedTuple):
    """The trie of a tree's branches, laid out once and copied behind every boundary."""

    input_ids: np.ndarray
    depth: np.ndarray
    subtree_end: np.ndarray
    pairs: np.ndarray
    """int64 [m, 4]: row (-1 is the boundary's own last token), label, answer, token."""


def _shared_prefix(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _paths(sequences: Sequence[np.ndarray]):
    """Visit sequences in an order in which each shares its longest possible prefix with the one before.

    Yields (index, shared with the one before, shared with the one after; -1 for the last).
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())
    shared = [_shared_prefix(sequences[a], sequences[b]) for a, b in pairwise(order)]
    yield from zip(order, [0, *shared], [*shared, -1], strict=True)


def _checked(tree: Tree) -> Tree:
    """The tree with arrays in place of lists."""
    rollouts = [
        RolloutTokens(
            r.index,
            whole_numbers(f"rollout {r.index}", "ids", r.ids, 0),
            whole_numbers(f"rollout {r.index}", "turns", r.turn, -1),
            whole_numbers(f"rollout {r.index}", "boundaries", r.boundaries, 0),
            [replace(f, ids=whole_numbers(f"a fork of rollout {r.index}", "ids", f.ids, 0)) for f in r.forks],
        )
        for r in tree.rollouts
    ]
    branches = [
        Branch(whole_numbers(f"branch {number}", "ids", branch.ids, 0), branch.start, branch.stop)
        for number, branch in enumerate(tree.branches)
    ]
    return Tree(rollouts, branches)


def _branch_block(branches: Sequence[Branch]) -> _BranchBlock:
    for number, branch in enumerate(branches):
        if not 0 <= branch.start < branch.stop <= len(branch.ids):
            raise ValueError(
                f"branch {number} scores tokens {branch.start}:{branch.stop} of {len(branch.ids)}; "
                "an answer has at least one token, inside the branch"
            )
    fed = [branch.ids[: branch.stop - 1] for branch in branches]
    size = 0
    path = np.zeros(0, np.int64)
    ids, depths, ends, pairs = [], [], np.zeros(sum(map(len, fed)), np.int64), [None] * len(branches)
    for a, before, after in _paths(fed):
        new = len(fed[a]) - before
        path = np.concatenate([path[:before], np.arange(size, size + new)])
        ids.append(fed[a][before:])
        depths.append(np.arange(before, len(fed[a])))
        size += new
        ends[path[max(after, 0) :]] = size
        tokens = np.arange(branches[a].start, branches[a].stop)
        rows = np.concatenate([[-1], path])[tokens]
        labels = branches[a].ids[tokens]
        pairs[a] = np.stack([rows, labels, np.full(len(tokens), a), tokens - tokens[0]], axis=1)
    return _BranchBlock(np.concatenate(ids), np.concatenate(depths), ends[:size], np.concatenate(pairs))


def _fed_length(rollout: RolloutTokens, scored: bool) -> int:
    """Number of tokens that the model must read: all before the last label, and every scored prefix."""
    n = len(rollout.ids)
    if n == 0 or len(rollout.turn) != n:
        raise ValueError(f"rollout {rollout.index} has {n} tokens and {len(rollout.turn)} turn numbers")
    if rollout.turn[0] >= 0:
        raise ValueError(f"rollout {rollout.index} trains its first token, which nothing predicts")
    trained = np.flatnonzero(rollout.turn >= 0)
    last = int(trained[-1]) if len(trained) else 1
    if scored and len(rollout.boundaries):
        b = rollout.boundaries
        if b[0] < 1 or b[-1] > n or (np.diff(b) <= 0).any():
            raise ValueError(f"rollout {rollout.index}: boundaries {b.tolist()} must increase within 1..{n}")
        last = max(last, int(b[-1]))
    return last


def _fed(tree: Tree) -> list[np.ndarray]:
    """The tokens that the model must read on each path: the rollouts', then their forks'."""
    paths = [rollout.ids[: _fed_length(rollout, len(tree.branches) > 0)] for rollout in tree.rollouts]
    for rollout in tree.rollouts:
        for fork in rollout.forks:
            if not (1 <= fork.at <= len(rollout.ids) and 0 <= fork.start < fork.stop <= len(fork.ids)):
                raise ValueError(
                    f"rollout {rollout.index}: a fork after {fork.at} of {len(rollout.ids)} tokens scores "
                    f"{fork.start}:{fork.stop} of its {len(fork.ids)}; it begins after 1 token or more, and scores one"
                )
            paths.append(np.concatenate([rollout.ids[: fork.at], fork.ids[: fork.stop - 1]]))
    return paths


def _layout(tree: Tree) -> _Layout:
    if not tree.rollouts:
        raise ValueError("a tree needs at least one rollout")
    tree = _checked(tree)
    scored = len(tree.branches) > 0
    block = _branch_block(tree.branches) if scored else None
    width = len(block.input_ids) if block else 0
    rollouts = tree.rollouts
    fed = _fed(tree)
    forks = [(rollout, fork) for rollout in rollouts for fork in rollout.forks]

    size = 0
    path = np.zeros(0, np.int64)
    open_boundaries: dict[int, list[tuple[int, int]]] = {}  # prefix length -> owners (rollout index, turn)
    ids, positions, closings = [], [], []
    decision_pairs: list = [None] * len(rollouts)
    fork_pairs: list = [None] * len(forks)
    answer_pairs = []
    for i, before, after in _paths(fed):
        length = len(fed[i])
        path = np.concatenate([path[:before], np.arange(size, size + length - before)])
        ids.append(fed[i][before:])
        positions.append(np.arange(before, length))
        size += length - before
        if i < len(rollouts):
            decision_pairs[i] = _decision_pairs(rollouts[i], path)
        else:
            fork_pairs[i - len(rollouts)] = _fork_pairs(*forks[i - len(rollouts)], path)
        if scored and i < len(rollouts):
            for t, boundary in enumerate(rollouts[i].boundaries):
                open_boundaries.setdefault(int(boundary), []).append((rollouts[i].index, t))
        # The part that the next rollout does not share is complete: close it from its end, laying the branches of each
        # boundary behind everything that continues the trunk.
        top = length
        for boundary in sorted((b for b in open_boundaries if b > after), reverse=True):
            closings.append((path[boundary:top], size))
            ids.append(block.input_ids)
            positions.append(block.depth + boundary)
            closings.append((np.arange(size, size + width), block.subtree_end + size))
            answer_pairs += _answer_pairs(block, size, path[boundary - 1], open_boundaries.pop(boundary))
            size += width
            top = boundary
        closings.append((path[max(after, 0) : top], size))

    subtree_end = np.zeros(size, np.int64)
    for where, end in closings:
        subtree_end[where] = end
    pairs = np.concatenate(decision_pairs)
    if answer_pairs:
        answers = np.concatenate(answer_pairs)
        answers = answers[np.lexsort((answers[:, 6], answers[:, 5], answers[:, 4], answers[:, 3]))]
        pairs = np.concatenate([pairs, answers])
    pairs = np.concatenate([pairs, *fork_pairs])
    return _Layout(np.concatenate(ids), np.concatenate(positions), subtree_end, pairs)


def _decision_pairs(rollout: RolloutTokens, path: np.ndarray) -> np.ndarray:
    token = np.flatnonzero(rollout.turn >= 0)
    m = len(token)
    columns = (
        path[token - 1], rollout.ids[token], np.full(m, DECISION), np.full(m, rollout.index),
        rollout.turn[token], np.full(m, -1), token,
    )  # fmt: skip
    return np.stack(columns, axis=1).astype(np.int64)


def _fork_pairs(rollout: RolloutTokens, fork: Fork, path: np.ndarray) -> np.ndarray:
    token = np.arange(fork.start, fork.stop)
    m = len(token)
    columns = (
        path[fork.at + token - 1], fork.ids[token], np.full(m, FORK), np.full(m, rollout.index), np.full(m, fork.turn),
        np.full(m, fork.answer), token - fork.start,
    )  # fmt: skip
    return np.stack(columns, axis=1).astype(np.int64)


def _answer_pairs(block: _BranchBlock, start: int, boundary_row: int, owners: list[tuple[int, int]]) -> list:
    row = np.where(block.pairs[:, 0] < 0, boundary_row, block.pairs[:, 0] + start)
    _, label, answer, token = block.pairs.T
    kind = np.full(len(row), ANSWER)
    return [
        np.stack([row, label, kind, np.full(len(row), index), np.full(len(row), turn), answer, token], axis=1)
        for index, turn in owners
    ]


def _join(layouts: Sequence[_Layout]) -> TreePlan:
    if not layouts:
        raise ValueError("nothing to pack: give at least one tree")
    sizes = np.array([len(layout.input_ids) for layout in layouts])
    starts = np.cumsum(sizes) - sizes
    pairs = []
    for layout, start in zip(layouts, starts, strict=True):
        moved = layout.pairs.copy()
        moved[:, 0] += start
        pairs.append(moved)
    pairs = np.concatenate(pairs)
    pairs = pairs[np.argsort(pairs[:, 2], kind="stable")]
    columns = dict(zip(_PAIR_COLUMNS, np.ascontiguousarray(pairs.T), strict=True))
    return TreePlan(
        input_ids=np.concatenate([layout.input_ids for layout in layouts]),
        position_ids=np.concatenate([layout.position_ids for layout in layouts]),
        subtree_end=np.concatenate([layout.subtree_end + start for layout, start in zip(layouts, starts, strict=True)]),
        tree_start=np.repeat(starts, sizes),
        **columns,
    )


_PAIR_COLUMNS = [f.name for f in fields(TreePlan)][4:11]
