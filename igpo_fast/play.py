"""Be the policy: one rollout in the terminal, turn by turn, and what each turn is worth to the model.

What is typed becomes the tokens of a turn, which the run's tools answer as in training; the values of the right answer,
and the gains, come from the code that trains.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial

import numpy as np
from rich.console import Console
from rich.text import Text

from igpo_fast.data.load import Data
from igpo_fast.engines.base import Generation
from igpo_fast.errors import InputError
from igpo_fast.evaluate import EVAL_STEP
from igpo_fast.rollouts.batch import RolloutLoop
from igpo_fast.rollouts.dialect import unquote
from igpo_fast.rollouts.dialect.parsing import Actions, Schema, answered, called_with, only_text, parameters_of
from igpo_fast.rollouts.rollout import NOTHING, OpenRollout, question_key
from igpo_fast.rollouts.tools.base import close
from igpo_fast.setup import Setup
from igpo_fast.transcripts import unknown_id
from igpo_fast.types import ANSWER, SEARCH, Action, Credit, Group, Question, Rollout, Turn, answer_with
from igpo_fast.update.advantages import earn, recipe_of
from igpo_fast.update.gains import values_of
from igpo_fast.update.packs import answer_values
from igpo_fast.update.policy import Policy
from igpo_fast.update.scoring import Scoring
from igpo_kernels import LossSettings

NEXT = Turn(NOTHING, NOTHING, "", (), NOTHING)
"""Stands for the turn that is not there yet, as in trajectories that are scored."""
RAW = "raw:"
POLICY, UNDO, PEEK, HELP, QUIT = (".", "policy"), ("undo",), ("peek",), ("help", "?"), ("quit", "exit")


def find_question(data: Data, wanted: str) -> Question:
    """The question with the id ``wanted``, or else the held-out one of that number, counted from 1.

    Raises:
        InputError: there is none.
    """
    for question in (*data.eval, *data.train):
        if question.id == wanted:
            return question
    if wanted.isdecimal() and 1 <= int(wanted) <= len(data.eval):
        return data.eval[int(wanted) - 1]
    raise InputError(
        f"--question {wanted}: neither an id nor a number of the {len(data.eval):,} held-out questions; give 1 to "
        f"{len(data.eval)}, or an id like {data.eval[0].id}"
    )


class Game:
    """One rollout that grows turn by turn, by whoever plays or by the policy. A context, which ends tools and engine.

    The policy's turns are those of an evaluation as long as it makes all of them; after an undo it draws others.
    """

    def __init__(self, setup: Setup, question: Question):
        config = setup.config
        recipe = recipe_of(config.algorithm)
        # Values are shown whatever the algorithm takes of them; other baselines need what one rollout has not.
        baseline = "none" if recipe.baseline == "none" else "previous"
        self._recipe = replace(recipe, algorithm="igpo", baseline=baseline)
        self.agent, self.question, self.basis = setup.eval_agent, question, recipe.basis
        notes = {
            f"values are the policy's, not those of algorithm.value_model={recipe.value_model}": recipe.values_apart,
            f"gains are over the value before, not over algorithm.baseline={recipe.baseline}": recipe.baseline
            != baseline,
            f"algorithm.name={recipe.algorithm} trains on outcomes, not on gains": not recipe.needs_values,
            f"training takes gains below algorithm.ig_gate={recipe.gate:g} for 0": recipe.needs_values
            and recipe.gate > 0,
        }
        self.notes = [note for note, applies in notes.items() if applies]
        """What differs from training, one line each."""
        count, dialect = self._recipe.scored_answers, self.agent.dialect
        self._scoring = Scoring(lambda question: dialect.branches(question)[:count], baseline=baseline)
        self._policy = Policy(setup.lm, config.rollout.temperature, LossSettings(), config.model.kernels)
        self._value_of = partial(values_of, basis=recipe.basis, answers=recipe.answers)
        self._unknown = unknown_id(setup.tokenizer)
        self._undone = 0
        self.authors: tuple[str, ...] = ()
        """Who wrote each turn."""

    def __enter__(self) -> Game:
        self._runner = asyncio.Runner(loop_factory=RolloutLoop)
        self._opened = AsyncExitStack()
        self._open(())
        return self

    def __exit__(self, *exception) -> None:
        async def end() -> None:
            self.agent.engine.release(self._key)
            await self._opened.aclose()
            await close(self.agent.tools, self.agent.engine)

        self._runner.run(end())
        self._runner.close()

    def _open(self, turns: Sequence[Turn]) -> None:
        """Begin anew, behind ``turns``."""

        async def opened() -> OpenRollout:
            await self._opened.aclose()
            tools = await self._opened.enter_async_context(self.agent.tools.open(self.question))
            rollout = OpenRollout(self.agent, self.question, tools)
            await rollout.resume(turns)
            return rollout

        self.rollout: OpenRollout = self._runner.run(opened())

    @property
    def _key(self) -> tuple[int, ...]:
        return self.agent.seed, EVAL_STEP, question_key(self.question), self._undone

    @property
    def functions(self) -> dict[str, Schema]:
        """The functions that a turn may call, by name."""
        return self.agent.dialect.functions

    @property
    def default(self) -> str:
        """The function that a text without a name calls: search, or the first that takes a text; "" if none does."""
        texts = [name for name, function in self.functions.items() if only_text(function)]
        return SEARCH if SEARCH in texts else next(iter(texts), "")

    def type(self, text: str) -> None:
        """Take what was typed as the next turn: a query, ``answer: TEXT``, ``NAME: ARGUMENTS``, or a turn in the
        dialect itself (also after ``raw:``).

        Raises:
            InputError: it is none of these, has words without a token, or is longer than a turn may be.
        """
        dialect, limits = self.agent.dialect, self.agent.limits
        if text.startswith(RAW) or dialect.parse(text):
            text, finished = self._raw(text.removeprefix(RAW).strip())
        else:
            text, finished = dialect.write(self.actions(text)), True
        ids = dialect.encode(text)
        if not len(ids):
            raise InputError("a turn without tokens; type some text")
        if self._unknown is not None and (ids == self._unknown).any():
            words = [word for word in unquote(text).split() if (dialect.encode(word) == self._unknown).any()]
            named = f" ({words[0]!r})" if words else ""
            raise InputError(f"the model's tokenizer does not know a word of it{named}; use words of the question")
        if len(ids) > limits.max_turn_tokens:
            raise InputError(
                f"{len(ids)} tokens, and a turn has at most rollout.max_turn_tokens={limits.max_turn_tokens}; be brief"
            )
        self._take(Generation(ids, np.zeros(len(ids), np.float32), finished), "you")

    def _raw(self, text: str) -> tuple[str, bool]:
        """What a sampler keeps of a text, which ends with the first stop; and whether there is one."""
        dialect = self.agent.dialect
        stops = (*dialect.stop_strings, *(dialect.decode(np.array([id])) for id in dialect.stop_ids))
        ends = [text.find(stop) + len(stop) for stop in stops if stop and stop in text]
        return text[: min(ends, default=len(text))], bool(ends)

    def actions(self, text: str) -> Actions:
        """What a typed text does.

        Raises:
            InputError: no call that fits.
        """
        name, colon, arguments = (part.strip() for part in text.partition(":"))
        if not (colon and (name == ANSWER or name in self.functions)):
            name, arguments = self.default, text
        if not name:
            raise InputError(f"which tool? Type one of: {', '.join(self.usage())}")
        actions = answered(arguments) if name == ANSWER else called_with(self.functions[name], arguments)
        if not actions:
            raise InputError(f"this is no call of {name}; type {self.usage(name)[0]}")
        return actions

    def usage(self, *names: str) -> list[str]:
        """What to type for each of ``names``; by default for everything that a turn may do."""
        return [self._usage(name) for name in names or (*self.functions, ANSWER)]

    def _usage(self, name: str) -> str:
        if name == ANSWER:
            return "answer: TEXT"
        function = self.functions[name]
        if parameter := only_text(function):
            return f"{name}: {parameter.upper()}"
        named = ", ".join(f'"{parameter}": ...' for parameter in parameters_of(function))
        return f"{name}: {{{named}}}" if named else f"{name}:"

    def written(self) -> list[str]:
        """A call of each function, and an answer, as the policy writes them."""
        calls = [Action(name, {p: p.upper() for p in parameters_of(of)}) for name, of in self.functions.items()]
        return [unquote(self.agent.dialect.write((action,))) for action in (*calls, answer_with("TEXT"))]

    def sample(self) -> None:
        """Let the policy take the next turn."""
        self._take(self._runner.run(self.agent.engine.generate(self.rollout.request(self._key))), "policy")

    def _take(self, generation: Generation, author: str) -> None:
        self._runner.run(self.rollout.add(generation))
        self.authors = (*self.authors, author)

    def undo(self) -> None:
        """Take back the last turn.

        Raises:
            InputError: there is none.
        """
        if not self.rollout.turns:
            raise InputError("there is no turn to undo; type one")
        self.agent.engine.release(self._key)
        self._undone += 1
        self._open(self.rollout.turns[:-1])
        self.authors = self.authors[:-1]

    def finished(self) -> Rollout:
        """The rollout that has ended, with what the run's judge says of it."""
        return self._runner.run(self.rollout.finish())

    def credit(self, rollout: Rollout | None = None) -> Credit:
        """Values and gains of the turns so far, or of the ``finished`` rollout, whose outcome they then include.

        Returns:
            ``values`` are v_0 .. v_t with t turns that have a response, ``gains`` those of these turns; without a right
            answer NaN. ``advantages`` are 0.
        """
        made = rollout or Rollout(self.question, 0, self.rollout.prompt_ids, (*self.rollout.turns, NEXT))
        unjudged = rollout is None or (self.agent.outcome is not None and not rollout.rewards)
        groups = [Group(self.question, (made,))]
        values = [np.full(len(made.turns), np.nan)]
        if self.question.answers:
            values = answer_values(self._policy, groups, self._scoring, self._value_of, 1 << 62)
        (credit,), _ = earn(groups, values, self._recipe, [np.nan] if unjudged else None, least=1)
        return credit


