"""A pretended H200, for dry runs on a machine without a GPU: what would be on it has shapes and no contents, and a
kernel is compiled for sm_90 with the arguments of its launch, not launched.

    python -m bench.pretend MODULE [ARGUMENTS]     a module of Python under the pretence
    pytest -p bench.pretend ...                    tests: each is skipped at its first launch, which the reason names

Whatever a test does before its first launch is real: imports, parametrisation, plans, block lists, the choice of the
implementation and of its configuration. Tensors of the pretended GPU are torch's meta tensors, which say that they are
on ``cuda``. IGPO_PRETEND_COMPILE=0 leaves the compilation out.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import NoReturn

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

H200 = SimpleNamespace(
    name="NVIDIA H200 (pretended)", major=9, minor=0, multi_processor_count=132, total_memory=143_771 << 20,
    gcnArchName="", L2_cache_size=60 << 20,
)  # fmt: skip
GPU, META = torch.device("cuda", 0), torch.device("meta")
SAID = {
    torch.Tensor.device.__get__: lambda x: GPU,
    torch.Tensor.is_cuda.__get__: lambda x: True,
    torch.Tensor.get_device: lambda x: GPU.index,
    torch.Tensor.data_ptr: lambda x: x.storage_offset() * x.element_size(),
}
"""What a tensor of the GPU answers."""


class Launched(RuntimeError):
    """A dry run came to a launch, or to a number that only a launch can give."""


def launched(what: str) -> NoReturn:
    raise Launched(what)


class Pretence(TorchFunctionMode):
    def __init__(self, stop: Callable[[str], NoReturn]):
        super().__init__()
        self.stop = stop

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        ours = any(map(on_gpu, given))
        if func in SAID and ours:
            return SAID[func](args[0])
        if func is torch.Tensor.cuda:
            func, args, ours = torch.Tensor.to, (args[0], GPU), True
        if func is torch.Tensor.cpu and ours:
            self.stop("copies numbers from the device")
        if not ours or func is torch.device:  # the name of a device is no tensor on it
            return func(*args, **kwargs)
        if func is torch.unique_consecutive:
            return distinct(*args, **kwargs)
        if "out_dtype" in kwargs:  # torch 2.11 has no meta function for it
            return kwargs["out"]
        args, kwargs = tree_map(to_meta, (tuple(args), kwargs))
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" not in str(error).lower():
                raise
            self.stop(f"needs a number from the device: {getattr(func, '__name__', func)}")


def on_gpu(value: object) -> bool:
    """Whether a tensor, or one of a list, is of the pretended GPU, or a device or its name is the GPU."""
    if isinstance(value, (list, tuple)):
        return any(map(on_gpu, value))
    if isinstance(value, torch.Tensor):
        return value.is_meta
    return (isinstance(value, torch.device) and value.type == "cuda") or (
        isinstance(value, str) and value.partition(":")[0] == "cuda"
    )


def to_meta(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value if value.is_meta else value.detach().to(META)
    return META if on_gpu(value) else value


def distinct(x, return_inverse=False, return_counts=False, dim=None):
    """``unique_consecutive``, as if no two were equal: how many are is in the numbers."""
    found = (x.clone(), *([torch.empty_like(x, dtype=torch.int64)] * (return_inverse + return_counts)))
    return found if len(found) > 1 else found[0]


def install(stop: Callable[[str], NoReturn] = launched) -> None:
    """Pretend from now on and in the whole process; ``stop`` is called instead of a launch and raises."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from igpo_kernels.aot.build import AbsentDevice
    from igpo_kernels.inspect import TARGETS

    for name, answer in dict(
        is_available=True, device_count=1, current_device=0, get_device_properties=H200, get_device_name=H200.name,
        get_device_capability=(H200.major, H200.minor), synchronize=None, memory_allocated=0, max_memory_allocated=0,
        reset_peak_memory_stats=None, manual_seed_all=None, is_bf16_supported=True, mem_get_info=(0, H200.total_memory),
        is_current_stream_capturing=False, current_stream=SimpleNamespace(cuda_stream=0),
    ).items():  # fmt: skip
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for kind in ("Event", "Stream"):
        new = lambda *_, kind=kind, **__: stop(f"asks the device for {kind}")  # noqa: E731
        setattr(torch.cuda, kind, type(kind, (), {"__new__": new}))
    torch.cuda.device.__enter__ = torch.cuda.device.__exit__ = lambda *_: None

    driver.set_active(AbsentDevice(TARGETS["sm_90"]))
    compile_for = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        if os.environ.get("IGPO_PRETEND_COMPILE") != "0":
            compile_for(self, *args, grid=grid, warmup=True, **options)
        stop(f"launches {self.__name__}")

    JITFunction.run = run
    Pretence(stop).__enter__()


def pytest_load_initial_conftests():
    import pytest

    install(pytest.skip)


def main() -> None:
    module, *sys.argv[1:] = sys.argv[1:]
    install()
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Launched as reached:
        print(f"{module}: ends here without a GPU: {reached}")


if __name__ == "__main__":
    main()
