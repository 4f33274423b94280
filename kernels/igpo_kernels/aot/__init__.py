"""Kernels ahead of time: ``python -m igpo_kernels.aot`` compiles them into libigpo_kernels, `load` uses that
library."""

from igpo_kernels.aot.library import Library, load

__all__ = ["Library", "load"]
