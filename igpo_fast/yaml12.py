"""YAML 1.2 (the core schema): ``010`` is ten, ``1:30``, ``yes`` and dates are text.

PyYAML reads version 1.1, where these are 8, 90, true and dates. Keys that occur twice are refused, not merged.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_TAG = "tag:yaml.org,2002:"
_TRUE = ("true", "True", "TRUE")
_PATTERNS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}
"""The core schema's scalars and their first characters; all other scalars are text."""
_REGEXES = {name: re.compile(rf"(?:{pattern})\Z") for name, (pattern, _) in _PATTERNS.items()}
_QUOTES = ("'", '"')
_CLOSING = {"[": "]", "{": "}"}
_DIGITS = 4000


class _Loader(yaml.SafeLoader):
    """A SafeLoader of the core schema."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's name; add_implicit_resolver copies it)
    yaml_constructors: dict = {}  # noqa: RUF012

    def construct_unique(self, node: yaml.Node) -> dict:
        if not isinstance(node, yaml.MappingNode):
            raise _refusal(node, "not of type map")
        found = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _refusal(key_node, "a key that is not text")
            if key in found:
                raise _refusal(key_node, f"the key {key!r} occurs twice")
            found[key] = self.construct_object(value_node, deep=True)
        return found

    def construct_core(self, node: yaml.Node) -> Any:
        name = node.tag.removeprefix(_TAG)
        if not isinstance(node, yaml.ScalarNode) or not _REGEXES[name].match(node.value):
            raise _refusal(node, f"not of type {name}")
        return _CONVERT[name](node.value)

    def refuse(self, node: yaml.Node) -> None:
        raise _refusal(node, f"the type {node.tag!r} is not used here")


def _refusal(node: yaml.Node, what: str) -> yaml.YAMLError:
    return yaml.YAMLError(f"line {node.start_mark.line + 1}: {what}")


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes texts which either version would read as something else."""


def _int(text: str) -> int:
    """The value of a decimal, octal or hexadecimal number; a decimal may begin with zeros."""
    if len(text) > _DIGITS:
        raise ValueError(f"a number of {len(text):,} digits")
    bases = {"0o": 8, "0x": 16}
    return int(text[2:], bases[text[:2]]) if text[:2] in bases else int(text)


_CONVERT = {
    "null": lambda text: None,
    "bool": lambda text: text in _TRUE,
    "int": _int,
    "float": lambda text: float(text.lower().replace(".inf", "inf").replace(".nan", "nan")),
}
for _name, (_, _first) in _PATTERNS.items():
    _Loader.add_implicit_resolver(_TAG + _name, _REGEXES[_name], _first)
    _Dumper.add_implicit_resolver(_TAG + _name, _REGEXES[_name], _first)
    _Loader.add_constructor(_TAG + _name, _Loader.construct_core)
_Loader.add_constructor(_TAG + "str", yaml.SafeLoader.construct_scalar)
_Loader.add_constructor(_TAG + "seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Loader.add_constructor(_TAG + "map", _Loader.construct_unique)
_Loader.add_constructor(None, _Loader.refuse)


def read(text: str) -> Any:
    """The value of a YAML document: None, bool, int, float, str, or lists and dicts (with text as keys) of them.

    Raises:
        ValueError: malformed, a repeated key, nested too deeply, or another type; in one line.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_argument(text: str, *, is_text: bool = False) -> Any:
    """The value of a command-line argument; ``#`` does not begin a comment.

    Quoted arguments, and without ``is_text`` bracketed ones, are read as YAML. Others are text if ``is_text``; else a
    number, true, false or null if they look like one, and text otherwise.

    Raises:
        ValueError: as in ``read``.
    """
    stripped = text.strip()
    quoted = len(stripped) > 1 and stripped[0] in _QUOTES and stripped[-1] == stripped[0]
    if is_text and not quoted:
        return text
    if stripped[:1] in _CLOSING and stripped[-1] != _CLOSING[stripped[0]]:
        raise ValueError(f"it ends without {_CLOSING[stripped[0]]!r}")
    if quoted or stripped[:1] in (*_CLOSING, "!"):
        return read(stripped)
    name = next((name for name, regex in _REGEXES.items() if regex.match(stripped)), None)
    return _CONVERT[name](stripped) if name else stripped


def write(value: Any) -> str:
    """``value`` as block YAML, keys in their order; ``read`` gives it back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)
