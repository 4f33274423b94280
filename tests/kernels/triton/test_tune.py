"""The tuner's choice, the tables' format and look-up; timing itself needs a GPU."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from igpo_kernels import triton_variants
from igpo_kernels.triton_variants import ARCHITECTURES, DTYPES, TABLES, Tunable, arch_of, config_for, configs

pytest.importorskip("triton")

from triton import knobs
from triton.backends.driver import GPUDriver
from triton.runtime.driver import driver

from igpo_kernels import tune
from igpo_kernels.linear_logprob import triton_path

pytestmark = pytest.mark.aot
PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "gfx942": 304}
KERNELS = sorted(path.stem for path in TABLES.glob("*.json"))


@pytest.fixture
def one_table(monkeypatch):
    entries = {"sm_90": {"any": {"bf16": {"num_warps": 4, "num_stages": 1, "BLOCK": 64}}}}
    monkeypatch.setattr(tune, "table", lambda kernel: entries)
    return entries["sm_90"]["any"]


def choose(one_table, times, passes=lambda block, most: True, seconds=60.0):
    space = {"num_warps": [4], "num_stages": [1], "BLOCK": list(times)}
    now = lambda: one_table["bf16"]  # noqa: E731
    return tune.tune(
        Tunable("k", "any", "bf16", space, None), "sm_90", lambda most: passes(now()["BLOCK"], most),
        lambda: times[now()["BLOCK"]], seconds,
    )  # fmt: skip


def test_the_fastest_that_passes_the_gate_is_left_in_the_table(one_table):
    best, after, before = choose(one_table, {64: 10.0, 128: 8.0, 256: 5.0, 512: 9.0}, lambda block, most: block != 256)
    assert (best["BLOCK"], after, before) == (128, 8.0, 10.0)
    assert one_table["bf16"] == best


def test_the_first_variant_decides_what_is_timed_and_all_what_is_taken(one_table):
    asked = []

    def passes(block, most):
        asked.append((block, most))
        return block < 256 if most is None else block < 512

    best, *_ = choose(one_table, {64: 10.0, 128: 8.0, 256: 5.0, 512: 1.0}, passes)
    assert best["BLOCK"] == 128
    assert asked == [(128, 1), (128, None), (256, 1), (256, None), (512, 1)]


def test_constants_are_searched_one_at_a_time(one_table):
    """From (4, 64): warps first, then blocks from the best warps, then again, until nothing is faster."""
    times = {(4, 64): 10.0, (8, 64): 9.0, (4, 128): 1.0, (8, 128): 8.0, (8, 256): 9.5, (4, 256): 2.0}
    now = lambda: (one_table["bf16"]["num_warps"], one_table["bf16"]["BLOCK"])  # noqa: E731
    seen = []

    def milliseconds():
        seen.append(now())
        return times[now()]

    space = {"num_warps": [4, 8], "BLOCK": [64, 128, 256], "num_stages": [1]}
    best, after, _ = tune.tune(Tunable("k", "any", "bf16", space, None), "sm_90", lambda most: True, milliseconds)
    assert seen == [(4, 64), (8, 64), (8, 128), (8, 256), (4, 128), (4, 256)]
    assert (best["num_warps"], best["BLOCK"], after) == (4, 128, 1.0)


def test_no_candidate_is_begun_after_the_time(one_table):
    best, after, before = choose(one_table, {64: 10.0, 128: 1.0}, seconds=-1.0)
    assert (best["BLOCK"], after, before) == (64, 10.0, 10.0)


def test_noise_changes_nothing(one_table):
    best, after, before = choose(one_table, {64: 10.0, 128: 9.9})
    assert (best["BLOCK"], after, before) == (64, 10.0, 10.0)
    assert one_table["bf16"] == best


def test_what_may_be_tuned_is_in_the_tables():
    for _, module, tunable in tune.tunables():
        found = {(c, d): config for arch, c, d, config in configs(tunable.kernel) if arch == "sm_90"}
        config = found[tunable.shape_class, tunable.dtype]
        assert set(tunable.space) == {"num_warps", "num_stages", *config.constants}
        built = {(v.kernel, v.dtype, v.shape_class.split("/")[0]) for v in module.variants()}
        assert (tunable.kernel, tunable.dtype, tunable.shape_class) in built
        for arch, shape_class, dtype, config in configs(tunable.kernel):
            if (shape_class, dtype) == (tunable.shape_class, tunable.dtype):
                space = tunable.on(PROCESSORS[arch]).space
                assert all(config[name] in space[name] for name in tunable.a_processor)


def test_the_gate_asks_for_the_variants_of_one_class(monkeypatch):
    """``variants()`` adds the options to the class: "small/plain", "small/entropy", ..."""
    found = {t.shape_class: (m, t) for op, m, t in tune.tunables() if (op, t.dtype) == ("linear_logprob", "bf16")}
    checked = []
    monkeypatch.setattr(tune, "check", lambda v: checked.append(v) or SimpleNamespace(faults=()))
    for size, variants in {"small": 5, "large": 4}.items():
        checked.clear()
        module, tunable = found[size]
        assert tune.passes_gate(module, tunable, "sm_90")
        assert len(checked) == variants and {v.shape_class.split("/")[0] for v in checked} == {size}
        assert {(v.kernel, v.arch, v.dtype) for v in checked} == {(tunable.kernel, "sm_90", "bf16")}
        assert tune.passes_gate(module, tunable, "sm_90", 1) and checked[-1].shape_class == f"{size}/plain"
        assert len(checked) == variants + 1
    monkeypatch.setattr(
        tune, "check", lambda v: SimpleNamespace(faults=("spills",) * (v.shape_class == "large/capped"))
    )
    assert not tune.passes_gate(*found["large"], "sm_90") and tune.passes_gate(*found["large"], "sm_90", 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's size")
@pytest.mark.parametrize("size", ["small", "large"])
def test_what_the_tuner_times_runs(size, monkeypatch):
    monkeypatch.setattr(triton_path, "TUNED_HIDDEN", 16)
    monkeypatch.setattr(triton_path, "TUNED_VOCAB", 512)
    monkeypatch.setattr(triton_path, "TUNED_ROWS", {"small": 20, "large": 80})
    launched = []
    monkeypatch.setattr(triton_path.Head, "grid", lambda self, config, n, vocab: launched.append((config, n)) or (1,))
    for op, _, tunable in tune.tunables():
        if (op, tunable.shape_class, tunable.dtype) == ("linear_logprob", size, "bf16"):
            tunable.workload(torch.device("cpu"))()
            config, n = launched.pop()
            assert n == triton_path.TUNED_ROWS[size]
            expected = config_for(tunable.kernel, "sm_90", size, "bf16")
            assert {name: config[name] for name in expected.constants} == dict(expected.constants)


def test_tables_go_where_they_are_asked_to(monkeypatch, tmp_path, capsys):
    """A machine without tables of its own: what main writes and prints, with the GPU's part replaced."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "arch_of", lambda device: "sm_90")
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(tune, "table", lambda kernel: {"sm_90": {"any": {"bf16": {"BLOCK": 64}}}})
    made = [("op", None, Tunable(kernel, "any", "bf16", {}, lambda device: None)) for kernel in ("a", "b")]
    monkeypatch.setattr(tune, "tunables", lambda: iter(made))
    monkeypatch.setattr(tune, "tune", lambda tunable, *rest: ({"BLOCK": 64}, 1.0, 2.0))
    assert tune.main(["--kernel", "b", "--out", str(tmp_path / "new")]) == 0
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["b.json"]
    assert capsys.readouterr().out == "b sm_90 any bf16: 2.0000 -> 1.0000 ms {'BLOCK': 64}\n"
    assert tune.main(["--dry-run", "--shape-class", "any", "--out", str(tmp_path / "none")]) == 0
    assert not (tmp_path / "none").exists()


