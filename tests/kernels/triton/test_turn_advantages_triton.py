"""turn_advantages on Triton against its definition in float64: every normaliser, ragged groups, tokens, one launch."""

import inspect
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from igpo_kernels.turn_advantages import Normaliser, turn_advantages
from tests.kernels.test_turn_advantages import (
    GROUP,
    ON_TRITON,
    PLAIN,
    POOLS,
    RELEASED,
    WORKED,
    batches,
    normalisers,
    spread,
    tensors,
    token_counts,
)
from tests.kernels.triton.test_inspect import compiled

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.usefixtures("poison"),
    # numpy says what a device does not: empty pools have no mean, equal rewards no scale.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

import triton.language as tl  # noqa: E402

from igpo_kernels.triton_variants import Config, config_for  # noqa: E402
from igpo_kernels.turn_advantages import triton_kernels, triton_path  # noqa: E402

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
KERNEL = triton_path.turn_advantages_kernel


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Groups of several tiles (16 turns, then 4 each), at lengths the interpreter can do."""
    monkeypatch.setattr(triton_path, "config_for", lambda *_: Config({"BLOCK": 16, "PROGRAMS": 5}, 1, 1))


def run(groups, normaliser, gamma=1.0, dtype=torch.float64, device="cpu", counts=None, backend="triton"):
    args = [x.to(device) for x in tensors(groups, dtype)]
    options = {} if counts is None else {"token_offsets": spread(counts).to(device), "n_tokens": sum(counts)}
    return turn_advantages(*args, gamma, normaliser, backend=backend, **options).cpu()


def check(groups, normaliser, gamma=1.0, dtype=torch.float64, device="cpu", counts=None):
    ours = run(groups, normaliser, gamma, dtype, device, counts)
    rounded = [[[float(torch.tensor(r, dtype=dtype)) for r in rollout] for rollout in group] for group in groups]
    exact = run(rounded, normaliser, gamma, counts=counts, backend="reference")
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), exact, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.parametrize("case", ON_TRITON)
def test_hand_worked(case, device):
    groups, normaliser, gamma, expected = WORKED[case]
    assert run(groups, normaliser, gamma, device=device).tolist() == pytest.approx(expected, abs=1e-6)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    groups=batches, normaliser=normalisers, gamma=st.sampled_from([0.0, 0.9, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]), data=st.data(),
)  # fmt: skip
def test_ragged_groups_equal_the_definition(groups, normaliser, gamma, dtype, data, device):
    turns = sum(len(rollout) for group in groups for rollout in group)
    check(groups, normaliser, gamma, dtype, device, data.draw(st.none() | token_counts(turns)))


def wave(*lengths):
    """Rollouts of these lengths, whose rewards neither repeat nor cancel."""
    return [[((7 * i + 3 * t * t) % 23) / 7 - 1.3 for t in range(n)] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("normaliser", [
    Normaliser(), Normaliser("joint", center=False, min_std=0.05), Normaliser("scaled_separate", leave_one_out=True),
], ids=POOLS)  # fmt: skip
@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize("lengths", [[8], [17], [15, 1], [1] * 36, [3, 30, 1, 5]], ids=str)
def test_groups_of_several_tiles(lengths, scope, normaliser, device):
    check([wave(*lengths), wave(2, 1)], replace(normaliser, scope=scope), 0.9, device=device)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [1, 3, 2], [3, 2, 1]], ids=str)
def test_groups_of_other_sizes_than_most(sizes, device):
    """A pool's rollouts are guessed before its group is known."""
    check([wave(*[5, 2, 7][:n]) for n in sizes], Normaliser(), 0.9, device=device)


