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

import triton

from igpo_kernels import inspect
from igpo_kernels.assembly import AMD, NVIDIA, Profile, profile
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


FACTS = inspect.Facts(
    registers=90, local=0, looped=0, hot_loop=300, outer_loop=700, shared=1024, scratch=0, tensor_columns=0,
    marks=("wgmma",),
)  # fmt: skip
VARIANT = Variant("op", "kernel", "sm_90", "bf16", "small", None, {"n": "i32"}, {"BLOCK": 64}, has_dot=True)


@pytest.fixture
def three(monkeypatch, tmp_path):
    """Three shipped variants, of keys w4, w8 and w4; yields the keys of those compiled."""
    shipped = [VARIANT, replace(VARIANT, num_warps=8), replace(VARIANT, shape_class="large")]
    compiled = []

    def measure(i):
        compiled.append(f"w{shipped[i].num_warps}")
        return replace(FACTS, registers=shipped[i].num_warps, looped=8 * (shipped[i].num_warps == 8))

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
    assert [(r.name[-1], r.facts.registers) for r in reports] == [("small", 4), ("small", 8), ("large", 4)]


def test_a_long_gate_tells_how_far_it_is(capsys):
    assert list(inspect.told("abcde", 5, every=2)) == list("abcde")
    assert capsys.readouterr().err == "compiled 2 of 5\ncompiled 4 of 5\n"


def test_what_holds_is_kept_and_not_compiled_again(three, capsys):
    other = {"w8": asdict(FACTS)}
    inspect.HOLDS.write_text(json.dumps({"3.0": other, triton.__version__: {"of other sources": asdict(FACTS)}}))
    assert inspect.main(["--write"]) == 1
    assert json.loads(inspect.HOLDS.read_text())["3.0"] == json.loads(json.dumps(other)), "another release's facts stay"
    assert inspect.read_holds() == {"w4": replace(FACTS, registers=4)}, "what spills, or ships no more, is not kept"
    three.clear()
    assert inspect.main(["--new", "--write"]) == 1 and three == ["w8"]
    assert "spills 8 bytes in loops" in capsys.readouterr().out
    assert inspect.main([]) == 1 and sorted(three) == ["w4", "w8", "w8"]


def test_facts_on_file_are_held_to_the_gate_again(three, capsys):
    kept = {"w4": replace(FACTS, marks=("wgmma", "serialized")), "w8": FACTS}
    inspect.HOLDS.write_text(json.dumps({triton.__version__: {key: asdict(facts) for key, facts in kept.items()}}))
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
        "tree_attention_backward_q", "tree_attention_backward_kv", "linear_policy_loss",
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
    *((f"spills {arch}", "once per program > 512") for arch in ("sm_80", "sm_100")),
    *((f"spills in a loop {arch}", "bytes in loops") for arch in ("sm_90", "gfx942")),
    ("tf32", "TF32"), ("no wgmma", "no wgmma"), ("no tcgen05", "no tcgen05"), ("shared", "shared memory"),
    ("scratch", "scratch: not ahead of time"), ("broken", "does not compile"),
])  # fmt: skip
def test_the_gate_fails_on(name, expected, faults):
    assert any(expected in fault for fault in faults[name]), faults[name]


