"""The workspace as a setting: what ops may take from their next call on."""

import math

import pytest
import torch

from igpo_kernels import set_workspace, workspace
from igpo_kernels.linear_logprob import torch_path


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(workspace, "CPU_BYTES", workspace.CPU_BYTES)
    monkeypatch.setattr(workspace, "GPU_BYTES", workspace.GPU_BYTES)


def test_each_kind_of_device_has_its_own():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (workspace.workspace_bytes(cpu), workspace.workspace_bytes(gpu)) == (64 << 20, 1 << 30)
    set_workspace(gpu_bytes=4 << 30)
    assert (workspace.workspace_bytes(cpu), workspace.workspace_bytes(gpu)) == (64 << 20, 4 << 30)
    set_workspace(cpu_bytes=1 << 20)
    assert torch_path.workspace_bytes(cpu) == 1 << 20


@pytest.mark.parametrize("size, got", [("1GiB", "'1GiB'"), (math.inf, "inf"), (True, "True")])
def test_what_is_no_size_is_refused(size, got):
    with pytest.raises(ValueError, match=rf"^set_workspace: cpu_bytes must be at least .*, got {got}; give bytes$"):
        set_workspace(cpu_bytes=size)


def test_too_little_is_refused_and_nothing_set():
    with pytest.raises(ValueError, match=r"gpu_bytes must be at least 1048576 \(1 MiB\), got 64; give bytes"):
        set_workspace(cpu_bytes=1 << 30, gpu_bytes=64)
    assert workspace.CPU_BYTES == 64 << 20