def play(setup: Setup, question: Question, console: Console, ask: Callable[[str], str] = input) -> None:
    """Play one question; ends after the last turn, or quietly at the end of the input or with Ctrl-C.

    Args:
        ask: shows a prompt and returns a line; raises EOFError at the end.
    """
    screen = Screen(console)
    try:
        with Game(setup, question) as game:
            _opening(game, screen)
            while not game.rollout.ended:
                number = len(game.rollout.turns) + 1
                last = " (the last)" * (number == game.agent.limits.max_turns)
                line = screen.read(ask, f"turn {number}{last} > ")
                if line in QUIT:
                    return
                try:
                    _do(game, screen, line)
                except InputError as error:
                    screen.say("", str(error), "yellow")
            _end(game, screen)
    except (EOFError, KeyboardInterrupt):
        console.print()


def _do(game: Game, screen: Screen, line: str) -> None:
    if line in PEEK:
        _answers(game, screen)
    elif line in UNDO:
        game.undo()
        screen.say("undone", f"turns so far: {len(game.rollout.turns)}")
    elif line in HELP or not line:
        _help(game, screen)
    else:
        game.sample() if line in POLICY else game.type(line)
        _last_turn(game, screen)


def _opening(game: Game, screen: Screen) -> None:
    question = game.question
    about = ", ".join([question.id, *([f"{question.hops} hop{'s' * (question.hops > 1)}"] if question.hops else [])])
    screen.say("question", question.question, "bold")
    screen.say("", about, "dim")
    limits = game.agent.limits
    screen.say(
        "limits",
        f"{limits.max_turns} turns of at most {limits.max_turn_tokens} tokens each; {limits.max_tokens:,} tokens with "
        "the question and what the tools answer",
    )
    _help(game, screen)
    for note in game.notes:
        screen.say("note", note, "yellow")
    if question.answers:
        screen.say("value", f"{_probability(game, game.credit().values[0])} of the right answer before the first turn")
    else:
        screen.say("note", "this question has no known answer, so turns have no values", "yellow")


