"""The data that flows through a training step, as frozen dataclasses.

Dimension letters, in the shapes of docstrings (``float64 [T]``) and as suffixes of names (``logits_BV``):

    Q  questions in a batch            A  tokens of one accepted answer
    G  rollouts of one question        N  packed tokens
    R  rollouts in a batch (Q * G)     M  scored (row, label) pairs
    T  turns of one rollout            L  tokens of one rollout
    H  hidden size                     V  vocabulary size

Imports only numpy, so that a machine without the trainer's dependencies can build batches and time updates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

SEARCH, ANSWER, INVALID = "search", "answer", "invalid"
OF_ANSWERS, OF_TOOLS = ("f1", "em"), "tools"
"""Outcomes that the answer decides, and the one that tools say; any other names a user's function."""
REWARD = "reward"
"""The number of a function or a tool that trains."""
ENVIRONMENT = "environment"
"""The tool that an environment of another library is."""
LOOKUP, CALCULATE = "lookup", "calculate"

Basis = Literal["log_prob", "prob"]
Answers = Literal["first", "max", "mean", "sum"]
CreditOf = Literal["turn", "query"]
Baseline = Literal["previous", "random", "masked", "none"]
ValueModel = Literal["policy", "reference", "teacher"]
Pool = Literal["separate", "joint", "scaled_separate", "turn_index", "raw"]
Accumulate = Literal["sum", "sum_over_sqrt", "none"]
PseudoAnswer = Literal["none", "majority", "reference"]
Normalisation = Literal["igpo", "squad", "hotpot"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "seq_mean_token_sum_norm"]
Ratio = Literal["token", "turn", "sequence"]
Surrogate = Literal["clip", "cispo", "sapo", "vespo"]
Level = Literal["token", "turn"]
Truncation = Literal["", "tokens", "turns"]


@dataclass(frozen=True)
class Question:
    """One task: a question and the answers that count as right.

    >>> Question("q1", "Who wrote Faust?", ("Goethe", "Johann Wolfgang von Goethe")).answers[0]
    'Goethe'
    """

    id: str
    """Unique within its data set."""
    question: str
    """Text of the question."""
    answers: tuple[str, ...]
    """Accepted answers, the main one first; empty where there is no ground truth."""
    hops: int | None = None
    """Number of facts on which the answer rests, if known."""
    steps: tuple[dict, ...] = ()
    """The supporting steps as the data set gives them (``passage_id``, optional ``question`` and ``answer``)."""
    corpus: str = ""
    """Name of the collection that is searched; empty if there is only one."""
    dataset: str = ""
    """Name of its data set if several are evaluated; empty if there is only one."""
    truth: tuple[str, ...] | None = None
    """The ground truth, if any, where ``answers`` are the group's own; None where ``answers`` are the ground truth."""

    @property
    def ground_truth(self) -> tuple[str, ...]:
        """The accepted answers of the data set; empty if it has none."""
        return self.answers if self.truth is None else self.truth


@dataclass(frozen=True)
class Passage:
    """A retrievable piece of text."""

    id: str
    title: str
    text: str


@dataclass(frozen=True)
class Action:
    """What a turn does: a call of a tool, or the final answer.

    >>> Action("search", {"query": "Who wrote Faust?"}).text
    'Who wrote Faust?'
    """

    tool: str
    """Name of the tool; ``answer`` for the final answer."""
    arguments: Mapping[str, Any]
    """Its arguments by name, JSON values; of an answer ``{"answer": text}``."""

    @property
    def text(self) -> str:
        """The arguments for people: a single text as it is, others as JSON."""
        values = list(self.arguments.values())
        if len(values) == 1 and isinstance(values[0], str):
            return values[0]
        return json.dumps(self.arguments, ensure_ascii=False)


def search_for(query: str) -> Action:
    """A call of the tool ``search``."""
    return Action(SEARCH, {"query": query})


def answer_with(answer: str) -> Action:
    """The final answer."""
    return Action(ANSWER, {"answer": answer})


@dataclass(frozen=True)
class ToolResult:
    """The result of a tool call: passages, or a text."""

    passages: tuple[Passage, ...] = ()
    """Passages, best first; empty if nothing was found."""
    text: str = ""
    """The result of a tool that finds no passages."""
    failure: str = ""
    """Text shown to the policy in place of a result if the call failed for good; else empty."""

    @property
    def found(self) -> bool:
        """Whether the call brought something."""
        return not self.failure and bool(self.passages or self.text)


@dataclass(frozen=True)
class Turn:
    """One turn of the policy and the environment's response.

    ``ids`` are exactly the sampled tokens: training uses these, never re-tokenised text.
    """

    ids: np.ndarray
    """Sampled tokens, the end-of-turn token included: int32 [n], n >= 1."""
    logp: np.ndarray
    """The engine's log-probability of each, at the sampling temperature, in nats: float32 [n]."""
    text: str
    """``ids`` as text, for people and for the parser."""
    actions: tuple[Action, ...]
    """The answer alone, or one or several calls of tools; empty if the turn is malformed."""
    response_ids: np.ndarray
    """The environment's response, up to and including the tokens that open the next turn: int32 [m]; m = 0 after
    the last turn."""
    response: str = ""
    """The environment's response as text."""
    passages: tuple[str, ...] = ()
    """Ids of the passages in the response."""
    found: bool = False
    """Whether a call of the turn brought something."""
    failed: bool = False
    """Whether a call of the turn failed for good."""
    call: int = 0
    """Place in ``ids`` of the first token of its actions, which go on to the end; 0 without one."""

    @property
    def action(self) -> str:
        """Name of the (first) tool that it calls, ``answer`` or ``invalid``."""
        return self.actions[0].tool if self.actions else INVALID

    @property
    def argument(self) -> str:
        """What it calls with, or answers, for people; empty if malformed."""
        return "\n".join(action.text for action in self.actions)

    @property
    def calls(self) -> bool:
        """Whether it calls a tool."""
        return self.action not in (ANSWER, INVALID)


