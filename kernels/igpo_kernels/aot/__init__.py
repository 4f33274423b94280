"""Kernels ahead of time: ``python -m igpo_kernels.aot`` compiles them for libigpo_kernels, `load` takes them out."""

from igpo_kernels.aot.library import Library, load

__all__ = ["Library", "load"]
