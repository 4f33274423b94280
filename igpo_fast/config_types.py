"""Types of configuration values, named by their meaning, with the bounds of sensible values."""

from __future__ import annotations

import os
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from igpo_fast.errors import masked
from igpo_fast.extend import is_spec
from igpo_fast.net import fault
from igpo_fast.types import OF_ANSWERS, OF_TOOLS

LARGEST = 2**31 - 1

Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Size = Annotated[int, Field(ge=1, le=65536)]
Concurrency = Annotated[int, Field(ge=1, le=65536)]
Tokens = Annotated[int, Field(ge=1, le=2**24)]
Hops = Annotated[int, Field(ge=1, le=4)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Retries = Annotated[int, Field(ge=0, le=100)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Share = Annotated[float, Field(gt=0, le=1)]
NonNegative = Annotated[float, Field(ge=0, le=1000)]
Difference = Annotated[float, Field(ge=0, le=1e6)]
LearningRate = Annotated[float, Field(ge=1e-12, le=1e36)]
Norm = Annotated[float, Field(ge=1e-9, le=1e9)]
Temperature = Annotated[float, Field(ge=1e-3, le=1e3)]
Seconds = Annotated[float, Field(ge=1e-3, le=1e6)]
Pause = Annotated[float, Field(ge=0, le=3600)]
Megabytes = Annotated[float, Field(gt=0, le=1e5)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _plain_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it has the character NUL; remove it")
    if not text.isascii() and re.search("[\ud800-\udfff]", text):
        raise ValueError("it is not valid UTF-8 text; correct it")
    return text


def _at_home(paths: str) -> str:
    """Expand ``~`` to the home folder, also after a comma or NAME=, because shells do not in key=value."""
    return re.sub(r"(?:(?<=^)|(?<=,)|(?<=\w=))~[^/,]*", lambda home: os.path.expanduser(home[0]), paths)


def _url_like(example: str) -> AfterValidator:
    def check(url: str) -> str:
        if why := fault(url.replace("***", "masked")):  # who uses it refuses a masked one: a stored run has them
            raise ValueError(f"{masked(repr(url))} is not a URL ({why}); give a URL like {example}")
        return url

    return AfterValidator(check)


def _extension(spec: str) -> str:
    if not is_spec(spec):
        raise ValueError(f"{spec!r} is not known; give package.module:name or path/to/file.py:name for one of your own")
    return spec


def _eval_metric(name: str) -> str:
    if name and not name.startswith("eval/"):
        raise ValueError(f"{name!r} is no number of the evaluation; give one like eval/f1, or leave it empty")
    return name


def _outcome(name: str) -> str:
    if name not in (*OF_ANSWERS, OF_TOOLS) and not is_spec(name):
        raise ValueError(
            f"{name!r} is no outcome; give f1, em, tools, package.module:function or path/to/file.py:function"
        )
    return name


def _device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ValueError(f"{name!r} is not a device to train on; give auto, cpu, cuda or cuda:1")
    return name


PlainText = Annotated[str, AfterValidator(_plain_text)]
NonEmpty = Annotated[str, Field(min_length=1), AfterValidator(_plain_text)]
FilePath = Annotated[NonEmpty, AfterValidator(_at_home)]
Url = Annotated[str, _url_like("http://127.0.0.1:8000")]
SearchUrl = Annotated[str, _url_like("http://127.0.0.1:8000/retrieve")]
Extension = Annotated[str, AfterValidator(_extension)]
"""The name of a function or class of the user's (extend.py)."""
Device = Annotated[str, AfterValidator(_device)]
Outcome = Annotated[str, AfterValidator(_outcome)]
EvalMetric = Annotated[PlainText, AfterValidator(_eval_metric)]
OneIsAList = BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)
EmptyIsNone = BeforeValidator(lambda value: None if value == "" else value)
