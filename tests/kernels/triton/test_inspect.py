"""The compile-only gate: every shipped configuration holds, and what must not pass does not."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from igpo_kernels import inspect
from igpo_kernels.triton_variants import TABLES, Variant, configs


def compiled(*command, **environment):
    """Run in a process that compiles instead of interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=1200)


def test_every_committed_configuration_is_shipped():
    shipped = {(v.kernel, v.arch, v.shape_class.split("/")[0], v.dtype) for v in inspect.shipped()}
    tables = {(path.stem, *entry[:3]) for path in TABLES.glob("*.json") for entry in configs(path.stem)}
    assert shipped == tables
    ops = ("tree_attention", "linear_logprob", "policy_loss", "linear_policy_loss", "turn_advantages")
    assert {(v.op, v.arch) for v in inspect.shipped()} == set(itertools.product(ops, inspect.TARGETS))


def test_every_shipped_configuration_holds():
    run = compiled("-m", "igpo_kernels.inspect", "--jobs", "2", "--new")
    assert run.returncode == 0, run.stdout + run.stderr
    *table, summary = run.stdout.splitlines()
    variants = len(table) - 1
    assert summary == f"{variants} variants, {variants} hold"
    names = [(v.op, v.kernel, v.arch, v.dtype, v.shape_class) for v in inspect.shipped()]
    assert [tuple(line.split()[:5]) for line in table[1:]] == names


FACTS = inspect.Facts(registers=90, spilled=0, shared=1024, scratch=0, tensor_columns=0, marks=("wgmma",))
VARIANT = Variant("op", "kernel", "sm_90", "bf16", "small", None, {"n": "i32"}, {"BLOCK": 64}, has_dot=True)


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Three shipped variants, of keys w4, w8 and w4; yields the keys of those compiled."""
    shipped = [VARIANT, replace(VARIANT, num_warps=8), replace(VARIANT, shape_class="large")]
    compiled = []

    def measure(i):
        compiled.append(f"w{shipped[i].num_warps}")
        return replace(FACTS, registers=shipped[i].num_warps, spilled=8 * (shipped[i].num_warps == 8))

    monkeypatch.setattr(inspect, "shipped", lambda: shipped)
    monkeypatch.setattr(inspect, "key", lambda variant: f"w{variant.num_warps}")
    monkeypatch.setattr(inspect, "measure_shipped", measure)
    monkeypatch.setattr(inspect, "HOLDS", tmp_path / "holds.json")
    monkeypatch.setattr(inspect.triton.knobs.runtime, "interpret", False)
    return compiled


def test_one_program_of_two_classes_is_compiled_once(three):
    checked = inspect.check_all({0: "w4", 1: "w8", 2: "w4"})
    assert sorted(three) == ["w4", "w8"]
    reports = [report for _, _, report in checked]
    assert [(r.name[-1], r.registers) for r in reports] == [("small", 4), ("small", 8), ("large", 4)]


def test_what_holds_is_kept_and_not_compiled_again(three, capsys):
    inspect.HOLDS.write_text(json.dumps({"of other sources": asdict(FACTS)}))
    assert inspect.main(["--write"]) == 1
    assert inspect.read_holds() == {"w4": replace(FACTS, registers=4)}, "what spills, or ships no more, is not kept"
    three.clear()
    assert inspect.main(["--new", "--write"]) == 1 and three == ["w8"]
    assert "spills 8 bytes" in capsys.readouterr().out
    assert inspect.main([]) == 1 and sorted(three) == ["w4", "w8", "w8"]


def test_facts_on_file_are_held_to_the_gate_again(three, capsys):
    kept = {"w4": replace(FACTS, marks=("wgmma", "serialized")), "w8": FACTS}
    inspect.HOLDS.write_text(json.dumps({key: asdict(facts) for key, facts in kept.items()}))
    assert inspect.main(["--new"]) == 1 and three == []
    assert capsys.readouterr().out.count("wgmma serialized") == 2


LIST = """
import json
from igpo_kernels.inspect import key, shipped
print(json.dumps([[v.kernel, v.arch, v.dtype, v.shape_class, key(v)] for v in shipped()]))
"""


def keys_of(folder):
    run = compiled("-c", LIST, PYTHONPATH=str(folder))
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_the_key_follows_every_source_that_matters(tmp_path):
    # A copy of the kernels with one comment in a function that others call, and one number of warps changed.
    package = tmp_path / "igpo_kernels"
    shutil.copytree(TABLES.parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    callee = package / "triton_math.py"
    above, name, below = callee.read_text().partition("def soft_capped(")
    callee.write_text(above + name + below.replace("return x", "return x  # as any other source", 1))
    table = json.loads((package / "configs/turn_advantages.json").read_text())
    table["sm_90"]["any"]["fp32"]["num_warps"] *= 2
    (package / "configs/turn_advantages.json").write_text(json.dumps(table))
    before, after = ({tuple(variant): key for *variant, key in keys_of(path)} for path in (TABLES.parents[1], tmp_path))
    new = {variant for variant in before if before[variant] != after[variant]}
    changed = {kernel for kernel, *_ in new} - {"turn_advantages"}
    assert changed == {  # all that call it
        "linear_logprob_forward", "linear_logprob_cells", "linear_logprob_backward", "tree_attention_forward",
        "tree_attention_backward_q", "tree_attention_backward_kv",
    }  # fmt: skip
    assert {variant[:3] for variant in new if variant[0] == "turn_advantages"} == {("turn_advantages", "sm_90", "fp32")}


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
        checked = [("key", FACTS, inspect.Report(name, faults=faults)) for faults in ((), found)]
        monkeypatch.setattr(inspect, "check_all", lambda *_, checked=checked: checked)
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
