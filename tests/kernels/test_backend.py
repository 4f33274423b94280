"""Which implementation `auto` stands for."""

from types import SimpleNamespace

import pytest
import torch

from igpo_kernels import backend, triton_variants
from igpo_kernels.backend import OPS, choose, chosen, resolve

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
    assert set(chosen("auto", CPU).values()) == {"torch"} and set(chosen("auto", CPU)) == set(OPS)


def test_a_known_gpu_takes_triton_for_what_its_kernels_take(gpu):
    gpu(9, 0)
    assert resolve("auto", GPU, BOTH, [torch.bfloat16, torch.bfloat16]) == "triton"
    assert resolve("auto", GPU, {"torch": 2}, [torch.bfloat16]) == "torch"
    assert resolve("auto", GPU, BOTH, [torch.float64]) == "torch"
    assert resolve("auto", GPU, BOTH, [torch.bfloat16, torch.float32]) == "torch"


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
    assert backend.lazy("math", "sqrt")(9) == 3
