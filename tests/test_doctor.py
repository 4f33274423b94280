"""doctor.py: the parity check can fail, and so can every other line."""

import io
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

import igpo_fast.doctor as doctor
from igpo_fast import config, model
from igpo_fast.doctor import diagnose, packed_error, table
from igpo_fast.errors import InputError
from igpo_fast.model import use_attend
from igpo_kernels import triton_variants
from igpo_kernels.tree_attention import IMPLEMENTATIONS

TINY = [
    "world.persons=12", "world.companies=6", "world.cities=6", "world.countries=4", "world.train_worlds=1",
    "world.eval_worlds=1", "eval.questions=4", "model.hidden_size=16", "model.heads=2", "model.kv_heads=2",
    "model.ffn_size=16",
]  # fmt: skip


def checks(overrides=(), configured=False, ranks=1):
    found = diagnose(config.load(None, overrides), configured=configured, ranks=ranks)
    return {check.name: check for check in found}


def test_all_is_well_here():
    found = checks()
    assert all(check.ok for check in found.values())
    assert found["op tree_attention"].found == "torch"
    assert found["parity, a tiny Qwen2"].found.startswith("ok: packed and separate differ by ")
    assert {"igpo-fast", "python", "torch", "transformers", "numpy", "bm25s", "triton", "device", "CUDA"} <= set(found)


def test_the_configured_model_and_data():
    found = checks(TINY, configured=True)
    assert all(check.ok for check in found.values())
    assert "4 eval questions" in found["data"].found
    assert found["parity, the configured model"].found.startswith("ok")


def test_memory_of_the_ranks_that_a_run_will_have():
    """A built model's, too: its size is known once its tokenizer is. Two ranks keep half the moments each."""
    wide = [*TINY, "model.hidden_size=512", "model.heads=8", "model.ffn_size=8192", "algorithm.kl=0"]
    moments = [
        float(re.search(r"Adam states ([\d.]+)", checks(wide, True, ranks)["memory in training"].found)[1])
        for ranks in (1, 2)
    ]
    assert moments == [0.2, 0.1]


def test_kernels_are_those_asked_for(monkeypatch):
    assert checks(["model.kernels=reference"])["op linear_logprob"].found == "reference"
    monkeypatch.setattr(triton_variants, "runs_on_cpu", lambda: False)
    found = checks(["model.kernels=triton"])
    assert not found["op tree_attention"].ok and "triton needs a GPU" in found["op tree_attention"].found
    assert not found["parity, a tiny Qwen2"].ok


def test_the_ops_are_told_by_the_models_own_dtypes(monkeypatch):
    """A head that loads in another dtype than the model runs on torch, whatever the configuration says."""
    asked = []
    for module in (model, doctor):
        monkeypatch.setattr(module, "chosen", lambda *args: asked.append(args) or {"linear_logprob": "reference"})
    checks(["train.precision=bfloat16"])
    cpu = torch.device("cpu")
    assert asked == [("auto", cpu, torch.bfloat16)]
    assert checks(TINY, configured=True)["op linear_logprob"].found.startswith("reference")
    assert asked[1:] == [("auto", cpu, torch.float32, torch.float32)]
    monkeypatch.setattr(model, "lm_head", lambda lm: SimpleNamespace(weight=torch.zeros(1, dtype=torch.float64)))
    model.kernels_of(doctor._tiny(), "auto")
    assert asked[2:] == [("auto", cpu, torch.float32, torch.float64)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="no such device only without a GPU")
@pytest.mark.parametrize("configured", [False, True])
def test_a_device_that_is_not_there_is_the_last_line_but_the_threads(configured):
    found = checks(["model.device=cuda"], configured)
    assert list(found)[-2:] == ["device", "threads"]
    assert found["device"] == doctor.Check(
        "device", "model.device=cuda: no such device here; use model.device=auto or one of cpu", ok=False
    )


@pytest.mark.skipif(torch.cuda.device_count() > 3, reason="there is such a device")
def test_the_fourth_gpu_is_a_line_where_there_are_fewer():
    for configured in (False, True):
        assert not checks(["model.device=cuda:3"], configured)["device"].ok


@pytest.mark.parametrize(
    "content",
    ["{", "", "[]", '{"model_type": "qwen2", "hidden_size": "wide"}', '{"model_type": "qwen2", "auto_map": 3}',
     '{"hidden_size": "wide"}', '{"auto_map": 3}', "3", "null", "\0"],
)  # fmt: skip
def test_a_damaged_model_folder_is_a_line(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    found = checks([f"model.path={tmp_path}"], configured=True)
    line = found["configuration"]
    assert not line.ok and line.found.startswith("FAILED: ") and "\n" not in line.found
    assert str(tmp_path) in line.found


def test_a_kernel_that_does_not_exist_is_named(monkeypatch):
    monkeypatch.delitem(IMPLEMENTATIONS, "reference")
    found = checks(["model.kernels=reference"])
    assert not found["op tree_attention"].ok and "no reference; choose one of torch" in found["op tree_attention"].found


def test_a_configuration_that_does_not_load_is_a_line():
    found = checks(["model.path=/nowhere"], configured=True)
    assert not found["configuration"].ok and "model.path=/nowhere" in found["configuration"].found
    assert found["parity, a tiny Qwen2"].ok


def faulty(attend):
    """Attention that every later token of the pack sees: the plan's mask is made plainly causal."""

    def run(q, k, v, plan, *rest, **how):
        leaky = replace(plan, subtree_end=plan.subtree_end * 0 + plan.n_tokens)
        return attend(q, k, v, leaky, *rest, **how)

    return run


def test_a_wrong_mask_is_found(monkeypatch):
    implementations = sys.modules["igpo_kernels.tree_attention"].IMPLEMENTATIONS
    monkeypatch.setitem(implementations, "torch", faulty(implementations["reference"]))
    lm = use_attend(doctor._tiny())
    assert packed_error(lm, "reference") < 1e-5
    assert packed_error(lm, "torch") > 1e-2
    monkeypatch.setattr(doctor, "probe", use_attend)  # which would refuse first
    broken = checks()["parity, a tiny Qwen2"]
    assert not broken.ok and broken.found.startswith("FAILED: packed and separate differ by ")


def test_what_the_probe_refuses_is_a_line(monkeypatch):
    def refuse(lm):
        raise InputError("X cannot run packed")

    monkeypatch.setattr(doctor, "probe", refuse)
    assert checks()["parity, a tiny Qwen2"] == doctor.Check(
        "parity, a tiny Qwen2", "FAILED: X cannot run packed", ok=False
    )


@pytest.mark.parametrize(("name", "ok"), [("bm25s", False), ("triton", True)])
def test_a_missing_package(monkeypatch, name, ok):
    real = doctor.importlib.import_module

    def missing(wanted):
        if wanted == name:
            raise ImportError(f"No module named {name!r}")
        return real(wanted)

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    assert checks()[name] == doctor.Check(name, f"not importable (No module named {name!r})", ok)


def test_the_table_has_a_line_for_each():
    out = io.StringIO()
    found = [doctor.Check("torch", "2.[13]"), doctor.Check("op x", "no [bold]triton[/bold] :smile:", ok=False)]
    Console(file=out, width=80).print(table(found))
    assert "torch │ 2.[13]" in out.getvalue() and "op x  │ no [bold]triton[/bold] :smile:" in out.getvalue()
