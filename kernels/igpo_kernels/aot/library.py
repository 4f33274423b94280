"""The loader: kernels of a libigpo_kernels in place of their just-in-time compilation.

Triton looks every kernel up in its cache before it compiles: under a key of the kernel's source, signature, constants,
options, target, Triton's own build and ptxas. `load` puts a library before that cache. A launch whose key the library
has takes the library's cubin; any other goes on to Triton's cache and compiler as if there were no library.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import logging
import os
import struct
import threading
from pathlib import Path
from types import ModuleType

import triton
from triton import knobs
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.cache import FileCacheManager, triton_key
from triton.runtime.jit import JITCallable

log = logging.getLogger(__name__)
ABI = 1
"""IGPO_KERNELS_ABI of igpo_kernels.h."""
PACKAGE = Path(__file__).parents[1]
SOURCES = ("triton_*.py", "*/triton_*.py", "configs/*.json")
"""Files that decide which kernels there are and what they compute."""
_lock = threading.Lock()
_loaded: dict[Path, Library] = {}


def sources() -> str:
    """The hash of the kernels' sources: a library made from other sources is refused."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in SOURCES for path in PACKAGE.glob(pattern)):
        digest.update(f"{path.relative_to(PACKAGE)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def compiler() -> dict:
    """The compiler's part of Triton's keys, without the target's part (`target_key`)."""
    build = hashlib.sha256(triton_key().encode()).hexdigest()
    return {"triton": triton.__version__, "build": build, "environment": get_cache_invalidating_env_vars()}


def target_key(arch: str) -> str:
    """The part of Triton's keys that ptxas and ``arch`` decide."""
    return make_backend(GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)).hash()


def settle() -> None:
    """Give every kernel of the package its key, callees first.

    Triton hashes the constants that a callee uses into its caller's key only if the callee has a key already, so a
    kernel's key would depend on the order in which a process launches kernels.
    """
    for path in sorted(PACKAGE.glob("*/triton_*.py")):
        module = importlib.import_module(f"igpo_kernels.{path.parent.name}.{path.stem}")
        for value in list(vars(module).values()):
            if isinstance(value, JITCallable):
                _settle(value, set())


def _settle(fn: JITCallable, seen: set[int]) -> None:
    if id(fn) in seen:
        return
    seen.add(id(fn))
    names, scope = fn.fn.__code__.co_names, fn.__globals__
    used = [scope[name] for name in names if name in scope]
    of_modules = [getattr(module, name, None) for module in used if isinstance(module, ModuleType) for name in names]
    for callee in (*used, *of_modules):
        if isinstance(callee, JITCallable):
            _settle(callee, seen)
    _ = fn.cache_key


