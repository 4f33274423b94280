"""Odd values, and ways to damage rows and files; everything depends on the ``random.Random`` given alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

DEEP = "@deep@"
"""Stands for 3,000 brackets, which Python's JSON cannot write."""
LONG = "@long@"
"""Stands for a number of 5,000 digits."""
TEXTS = [
    "", " ", "\n", "\0", "x" * 3000, "\ud800", "\u200b", "e\u0301", "\ufeff", "مرحبا", "null", "nan", "-1", "1e999",
    "[1, 2]", "['a', 'b']", "{'a': 1}", '{"a": [1]}', "<|im_end|>\n<|im_start|>system", "</answer>", "<search>", "{}",
    "{0}", "%s", "../../etc/passwd", "~", "a,b", "*", "file:///x", "http://[::", "2024-13-45", "010", "1:30", "true",
    "é" * 300,
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 1.5, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), 2**31, 2**63,
    10**25, [], [[]], [None], [1, "a"], ["a", ["b"]], [{}], {}, {"a": 1}, {"a": []}, {"": None}, DEEP, LONG, *TEXTS,
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a JSON value, its own first."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, entry in inner:
        yield from places(entry, (*path, key))


def changed(random: Random, value: Any, changes: int = 1) -> Any:
    """A copy of a JSON value with some of its parts replaced, removed, doubled, wrapped, renamed or swapped."""
    value = copy.deepcopy(value)
    for _ in range(changes):
        paths = list(places(value))[1:]
        if not paths:
            return random.choice(VALUES)
        *to, key = random.choice(paths)
        owner = value
        for step in to:
            owner = owner[step]
        how = random.randrange(10)
        if how == 0:
            del owner[key]
        elif how == 1:
            owner[key] = [owner[key]]
        elif how == 2:
            owner[key] = {str(random.choice(["text", "value", "a"])): owner[key]}
        elif how == 3 and isinstance(owner, dict):
            owner[random.choice(["", "x", str(key).upper(), f"{key}s"])] = owner.pop(key)
        elif how == 4 and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[key]))
        elif how in (5, 6, 7) and isinstance(owner[key], str):
            at = random.randrange(len(owner[key]) + 1)
            owner[key] = owner[key][:at] + random.choice(TEXTS) + owner[key][at:]
        else:
            owner[key] = copy.deepcopy(random.choice(VALUES))
    return value


def written(value: Any) -> bytes:
    """A value as JSON, the stand-ins of ``VALUES`` as what they stand for; half characters are escapes."""
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 3000 + "]" * 3000).replace(f'"{LONG}"', "7" * 5000).encode()


def damaged(random: Random, content: bytes) -> bytes:
    """A file's bytes, cut, flipped, doubled, with garbage, or gone."""
    at, to = sorted(random.randrange(len(content) + 1) for _ in range(2))
    how = random.randrange(8)
    if how == 0:
        return content[:at]
    if how == 1:
        return content[:at] + content[to:]
    if how == 2:
        return content[:to] + content[at:]
    if how == 3:
        return content[:at] + random.randbytes(8) + content[at:]
    if how == 4:
        return content[:at] + b"\0" * (to - at) + content[to:]
    if how == 5:
        return random.choice(
            [b"", b"\n", b"\0" * 64, b"null", b"[]", b"{}", b"\xff\xfe", b"\xef\xbb\xbf", b"PK\x03\x04", b"PAR1"]
        )
    flipped = bytearray(content)
    for _ in range(1 + 3 * (how == 6)):
        if flipped:
            flipped[random.randrange(len(flipped))] ^= 1 << random.randrange(8)
    return bytes(flipped)


def harm(random: Random, path: Path) -> None:
    """Damage a file: its bytes or, where it is JSON, a value in it; or delete it, or put a folder in its place."""
    how = random.randrange(10)
    if how == 0:
        path.unlink()
        if random.randrange(3) == 0:
            path.mkdir()
    elif how < 6 and path.suffix == ".json":
        path.write_bytes(written(changed(random, json.loads(path.read_bytes()), random.choice([1, 1, 2]))))
    else:
        path.write_bytes(damaged(random, path.read_bytes()))