def test_one_fault_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(inspect.triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(inspect, "shipped", lambda: [])
    name = ("op", "kernel", "sm_90", "bf16", "any")
    for found, code in (((), 0), (("spills 8 bytes in loops",), 1)):
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
    kernel = SimpleNamespace(
        asm={"ptx": "wgmma.mma_async", "cubin": b""}, metadata=namedtuple("Metadata", "shared")(1024)
    )
    variant = Variant("op", "kernel", "sm_90", "bf16", "any", None, {}, has_dot=True)
    monkeypatch.setattr(inspect.assembly, "disassemble", lambda cubin: NESTED)
    for said, expected in ((used, ()), (log + used, ("wgmma serialized",))):
        monkeypatch.setattr(inspect, "compile_variant", lambda _, said=said: (kernel, said))
        assert inspect.check(variant).faults == expected


NESTED = """
.text.kernel:
        /*0000*/                   STL.64 [R1], R2 ;
        /*0010*/               @P0 BRA `(.L_end) ;
.L_runs:
        /*0020*/                   MOV R4, RZ ;
.L_blocks:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9], R88 ;
        /*0040*/              @!P3 BRA `(.L_wait) ;
.L_on:
        /*0050*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0060*/               @P1 BRA `(.L_blocks) ;
.L_masked:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0080*/                   ISETP.GT.AND P3, PT, R168, R183, PT ;
        /*0090*/                   ISETP.GT.AND P3, PT, R168, R183, PT ;
        /*00a0*/                   ISETP.GT.AND P3, PT, R168, R183, PT ;
        /*00a4*/                   ISETP.GT.AND P3, PT, R168, R183, PT ;
        /*00a8*/                   ISETP.GT.AND P3, PT, R168, R183, PT ;
        /*00b0*/                   ISETP.GT.AND P3, PT, R168, R183, PT ;
        /*00c0*/               @P1 BRA `(.L_masked) ;
        /*00d0*/               @P2 BRA `(.L_runs) ;
.L_end:
        /*00e0*/                   LDL.LU.64 R2, [R1] ;
        /*00f0*/                   LDL R2, [R1] ;
        /*0100*/                   EXIT ;
.L_wait:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9], R88 ;
        /*0120*/              @!P3 BRA `(.L_wait) ;
        /*0130*/                   BRA `(.L_on) ;
.L_x:
        /*0140*/                   BRA `(.L_x);
"""
"""A loop over runs that holds one over full blocks, whose wait stands behind the end, and one over masked blocks."""


def test_loops_by_hand():
    # The loop over full blocks: two instructions, its wait of three, and two. That over runs adds 1 + 8 + 1.
    assert profile(NESTED, NVIDIA) == Profile(local=8 + 8 + 4, looped=0, hot_loop=7, outer_loop=17)


@pytest.mark.parametrize("at", ["0020", "0060", "00b0", "0130"])
def test_local_memory_in_any_loop_is_told_apart(at):
    text = NESTED.replace(f"        /*{at}*/", f"        /*{at}*/   @P4 LDL.128 R8, [R1+0x10] ;\n        /*{at}*/")
    found = profile(text, NVIDIA)
    assert (found.local, found.looped) == (20, 16)


def test_jumps_back_that_make_no_loop():
    """Local memory between a wait's return and the wait itself, which stands behind it: outside all loops."""
    waits = """
        /*0000*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9], R88 ;
        /*0010*/              @!P3 BRA `(.L_wait) ;
.L_on:
        /*0020*/                   STL [R1], R2 ;
        /*0030*/                   EXIT ;
.L_wait:
        /*0040*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR9], R88 ;
        /*0050*/              @!P3 BRA `(.L_wait) ;
        /*0060*/                   BRA `(.L_on) ;
"""
    assert profile(waits, NVIDIA) == Profile(local=4, looped=0, hot_loop=2, outer_loop=2)


def test_loops_of_an_amd_chip_by_hand():
    text = """
kernel:                                 ; @kernel
\tscratch_store_dwordx2 off, v[0:1], s0  ; a comment
\ts_cbranch_scc1 .LBB0_3
.LBB0_1:
\t.loc\t1 42 19
\ts_waitcnt lgkmcnt(0)
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc0 .LBB0_1
\ts_branch .LBB0_3
.LBB0_2:
\tscratch_load_dword v3, off, s0
\ts_cbranch_scc0 .LBB0_2
.LBB0_3:
\tscratch_load_dwordx4 v[0:3], off, s0
\ts_endpgm
"""
    # What nothing reaches belongs to no loop.
    assert profile(text, AMD) == Profile(local=8 + 4 + 16, looped=0, hot_loop=3, outer_loop=3)
    entered = profile(text.replace("s_branch .LBB0_3", "s_cbranch_scc1 .LBB0_3"), AMD)
    assert entered == Profile(local=8 + 16, looped=4, hot_loop=3, outer_loop=3)
