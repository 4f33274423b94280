"""Which implementation `auto` stands for."""

import sys
from types import SimpleNamespace

import pytest
import torch

from igpo_kernels import backend, linear_logprob, triton_variants
from igpo_kernels.backend import choose, chosen, resolve

OPS = ("tree_attention", "linear_logprob", "policy_loss", "linear_policy_loss", "turn_advantages")
BOTH = {"reference": 1, "torch": 2, "triton": 3}
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    def of(major, minor):
        properties = SimpleNamespace(major=major, minor=minor, gcnArchName="gfx942:sramecc+")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        triton_variants.arch_name.cache_clear()

    yield of
    triton_variants.arch_name.cache_clear()


def test_a_cpu_takes_the_torch_path():
    assert resolve("auto", CPU, BOTH, [torch.float32]) == "torch"
    assert set(chosen("auto", CPU).values()) == {"torch"} and set(chosen("auto", CPU)) == set(OPS[:4])


def test_a_known_gpu_takes_triton_for_what_its_kernels_take(gpu):
    gpu(9, 0)
    assert resolve("auto", GPU, BOTH, [torch.bfloat16, torch.bfloat16]) == "triton"
    assert resolve("auto", GPU, {"torch": 2}, [torch.bfloat16]) == "torch"
    assert resolve("auto", GPU, BOTH, [torch.float64]) == "torch"
    assert resolve("auto", GPU, BOTH, [torch.bfloat16, torch.float32]) == "torch"


def test_what_is_said_to_run_depends_on_the_models_dtypes(gpu):
    gpu(9, 0)
    head_ops = {"linear_logprob", "linear_policy_loss"}
    for model, head, on_torch in [
        (torch.bfloat16, None, set()),
        (torch.bfloat16, torch.float32, head_ops),
        (torch.float64, None, set(OPS[:4])),
    ]:
        names = chosen("auto", GPU, model, head)
        assert {op for op, name in names.items() if name == "torch"} == on_torch
        assert set(names.values()) <= {"torch", "triton"}


def test_a_gpu_without_tables_takes_the_torch_path(gpu):
    gpu(8, 9)
    assert resolve("auto", GPU, BOTH, [torch.bfloat16]) == "torch"
    with pytest.raises(ValueError, match=r"no Triton configurations for sm_89.*backend='torch'"):
        triton_variants.arch_of(GPU)


def test_a_name_is_itself_and_an_unknown_one_is_refused(gpu):
    gpu(8, 9)
    assert choose("op", "triton", GPU, BOTH) == 3
    with pytest.raises(ValueError, match="op: backend 'cuda' is not available; choose one of auto, reference, torch"):
        choose("op", "cuda", CPU, BOTH)


@pytest.mark.parametrize("op", OPS)
def test_kernels_are_launched_on_the_device_of_their_tensors(op, monkeypatch):
    """Triton launches on the current device, whichever its arguments are on."""
    current, launched_on = [0], []

    def exchange(device):
        before, current[0] = current[0], device
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    module = type("Module", (), {"__getattr__": lambda self, name: lambda *_: launched_on.append(current[0])})()
    monkeypatch.setattr(backend.importlib, "import_module", lambda name: module)
    first = SimpleNamespace(is_cuda=True, get_device=lambda: 3)
    sys.modules[f"igpo_kernels.{op}"].IMPLEMENTATIONS["triton"](first)
    assert (launched_on, current) == ([3], [0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one_gives_the_same():
    def gradients(device, backend):
        hidden, weight = (torch.ones(n, 64).mul(torch.arange(n)[:, None] / n).to(device) for n in (48, 256))
        inputs = [x.requires_grad_() for x in (hidden, weight)]
        logp = linear_logprob(*inputs, torch.arange(48, device=device), backend=backend)
        return [logp.cpu(), *(g.cpu() for g in torch.autograd.grad(logp.sum(), inputs))]

    torch.testing.assert_close(gradients("cuda:1", "triton"), gradients("cpu", "reference"), atol=1e-4, rtol=1e-4)