def test_a_filter_given_twice_takes_both():
    found = {t.kernel for _, t in tune.wanted(tune.parsed(["--op=policy_loss", "--op=turn_advantages"]))}
    assert {"policy_loss", "turn_advantages"} <= found and not any(name.startswith("linear") for name in found)
    both = {t.dtype for _, t in tune.wanted(tune.parsed(["--dtype=bf16", "--dtype=fp32", "--op=linear_logprob"]))}
    assert both == {"bf16", "fp32"}


def test_counts_for_each_multiprocessor():
    space = {"BLOCK": [64, 128], "PROGRAMS": [2, 4]}
    tunable = Tunable("k", "any", "bf16", space, None, ("PROGRAMS",)).on(132)
    assert tunable.space == {"BLOCK": [64, 128], "PROGRAMS": [264, 528]} and tunable.on(7) == tunable


@pytest.mark.parametrize("kernel", KERNELS)
def test_committed_tables_are_as_the_tuner_writes_them(kernel):
    text = (TABLES / f"{kernel}.json").read_text()
    assert tune.render(json.loads(text)) == text


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_configured_for_every_architecture(kernel):
    found = {(arch, dtype) for arch, _, dtype, _ in configs(kernel)}
    assert {arch for arch, _ in found} == set(ARCHITECTURES)
    assert {dtype for _, dtype in found} <= {*DTYPES, "fp64"}


def test_without_a_gpu_the_tuner_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().err == "igpo_kernels.tune: no GPU is visible; run it on the machine to tune for\n"


def test_fusion_is_pinned():
    # Whether a * b + c contracts is a knob of the Triton version: no launch leaves it open.
    assert config_for("policy_loss", "sm_90", "any", "fp32").launch()["enable_fp_fusion"] is True


def test_a_missing_entry_is_named():
    with pytest.raises(KeyError, match=re.escape("configs/policy_loss.json has no entry sm_90/huge/fp32")):
        config_for("policy_loss", "sm_90", "huge", "fp32")


@pytest.mark.parametrize("capability, expected", [((9, 0), "sm_90"), ((8, 0), "sm_80"), ((10, 0), "sm_100")])
def test_architecture_of_a_device(capability, expected, monkeypatch):
    properties = SimpleNamespace(major=capability[0], minor=capability[1])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    triton_variants.arch_name.cache_clear()
    assert arch_of(torch.device("cuda", 0)) == expected
    triton_variants.arch_name.cache_clear()


def test_tensors_on_the_cpu_are_refused_beside_a_gpu(monkeypatch):
    class Gpu(GPUDriver):
        def __init__(self):
            pass

    Gpu.__abstractmethods__ = frozenset()
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    monkeypatch.setattr(driver, "_active", Gpu())
    with pytest.raises(ValueError, match="Triton kernels run on GPUs, got tensors on the CPU; pass backend='auto'"):
        arch_of(torch.device("cpu"))
    monkeypatch.setattr(driver, "_active", object())  # as aot's absent device
    assert arch_of(torch.device("cpu")) == "sm_90"


def test_a_device_without_tables_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=9))
    triton_variants.arch_name.cache_clear()
    with pytest.raises(ValueError, match=r"no Triton configurations for sm_89.*pass backend='torch'"):
        triton_variants.arch_of(torch.device("cuda", 0))
    triton_variants.arch_name.cache_clear()
