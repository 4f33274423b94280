"""Baselines that read on after another response: forks by rule, and values and gradients against separate passes."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from igpo_fast import config
from igpo_fast.types import Batch
from igpo_fast.update.advantages import Recipe, credit_rollouts
from igpo_fast.update.policy import make_trees
from igpo_fast.update.scoring import MASKED, REAL, Scoring, Values
from igpo_kernels import LossSettings, tree_size
from tests import family
from tests.parity import naive
from tests.parity.test_parity import TEMPERATURE, Case, assert_same_gradients, models
from tests.test_mutant_gaps import Updates, naive_gradients

EMPTY = np.array([5, 9], np.int32)


def scoring_of(case, baseline, **options):
    branches = {g.question.id: tuple(b) for g, b in zip(case.groups, case.branches, strict=True)}
    more = dict(longest_response=6, samples=2) if baseline == "random" else dict(masked_response=EMPTY)
    none = lambda question: ()  # noqa: E731
    of = none if baseline == "masked" else lambda question: branches[question.id]
    return Scoring(of, answer_tokens=1, baseline=baseline, **more | options)


def turn_end(rollout, t):
    """Tokens up to the last of turn t = 1 .. T."""
    return (
        len(rollout.prompt_ids)
        + sum(len(x.ids) for x in rollout.turns[:t])
        + sum(len(x.response_ids) for x in rollout.turns[: t - 1])
    )


def test_a_random_fork_has_another_questions_response_then_an_answer():
    case = Case(4)
    batch = Batch(1, tuple(case.groups))
    responses = {
        g.question.id: {turn.response_ids.tobytes() for r in g.rollouts for turn in r.turns[:-1]} for g in case.groups
    }
    forks = scoring_of(case, "random").forks(batch)
    for i, rollout in enumerate(case.rollouts):
        branches = case.branches[case.group_of[i]]
        made = {(fork.turn, fork.answer): fork for fork in forks.get(i, ())}
        turns = range(1, len(rollout.turns))
        assert set(made) == {(t, a) for t in turns for a in range(2 * len(branches))}
        for (t, number), fork in made.items():
            branch = branches[number % len(branches)]
            lent = fork.ids[: -len(branch.ids[: branch.stop])]
            assert fork.at == turn_end(rollout, t)
            assert fork.ids[len(lent) :].tolist() == branch.ids[: branch.stop].tolist()
            assert (fork.start, fork.stop) == (len(lent) + branch.start, len(fork.ids))
            owners = {question for question, known in responses.items() if lent.tobytes() in known}
            assert owners and owners != {rollout.question.id}
        for t in turns:  # two samples are two responses
            first, second = (made[t, n].ids[: made[t, n].start].tobytes() for n in (0, len(branches)))
            assert first != second or len({r for known in responses.values() for r in known}) < 3


def test_every_response_of_another_question_is_lent_sooner_or_later():
    case = Case(4)
    scoring, first = scoring_of(case, "random"), case.groups[0].question.id
    lent = {
        fork.ids[: fork.start - case.branches[0][fork.answer % len(case.branches[0])].start].tobytes()
        for step in range(1, 60)
        for i, found in scoring.forks(Batch(step, tuple(case.groups))).items()
        for fork in found
        if case.rollouts[i].question.id == first
    }
    turns = [turn for r in case.rollouts if r.question.id != first for turn in r.turns[:-1]]
    assert lent == {turn.response_ids.tobytes() for turn in turns}


def test_random_forks_depend_on_step_and_seed_but_not_on_who_else_is_asked_first():
    case = Case(4)
    batch = Batch(1, tuple(case.groups))
    drawn = lambda batch, **seed: {  # noqa: E731
        (batch.rollouts[i].question.id, batch.rollouts[i].index): [f.ids.tobytes() for f in found]
        for i, found in scoring_of(case, "random", **seed).forks(batch).items()
    }
    assert drawn(batch) == drawn(batch)
    assert drawn(batch) != drawn(replace(batch, step=2)) and drawn(batch) != drawn(batch, seed=1)


def test_responses_that_are_too_long_or_found_nothing_are_not_lent():
    case = Case(4)
    lengths = lambda **more: {  # noqa: E731
        f.start - case.branches[case.group_of[i]][f.answer % len(case.branches[case.group_of[i]])].start
        for i, found in scoring_of(case, "random", **more).forks(Batch(1, tuple(case.groups))).items()
        for f in found
    }
    assert max(lengths()) > 3 and max(lengths(longest_response=3)) == 3
    bare = [
        replace(
            g, rollouts=tuple(replace(r, turns=tuple(replace(t, found=False) for t in r.turns)) for r in g.rollouts)
        )
        for g in case.groups
    ]
    assert scoring_of(case, "random").forks(Batch(1, tuple(bare))) == {}


def test_turns_that_did_not_search_have_no_random_fork_and_earn_nothing():
    case = Case(4)
    i = next(i for i, r in enumerate(case.rollouts) if len(r.turns) > 2)
    group = case.group_of[i]
    turns = list(case.rollouts[i].turns)
    turns[0] = replace(turns[0], actions=())
    changed = replace(case.rollouts[i], turns=tuple(turns))
    rollouts = tuple(changed if r is case.rollouts[i] else r for r in case.groups[group].rollouts)
    batch = Batch(1, tuple(replace(g, rollouts=rollouts) if n == group else g for n, g in enumerate(case.groups)))
    assert 1 not in {fork.turn for fork in scoring_of(case, "random").forks(batch)[i]}
    values = Values(np.zeros(len(turns)), np.array([np.nan, *[-0.5] * (len(turns) - 2)]))
    (credit,) = credit_rollouts([replace(case.groups[group], rollouts=(changed,))], [values], Recipe(baseline="random"))
    assert np.isnan(credit.gains[0]) and credit.gains[1:].tolist() == [0.5] * (len(turns) - 2) and credit.undefined == 0
    assert credit.advantages[0] == credit.advantages[1]


def naive_random(case, plain, scoring, i):
    """v_t of a rollout and the values after random responses, a plain pass each: log-probability, best answer."""
    rollout, branches = case.rollouts[i], case.branches[case.group_of[i]]
    value = lambda prefix: max(  # noqa: E731
        naive.answer_value(plain, prefix, b.ids, b.start, b.stop, TEMPERATURE) for b in branches
    )
    others = {}
    for fork in scoring.forks(Batch(1, tuple(case.groups))).get(i, ()):
        lent = fork.ids[: len(fork.ids) - branches[fork.answer % len(branches)].stop]
        others.setdefault(fork.turn, {})[fork.answer // len(branches)] = value([*rollout.ids[: fork.at], *lent])
    values = [value(rollout.ids[:b]) for b in rollout.boundaries]
    return values, [list(others[t].values()) for t in range(1, len(rollout.turns))]


def naive_masked(case, plain, i):
    rollout, sides = case.rollouts[i], ([], [])
    for t in range(1, len(rollout.turns)):
        own, following = rollout.turns[t - 1].response_ids, rollout.turns[t].ids
        for side, response in zip(sides, (own, EMPTY), strict=True):
            ids = [*rollout.ids[: turn_end(rollout, t)], *response, *following]
            with torch.no_grad():
                side.append(naive.logprobs(plain, ids, TEMPERATURE)[-len(following) :].tolist())
    return sides


@pytest.mark.parametrize("baseline, passes, packs", [
    ("random", "one", 1), ("random", "one", 3), ("random", "two", 3), ("masked", "one", 1), ("masked", "one", 3),
    ("masked", "two", 1), ("none", "one", 3),
])  # fmt: skip
def test_gains_and_gradients_are_those_of_separate_passes(monkeypatch, baseline, passes, packs):
    case, (ours, plain) = Case(19, groups=3), models()  # no two of its groups fit the third's pack
    scoring = scoring_of(case, baseline)
    trees = make_trees(case.groups, [scoring.branches_of(g.question) for g in case.groups], case.numbers,
        scoring.forks(Batch(1, tuple(case.groups))))  # fmt: skip
    sizes = [tree_size(tree)[0] for tree in trees]
    room = sum(sizes) if packs == 1 else max(sizes)
    settings = ["algorithm.preset=robust", "algorithm.basis=log_prob", "algorithm.answers=max", "algorithm.ig_gate=0"]
    settings += [f"algorithm.baseline={baseline}", f"algorithm.passes={passes}", f"train.token_budget={room}"]
    options = {
        name: getattr(scoring, name) for name in ("samples", "longest_response", "masked_response", "branches_of")
    }
    read = []
    ours.model.embed_tokens.register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    run = Updates(monkeypatch, case, ours, *settings, baseline=baseline, **options)
    # One pass reads each pack in two parts.
    assert len(read) == 2 * packs if passes == "one" else packs < len(read) <= 2 * packs
    scored = []
    for i, rollout in enumerate(case.rollouts):
        if baseline == "masked":
            gains = family.infopo(*naive_masked(case, plain, i))
        elif baseline == "random":
            gains = family.ig_search(*naive_random(case, plain, scoring, i))
        else:
            gains = case.naive_values(plain, "log_prob")[i][1:]
        np.testing.assert_allclose(run.credits[i].gains, gains, atol=1e-4)
        scored.append(Values(np.array([0.0, *gains]), np.zeros(len(rollout.turns) - 1)))
    recipe = replace(run.trainer.update.recipe, baseline="none")
    expected = credit_rollouts(case.groups, scored, recipe)
    (gradients,) = run.gradients
    everyone = range(len(case.rollouts))
    assert_same_gradients(gradients, naive_gradients(case, plain, expected, LossSettings(), everyone))
    assert max(abs(c.gains).max() for c in run.credits if len(c.gains)) > 0.1


@pytest.mark.parametrize("passes", ["one", "two"])
def test_forks_cost_their_own_tokens_and_no_pass(monkeypatch, passes):
    """Packed tokens by a trie in plain Python: every distinct path of every tree is read once."""
    case = Case(5)
    read = {}
    for baseline in ("random", "masked"):
        (ours, _), scoring = models(), scoring_of(case, baseline)
        forwards = []
        ours.model.embed_tokens.register_forward_hook(lambda m, args, out, to=forwards: to.append(args[0].numel()))
        options = {
            name: getattr(scoring, name) for name in ("samples", "longest_response", "masked_response", "branches_of")
        }
        settings = [f"algorithm.baseline={baseline}", f"algorithm.passes={passes}", "train.token_budget=100000"]
        row = Updates(monkeypatch, case, ours, *settings, baseline=baseline, **options).row
        forks = scoring.forks(Batch(1, tuple(case.groups)))
        paths, plain, scored = set(), set(), 0
        for i, rollout in enumerate(case.rollouts):
            tree, ids, branches = case.group_of[i], rollout.ids.tolist(), scoring.branches_of(rollout.question)
            read_to = max(np.flatnonzero(rollout.turn_of_token >= 0)[-1], rollout.boundaries[-1] if branches else 0)
            own = [ids[:read_to]]
            plain |= {(tree, *ids[:n]) for n in range(1, np.flatnonzero(rollout.turn_of_token >= 0)[-1] + 1)}
            for fork in forks.get(i, ()):
                own.append([*ids[: fork.at], *fork.ids[: fork.stop - 1].tolist()])
                scored += fork.stop - fork.start
            paths |= {(tree, *path[:n]) for path in own for n in range(1, len(path) + 1)}
            scored += len(rollout.boundaries) * sum(b.stop - b.start for b in branches)
        # Answers are laid out once per boundary, apart from what happens to continue alike.
        blocks = {
            (tree, *case.rollouts[i].ids[:b].tolist())
            for i, tree in enumerate(case.group_of)
            for b in case.rollouts[i].boundaries
            if baseline == "random"
        }
        trie = lambda g: len({tuple(b.ids[:n]) for b in case.branches[g] for n in range(1, b.stop)})  # noqa: E731
        packed = len(paths) + sum(trie(key[0]) for key in blocks)
        assert row["tokens/scored"] == scored
        assert row["tokens/packed"] == packed + (len(plain) if passes == "two" else 0) == sum(forwards)
        # One pass: what the loss has a gradient at, then the rest. Two: everything, then the rollouts.
        assert forwards == ([len(plain), packed - len(plain)] if passes == "one" else [packed, len(plain)])
        read[baseline] = packed
    assert read["masked"] < read["random"]


def test_the_real_side_of_a_masked_response_adds_no_token():
    case = Case(5)
    for found in scoring_of(case, "masked").forks(Batch(1, tuple(case.groups))).values():
        kinds = [fork.answer for fork in found]
        assert kinds == [REAL, MASKED] * (len(kinds) // 2)
    for i, found in scoring_of(case, "masked").forks(Batch(1, tuple(case.groups))).items():
        for fork in found:
            following = case.rollouts[i].turns[fork.turn].ids
            assert fork.ids[fork.start : fork.stop].tolist() == following.tolist()
            if fork.answer == REAL:
                assert case.rollouts[i].ids[fork.at : fork.at + fork.stop].tolist() == fork.ids.tolist()
            else:
                assert fork.ids[: fork.start].tolist() == EMPTY.tolist()


def test_no_rollout_takes_more_than_its_bound():
    for baseline in ("random", "masked", "previous"):
        case = Case(6)
        scoring = scoring_of(case, baseline)
        answers = max(sum(len(b.ids) for b in branches) for branches in case.branches)
        scoring = replace(scoring, answer_tokens=0 if baseline == "masked" else answers)
        forks = scoring.forks(Batch(1, tuple(case.groups)))
        for i, rollout in enumerate(case.rollouts):
            added = sum(len(f.ids) for f in forks.get(i, ()) if baseline == "random" or f.answer == MASKED)
            added += len(rollout.turns) * (0 if baseline == "masked" else answers)
            assert added <= scoring.most_tokens(len(rollout.turns), rollout.decision_tokens)


def test_separate_tokens_are_those_of_a_pass_per_prefix_and_fork():
    case = Case(6)
    plain = Scoring(scoring_of(case, "random").branches_of)
    batch = Batch(1, tuple(case.groups))
    for baseline in ("random", "masked"):
        scoring = scoring_of(case, baseline)
        total = 0 if baseline == "masked" else plain.separate_tokens(batch)
        for found in scoring.forks(batch).values():
            total += sum(f.at + f.stop - 1 for f in found if baseline == "random" or f.answer == MASKED)
        assert scoring.separate_tokens(batch) == total


def test_one_question_has_no_other_to_borrow_from():
    with pytest.raises(ValueError, match=r"algorithm.baseline=random takes .*; give train.questions=2 or more"):
        config.load(None, ["algorithm.baseline=random", "train.questions=1"])


def test_an_undefined_value_gives_a_gain_of_zero_and_is_counted():
    case = Case(4)
    rollout = next(r for r in case.rollouts if len(r.turns) > 2)
    group = replace(case.groups[0], rollouts=(rollout,))
    values = np.full(len(rollout.turns), -1.0)
    values[0] = np.nan  # masked: no value of the prompt, and none is needed
    baselines = np.full(len(rollout.turns) - 1, -2.0)
    baselines[0] = np.inf
    (credit,) = credit_rollouts([group], [Values(values, baselines)], Recipe(baseline="masked"))
    assert credit.gains.tolist() == [0.0, *[1.0] * (len(rollout.turns) - 2)] and credit.undefined == 1
    assert copy.copy(credit).baselines is baselines


def test_a_malformed_turns_hint_is_not_masked():
    case = Case(4)
    i = next(i for i, r in enumerate(case.rollouts) if len(r.turns) > 2)
    turns = list(case.rollouts[i].turns)
    turns[0] = replace(turns[0], actions=())
    rollout = replace(case.rollouts[i], turns=tuple(turns))
    made = scoring_of(case, "masked").forks(Batch(1, (replace(case.groups[0], rollouts=(rollout,)),)))[0]
    assert [(fork.turn, fork.answer) for fork in made][:3] == [(1, REAL), (2, REAL), (2, MASKED)]
    assert Recipe(baseline="masked").calls_only