def _help(game: Game, screen: Screen) -> None:
    bare = f"; without a name it is {game.default}" if game.default else ""
    screen.say("you type", " | ".join(game.usage()) + bare)
    screen.say(
        "", ". lets the policy take the turn | undo | peek shows the answer | quit | raw: AS THE POLICY WRITES IT"
    )


def _answers(game: Game, screen: Screen) -> None:
    screen.say("answer", " | ".join(game.question.ground_truth) or "not known", "bold")


def _last_turn(game: Game, screen: Screen) -> None:
    turn = game.rollout.turns[-1]
    screen.say(f"{game.authors[-1]}", turn.text)
    if not turn.actions:
        screen.say("malformed", "no call and no answer can be read in this turn; a turn that is well formed:", "yellow")
        for number, text in enumerate(game.written()):
            screen.say("or" if number else "", text, "yellow")
    if game.rollout.ended:
        return
    screen.say("result", turn.response, "dim")
    credit = game.credit()
    if game.question.answers:
        screen.say("value", f"{_probability(game, credit.values[-2])} -> {_value_and_gain(game, credit, -1)}", "bold")


def _end(game: Game, screen: Screen) -> None:
    rollout = game.finished()
    credit = game.credit(rollout)
    how = {"tokens": "no room for another turn (rollout.max_tokens)", "turns": "no turn is left (rollout.max_turns)"}
    ended = f"answered {rollout.answer!r}" if rollout.answer is not None else how.get(rollout.truncated, "no answer")
    screen.say("", "")
    screen.say("the end", ended)
    _answers(game, screen)
    for number, (turn, author) in enumerate(zip(rollout.turns, game.authors, strict=True), start=1):
        what = f"{turn.action}: {turn.argument}" if turn.actions else "malformed"
        gained = number <= len(credit.gains) and game.question.answers
        worth = f"   value {_value_and_gain(game, credit, number - 1)}" if gained else ""
        screen.say(f"turn {number}", f"{author}  {what}{worth}")
    scores = [("F1", credit.f1), ("EM", credit.em), ("reward", credit.outcome)]
    screen.say("outcome", "  ".join(f"{name} {x:.3f}" for name, x in scores if np.isfinite(x)), "bold")
    screen.say(
        "",
        "The turn that answers earns the reward, the others their gains. Advantages need a group: training compares "
        "them with those of the question's other rollouts (rollout.group_size), and this one has no other.",
        "dim",
    )