@pytest.mark.parametrize("gate", [0.1, 0.3, 0.5, 1e-50, 0.0])
def test_a_gate_between_two_numbers_of_float32(gate, device):
    """Float32 rewards meet the gate as they do in float64, whichever way it rounds."""
    bound = torch.tensor(gate)
    near = [float(torch.nextafter(bound, torch.tensor(way))) for way in (-1.0, 1.0)]
    check(
        [[[x, -x, 0.7, 1.0] for x in (*near, float(bound))]], Normaliser(gate=gate), dtype=torch.float32, device=device
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_shipped_tiles(dtype, device, monkeypatch):
    monkeypatch.setattr(triton_path, "config_for", config_for)
    check([wave(5, 2, 9), wave(1, 1)], Normaliser("scaled_separate"), 0.9, dtype, device, counts=[3, 0] * 9)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reward, rollouts", [(0.7, 15), (0.1, 10), (0.1, 3), (0.7, 1)])
def test_equal_rewards_give_exact_zeros(reward, rollouts, dtype, device):
    for pool in POOLS:
        for floors in (PLAIN, RELEASED):
            normaliser = Normaliser(pool, center=False, **floors)
            assert not run([[[reward] * 2] * rollouts] * 2, normaliser, dtype=dtype, device=device).any()


def test_squares_that_underflow_give_zeros(device):
    assert not run([[[0.0], [1e-200]]], Normaliser(), device=device).any()


def test_a_spread_that_float32_would_lose(device):
    # Float32 rewards one step apart: float32 statistics would be of the rounded mean's size.
    above = float(torch.nextafter(torch.tensor(0.7), torch.tensor(1.0)))
    check([[[0.7], [above], [0.7]]], Normaliser(), dtype=torch.float32, device=device)


def test_scalars_are_not_rounded_to_float32(device):
    # 0.1 in float32 is above 0.1: the gate would take a gain on its bound. gamma and floor would err by 1e-8.
    check([[[0.1, 0.5, 1.0], [-0.3, 0.2]]], Normaliser(gate=0.1, min_std=0.1, gain_weight=0.3), 0.1, device=device)
    check([[[0.1, 0.5, 1.0], [-0.3, 0.2]]], Normaliser(outcome_min_std=0.1, min_var=0.1), device=device)
    source = inspect.getsource(triton_kernels)
    names = ("gamma", "gate", "center", "min_std", "outcome_floor", "min_var", "gain_weight", "outcome_weight")
    assert all(f"{name}: tl.float64" in source for name in names)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("scale_std", [True, False])
@pytest.mark.parametrize("pool", POOLS)
def test_a_reward_that_is_not_finite_spoils_its_pool_and_no_other_group(pool, scale_std, bad, device):
    args = [x.to(device) for x in tensors([wave(3, 9), wave(3, 9), wave(2)])]
    args[0][13] = bad  # a gain of the second group; on a CPU the op itself refuses it
    out = triton_path.turn_advantages_triton(*args, 1.0, Normaliser(pool, scale_std=scale_std))
    assert not out[12:14].isfinite().any() and not out[15:23].isfinite().any()
    assert out[:12].isfinite().all() and out[24:].isfinite().all()


NANS = r"""
import json, re
from igpo_kernels.inspect import compile_variant
from igpo_kernels.turn_advantages.triton_path import variants
shipped = {(v.arch, v.dtype, v.shape_class): v for v in variants()}
kernel, _ = compile_variant(shipped["sm_90", "fp32", "any/scaled_separate"])
print(json.dumps([re.findall(r"arith.m(?:in|ax)\w*f", kernel.asm["ttgir"]), kernel.asm["ptx"]]))
"""


def test_compiled_minima_keep_a_nan():
    """The interpreter's do in any case."""
    run = compiled("-c", NANS)
    assert run.returncode == 0, run.stderr
    extrema, ptx = json.loads(run.stdout.splitlines()[-1])
    assert sorted(set(extrema)) == ["arith.maximumf", "arith.maxnumf", "arith.minimumf"]
    assert extrema.count("arith.maxnumf") == 1  # of a count
    assert "min.NaN.f32" in ptx and "min.f32" not in ptx and "max.f32" not in ptx


@pytest.mark.parametrize("counts", [[4] * 5, [0, 0, 40, 0, 1], [0] * 5, [0, 9, 0, 0, 0]], ids=str)
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_tokens_carry_their_turns_advantage(counts, scope, device):
    groups = [GROUP[0], wave(2, 9)]
    counts = [*counts, *range(11)]
    normaliser = Normaliser(scope=scope, **PLAIN)
    turns = run(groups, normaliser, device=device)
    assert run(groups, normaliser, device=device, counts=counts).tolist() == [
        a for a, count in zip(turns.tolist(), counts, strict=True) for _ in range(count)
    ]


def test_n_tokens_bounds_what_is_written(device):
    args = [x.to(device) for x in tensors(GROUP)]
    offsets = spread([3] * 5).to(device)
    whole = turn_advantages(*args, 1.0, Normaliser(), token_offsets=offsets, backend="triton")
    memory = torch.full((15,), 7.0, dtype=torch.float64, device=device)
    grid = (1,)
    KERNEL[grid](
        *args, offsets, torch.empty_like(args[0]), memory, 5, 2, 1, 1, 10, 1.0, 0.0, 1.0, 1e-6, 0.0, 0.0, 1.0,
        1.0, 1, 0,
        POOL="separate", BLOCK=16,
    )  # fmt: skip
    assert torch.equal(memory[:10], whole[:10]) and memory[10:].tolist() == [7.0] * 5


def test_twice_is_bitwise_equal_however_tokens_are_shared_out(device, monkeypatch):
    counts, groups = [5] * 24, [wave(3, 9), wave(3, 9)]
    found = []
    for programs in (1, 4, 4):
        monkeypatch.setattr(
            triton_path, "config_for", lambda *_, p=programs: Config({"BLOCK": 16, "PROGRAMS": p}, 1, 1)
        )
        found.append(run(groups, Normaliser(), 0.9, torch.float32, device, counts))
    assert all(torch.equal(found[0], other) for other in found[1:])


class Launches:
    """In the kernel's place: notes grids and arguments, runs nothing."""

    def __init__(self):
        self.grids, self.arguments = [], []

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: self.arguments.append((args, options))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket._qualified_op_name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("counts", [None, [3] * 16], ids=["turns", "tokens"])
@pytest.mark.parametrize("scope", ["group", "batch"])
def test_one_launch_and_nothing_beside_it(counts, scope, monkeypatch, device):
    launches = Launches()
    monkeypatch.setattr(triton_path, "turn_advantages_kernel", launches)
    args = [x.to(device) for x in tensors([GROUP[0], wave(2, 9)], torch.float32)]
    tokens = (None, None) if counts is None else (spread(counts).to(device), sum(counts))
    with Operations() as operations:
        triton_path.turn_advantages_triton(*args, 0.9, Normaliser(scope=scope), *tokens)
    assert len(launches.grids) == 1 and len(launches.grids[0]) == 1
    assert set(operations.names) <= {"empty", "empty_like", "new_empty", "fill_"}  # fill_ is this test's poison


def test_lengths_are_arguments_of_one_type_and_never_specialised():
    names = ("turns", "rollouts_per_pool", "groups_per_pool", "splits", "n_tokens")
    source = inspect.getsource(triton_kernels).replace("\n", " ")
    free = source.split("do_not_specialize=[")[1].split("]")[0]
    for name in names:
        assert f'"{name}"' in free and f"{name}: tl.int64" in source


@triton.jit
def composed_the_other_way(decay_late, sum_late, decay_early, sum_early):
    return decay_late * decay_early, sum_late + decay_late * sum_early


@triton.jit
def squares_about_zero(x, member, mean):
    return tl.sum(tl.where(member, x.to(tl.float64) * x.to(tl.float64), 0.0), 0)


@triton.jit
def all_kinds(kind, JOINT: tl.constexpr):
    return kind != triton_kernels.NEITHER


@triton.jit
def unmirrored(x, BLOCK: tl.constexpr):
    return tl.reshape(x, [BLOCK])


@pytest.mark.skipif(torch.cuda.is_available(), reason="planted in the interpreter")
@pytest.mark.parametrize("name, fault", [
    ("then_earlier", composed_the_other_way), ("sum_of_squares", squares_about_zero), ("in_pool", all_kinds),
    ("mirrored", unmirrored),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_planted_faults_are_found(name, fault, monkeypatch):
    case = [wave(3, 9, 2), wave(5)], Normaliser(), 0.9
    check(*case)
    monkeypatch.setattr(triton_kernels, name, fault)
    with pytest.raises(AssertionError, match="not close"):
        check(*case)


def test_other_integer_kinds_and_strides(device):
    args = [x.to(device) for x in tensors([GROUP[0], wave(2, 9)], torch.float32)]
    expected = turn_advantages(*args, 0.9, Normaliser(), backend="triton")
    args[0] = torch.stack([args[0], torch.full_like(args[0], torch.nan)], 1)[:, 0]
    for dtype in (torch.uint8, torch.int8, torch.int32):
        args[1] = args[1].to(dtype)
        assert torch.equal(turn_advantages(*args, 0.9, Normaliser(), backend="triton"), expected)


def test_every_knob_reaches_the_kernel(device):
    """Each changes the result of a group made for it."""
    groups = [wave(4, 6, 1)]
    plain = run(groups, Normaliser(), device=device)
    changes = dict(
        pool="joint", gate=0.5, center=False, min_std=0.5, outcome_min_std=0.5, min_var=0.5, gain_weight=0.5,
        outcome_weight=0.5, scale_std=False, leave_one_out=True,
    )  # fmt: skip
    for change in [*({name: value} for name, value in changes.items()), {"pool": "scaled_separate"}]:
        assert not torch.allclose(run(groups, replace(Normaliser(), **change), device=device), plain), change