class Library:
    """An opened libigpo_kernels.

    Attributes:
        path: the library's file. manifest: what the build recorded about it.
        served: launches that took a kernel from it. lacking: launches of its functions for which it has no variant.
    Raises:
        ValueError: a file that is no library of this ABI, or is cut short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.served = self.lacking = 0
        self._open()
        self.manifest = json.loads(self._function("igpo_kernels_manifest", ctypes.c_char_p)())
        self.keys = {kernel["key"]: i for i, kernel in enumerate(self.manifest["kernels"])}
        self.names = {kernel["file"] for kernel in self.manifest["kernels"]}

    def __len__(self) -> int:
        return len(self.manifest["kernels"])

    def _refuse(self, got: str, expected: str, remedy: str):
        raise ValueError(
            f"IGPO_KERNELS_AOT={self.path}: {got}, expected {expected}; {remedy} or unset IGPO_KERNELS_AOT"
        )

    def _open(self) -> None:
        expected, remedy = "a libigpo_kernels.so", "give the one that CMake built"
        try:
            with self.path.open("rb") as file:
                header, size = file.read(64), self.path.stat().st_size
        except OSError as error:
            self._refuse(error.strerror, expected, remedy)
        if header[:5] != b"\x7fELF\2" or len(header) < 64:
            self._refuse("not a shared library", expected, remedy)
        # The section headers end the file. The dynamic loader would map a file cut short, and die reading it.
        (at,), (entry, count) = struct.unpack_from("<Q", header, 40), struct.unpack_from("<HH", header, 58)
        if at + entry * count > size:
            self._refuse(f"cut short at {size} bytes", f"{at + entry * count}", "copy it again")
        try:
            self._library = ctypes.CDLL(str(self.path.resolve()))
            abi = self._function("igpo_kernels_abi", ctypes.c_uint32)()
        except (OSError, AttributeError):
            self._refuse("not a library of kernels", expected, remedy)
        if abi != ABI:
            self._refuse(f"its ABI is {abi}", f"{ABI}", "rebuild it from this version of igpo_kernels")

    def _function(self, name: str, result, *arguments):
        function = self._library[name]
        function.restype, function.argtypes = result, arguments
        return function

    def check(self, arch: str) -> None:
        """Refuse a library that no launch on ``arch`` could use.

        Raises:
            ValueError: other sources, another compiler, another architecture.
        """
        built, here = self.manifest, compiler()
        rebuild = "rebuild it (cmake --build) with this Python"
        if built["sources"] != (got := sources()):
            self._refuse(f"built from other kernel sources ({built['sources'][:12]})", got[:12], rebuild)
        if built["triton"] != here["triton"]:
            self._refuse(f"built by Triton {built['triton']}", here["triton"], rebuild)
        if built["build"] != here["build"]:
            # Wheels of one version differ by Python version and platform.
            other = f"built by another build of Triton {here['triton']} ({built['build'][:12]})"
            self._refuse(other, here["build"][:12], rebuild)
        if arch not in built["targets"]:
            nvidia = arch.startswith("sm_")
            remedy = f"rebuild it with -DIGPO_ARCHS={arch}" if nvidia else "use the just-in-time compiler"
            self._refuse(f"built for {', '.join(built['targets'])}", f"this device's {arch}", remedy)
        if built["targets"][arch] != (got := target_key(arch)):
            self._refuse(f"built by ptxas {_release(built['targets'][arch])}", _release(got), rebuild)
        if built["environment"] != here["environment"]:
            then, now = built["environment"] or "none", here["environment"] or "none"
            self._refuse(f"built under compiler variables {then}", f"this process's {now}", "set the same")

    def files(self, index: int) -> dict[str, bytes]:
        """The files that Triton keeps for a compiled kernel: name -> content."""
        size = ctypes.c_size_t()
        read = self._function("igpo_kernels_cubin", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        cubin = read(index, ctypes.byref(size))
        kernel = self.manifest["kernels"][index]
        return {
            f"{kernel['file']}.cubin": ctypes.string_at(cubin, size.value),
            f"{kernel['file']}.json": kernel["metadata"].encode(),
        }


def _release(key: str) -> str:
    """The release in a target's key, like ``release 12.9, V12.9.86``."""
    return next((line.partition(", ")[2] for line in key.splitlines() if "release" in line), key)


def load(path: str | os.PathLike, arch: str) -> Library:
    """Let launches on ``arch`` take their kernels from a library, from now on and in the whole process.

    Raises:
        ValueError: the file is no such library, or was built for another device, compiler or version.
    """
    path = Path(path).resolve()
    with _lock:
        library = _loaded[path] if path in _loaded else Library(path)
        library.check(arch)
        if path not in _loaded:
            _loaded[path] = library
            settle()
            _serve(library)
    return library


def _serve(library: Library) -> None:
    base = knobs.cache.manager_class or FileCacheManager

    class LibraryCache(base):
        def __init__(self, key, override=False, dump=False):
            super().__init__(key, override=override, dump=dump)
            self.index = None if override or dump else library.keys.get(key)

        def get_group(self, filename):
            if self.index is not None:
                library.served += 1
                return {name: self.put(data, name) for name, data in library.files(self.index).items()}
            name = filename.removesuffix(".json")
            if name in library.names:
                library.lacking += 1
                log.debug("%s: no variant for this launch of %s (%d so far)", library.path, name, library.lacking)
            return super().get_group(filename)

    knobs.cache.manager_class = LibraryCache
    log.info(
        "IGPO_KERNELS_AOT: %s: %d kernels for %s (sources %s, Triton %s)",
        library.path, len(library), ", ".join(library.manifest["targets"]), library.manifest["sources"][:12],
        library.manifest["triton"],
    )  # fmt: skip
