"""The sources of libigpo_kernels around compiled kernels: a table in C, cubins and manifest by the assembler."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

PRIVATE = ("cubin",)
"""Keys of an entry that the library's manifest leaves out."""

DATA = """\
    .section .rodata
    .globl igpo_kernels_manifest_text
    .hidden igpo_kernels_manifest_text
igpo_kernels_manifest_text:
    .incbin {manifest}
    .byte 0
{cubins}
    .section .note.GNU-stack,"",%progbits
"""
CUBIN = """\
    .balign 64
    .globl {name}
    .hidden {name}
{name}:
    .incbin {path}
"""
TABLE = """\
#include "igpo_kernels.h"

#define IGPO_KERNELS_SOURCES {sources}
#define IGPO_KERNELS_TRITON {triton}

extern const char igpo_kernels_manifest_text[];
{cubins}
{maps}
{parameters}
static const igpo_kernels_kernel igpo_kernels_table[] = {{
{rows}
}};
static const size_t igpo_kernels_table_size = {size};
"""


def write(out: Path, manifest: Mapping, entries: Sequence[Mapping]) -> None:
    """Write manifest.json, data.S and table.h to ``out``."""
    kernels = [{k: v for k, v in entry.items() if k not in PRIVATE} for entry in entries]
    text = json.dumps({**manifest, "kernels": kernels}, indent=1)
    (out / "manifest.json").write_text(text)
    cubins = [CUBIN.format(name=f"igpo_kernels_cubin_{i}", path=quoted(e["cubin"])) for i, e in enumerate(entries)]
    path = quoted(str((out / "manifest.json").resolve()))
    (out / "data.S").write_text(DATA.format(manifest=path, cubins="".join(cubins)))
    (out / "table.h").write_text(table(manifest, entries))


def table(manifest: Mapping, entries: Sequence[Mapping]) -> str:
    maps, parameters, rows = (
        Definitions("igpo_kernels_tensor_map", "map"),
        Definitions("igpo_kernels_parameter", "p"),
        [],
    )
    for i, entry in enumerate(entries):
        listed = []
        for p in entry["parameters"]:
            m = p["tensor_map"]
            values = m and (m["rank"], f"{{{listing(m['box'])}}}", m["element_bytes"], m["data_type"], m["swizzle"])
            reference = maps.name(f"{{{listing(values)}}}") if m else "NULL"
            listed.append(f"{{{quoted(p['name'])}, {quoted(p['type'])}, {p['size']}, {p['divisor']}, {reference}}}")
        constexprs = " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in entry["constexprs"].items())
        names = (entry[k] for k in ("op", "kernel", "arch", "dtype", "shape_class", "symbol"))
        numbers = entry["num_warps"], entry["threads"], entry["shared"], len(entry["parameters"])
        size = Path(entry["cubin"]).stat().st_size
        rows.append(
            f"    {{{listing(map(quoted, (*names, constexprs)))}, {listing(numbers)}, "
            f"{parameters.name(listing(listed))}, igpo_kernels_cubin_{i}, {size}}},"
        )
    cubins = [f"extern const unsigned char igpo_kernels_cubin_{i}[];" for i in range(len(entries))]
    return TABLE.format(
        sources=quoted(manifest["sources"]), triton=quoted(manifest["triton"]), cubins="\n".join(cubins),
        maps=maps, parameters=parameters, rows="\n".join(rows), size=len(entries),
    )  # fmt: skip


class Definitions:
    """Constant arrays of a C type, each value once."""

    def __init__(self, kind: str, prefix: str):
        self.kind, self.prefix, self.names = kind, prefix, {}

    def name(self, value: str) -> str:
        return self.names.setdefault(value, f"{self.prefix}{len(self.names)}")

    def __str__(self) -> str:
        return "\n".join(f"static const {self.kind} {n}[] = {{{v}}};" for v, n in self.names.items())


def listing(values: Iterable) -> str:
    return ", ".join(map(str, values))


def quoted(text: str) -> str:
    return json.dumps(text)