@dataclass(frozen=True)
class Rollout:
    """A prompt followed by turns. Its tokens are ``prompt_ids + turn.ids + turn.response_ids + ...``."""

    question: Question
    index: int
    """Place in the group: 0 .. G-1."""
    prompt_ids: np.ndarray
    """int32 [p], p >= 1."""
    turns: tuple[Turn, ...]
    """Turns: 1 .. max_turns."""
    truncated: Truncation = ""
    """The limit that ended it (``truncation``); empty if it answered or its last turn is malformed."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """What a user's function or the tools say that it earned, by name; ``reward`` trains. Empty if none was asked, or
    gave no verdict."""

    @cached_property
    def ids(self) -> np.ndarray:
        """All tokens: int32 [L]."""
        parts = [self.prompt_ids]
        for turn in self.turns:
            parts += [turn.ids, turn.response_ids]
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def turn_of_token(self) -> np.ndarray:
        """The turn (0-based) of each decision token, -1 for prompt and responses: int32 [L]."""
        parts = [np.full(len(self.prompt_ids), -1)]
        for t, turn in enumerate(self.turns):
            parts += [np.full(len(turn.ids), t), np.full(len(turn.response_ids), -1)]
        return np.concatenate(parts).astype(np.int32)

    @cached_property
    def boundaries(self) -> np.ndarray:
        """Length of prefix_0 .. prefix_{T-1}: the prompt, then everything up to and including each response but
        the last: int64 [T]."""
        lengths = [len(turn.ids) + len(turn.response_ids) for turn in self.turns[:-1]]
        return np.cumsum([len(self.prompt_ids), *lengths])

    @cached_property
    def logp(self) -> np.ndarray:
        """The engine's log-probabilities of the decision tokens, in order: float32 [decision tokens]."""
        return np.concatenate([turn.logp for turn in self.turns]).astype(np.float32)

    @property
    def decision_tokens(self) -> int:
        return sum(len(turn.ids) for turn in self.turns)

    @property
    def answer(self) -> str | None:
        """The final answer, or None if the rollout ended without a well-formed one."""
        last = self.turns[-1]
        return last.argument if last.action == ANSWER else None


def truncation(action: str, finished: bool, out_of_turns: bool) -> Truncation:
    """The limit that cut a rollout short, from its last turn.

    Args:
        action: ``Turn.action`` of the last turn.
        finished: whether that turn ended by itself, not by length.
        out_of_turns: whether it was the last turn allowed.
    Returns:
        ``turns``: it called a tool in the last turn allowed. ``tokens``: the turn was cut, or the response left no room
        for another. Empty: it answered, or wrote a complete turn that is neither a call nor an answer.
    """
    if action == ANSWER:
        return ""
    if action == INVALID:
        return "" if finished else "tokens"
    return "turns" if out_of_turns else "tokens"


@dataclass(frozen=True)
class Group:
    """The rollouts of one question: the unit of every per-group statistic, and one tree of the packed pass."""

    question: Question
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Credit:
    """Values, gains, rewards and advantages of one rollout, per turn (the paper's v, ig, r and A)."""

    values: np.ndarray
    """v_t at prefix_0 .. prefix_{T-1}, in the configured basis: float64 [T]; NaN where undefined."""
    gains: np.ndarray
    """ig_t = v_t - v_{t-1}, or v_t less what ``baseline`` compares it with, credited to turns 1 .. T-1: float64 [T-1];
    NaN for a turn that earns none (``ig_tools``, ``ig_every``)."""
    outcome: float
    """F1 or EM of the final answer or the format penalty, or ``Rollout.rewards["reward"]``."""
    f1: float
    """Against the ground truth; NaN without one."""
    em: float
    """Likewise."""
    advantages: np.ndarray
    """A_t, after normalising and discounting: float64 [T]."""
    clip_scale: np.ndarray | None = None
    """Factor of each turn's clip range: float64 [T]; None is 1."""
    baselines: np.ndarray | None = None
    """What v_1 .. v_{T-1} are compared with, if not with the value before: float64 [T-1]; NaN where there is none."""
    undefined: int = 0
    """Number of gains that count as 0 because a value is NaN or infinite."""
    token_advantages: np.ndarray | None = None
    """Advantages of the decision tokens, whose means per turn are ``advantages``: float32 [decision tokens]; None where
    a turn's tokens share one. Not on record."""


@dataclass(frozen=True)
class Batch:
    """The rollouts that one step trains on, and what they earned."""

    step: int
    groups: tuple[Group, ...]
    credits: tuple[Credit, ...] = field(default=())
    """One per rollout, in the order of ``rollouts``; empty until scored."""

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group.rollouts]


@dataclass(frozen=True)
class Evaluation:
    """Rollouts on held-out questions, and their metrics."""

    metrics: dict[str, float]
    """``eval/*`` keys of a row."""
    rollouts: tuple[Rollout, ...]
    """One per question, in the questions' order."""
