"""``python -m igpo_fast.config_docs [FILE]`` writes docs/config.md: every key, from the code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from igpo_fast.config import PRESETS, Algorithm, Config
from igpo_fast.config_types import LARGEST

HEADER = """# Configuration

Written by `python -m igpo_fast.config_docs` from igpo_fast/config.py; edit that file, not this one.

A YAML file holds sections of keys; `section.key=value` on the command line overrides it.
Unknown keys are refused.
"""


def _value(value) -> str:
    """The value as it is written after ``key=``."""
    if value is None:
        return "empty"
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _type(schema: dict) -> str:
    """A key's JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join("empty" if s.get("type") == "null" else _type(s) for s in schema["anyOf"])
    if schema.get("type") == "array" and "items" in schema:
        return f"list of {_type(schema['items'])}"
    if "prefixItems" in schema:
        return f"list of {len(schema['prefixItems'])}: {_type(schema['prefixItems'][0])}"
    choices = schema.get("enum") or ([schema["const"]] if "const" in schema else None)
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    bounds = [("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<")]
    limits = [f"{sign} {schema[key]:g}" for key, sign in bounds if key in schema and abs(schema[key]) < LARGEST]
    return " ".join([schema["type"], ", ".join(limits)]).strip()


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def render() -> str:
    """The whole page as Markdown."""
    parts = [HEADER]
    for section, field in Config.model_fields.items():
        cls = field.annotation
        rows = [
            [f"`{key}`", _type(schema), _value(schema["default"]), " ".join(schema["description"].split())]
            for key, schema in cls.model_json_schema()["properties"].items()
        ]
        about = f"{' '.join(cls.__doc__.split())}\n\n" if cls.__doc__ else ""
        parts.append(f"## {section}\n\n{about}{_table(['key', 'type', 'default', 'meaning'], rows)}\n")
    keys = dict.fromkeys(key for values in PRESETS.values() for key in values)
    defaults = {key: field.default for key, field in Algorithm.model_fields.items()}
    rows = [[f"`{key}`", *(_value(values.get(key, defaults[key])) for values in PRESETS.values())] for key in keys]
    parts.append(
        "## Presets\n\nValues that `algorithm.preset` sets unless the key is given:\n\n"
        f"{_table(['key', *(f'`{name}`' for name in PRESETS)], rows)}\n"
    )
    return "\n".join(parts)


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/config.md")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(render(), encoding="utf-8")
    print(f"wrote {target}")
