"""libigpo_kernels: it builds without a GPU, its own tests pass, and the loader refuses what does not fit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if missing := [tool for tool in ("cmake", "ctest", "cc", "c++") if not shutil.which(tool)]:
    pytest.skip(f"no {', '.join(missing)}", allow_module_level=True)

from triton import knobs

from igpo_kernels import triton_variants
from igpo_kernels.aot import build, library, load
from igpo_kernels.aot.__main__ import main

pytestmark = pytest.mark.aot
ROOT = Path(__file__).parents[2]


def run(*command, **environment):
    command = list(map(str, command))
    return subprocess.run(
        command, env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


OPS = (
    "policy_loss", "linear_policy_loss/bf16", "turn_advantages/fp32", "tree_attention/bf16/d64",
    "tree_attention/bf16/d64-capped/64/capped_windowed",
)  # fmt: skip
"""Few kernels, TMA's among them."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The build folder of a library with parts of four ops for one architecture."""
    folder = tmp_path_factory.mktemp("build")
    configured = run(
        "cmake", "-S", ROOT, "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}", "-DIGPO_ARCHS=sm_90",
        f"-DIGPO_OPS={';'.join(OPS)}", "-DIGPO_JOBS=2",
    )  # fmt: skip
    assert configured.returncode == 0, configured.stderr
    made = run("cmake", "--build", folder)
    assert made.returncode == 0, made.stdout + made.stderr
    return folder


@pytest.fixture
def path(built):
    return built / "libigpo_kernels.so"


def test_ctest_passes(built):
    tested = run("ctest", "--test-dir", built, "--output-on-failure")
    assert tested.returncode == 0, tested.stdout
    verdicts = {line.split()[3]: line for line in tested.stdout.splitlines() if " Test #" in line}
    assert set(verdicts) == {"list", "launch", "loader", "install", "find_package"}
    assert all("Passed" in line for name, line in verdicts.items() if name != "launch")
    log = (built / "Testing" / "Temporary" / "LastTest.log").read_text()
    for op in {name.split("/")[0] for name in OPS}:
        assert re.search(rf"^{op}: \d+ kernels served, none compiled$", log, re.MULTILINE), op


def test_the_library_has_kernels_that_take_tensor_maps(built):
    kernels = json.loads((built / "generated" / "manifest.json").read_text())["kernels"]
    parameters = {k["kernel"]: [p["type"] for p in k["parameters"]] for k in kernels}
    assert parameters["tree_attention_forward"].count("tensormap") == 4  # keys and values, ends and positions


def test_what_is_compiled_is_not_compiled_again(built):
    command = (sys.executable, "-m", "igpo_kernels.aot", "--out", built / "generated", "--arch", "sm_90", "--jobs", "1")
    again = run(*command, "--op", "policy_loss", TRITON_INTERPRET="0")
    assert again.returncode == 0 and re.search(r": \d+ kernels for sm_90, .*: 0 compiled", again.stdout), again.stdout


