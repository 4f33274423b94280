"""A made-up world of tables and arithmetic: questions whose answer only lookups and calculations can find.

A table has rows with names of two made-up words, the columns ``COLUMNS``, and whole numbers as cells. A question is a
chain, read from left to right: ``zavu kolo height plus nira pado weight times 3 ?`` is (height + weight) * 3. Worlds
share words and columns but no cells, and numbers are drawn independently, so nothing tells of a cell but looking it
up. No tool writes prose: results are numbers.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import product

from igpo_fast.arithmetic import NO_QUOTIENT, NOT_ARITHMETIC, TOO_LARGE, calculate
from igpo_fast.config import World as WorldConfig
from igpo_fast.data.table import NO_COLUMN, NO_ROW
from igpo_fast.data.world import WORDS, Demonstration, Fact, Kind, Noise, World, draw_names, facts_of
from igpo_fast.types import CALCULATE, LOOKUP, Action, Question, answer_with

COLUMNS = ("height", "weight", "age", "depth", "speed", "length", "price", "width", "rank", "score")
SIGNS = {"plus": "+", "minus": "-", "times": "*"}
NUMBERS = tuple(map(str, range(200)))
"""The numbers that have a word. Every cell, number in a question, intermediate result and answer is one of them."""
CELLS, FACTORS = range(100), range(2, 6)
TAGS = (
    "<lookup>", "</lookup>", "<calculate>", "</calculate>", "<information>", "</information>", "<answer>", "</answer>",
)  # fmt: skip

Call = tuple[str, str]
"""Tool and argument."""


def vocabulary() -> list[str]:
    """Every word of the language: tags, punctuation, signs, columns, what tools say, numbers, the words of names."""
    said = " ".join((NO_ROW, NO_COLUMN, NOT_ARITHMETIC, NO_QUOTIENT, TOO_LARGE, *(f"{name}," for name in COLUMNS)))
    words = (*TAGS, "?", *SIGNS, *SIGNS.values(), "(", ")", *COLUMNS, *said.split(), *NUMBERS, *WORDS)
    return list(dict.fromkeys(words))


def make_worlds(
    config: WorldConfig, kind: Kind, *, hops: tuple[int, int] | None = None, questions: int = 128
) -> list[World]:
    """The worlds of one kind, like ``world.make_worlds``: a fact is a cell, (row, column, number), and a hop is a call
    of a tool. ``World.objects`` is the table.

    Raises:
        InputError: more rows than names.
    """
    low, high = hops or (1 if kind == "sft" else config.min_hops, config.max_hops)
    worlds = []
    for index, facts in enumerate(facts_of(config, kind, _draw)):
        world = World(f"{kind}-{index}", facts, (), ())
        rng = random.Random(f"{config.seed}/{world.name}/questions")
        asked = _questions(world, range(low, high + 1), questions, rng)
        worlds.append(replace(world, questions=tuple(asked)))
    return worlds


def _draw(config: WorldConfig, rng: random.Random) -> tuple[Fact, ...]:
    """The cells of one world."""
    rows = draw_names(config.rows, rng, "rows")
    return tuple((row, column, str(rng.choice(CELLS))) for row, column in product(rows, COLUMNS))


def _questions(world: World, hops: range, limit: int, rng: random.Random) -> Iterator[Question]:
    """Up to ``limit`` different questions, cycling through the numbers of calls."""
    found: set[str] = set()
    for attempt in range(50 * limit):
        if len(found) == limit:
            break
        text = _chain_of(world, hops[attempt % len(hops)], rng)
        steps = _steps(text, world)
        if text not in found and steps:
            id = f"{world.name}/q{len(found)}"
            found.add(text)
            yield Question(id, text, (steps[-1]["answer"],), len(steps), steps, corpus=world.name)


def _chain_of(world: World, calls: int, rng: random.Random) -> str:
    """A question of some ``calls``: the first cell is one, another cell two, a factor one."""
    kinds = {1: [()], 2: [("factor",)], 3: [("cell",)], 4: [("cell", "factor"), ("factor", "cell")]}
    words = list(rng.choice(world.facts)[:2])
    for kind in rng.choice(kinds[calls]):
        if kind == "cell":
            words += [rng.choice(("plus", "minus")), *rng.choice(world.facts)[:2]]
        else:
            words += ["times", str(rng.choice(FACTORS))]
    return " ".join((*words, "?"))


def _steps(text: str, world: World) -> tuple[dict, ...]:
    """The calls that answer a question, with their results; none if a number has no word."""
    calls, steps = _calls(text), []
    call = next(calls)
    while call:
        result = _result(call, world)
        if result not in NUMBERS:
            return ()
        steps.append({"tool": call[0], "question": call[1], "answer": result})
        call = _next(calls, result)
    return tuple(steps)


def _calls(text: str) -> Generator[Call, str, None]:
    """The calls that answer a question, in order; each is sent the result of the one before."""
    words, value, sign = iter(text.split()), "", ""
    for word in words:
        operand = word
        if not word.isdigit():
            operand = yield LOOKUP, f"{word} {next(words)} {next(words)}"
        value = (yield CALCULATE, f"{value} {sign} {operand}") if sign else operand
        sign = SIGNS.get(next(words), "")
        if not sign:  # the question mark
            return


def _next(calls: Generator[Call, str, None], result: str) -> Call | None:
    try:
        return calls.send(result)
    except StopIteration:
        return None


def _result(call: Call, world: World) -> str:
    """What the world's tools answer to a call that has a result."""
    tool, argument = call
    if tool == CALCULATE:
        return calculate(argument)
    return world.objects[tuple(argument.rsplit(" ", 1))]


