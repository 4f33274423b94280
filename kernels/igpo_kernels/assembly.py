"""Loops of a compiled kernel and the local memory that they touch, read from its assembly.

Local memory once per program costs what a few numbers of its tile cost; in a loop it costs at every iteration. What
ptxas says of spills does not tell the two apart, the assembly does.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Dialect:
    """Patterns of one assembly language; all match instructions without labels and comments."""

    instruction: re.Pattern
    """A line with an instruction, which is group 1."""
    jump: re.Pattern
    """An instruction that may go on at the label in group 1."""
    end: re.Pattern
    """An instruction behind which nothing goes on, other than at its label."""
    local: re.Pattern
    """A load or store of local memory, whose width is group 1."""
    widths: dict[str | None, int]
    """Bytes of a width; 4 for those that are not here."""
    matrix: re.Pattern
    """A matrix instruction."""


NVIDIA = Dialect(
    re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;"),
    re.compile(r"\b(?:BRA|JMP|CALL|WARPSYNC\.COLLECTIVE)\b.*`\((\S+)\)"),
    re.compile(r"(?:(?:BRA|JMP)[.\w]* `|EXIT|RET)"),
    re.compile(r"\b(?:LDL|STL)\b(?:\.LU)?(?:\.(64|128))?"),
    {"64": 8, "128": 16},
    re.compile(r"\b\w*MMA\b"),
)
AMD = Dialect(
    re.compile(r"\t([a-z][^;]*?)\s*(?:;.*)?$"),
    re.compile(r"s_c?branch\w* (\S+)"),
    re.compile(r"s_branch|s_endpgm|s_setpc"),
    re.compile(r"scratch_(?:load|store)_\w*dword(x[234])?"),
    {"x2": 8, "x3": 12, "x4": 16},
    re.compile(r"v_\w*mfma\w*"),
)


@dataclass(frozen=True)
class Profile:
    """Local memory and the hot loop of a kernel."""

    local: int
    """Bytes of local memory that a thread loads and stores outside loops."""
    looped: int
    """Those inside loops, of one iteration each."""
    hot_loop: int
    """Instructions of one iteration of the hot loop: of the loops with matrix instructions that hold no other such
    loop, the shortest, for the one that masks as well is longer and runs less often. Without matrix instructions, the
    longest loop that holds no other; 0 without loops. Branches not taken count."""
    outer_loop: int
    """Instructions of the longest loop, with what it holds."""


def profile(text: str, dialect: Dialect) -> Profile:
    """Read the assembly of one kernel. Code of a subroutine belongs to no loop."""
    instructions, labels = _parse(text.splitlines(), dialect)
    found = _loops(instructions, labels, dialect)
    looped = set().union(*found)
    moved = {
        i: dialect.widths.get(match[1], 4)
        for i, instruction in enumerate(instructions)
        if (match := dialect.local.search(instruction))
    }
    products = {i for i, instruction in enumerate(instructions) if dialect.matrix.match(_unguarded(instruction))}
    multiplying = [loop for loop in found if loop & products]
    lengths = [len(loop) for loop in multiplying or found if not any(other < loop for other in multiplying or found)]
    hot = (min if multiplying else max)(lengths, default=0)
    return Profile(
        sum(size for i, size in moved.items() if i not in looped),
        sum(size for i, size in moved.items() if i in looped),
        hot,
        max(map(len, found), default=0),
    )


def disassemble(cubin: bytes) -> str:
    """The assembly of an NVIDIA binary, by the nvdisasm that Triton brings."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--print-code", "--no-dataflow", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _parse(lines: Iterable[str], dialect: Dialect) -> tuple[list[str], dict[str, int]]:
    """Instructions, and of each label the number of the next one."""
    instructions, labels = [], {}
    for line in lines:
        if match := re.match(r"([.$\w]+):", line):
            labels[match[1]] = len(instructions)
        elif match := dialect.instruction.match(line):
            instructions.append(match[1])
    return instructions, labels


def _unguarded(instruction: str) -> str:
    """Without the predicate in front."""
    return re.sub(r"^@\S+\s+", "", instruction)


def _loops(instructions: list[str], labels: dict[str, int], dialect: Dialect) -> list[frozenset[int]]:
    """Natural loops as sets of instructions: for each header, which every way into the loop passes, what reaches a
    jump back to it. Jumps alone do not tell loops: waits are moved behind the kernel's end and jump back from there."""
    jumps = {i: labels[match[1]] for i, text in enumerate(instructions) if (match := dialect.jump.search(text))}
    stops = {i for i, text in enumerate(instructions) if dialect.end.match(text)}
    count = len(instructions)
    starts = sorted({0, *jumps.values(), *(i + 1 for i in jumps), *(i + 1 for i in stops)} - {count})
    block_at = {start: block for block, start in enumerate(starts)}
    bounds = list(zip(starts, [*starts[1:], count], strict=True))
    after = [{block_at[jumps[stop - 1]]} if stop - 1 in jumps else set() for _, stop in bounds]
    for block, (_, stop) in enumerate(bounds):
        if stop < count and stop - 1 not in stops:
            after[block].add(block + 1)
    reached = _reached(after, 0, set())
    before = [{a for a in reached if b in after[a]} for b in range(len(bounds))]
    above = _dominators(before)
    loops: dict[int, set[int]] = {}
    for block in reached:
        for header in after[block] & above[block]:
            _reached(before, block, loops.setdefault(header, {header}))
    return [frozenset(i for block in inside for i in range(*bounds[block])) for inside in loops.values()]


def _reached(ways: list[set[int]], start: int, found: set[int]) -> set[int]:
    """``found``, with the blocks that ways lead to from ``start`` and not through one that was in it."""
    todo = [start]
    while todo:
        if (block := todo.pop()) not in found:
            found.add(block)
            todo.extend(ways[block])
    return found


def _dominators(before: list[set[int]]) -> list[set[int]]:
    """Of each block, the blocks that every way from the first one to it passes."""
    blocks = range(len(before))
    above, changed = [{0}, *(set(blocks) for _ in blocks[1:])], True
    while changed:
        changed = False
        for block in blocks[1:]:
            ways = [above[other] for other in before[block]]
            found = set.intersection(*ways) | {block} if ways else set()
            changed |= found != above[block]
            above[block] = found
    return above