def test_the_command_says_what_it_cannot_do(tmp_path, monkeypatch, capsys):
    command = ["--out", str(tmp_path), "--arch", "sm_90", "--op", "no_such_op"]
    monkeypatch.setattr(knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err
    monkeypatch.setattr(knobs.runtime, "interpret", False)
    assert main(command) == 2
    assert "no kernels of no_such_op for sm_90; ops are" in capsys.readouterr().err
    assert main([*command[:-1], "policy_loss", "policy_loss/bf15"]) == 2
    assert "no kernels of policy_loss/bf15 for sm_90" in capsys.readouterr().err


def shared(folder, source):
    (folder / "other.c").write_text(source)
    assert run("cc", "-shared", "-fPIC", folder / "other.c", "-o", folder / "other.so").returncode == 0
    return folder / "other.so"


def cut(folder, path):
    (folder / "cut.so").write_bytes(path.read_bytes()[:-1000])
    return folder / "cut.so"


FILES = {
    "is missing": (lambda folder, _: folder / "none.so", "No such file or directory, expected a libigpo_kernels.so"),
    "is a folder": (lambda folder, _: folder, "Is a directory"),
    "is text": (lambda *_: Path(__file__), "not a shared library, expected a libigpo_kernels.so"),
    "is cut short": (cut, "cut short at"),
    "is another library": (lambda folder, _: shared(folder, "int x;"), "not a library of kernels"),
    "has another ABI": (
        lambda folder, _: shared(folder, "unsigned igpo_kernels_abi(void) { return 99; }"),
        "its ABI is 99, expected 1; rebuild it from this version of igpo_kernels",
    ),
}


def refusal(path, arch="sm_90"):
    manager = knobs.cache.manager_class
    with pytest.raises(ValueError) as error:
        load(path, arch)
    line = str(error.value)
    assert line.startswith("IGPO_KERNELS_AOT=") and line.endswith(" or unset IGPO_KERNELS_AOT") and "\n" not in line
    assert knobs.cache.manager_class is manager  # nothing is served from it
    return line


@pytest.mark.parametrize("fault", FILES)
def test_a_file_is_refused_that(fault, path, tmp_path):
    make, expected = FILES[fault]
    assert expected in refusal(make(tmp_path, path))


def compiler_with(**changes):
    compiler = library.compiler
    return lambda: {**compiler(), **changes}


BUILDS = {
    "sources": ("sources", lambda: "0" * 64, "built from other kernel sources"),
    "Triton": ("compiler", compiler_with(triton="3.5.0"), "expected 3.5.0; rebuild it"),
    "Triton's build": ("compiler", compiler_with(build="0" * 64), "built by another build of Triton"),
    "ptxas": ("target_key", lambda arch: "tools, release 1.2, V1.2.3\n-90", "expected release 1.2, V1.2.3; rebuild it"),
}


@pytest.mark.parametrize("other", BUILDS)
def test_a_library_is_refused_that_was_built_from_another(other, path, monkeypatch):
    name, replacement, expected = BUILDS[other]
    monkeypatch.setattr(library, name, replacement)
    assert expected in refusal(path)


def test_other_compiler_variables_are_refused(path, monkeypatch):
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    assert "built under compiler variables none, expected" in refusal(path)


def test_another_architecture_is_refused(path):
    line = refusal(path, "sm_100")
    assert "built for sm_90, expected this device's sm_100; rebuild it with -DIGPO_ARCHS=sm_100" in line
    assert "this device's gfx942; use the just-in-time compiler" in refusal(path, "gfx942")


def test_the_variable_takes_effect_at_a_devices_first_launch(path, monkeypatch):
    """And every time, if it fails: nothing falls back to compiling."""
    triton_variants.load_ahead_of_time.cache_clear()
    monkeypatch.setattr(triton_variants, "arch_name", lambda device: "sm_100")
    monkeypatch.setenv("IGPO_KERNELS_AOT", str(path))
    assert triton_variants.arch_of(torch.device("cpu")) == "sm_90"
    for _ in range(2):
        with pytest.raises(ValueError, match="built for sm_90, expected this device's sm_100"):
            triton_variants.arch_of(torch.device("cuda"))
    monkeypatch.delenv("IGPO_KERNELS_AOT")
    assert triton_variants.arch_of(torch.device("cuda")) == "sm_100"
    triton_variants.load_ahead_of_time.cache_clear()


def test_parameters_are_counted_from_ptx():
    ptx = """.visible .entry kernel(
        .param .align 64 .b8 kernel_param_0[128],
        .param .u64 .ptr .global .align 1 kernel_param_1,
        .param .u32 kernel_param_2,
        .param .f32 kernel_param_3,
        .param .u8 kernel_param_4
    )
    .reqntid 128
    { ld.param.b32 %r1, [kernel_param_2]; }"""
    assert build.parameter_sizes(ptx) == [128, 8, 4, 4, 1]
