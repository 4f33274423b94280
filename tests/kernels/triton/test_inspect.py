"""The compile-only gate: every shipped configuration holds, and what must not pass does not."""

import itertools
import json
import os
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from igpo_kernels import inspect
from igpo_kernels.triton_variants import TABLES, Variant, configs


def compiled(*command):
    """Run in a process that compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1200)


def test_every_committed_configuration_is_shipped():
    shipped = {(v.kernel, v.arch, v.shape_class.split("/")[0], v.dtype) for v in inspect.shipped()}
    tables = {(path.stem, *entry[:3]) for path in TABLES.glob("*.json") for entry in configs(path.stem)}
    assert shipped == tables
    ops = ("tree_attention", "linear_logprob", "policy_loss", "linear_policy_loss", "turn_advantages")
    assert {(v.op, v.arch) for v in inspect.shipped()} == set(itertools.product(ops, inspect.TARGETS))


def test_every_shipped_configuration_holds():
    run = compiled("-m", "igpo_kernels.inspect", "--jobs", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    *table, summary = run.stdout.splitlines()
    variants = len(table) - 1
    assert summary == f"{variants} variants, {variants} hold"
    names = [(v.op, v.kernel, v.arch, v.dtype, v.shape_class) for v in inspect.shipped()]
    assert [tuple(line.split()[:5]) for line in table[1:]] == names


def test_one_program_of_two_classes_is_compiled_once(monkeypatch):
    variant = Variant("op", "kernel", "sm_90", "bf16", "small", None, {"n": "i32"}, {"BLOCK": 64})
    shipped = [variant, replace(variant, num_warps=8), replace(variant, shape_class="large")]
    compiled = []

    def check(i):
        compiled.append(i)
        return inspect.Report(("op", "kernel", "sm_90", "bf16", shipped[i].shape_class), registers=shipped[i].num_warps)

    monkeypatch.setattr(inspect, "shipped", lambda: shipped)
    monkeypatch.setattr(inspect, "check_shipped", check)
    reports = inspect.check_all(range(3))
    assert len(compiled) == 2
    assert [(r.name[-1], r.registers) for r in reports] == [("small", 4), ("small", 8), ("large", 4)]


@pytest.fixture(scope="module")
def faults():
    run = compiled(str(Path(__file__).with_name("failing.py")))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_sound_kernels_hold(faults):
    assert {name: found for name, found in faults.items() if name.startswith("holds") and found} == {}


@pytest.mark.parametrize("name, expected", [
    *((f"spills {arch}", "spills") for arch in ("sm_80", "sm_90", "sm_100", "gfx942")),
    ("tf32", "TF32"), ("no wgmma", "no wgmma"), ("no tcgen05", "no tcgen05"), ("shared", "shared memory"),
    ("scratch", "scratch: not ahead of time"), ("broken", "does not compile"),
])  # fmt: skip
def test_the_gate_fails_on(name, expected, faults):
    assert any(expected in fault for fault in faults[name]), faults[name]


def test_one_fault_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(inspect.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(inspect, "shipped", lambda: [])
    name = ("op", "kernel", "sm_90", "bf16", "any")
    for found, code in (((), 0), (("spills 8 bytes",), 1)):
        reports = [inspect.Report(name), inspect.Report(name, faults=found)]
        monkeypatch.setattr(inspect, "check_all", lambda *_, reports=reports: reports)
        assert inspect.main([]) == code
        assert capsys.readouterr().out.splitlines()[-1] == f"2 variants, {2 - code} hold"


def test_the_interpreter_is_refused():
    run = subprocess.run(
        [sys.executable, "-m", "igpo_kernels.inspect"], env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 2 and "TRITON_INTERPRET is set" in run.stderr


def test_a_serialized_wgmma_is_a_fault(monkeypatch):
    log = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to\n"
    used = "ptxas info : Used 90 registers, 0 bytes spill stores, 0 bytes spill loads\n"
    kernel = SimpleNamespace(asm={"ptx": "wgmma.mma_async"}, metadata=namedtuple("Metadata", "shared")(1024))
    variant = Variant("op", "kernel", "sm_90", "bf16", "any", None, {}, has_dot=True)
    for said, expected in ((used, ()), (log + used, ("wgmma serialized",))):
        monkeypatch.setattr(inspect, "compile_variant", lambda _, said=said: (kernel, said))
        assert inspect.check(variant).faults == expected
