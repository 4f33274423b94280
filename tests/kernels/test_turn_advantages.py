"""turn_advantages: hand-worked numbers for every normaliser, exact zeros, torch path against reference."""

from dataclasses import replace
from itertools import accumulate, pairwise, product
from math import fsum

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_kernels.turn_advantages import GAIN, OUTCOME, Normaliser, normalised_rewards, turn_advantages

BACKENDS = ["torch", "reference"]
POOLS = ["separate", "joint", "scaled_separate"]
"""Pools of all backends; Triton's kernel has no others."""
ALL_POOLS = [*POOLS, "turn_index", "raw"]


def tensors(groups, dtype=torch.float64):
    """groups: per group a list of rollouts, each its gains followed by its outcome."""
    rollouts = [rollout for group in groups for rollout in group]
    return (
        torch.tensor([r for rollout in rollouts for r in rollout], dtype=dtype),
        torch.tensor([k for rollout in rollouts for k in [GAIN] * (len(rollout) - 1) + [OUTCOME]]),
        torch.tensor([0, *accumulate(len(rollout) for rollout in rollouts)]),
        torch.tensor([0, *accumulate(len(group) for group in groups)]),
    )


def spread(counts):
    """Token offsets of turns with so many tokens each."""
    return torch.tensor([0, *accumulate(counts)])


def token_counts(turns):
    return st.lists(st.integers(0, 12), min_size=turns, max_size=turns)


def advantages(groups, normaliser, gamma=1.0, backend="auto", dtype=torch.float64):
    return turn_advantages(*tensors(groups, dtype), gamma, normaliser, backend=backend).tolist()


# One group, two rollouts. Gains {1, 3, 2}: mean 2, std sqrt(2/3) = .8164966, z = -1.2247449, 1.2247449, 0.
# Outcomes {1, 0}: mean .5, std .5, z = 1, -1.
GROUP = [[[1.0, 3.0, 1.0], [2.0, 0.0]]]
PLAIN = dict(min_std=0.0)
RELEASED = dict(min_std=1e-6, outcome_min_std=1e-6, min_var=1e-8)

# A2TGPO: three rollouts of 3, 3 and 2 turns. Gains of turn 1 {.5, .2, -.1}: z 1.2247449, 0, -1.2247449; of turn 2
# {.1, .3}: -1, 1. Outcomes {1, 0, 0}: 1.4142136, -.7071068 twice.
RAGGED = [[[0.5, 0.1, 1.0], [0.2, 0.3, 0.0], [-0.1, 0.0]]]