def _action(call: Call) -> Action:
    tool, argument = call
    return Action(tool, {"cell" if tool == LOOKUP else "expression": argument})


def demonstrate(
    question: Question, world: World, noise: Noise, rng: random.Random, *, max_turns: int = 6
) -> Demonstration:
    """Walk a question's chain: look up each cell, calculate with it, answer with the last result.

    A wrong call looks up another cell of the row or column, or calculates with another number or sign. After it the
    expert corrects itself in half of the cases if ``max_turns`` leaves room. Else it goes on with the wrong result, and
    is lost; it stops where a number gets out of ``NUMBERS``.

    Args:
        question: one of ``world.questions``.
        max_turns: most turns; at least the calls and one.
    """
    calls, turns, value = _calls(question.question), [], ""
    call, left = next(calls), len(question.steps)
    while call:
        if turns and rng.random() < noise.early_stop:
            break
        result = _result(call, world)
        if result not in NUMBERS:
            break
        if rng.random() < noise.wrong_query:
            wrong = _wrong(call, world, rng)
            if rng.random() < 0.5 and len(turns) + 2 + left <= max_turns:
                turns.append(_action(wrong))
            else:
                call, result = wrong, _result(wrong, world)
        turns.append(_action(call))
        value, left = result, left - 1
        call = _next(calls, result)
    if rng.random() < noise.wrong_answer:
        value = rng.choice([number for number in NUMBERS if number != value])
    return Demonstration(question, (*turns, answer_with(value)))


def _wrong(call: Call, world: World, rng: random.Random) -> Call:
    """Another call whose result has a word."""
    tool, argument = call
    if tool == LOOKUP:
        row, column = argument.rsplit(" ", 1)
        if len(world.entities) > 1 and rng.random() < 0.5:
            row = rng.choice([other for other in world.entities if other != row])
        else:
            column = rng.choice([other for other in COLUMNS if other != column])
        return tool, f"{row} {column}"
    while True:
        left, sign, right = argument.split()
        if rng.random() < 0.5:
            sign = rng.choice(list(SIGNS.values()))
        else:
            right = str(rng.choice(CELLS))
        wrong = tool, f"{left} {sign} {right}"
        if wrong != call and _result(wrong, world) in NUMBERS:
            return wrong
