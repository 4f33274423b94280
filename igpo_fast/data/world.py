"""A made-up knowledge world: facts nobody can know, questions whose answer only search can find.

Persons, companies, cities and countries have names of two made-up words. A passage holds one fact: its
subject as title, the rest as text, together ``zavu kolo birthplace nira pado .``; a question names a
subject and the relations to follow from it: ``zavu kolo birthplace country ?``. Worlds share words and
relations but not facts, so memorised facts do not help; relations are drawn independently, so no hop tells
about another.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, count
from typing import Literal

from igpo_fast.config import World as WorldConfig
from igpo_fast.errors import InputError
from igpo_fast.types import Action, Passage, Question, answer_with, search_for

Kind = Literal["eval", "train", "sft"]
Fact = tuple[str, str, str]
"""Subject, relation, object."""

RELATIONS = {
    "birthplace": ("person", "city"),
    "residence": ("person", "city"),
    "employer": ("person", "company"),
    "mentor": ("person", "person"),
    "headquarters": ("company", "city"),
    "founder": ("company", "person"),
    "country": ("city", "country"),
    "capital": ("country", "city"),
    "leader": ("country", "person"),
}
"""Each relation's types of subject and object."""

TAGS = ("<search>", "</search>", "<information>", "</information>", "<answer>", "</answer>")

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aiou"]
WORDS = tuple(random.Random("words").sample(sorted(a + b for a, b in combinations(_SYLLABLES, 2) if a[0] != b[0]), 120))
"""The 120 words of which names are made."""
_NAMES = tuple(combinations(WORDS, 2))

# In this order: a later kind avoids the facts of earlier kinds, so evaluation does not depend on them.
_KINDS = ("eval", "train", "sft")


def vocabulary() -> list[str]:
    """Every word of the language: tags, punctuation, relations, and the words of names."""
    return [*TAGS, ".", "?", *RELATIONS, *WORDS]


@dataclass(frozen=True)
class World:
    """One world: a collection to search and questions about it."""

    name: str
    """Kind and number, like ``train-3``; also ``Question.corpus`` of its questions."""
    facts: tuple[Fact, ...]
    """The world's facts; a subject and a relation have one object."""
    passages: tuple[Passage, ...]
    """One passage per fact, in the same order."""
    questions: tuple[Question, ...]

    @cached_property
    def objects(self) -> dict[tuple[str, str], str]:
        """The object of each (subject, relation)."""
        return {(subject, relation): object for subject, relation, object in self.facts}

    @cached_property
    def entities(self) -> tuple[str, ...]:
        """The names, in the order of their first fact as subject."""
        return tuple(dict.fromkeys(subject for subject, _, _ in self.facts))


def make_worlds(
    config: WorldConfig, kind: Kind, *, hops: tuple[int, int] | None = None, questions: int = 128
) -> list[World]:
    """The worlds of one kind, drawn from ``config.seed``, the kind and their number alone.

    No fact of a world of one kind occurs in a world of another.

    Args:
        hops: number of hops of the shortest and longest questions; None takes ``config.min_hops`` (1 for ``sft``) and
            ``config.max_hops``.
        questions: most questions of each world; small worlds may have fewer.
    Raises:
        InputError: more entities than names.
    """
    low, high = hops or (1 if kind == "sft" else config.min_hops, config.max_hops)
    worlds = []
    for index, facts in enumerate(facts_of(config, kind, _draw)):
        name = f"{kind}-{index}"
        passages = tuple(
            Passage(f"{name}/{number}", subject, f"{relation} {object} .")
            for number, (subject, relation, object) in enumerate(facts)
        )
        rng = random.Random(f"{config.seed}/{name}/questions")
        asked = tuple(_questions(name, facts, passages, range(low, high + 1), questions, rng))
        worlds.append(World(name, facts, passages, asked))
    return worlds


def facts_of(
    config: WorldConfig, kind: Kind, draw: Callable[[WorldConfig, random.Random], tuple[Fact, ...]]
) -> list[tuple[Fact, ...]]:
    """The facts of every world of a kind, drawn by ``draw``; no fact of an earlier kind is among them."""
    earlier = _KINDS[: _KINDS.index(kind)]
    taken = {fact for other in earlier for facts in facts_of(config, other, draw) for fact in facts}
    worlds = []
    for index in range(getattr(config, f"{kind}_worlds")):
        attempts = (draw(config, random.Random(f"{config.seed}/{kind}-{index}/{attempt}")) for attempt in count())
        worlds.append(next(facts for facts in attempts if taken.isdisjoint(facts)))
    return worlds


def _draw(config: WorldConfig, rng: random.Random) -> tuple[Fact, ...]:
    """The facts of one world."""
    sizes = {
        "person": config.persons,
        "company": config.companies,
        "city": config.cities,
        "country": config.countries,
    }
    names = iter(draw_names(sum(sizes.values()), rng, "persons"))
    entities = {type: [next(names) for _ in range(size)] for type, size in sizes.items()}
    return tuple(
        (subject, relation, object)
        for relation, (source, target) in RELATIONS.items()
        for subject, object in _deal(entities[source], entities[target], rng)
        if subject != object
    )


def draw_names(count: int, rng: random.Random, key: str) -> list[str]:
    """Names of two words; never both `a b` and `b a`, because search ignores the order of words.

    Args:
        key: the key of ``world`` that is too large if there are fewer names than that.
    """
    if count > len(_NAMES):
        raise InputError(f"world: {count} entities, but there are {len(_NAMES)} names; lower world.{key}")
    return [" ".join(rng.sample(pair, 2)) for pair in rng.sample(_NAMES, count)]