WORKED = {
    # A: 1, then 1.2247449 + 1, then -1.2247449 + that. B: -1, then 0 - 1.
    "separate": (GROUP, Normaliser(**PLAIN), 1.0, [1.0, 2.2247449, 1.0, -1.0, -1.0]),
    # A: 1, 1.2247449 + .5 = 1.7247449, -1.2247449 + .5 * 1.7247449 = -.3623724. B: -1, -.5.
    "discounted": (GROUP, Normaliser(**PLAIN), 0.5, [-0.3623724, 1.7247449, 1.0, -0.5, -1.0]),
    # Gains / (.8164966 + .1835034) = -1, 1, 0 after centring; outcomes untouched by the floor.
    "floor": (GROUP, Normaliser(min_std=1 - (2 / 3) ** 0.5), 1.0, [1.0, 2.0, 1.0, -1.0, -1.0]),
    # Not centred, same divisor: 1, 3, 2.
    "uncentred": (
        GROUP,
        Normaliser(center=False, min_std=1 - (2 / 3) ** 0.5),
        1.0,
        [5.0, 4.0, 1.0, 1.0, -1.0],
    ),
    # Gate 2 keeps {0, 3, 2}: mean 5/3, var 13/3 - 25/9 = 14/9, std 1.2472191: -1.3363062, 1.069045, .2672612.
    "gate keeps its bound": (
        GROUP,
        Normaliser(gate=2.0, **PLAIN),
        1.0,
        [-1.3363062 + 2.0690450, 2.0690450, 1.0, 0.2672612 - 1, -1.0],
    ),
    # Gains {.01, .4, -.2} gated to {0, .4, -.2}: mean .2/3, var .2/3 - .04/9 = .56/9, std .2494438, divisor
    # .2994438: 0, 1.3358099, -.6679049. Outcomes {1, .5}: 1, -1.
    "robust": (
        [[[0.01, 0.4, 1.0], [-0.2, 0.5]]],
        Normaliser(gate=0.02, center=False, min_std=0.05),
        1.0,
        [2.3358099, 2.3358099, 1.0, -1.6679049, -1.0],
    ),
    # One pool {2, 4, 0, 2}: mean 2, std sqrt(8/4) = 1.4142136: 0, 1.4142136 and -1.4142136, 0.
    "joint": (
        [[[2.0, 4.0], [0.0, 2.0]]],
        Normaliser("joint", **PLAIN),
        1.0,
        [1.4142136, 1.4142136, -1.4142136, 0.0],
    ),
    # The floor is the pool's and raises its divisor to 2: 0, 2 / 2 and -2 / 2, 0. The outcomes' own has no say.
    "joint, floor": (
        [[[2.0, 4.0], [0.0, 2.0]]],
        Normaliser("joint", min_std=2 - 2**0.5, outcome_min_std=7.0),
        1.0,
        [1.0, 1.0, -1.0, 0.0],
    ),
    # Outcomes / (.5 + .5): .5, -.5; gains as in "separate".
    "floor of outcomes": (
        GROUP,
        Normaliser(outcome_min_std=0.5, **PLAIN),
        1.0,
        [0.5, 1.7247449, 0.5, -0.5, -0.5],
    ),
    # Var 2/3 + 1/3 of gains: -1, 1, 0; .25 + 1/3 of outcomes: .5 / .7637626 = .6546537.
    "variance's floor": (
        GROUP,
        Normaliser(min_var=1 / 3, **PLAIN),
        1.0,
        [0.6546537, 1.6546537, 0.6546537, -0.6546537, -0.6546537],
    ),
    # The authors' code, sqrt(var + 1e-8) + 1e-6. Gains {2e-5, 0}: var 1e-10, sqrt(1.01e-8) = 1.0049876e-4, divisor
    # 1.0149876e-4: +-.0985234. Outcomes {1, .9999}: var 2.5e-9, sqrt(1.25e-8) = 1.1180340e-4, divisor 1.1280340e-4:
    # +-5e-5 / that = +-.4432491.
    "released": (
        [[[2e-5, 1.0], [0.0, 0.9999]]],
        Normaliser(**RELEASED),
        1.0,
        [0.5417725, 0.4432491, -0.5417725, -0.4432491],
    ),
    # Pool {2, 4, 0, 2} * 1e-4: var 2e-8, sqrt(3e-8) = 1.7320508e-4, divisor 1.7420508e-4: 0, 1.1480722, -1.1480722, 0.
    "released, joint": (
        [[[2e-4, 4e-4], [0.0, 2e-4]]],
        Normaliser("joint", **RELEASED),
        1.0,
        [1.1480722, 1.1480722, -1.1480722, 0.0],
    ),
    # Gains keep their mean: 2 / 1.4142136 and 0.
    "joint, uncentred": (
        [[[2.0, 4.0], [0.0, 2.0]]],
        Normaliser("joint", center=False, **PLAIN),
        1.0,
        [2.8284271, 1.4142136, 0.0, 0.0],
    ),
    # mean|z_ig| = 2 * 1.2247449 / 3 = .8164966, mean|z_out| = 1: factor 1.2247449, gains -1.5, 1.5, 0.
    "scaled": (GROUP, Normaliser("scaled_separate", **PLAIN), 1.0, [1.0, 2.5, 1.0, -1.0, -1.0]),
    # Equal outcomes: size .3 instead of 0, factor .3674235, gains -.45, .45, 0.
    "scaled, equal outcomes": (
        [[[1.0, 3.0, 1.0], [2.0, 1.0]]],
        Normaliser("scaled_separate", **PLAIN),
        1.0,
        [0.0, 0.45, 0.0, 0.0, 0.0],
    ),
    # Divisor 1000: gains -.001, .001, 0, mean size 1/1500; the factor 1500 is capped at 10: -.01, .01, 0.
    "scaled, capped": (
        GROUP,
        Normaliser("scaled_separate", min_std=1000 - (2 / 3) ** 0.5),
        1.0,
        [1.0, 1.01, 1.0, -1.0, -1.0],
    ),
    # z_ig halved, z_out doubled: -.6123724, .6123724, 0 and 2, -2.
    "weights": (
        GROUP,
        Normaliser(gain_weight=0.5, outcome_weight=2.0, **PLAIN),
        1.0,
        [2.0, 2.6123724, 2.0, -2.0, -2.0],
    ),
    # grpo: 1 and -1 on every turn.
    "no gains": (GROUP, Normaliser(gain_weight=0.0), 1.0, [1.0, 1.0, 1.0, -1.0, -1.0]),
    # IG only: -1.2247449 + 1.2247449, 1.2247449, 0 and 0, 0.
    "no outcomes": (GROUP, Normaliser(outcome_weight=0.0, **PLAIN), 1.0, [0.0, 1.2247449, 0.0, 0.0, 0.0]),
    # dr_grpo: {1, 0, .5} minus .5.
    "no std": (
        [[[1.0], [0.0], [0.5]]],
        Normaliser(scale_std=False, gain_weight=0.0),
        1.0,
        [0.5, -0.5, 0.0],
    ),
    # rloo: 1 - .25, 0 - .75, .5 - .5.
    "leave one out": (
        [[[1.0], [0.0], [0.5]]],
        Normaliser(scale_std=False, leave_one_out=True, gain_weight=0.0),
        1.0,
        [0.75, -0.75, 0.0],
    ),
    # reinforce_pp: {1, 0, 1, 1}: mean .75, std sqrt(3/16) = .4330127: .5773503, -1.7320508; the second group,
    # whose outcomes are equal, still learns.
    "batch": (
        [[[1.0], [0.0]], [[1.0], [1.0]]],
        Normaliser(scope="batch", gain_weight=0.0),
        1.0,
        [0.5773503, -1.7320508, 0.5773503, 0.5773503],
    ),
    # (1.2247449 - 1) / sqrt(2) + 1.4142136, -1 + 1.4142136; (0 + 1) / sqrt(2) - .7071068 = 0, 1 - .7071068; one gain.
    "by turn number, over the root": (
        RAGGED,
        Normaliser("turn_index", accumulate="sum_over_sqrt", **PLAIN),
        1.0,
        [1.5731322, 0.4142136, 1.4142136, 0.0, 0.2928932, -0.7071068, -1.9318517, -0.7071068],
    ),
    # The outcome is not discounted: (1.2247449 - .9) / sqrt(2) + 1.4142136 and (0 + .9) / sqrt(2) - .7071068.
    "by turn number, over the root, discounted": (
        RAGGED,
        Normaliser("turn_index", accumulate="sum_over_sqrt", **PLAIN),
        0.9,
        [1.6438428, 0.4142136, 1.4142136, -0.0707107, 0.2928932, -0.7071068, -1.9318517, -0.7071068],
    ),
    # The usual sum over the same pools.
    "by turn number": (
        RAGGED,
        Normaliser("turn_index", **PLAIN),
        1.0,
        [1.6389584, 0.4142136, 1.4142136, 0.2928932, 0.2928932, -0.7071068, -1.9318517, -0.7071068],
    ),
    # One pool per turn number of the batch: turn 1 {.5, .2, -.1, .2}: mean .2, var .045, std .2121320.
    "by turn number, over the batch": (
        [*RAGGED, [[0.2, 1.0]]],
        Normaliser("turn_index", scope="batch", outcome_weight=0.0, accumulate="none", **PLAIN),
        1.0,
        [1.4142136, -1.0, 0.0, 0.0, 1.0, 0.0, -1.4142136, 0.0, 0.0, 0.0],
    ),
    # Gains as they are, of which the gate drops one and the weight takes half; outcomes normalised, and not summed.
    "raw": (
        [[[0.5, 0.1, 1.0], [-0.3, 0.0]]],
        Normaliser("raw", gate=0.2, gain_weight=0.5, accumulate="none", center=True, min_std=9.0),
        0.5,
        [1.25, 1.0, 1.0, -1.15, -1.0],
    ),
    # Two groups do not mix: +-1 each, whatever their size.
    "groups": (
        [[[100.0], [0.0]], [[0.1], [0.2]]],
        Normaliser(),
        1.0,
        [1.0, -1.0, -1.0, 1.0],
    ),
}