def _probability(game: Game, value: float) -> str:
    """A value as a probability: the answer's, per token (the geometric mean)."""
    p = float(np.exp(value)) if game.basis == "log_prob" else float(value)
    return f"{p:.3f}" if not 0 < p < 0.001 else f"{p:.1e}"


def _value_and_gain(game: Game, credit: Credit, turn: int) -> str:
    """The value after a turn, and its gain."""
    gain, unit = credit.gains[turn], " nats" * (game.basis == "log_prob")
    earned = f"gain {gain:+.4f}{unit}" if np.isfinite(gain) else "earns no gain"
    return f"{_probability(game, credit.values[1:][turn])}  {earned}"


class Screen:
    """Lines on a console: what it is, then its text, which is never read as markup or as control sequences."""

    def __init__(self, console: Console):
        self._console = console

    def say(self, label: str, text: str, style: str = "") -> None:
        """Show a text, whose further lines are indented."""
        lines = _printable(text).strip().splitlines() or [""]
        for line in lines:
            shown = Text.assemble((f"{label:<10}", "cyan"), (line, style))
            shown.rstrip()
            self._console.print(shown, soft_wrap=True)
            label = ""

    def read(self, ask: Callable[[str], str], prompt: str) -> str:
        line = ask(prompt).strip()
        if not self._console.is_terminal:
            self._console.print(Text(_printable(line)), soft_wrap=True)  # nobody's keyboard has shown it
        return line


def _printable(text: str) -> str:
    """``text`` with control characters spelled out, so that no passage moves the cursor."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