def _deal(subjects: list[str], objects: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """An object for each subject, all about equally often; if both have one type, along one cycle."""
    if subjects is objects:
        order = rng.sample(subjects, len(subjects))
        return zip(order, order[1:] + order[:1], strict=True)
    rounds = -(-len(subjects) // len(objects))
    return zip(subjects, [o for _ in range(rounds) for o in rng.sample(objects, len(objects))], strict=False)


def _questions(
    name: str,
    facts: Sequence[Fact],
    passages: Sequence[Passage],
    hops: Sequence[int],
    limit: int,
    rng: random.Random,
) -> list[Question]:
    """Up to ``limit`` different questions, cycling through the numbers of hops.

    Chains are drawn from the answer backwards, relation before fact, so that relations are about equally
    frequent and answers are spread: drawn forwards, too many chains would end in the few countries.
    """
    by_relation = _group(range(len(facts)), facts)
    numbers_to = defaultdict(list)
    for number, (_, _, object) in enumerate(facts):
        numbers_to[object].append(number)
    leading_to = {object: _group(numbers, facts) for object, numbers in numbers_to.items()}
    found: dict[str, Question] = {}
    for attempt in range(20 * limit):
        if len(found) == limit:
            break
        last = rng.choice(rng.choice(by_relation))
        chain = _extend_backwards(last, hops[attempt % len(hops)], facts, leading_to, rng)
        if not chain:
            continue
        text = " ".join([facts[chain[0]][0], *(facts[number][1] for number in chain), "?"])
        steps = tuple(
            {
                "passage_id": passages[number].id,
                "question": " ".join(facts[number][:2]),
                "answer": facts[number][2],
            }
            for number in chain
        )
        if text not in found:
            found[text] = Question(
                f"{name}/q{len(found)}", text, (steps[-1]["answer"],), len(chain), steps, corpus=name
            )
    return list(found.values())


def _group(numbers: Iterable[int], facts: Sequence[Fact]) -> list[list[int]]:
    """Numbers of facts, grouped into one list per relation."""
    groups = defaultdict(list)
    for number in numbers:
        groups[facts[number][1]].append(number)
    return list(groups.values())


def _extend_backwards(
    last: int, hops: int, facts: Sequence[Fact], leading_to: dict[str, list[list[int]]], rng: random.Random
) -> list[int]:
    """Numbers of ``hops`` facts, each about the object of the one before, ending with ``last``.

    No entity occurs twice. Empty at a dead end.
    """
    chain = [last]
    subject, _, answer = facts[last]
    entities = [answer, subject]
    while len(chain) < hops:
        groups = leading_to.get(entities[-1], [])
        fresh = [[number for number in group if facts[number][0] not in entities] for group in groups]
        fresh = [group for group in fresh if group]
        if not fresh:
            return []
        chain.append(rng.choice(rng.choice(fresh)))
        entities.append(facts[chain[-1]][0])
    return chain[::-1]


@dataclass(frozen=True)
class Noise:
    """Probabilities of mistakes in a demonstration."""

    wrong_query: float
    """A hop's query has a random entity or relation."""
    early_stop: float
    """The expert answers instead of taking the next hop (never the first)."""
    wrong_answer: float
    """The expert answers with a random entity."""


CLEAN = Noise(0.05, 0.02, 0.02)
NOISY = Noise(0.40, 0.12, 0.40)
HARD = Noise(0.70, 0.30, 0.75)


@dataclass(frozen=True)
class Demonstration:
    """An imperfect expert's turns on a question.

    >>> Demonstration("a b birthplace ?", (search_for("a b birthplace"), answer_with("c d"))).turns[-1].text
    'c d'
    """

    question: Question
    turns: tuple[Action, ...]
    """Calls of tools; the last is the answer."""


def demonstrate(
    question: Question, world: World, noise: Noise, rng: random.Random, *, max_turns: int = 6
) -> Demonstration:
    """Walk the hops of a question: search ``a b rel1``, read ``c d``, search ``c d rel2``, ..., answer.

    After a wrong query the expert asks again in half of the cases if ``max_turns`` leaves room. Else it goes on
    from the result of the wrong query and is lost.

    Args:
        question: one of ``world.questions``.
        max_turns: most turns; at least the hops and one.
    """
    first, second, *relations, _ = question.question.split()
    entity = f"{first} {second}"
    turns: list[Action] = []
    for hop, relation in enumerate(relations):
        if hop and rng.random() < noise.early_stop:
            break
        query = (entity, relation)
        if rng.random() < noise.wrong_query:
            wrong = _wrong_query(query, world, rng)
            needed = len(relations) - hop + 1
            if rng.random() < 0.5 and len(turns) + 1 + needed <= max_turns:
                turns.append(search_for(" ".join(wrong)))
            else:
                query = wrong
        turns.append(search_for(" ".join(query)))
        entity = world.objects.get(query, entity)
    if rng.random() < noise.wrong_answer:
        entity = rng.choice([other for other in world.entities if other != entity])
    return Demonstration(question, (*turns, answer_with(entity)))


def _wrong_query(right: tuple[str, str], world: World, rng: random.Random) -> tuple[str, str]:
    """The right query with another entity or another relation."""
    entity, relation = right
    if rng.random() < 0.5:
        return rng.choice([other for other in world.entities if other != entity]), relation
    return entity, rng.choice([other for other in RELATIONS if other != relation])