ON_TRITON = [name for name, (_, n, _, _) in WORKED.items() if n.pool in POOLS and n.accumulate == "sum"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", WORKED)
def test_hand_worked(case, backend):
    groups, normaliser, gamma, expected = WORKED[case]
    assert advantages(groups, normaliser, gamma, backend) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_normalises_before_discounting(backend):
    # Gains {1, 0, 0}: mean 1/3, std .4714045: 1.4142136, -.7071068, -.7071068; outcomes 1, -1.
    # Discounting first would pool the returns {2, 1, 0}, and give A's second turn 0 instead of -.7071068 + 1.
    groups = [[[1.0, 0.0, 1.0], [0.0, 0.0]]]
    expected = [1.7071068, 0.2928932, 1.0, -1.7071068, -1.0]
    assert advantages(groups, Normaliser(**PLAIN), backend=backend) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("pool", [*POOLS, "turn_index"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("reward", "rollouts"), [(0.7, 15), (0.1, 10), (0.1, 3), (0.7, 1)])
def test_equal_rewards_give_exact_zeros(backend, pool, dtype, reward, rollouts):
    for scope in ("group", "batch"):
        for center in (True, False):
            one_turn = [[[reward]] * rollouts] * 2
            two_turns = [[[reward, reward]] * rollouts] * 2
            for floors, groups in product((PLAIN, RELEASED), (one_turn, two_turns)):
                normaliser = Normaliser(pool, center=center, scope=scope, **floors)
                result = advantages(groups, normaliser, backend=backend, dtype=dtype)
                assert result == [0.0] * len(result)


def test_rounded_means_of_equal_rewards_are_a_trap():
    assert torch.full((15,), 0.7).std(unbiased=False) > 0
    assert list(accumulate([0.1] * 10))[-1] / 10 != 0.1  # one by one: sum() compensates from Python 3.12 on
    assert fsum([0.1] * 3) / 3 != 0.1  # exactly rounded sums do not help


@pytest.mark.parametrize("backend", BACKENDS)
def test_pool_of_one_and_underflow_give_zeros(backend):
    # A lone gain beside two outcomes; then outcomes so close that their squared deviations vanish.
    assert advantages([[[5.0, 1.0], [1.0]]], Normaliser(center=False), backend=backend) == [0.0] * 3
    assert advantages([[[0.0], [1e-200]]], Normaliser(), backend=backend) == [0.0] * 2
    leave_one_out = Normaliser(leave_one_out=True, scale_std=False)
    assert advantages([[[1.0]]], leave_one_out, backend=backend) == [0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_turn_question_reduces_to_outcome_only(backend):
    groups = [[[0.2], [0.9], [0.4]], [[1.0], [-2.0]]]
    outcome_only = advantages(groups, Normaliser(gain_weight=0.0), backend=backend)
    for pool in ALL_POOLS:
        floor = 0.0 if pool == "joint" else 0.05  # a joint pool's floor is of outcomes, too
        assert advantages(groups, Normaliser(pool, min_std=floor), 0.9, backend) == outcome_only


rewards = st.integers(-300, 300).map(lambda n: n / 100)
batches = st.lists(st.lists(st.lists(rewards, min_size=1, max_size=6), min_size=1, max_size=5), min_size=1, max_size=4)
normalisers = st.builds(
    Normaliser,
    pool=st.sampled_from(POOLS),
    gate=st.sampled_from([0.0, 0.02, 1.0]),
    center=st.booleans(),
    min_std=st.sampled_from([0.0, 1e-6, 0.05]),
    outcome_min_std=st.sampled_from([0.0, 1e-6, 0.05]),
    min_var=st.sampled_from([0.0, 1e-8, 0.1]),
    gain_weight=st.sampled_from([0.0, 0.3, 1.0]),
    outcome_weight=st.sampled_from([0.0, 0.7, 1.0]),
    scale_std=st.booleans(),
    leave_one_out=st.booleans(),
    scope=st.sampled_from(["group", "batch"]),
)


any_normaliser = st.builds(
    replace,
    normalisers,
    pool=st.sampled_from(ALL_POOLS),
    accumulate=st.sampled_from(["sum", "sum_over_sqrt", "none"]),
)


@settings(max_examples=300, deadline=None)
@given(batches, any_normaliser, st.sampled_from([0.0, 0.9, 1.0]), st.sampled_from([torch.float32, torch.float64]))
def test_torch_path_equals_reference(groups, normaliser, gamma, dtype):
    expected = advantages(groups, normaliser, gamma, "reference", dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    assert advantages(groups, normaliser, gamma, "torch", dtype) == pytest.approx(
        expected, rel=tolerance, abs=tolerance
    )


@settings(max_examples=50, deadline=None)
@given(batches, any_normaliser)
def test_normalised_rewards_are_what_is_weighted_and_summed(groups, normaliser):
    """With one turn's gain and no sum, an advantage is the weighted z and the outcome's."""
    n = replace(normaliser, accumulate="none")
    for backend in BACKENDS:
        z = normalised_rewards(*tensors(groups), n, backend=backend).tolist()
        kinds, offsets = tensors(groups)[1:3]
        weighted = [
            x * (n.gain_weight if kind == GAIN else n.outcome_weight) for x, kind in zip(z, kinds.tolist(), strict=True)
        ]
        expected = list(weighted)
        for first, end in pairwise(offsets.tolist()):
            for s in range(first, end - 1):
                expected[s] += weighted[end - 1]
        assert advantages(groups, n, backend=backend) == pytest.approx(expected, rel=1e-10, abs=1e-10)


def test_triton_refuses_what_its_kernel_lacks():
    for n in (Normaliser("turn_index"), Normaliser("raw"), Normaliser(accumulate="none")):
        with pytest.raises(ValueError, match="the triton kernel has no"):
            advantages(GROUP, n, backend="triton")


@settings(max_examples=50, deadline=None)
@given(batches, st.sampled_from(ALL_POOLS))
def test_groups_are_independent(groups, pool):
    together = advantages(groups, Normaliser(pool), 0.9)
    alone = [a for group in groups for a in advantages([group], Normaliser(pool), 0.9)]
    assert together == pytest.approx(alone, abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(rewards, min_size=2, max_size=8), st.floats(0.1, 10), st.floats(-5, 5))
def test_outcomes_are_invariant_to_scale_and_shift(outcomes, scale, shift):
    moved = advantages([[[scale * o + shift] for o in outcomes]], Normaliser())
    if len(set(outcomes)) > 1:
        assert moved == pytest.approx(advantages([[[o] for o in outcomes]], Normaliser()), abs=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_carries_no_gradient_and_leaves_inputs_alone(backend):
    args = list(tensors(GROUP))
    args[0].requires_grad_()
    before = [a.clone() for a in args]
    result = turn_advantages(*args, 1.0, Normaliser("scaled_separate", gate=2.0), backend=backend)
    assert not result.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(args, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n_tokens", [None, 6])
def test_tokens_carry_their_turns_advantage(backend, n_tokens):
    # Hand-worked "separate" above: 1, 2.2247449, 1 and -1, -1; the second and the last turn have no token.
    result = turn_advantages(
        *tensors(GROUP), 1.0, Normaliser(**PLAIN), token_offsets=spread([2, 0, 1, 3, 0]), n_tokens=n_tokens,
        backend=backend,
    )  # fmt: skip
    assert result.tolist() == pytest.approx([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])


def test_no_tokens_at_all():
    result = turn_advantages(*tensors(GROUP), 1.0, Normaliser(), token_offsets=spread([0] * 5))
    assert result.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_rewards(backend):
    args = list(tensors(GROUP, torch.float32))
    strided = torch.stack([args[0], torch.full_like(args[0], torch.nan)], dim=1)[:, 0]
    expected = turn_advantages(*args, 1.0, Normaliser())
    result = turn_advantages(strided, *args[1:], 1.0, Normaliser(), backend=backend)
    assert result.dtype == torch.float32
    assert torch.allclose(result, expected)


def refused(match, gamma=1.0, backend="auto", **changes):
    names = ("rewards", "kinds", "rollout_offsets", "group_offsets")
    args = dict(zip(names, tensors(GROUP), strict=True)) | changes
    with pytest.raises(ValueError, match=match):
        turn_advantages(**args, gamma=gamma, normaliser=Normaliser(), backend=backend)


def test_refuses_bad_arguments():
    for bad in (torch.nan, torch.inf):
        refused("non-finite", rewards=torch.tensor([1.0, bad, 0, 0, 0]))
    refused("float32", rewards=torch.zeros(5, dtype=torch.int64))
    refused("float32", rewards=torch.zeros(1, 5))
    refused("kinds", kinds=torch.tensor([0, 0, 1, 0]))
    refused("kinds", kinds=torch.tensor([0, 1, 0, 0, 1]))
    refused("rollout_offsets", rollout_offsets=torch.tensor([0, 3, 4]))
    refused("rollout_offsets", rollout_offsets=torch.tensor([0, 3, 3, 5]))
    refused("rollout_offsets", rollout_offsets=torch.tensor([0, 3, 5], dtype=torch.int32))
    refused("group_offsets", group_offsets=torch.tensor([0, 1]))
    refused("group_offsets", group_offsets=torch.tensor([0]))
    refused("gamma", gamma=1.5)
    refused("backend", backend="cuda")
    refused("kinds", kinds=torch.tensor([0.0, 0, 1, 0, 1]))
    refused("token_offsets", token_offsets=torch.arange(5))
    refused("token_offsets", token_offsets=torch.arange(6, dtype=torch.int32))
    refused("token_offsets", token_offsets=torch.arange(1, 7))
    refused("token_offsets", token_offsets=torch.tensor([0, 2, 1, 3, 4, 5]))
    refused("token_offsets", token_offsets=torch.arange(6), n_tokens=4)


@pytest.mark.parametrize("wrong, message", [
    (dict(rollout_offsets=torch.tensor([1, 3, 5])), r"rollout_offsets\[0\] is 1; expected 0"),
    (dict(rollout_offsets=torch.tensor([0, 3, 3, 5])), r"rollout_offsets\[2\] is 3 after 3; expected 4 or more"),
    (dict(rollout_offsets=torch.tensor([0, 3, 4])), r"rollout_offsets\[2\] is 4; expected 5, the number of rewards"),
    (dict(group_offsets=torch.tensor([0, 1])), r"group_offsets\[1\] is 1; expected 2, the number of rollouts"),
    (dict(token_offsets=torch.tensor([0, 2, 1, 3, 4, 5])), r"token_offsets\[2\] is 1 after 2; expected 2 or more"),
    (dict(token_offsets=torch.arange(6), n_tokens=4), r"token_offsets\[5\] is 5; expected 4, n_tokens"),
    (dict(token_offsets=torch.tensor(5)), r"got token_offsets torch.int64 \(\); expected int64 \[6\]"),
    (dict(token_offsets=torch.zeros(6, 1).long()), r"got token_offsets torch.int64 \(6, 1\); expected int64 \[6\]"),
    (dict(token_offsets=torch.zeros(6, device="meta").long()), "token_offsets on meta, rewards on cpu; move them .*"),
    (dict(n_tokens=5), r"got n_tokens 5 without token_offsets; expected the whole number token_offsets\[-1\], or None"),
    (dict(token_offsets=torch.arange(6), n_tokens=5.0), r"got n_tokens 5.0; expected the whole number .*"),
    (dict(kinds=None), "kinds is None; give a tensor"),
    (dict(normaliser={"pool": "joint"}), "normaliser is a dict; give a Normaliser"),
    (dict(normaliser=None), "normaliser is None; give a Normaliser"),
    (dict(gamma=None), "got gamma None; give a plain number"),
    (dict(gamma=float("nan")), "got gamma=nan; expected 0 <= gamma <= 1"),
])  # fmt: skip
def test_what_is_wrong_is_named(wrong, message):
    names = ("rewards", "kinds", "rollout_offsets", "group_offsets")
    args = dict(zip(names, tensors(GROUP), strict=True)) | dict(gamma=1.0, normaliser=Normaliser()) | wrong
    with pytest.raises(ValueError, match=f"^turn_advantages: {message}$"):
        turn_advantages(**args)


@pytest.mark.parametrize("bad", [
    {"pool": "both"}, {"scope": "rank"}, {"gate": -1.0}, {"min_std": float("nan")}, {"outcome_min_std": -1e-6},
    {"min_var": float("inf")}, {"gain_weight": float("nan")}, {"outcome_weight": float("inf")}, {"gain_weight": None},
    {"gate": "0"}, {"min_std": True}, {"min_var": torch.zeros(2)},
])  # fmt: skip
def test_normaliser_refuses(bad):
    with pytest.raises(ValueError, match=f"Normaliser.{next(iter(bad))}"):
        Normaliser(**bad)
