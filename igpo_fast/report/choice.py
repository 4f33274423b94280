"""Which of a run's rollouts a page shows."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from igpo_fast.errors import InputError
from igpo_fast.run.checkpoint import RunFolder
from igpo_fast.types import Credit, Rollout

ENDS = 3
"""The first, the last and the middle step share the room for training rollouts; others get what they leave."""


@dataclass(frozen=True)
class Shown:
    """A rollout of the page."""

    file: str
    """``step_000090`` or ``eval_000090``."""
    line: int
    """Its line there, from 1."""
    rollout: Rollout
    credit: Credit | None

    @property
    def key(self) -> str:
        """Names it in the page's address."""
        return f"{self.file}.{self.line}"

    @property
    def kind(self) -> str:
        return self.file.partition("_")[0]

    @property
    def step(self) -> int:
        return int(self.file.partition("_")[2])


Group = tuple[Shown, ...]
"""A question's rollouts of one step; of an evaluation one."""


def choose(run: RunFolder, most: int, steps: Sequence[int] | None = None) -> tuple[list[Group], list[str]]:
    """The groups of a page, newest first, and sentences about what it leaves out.

    The evaluation of the last step gets half of the room at most. The rest is for whole groups of the first, the middle
    and the last step in turn, and then of those between.

    Args:
        most: rollouts of the page.
        steps: only these.
    Raises:
        InputError: a step without rollouts; no group fits; a file of rollouts that is damaged, or of a later version.
    """
    trained, evaluated = _written(run, "step"), _written(run, "eval")
    if missing := set(steps or ()) - {*trained, *evaluated}:
        there = ", ".join(map(str, sorted({*trained, *evaluated}))) or "none"
        raise InputError(f"--steps {min(missing)}: {run.rollouts} has no rollouts of it; it has {there}")
    if steps is None:
        spread = _spread(trained)
        first, later, tested = spread[:ENDS], spread[ENDS:], evaluated[-1:]
    else:
        first, later, tested = [s for s in trained if s in steps], [], [s for s in evaluated if s in steps]
    evaluations = _in_turn([_groups(run, "eval", step) for step in tested])
    batches = chain(_in_turn([_groups(run, "step", step) for step in first]), *(_groups(run, "step", s) for s in later))
    chosen: list[Group] = []
    half = most // 2
    room = most - half + _take(chosen, evaluations, half)
    room = _take(chosen, batches, room)
    _take(chosen, evaluations, room)
    large = ""
    if first and all(group[0].kind == "eval" for group in chosen):
        size = len(next(_groups(run, "step", first[0])))
        if not chosen:
            raise InputError(f"--rollouts {most}: a group has {size} rollouts and the page whole groups; give {size}")
        large = f"training groups have {size} rollouts and do not fit; --rollouts {2 * size} has room for one"
    chosen.sort(key=lambda group: (-group[0].step, group[0].kind, group[0].line))
    return chosen, [*_told(run, chosen, most), *filter(None, [large])]


def _written(run: RunFolder, kind: str) -> list[int]:
    """Steps with rollouts; an emptied file has none."""
    return [step for step in run.written(kind) if (run.rollouts / f"{kind}_{step:06d}.jsonl").stat().st_size]


def _take(chosen: list[Group], groups: Iterator[Group], room: int) -> int:
    """Move groups into ``chosen`` until one does not fit; returns the room that is left."""
    while room and (group := next(groups, None)) and len(group) <= room:
        chosen.append(group)
        room -= len(group)
    return room


def _groups(run: RunFolder, kind: str, step: int) -> Iterator[Group]:
    """The groups of a file. Its rollouts are in order, and some may be missing."""
    file, group = f"{kind}_{step:06d}", []
    for line, (rollout, credit) in enumerate(run.read_rollouts(file), start=1):
        last = group[-1].rollout if group else rollout
        same = (last.question.dataset, last.question.id) == (rollout.question.dataset, rollout.question.id)
        if group and (kind == "eval" or not same or rollout.index <= last.index):
            yield tuple(group)
            group = []
        group.append(Shown(file, line, rollout, credit))
    if group:
        yield tuple(group)


def _in_turn(sources: Sequence[Iterator[Group]]) -> Iterator[Group]:
    """One of each source, then the next of each."""
    return (group for groups in zip_longest(*sources) for group in groups if group)


def _spread(steps: Sequence[int]) -> list[int]:
    """First, last, middle, and then the middles of what lies between.

    >>> _spread([1, 2, 3, 4, 5])
    [1, 5, 3, 2, 4]
    """
    order, spans = [0, len(steps) - 1], deque([(0, len(steps) - 1)])
    while spans:
        low, high = spans.popleft()
        if high - low > 1:
            order.append((low + high) // 2)
            spans += [(low, order[-1]), (order[-1], high)]
    return [steps[i] for i in dict.fromkeys(order) if steps]


def _told(run: RunFolder, chosen: Sequence[Group], most: int) -> list[str]:
    """What the page shows and what it does not, and how to see that."""
    shown = Counter(one.file for group in chosen for one in group)
    told, others, more = [], [], ""
    for kind, name in (("eval", "evaluation"), ("step", "training")):
        parts, left = [], []
        for step in _written(run, kind):
            count = shown[file := f"{kind}_{step:06d}"]
            there = (run.rollouts / f"{file}.jsonl").read_bytes().count(b"\n") if count else 0
            if not count:
                left.append(step)
            elif count < there:
                parts.append(f"step {step} ({count:,} of {there:,})")
                more = f"more of them by --rollouts {4 * most}"
            else:
                parts.append(f"step {step} ({count:,})")
        without = f"; not on this page: {'steps' if left[1:] else 'step'} {ranges(left)}" if left else ""
        if parts or left:
            told.append(f"{name} rollouts: {', '.join(parts) or 'none'}{without}")
        others += left
    if others:
        more = ", ".join(filter(None, [f"other steps by --steps {','.join(map(str, sorted({*others})[:2]))}", more]))
    return [*told, f"igpo-fast report {run.path}: {more}"] if more else told


def ranges(steps: Sequence[int]) -> str:
    """Ascending numbers in short.

    >>> ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return ", ".join("-".join(map(str, part)) for part in parts)
