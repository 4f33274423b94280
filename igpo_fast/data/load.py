"""Questions and passages of a run, from a made-up world, files, or the datasets hub."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from igpo_fast.config import Config
from igpo_fast.contents import NAMED_SOURCE, OWN_PARAGRAPHS
from igpo_fast.data.passages import load_corpus
from igpo_fast.data.questions import load_questions
from igpo_fast.data.rows import stem_of
from igpo_fast.data.table import Table, load_table
from igpo_fast.data.world import World
from igpo_fast.data.worlds import WORLDS
from igpo_fast.errors import InputError
from igpo_fast.types import Passage, Question


@dataclass(frozen=True)
class Data:
    """Data that a run reads."""

    train: tuple[Question, ...]
    eval: tuple[Question, ...]
    """Questions of an evaluation: at most ``eval.questions`` per data set."""
    collections: Mapping[str, Sequence[Passage]]
    """Collections by the names in ``Question.corpus``: one per world; from files one without a name, or none."""
    warnings: tuple[str, ...] = ()
    """Notes for the user, one line each."""
    tables: Mapping[str, Table] = field(default_factory=dict)
    """Tables by the names of collections, for the tool ``lookup``."""


def load_data(config: Config) -> Data:
    """Read or make up the questions and passages of a run.

    Raises:
        InputError: bad input, naming file and line; too few questions.
    """
    return _from_world(config) if config.data.source == "world" else _from_files(config)


def _from_world(config: Config) -> Data:
    make_worlds = WORLDS[config.world.kind].make_worlds
    train = make_worlds(config.world, "train")
    wanted = config.eval.questions
    evaluation = make_worlds(config.world, "eval", questions=-(-wanted // config.world.eval_worlds))
    # Shuffled, so that any prefix covers all worlds.
    shuffled = [question for world in evaluation for question in world.questions]
    random.Random(config.world.seed).shuffle(shuffled)
    if len(shuffled) < wanted:
        raise InputError(
            f"eval.questions: {wanted} wanted, the worlds have {len(shuffled)}; raise world.eval_worlds or "
            "world.persons (of tables: world.rows), or lower eval.questions"
        )
    return Data(
        train=tuple(question for world in train for question in world.questions),
        eval=tuple(shuffled[:wanted]),
        **sources_of(config, [*train, *evaluation]),
    )


def sources_of(config: Config, worlds: Sequence[World]) -> dict[str, Mapping]:
    """What the tools read of some worlds, as fields of ``Data``."""
    tables = config.world.kind == "tables"
    return {
        "collections": {} if tables else {world.name: world.passages for world in worlds},
        "tables": {world.name: Table(world.objects) for world in worlds} if tables else {},
    }


def _from_files(config: Config) -> Data:
    own: dict[str, Passage] | None = {} if config.data.corpus == OWN_PARAGRAPHS else None
    answered = config.algorithm.needs_answers
    train = load_questions(config.data.train, passages=own, answered=answered)
    warnings = []
    if config.data.eval is not None:
        evaluation = _evaluation(config.data.eval, config.eval.questions, own, answered)
        warnings += trained_on(train, evaluation)
    else:
        train, evaluation = hold_out(train, config.eval.questions, config.data.train, "data.eval=FILE")
    if own is not None:
        collections = {"": tuple(own.values())}
    else:
        collections = {} if config.data.corpus is None else {"": load_corpus(config.data.corpus)}
    tables = {} if config.tools.table is None else {"": load_table(config.tools.table)}
    return Data(train, evaluation, collections, tuple(warnings), tables)


def hold_out(
    questions: tuple[Question, ...], most: int, where: str, remedy: str
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Questions to train on, and the last ``most``, but at most half, to evaluate with.

    Args:
        where, remedy: for the refusal of a single question: where it is, and the setting that gives others.
    """
    held_out = min(most, len(questions) // 2)
    if not held_out:
        raise InputError(f"{where}: one question cannot be split; give {remedy}")
    return questions[:-held_out], questions[-held_out:]


def _evaluation(
    given: str | Sequence[str], most: int, passages: dict[str, Passage] | None, answered: bool
) -> tuple[Question, ...]:
    """At most ``most`` questions per data set; of a larger one a fixed random part, because many are sorted."""
    sources = [given] if isinstance(given, str) else given
    sets: dict[str, list[Question]] = {}
    seen: set[str] = set()
    for entry in sources:
        name, source = NAMED_SOURCE.fullmatch(entry).groups()
        # A file with several data_sources is several data sets, in a list, too.
        stem = stem_of(source.partition(":")[0]) if len(sources) > 1 else ""
        questions = load_questions(source, name or "", otherwise=stem, passages=passages, answered=answered)
        earlier = set(sets)
        for question in questions:
            if question.id in seen:
                raise InputError(
                    f"data.eval: an earlier set has the question {question.id!r} of {entry!r} too; tell them apart by "
                    "writing NAME=SOURCE"
                )
            if question.dataset in earlier:
                raise InputError(
                    f"data.eval: an earlier source has a set {question.dataset!r}, as {entry!r} has; tell them apart "
                    "by writing NAME=SOURCE, or join a set's files by commas"
                )
            seen.add(question.id)
            sets.setdefault(question.dataset, []).append(question)
    for questions in sets.values():
        if len(questions) > most:
            random.Random(0).shuffle(questions)
            del questions[most:]
    return tuple(question for questions in sets.values() for question in questions)


def trained_on(
    train: Sequence[Question], evaluation: Sequence[Question], key: str = "data.eval", of: str = "data.train"
) -> list[str]:
    """A warning if some questions of the evaluation, which ``key`` gives, are trained on, which ``of`` gives.

    Raises:
        InputError: all questions of a set are.
    """
    trained = {question.question for question in train}
    sets: dict[str, list[bool]] = {}
    for question in evaluation:
        sets.setdefault(question.dataset, []).append(question.question in trained)
    for name, both in sets.items():
        if all(both):
            whose = f" of {name}" if name else ""
            raise InputError(
                f"{key}: all questions{whose} are in {of}, too; give others, or leave {key} out to hold out some of "
                f"{of}"
            )
    common = sum(map(sum, sets.values()))
    return [f"{key}: {common:,} of {len(evaluation):,} questions are in {of}, too"] if common else []


def without_long(data: Data, fits: Callable[[Question], bool]) -> Data:
    """The questions that fit, with a warning that counts the rest.

    Raises:
        InputError: none to train on, or to evaluate, is left.
    """
    train, evaluation = tuple(filter(fits, data.train)), tuple(filter(fits, data.eval))
    if not train or (data.eval and not evaluation):
        raise InputError("data.skip_long: no question is short enough; raise rollout.max_tokens")
    long = len(data.train) - len(train), len(data.eval) - len(evaluation)
    if not any(long):
        return data
    warning = f"data.skip_long: left out {long[0]:,} train, {long[1]:,} eval questions too long for rollout.max_tokens"
    return replace(data, train=train, eval=evaluation, warnings=(*data.warnings, warning))


def question_order(n_questions: int, per_step: int, step: int, seed: int) -> list[int]:
    """Indices of a step's questions: a slice of the epoch's permutation.

    It depends on its arguments alone, so a resumed run needs only its step. An epoch is as many whole steps as the
    questions fill; the few questions left out differ between epochs.

    Args:
        step: 0-based.
    Returns:
        ``per_step`` different indices in 0 .. n_questions-1.
    Raises:
        InputError: fewer questions than a step takes.
    """
    if n_questions < per_step:
        raise InputError(
            f"a step asks {per_step} questions (train.questions and rollout.oversample), the data set has "
            f"{n_questions} to train on; lower these keys, or give more questions"
        )
    epoch, at = divmod(step, n_questions // per_step)
    order = random.Random(f"{seed}/{epoch}").sample(range(n_questions), n_questions)
    return order[at * per_step : (at + 1) * per_step]
