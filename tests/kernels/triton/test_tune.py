"""The tuner's choice, the tables' format and look-up; timing itself needs a GPU."""

import json
import re
from types import SimpleNamespace

import pytest
import torch

from igpo_kernels import triton_variants
from igpo_kernels.triton_variants import ARCHITECTURES, DTYPES, TABLES, Tunable, arch_of, config_for, configs

pytest.importorskip("triton")

from igpo_kernels import tune

KERNELS = sorted(path.stem for path in TABLES.glob("*.json"))


@pytest.fixture
def one_table(monkeypatch):
    entries = {"sm_90": {"any": {"bf16": {"num_warps": 4, "num_stages": 1, "BLOCK": 64}}}}
    monkeypatch.setattr(tune, "table", lambda kernel: entries)
    return entries["sm_90"]["any"]


def choose(one_table, times, passes=lambda entry: True):
    space = {"num_warps": [4], "num_stages": [1], "BLOCK": list(times)}
    now = lambda: one_table["bf16"]  # noqa: E731
    return tune.tune(
        Tunable("k", "any", "bf16", space, None), "sm_90", lambda: passes(now()["BLOCK"]), lambda: times[now()["BLOCK"]]
    )


def test_the_fastest_that_passes_the_gate_is_left_in_the_table(one_table):
    best, after, before = choose(one_table, {64: 10.0, 128: 8.0, 256: 5.0, 512: 9.0}, lambda block: block != 256)
    assert (best["BLOCK"], after, before) == (128, 8.0, 10.0)
    assert one_table["bf16"] == best


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


@pytest.mark.parametrize("kernel", KERNELS)
def test_committed_tables_are_as_the_tuner_writes_them(kernel):
    text = (TABLES / f"{kernel}.json").read_text()
    assert tune.render(json.loads(text)) == text


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_configured_for_every_architecture(kernel):
    found = {(arch, dtype) for arch, _, dtype, _ in configs(kernel)}
    assert {arch for arch, _ in found} == set(ARCHITECTURES)
    assert {dtype for _, dtype in found} <= set(DTYPES)


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


def test_a_device_without_tables_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=8, minor=9))
    triton_variants.arch_name.cache_clear()
    with pytest.raises(ValueError, match=r"no Triton configurations for sm_89.*pass backend='torch'"):
        triton_variants.arch_of(torch.device("cuda", 0))
    triton_variants.arch_name.cache_clear()
